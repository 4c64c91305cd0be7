"""A first command for a folder of images: method, size, batch and epochs, and what a few of its steps take on this machine."""

import subprocess
import sys

from sslctl.config.command_line import Prepared
from sslctl.config.diagnose import compose_choices
from sslctl.data.scale import choose_scale
from sslctl.training.plan import choose_device, fitting_batch

SIDES = {"cpu": 96, "mps": 128, "cuda": 224}  # pixels of images that are larger


def suggest(words: list[str], images: int, size: tuple[int, int], prepared: Prepared) -> list[str]:
    """Returns the words of a first pretraining. words: that name the data; size: (width, height) of most images; prepared: the
    same words, ready for Hydra.

    MoCo, since its queue does not ask for large batches, SimCLR where even the groups of MoCo's BatchNorm would be single images;
    the batch and the epochs of the scale that suits so many images.
    """
    scale = choose_scale(prepared)
    overrides = [*prepared.overrides, "method=moco", *([f"scale@dataset.scale={scale}"] if scale else [])]
    config = compose_choices("pretrain", Prepared(), overrides)
    batch = min(config.trainer.batch_size, fitting_batch(images))
    named = {word.partition("=")[0] for word in words}
    chosen = {
        "method": "moco" if batch >= 32 else "simclr",
        "backbone": "resnet18",
        "dataset.image_size": min(SIDES[choose_device("auto").type], max(32, min(size) // 32 * 32)),
        "trainer.batch_size": batch,
        "trainer.epochs": config.trainer.epochs,
    }
    if min(size) <= 96 and size[0] == size[1]:  # small squares keep their own
        del chosen["dataset.image_size"]
    return ["sslctl", "pretrain", *words, *(f"{key}={value}" for key, value in chosen.items() if key not in named)]


def measure(words: list[str], seconds: float) -> list[str]:
    """Returns what plan_only=true says of a command's time and memory; why not, where it fails or takes longer than `seconds`."""
    command = [sys.executable, "-P", "-m", "sslctl", *words[1:], "plan_only=true"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=seconds, check=False)
    except subprocess.TimeoutExpired:
        return [
            f"time       not known, its first steps take more than {seconds:g} s here: a smaller dataset.image_size"
        ]
    if done.returncode:
        return [f"time       not known: {(done.stderr.splitlines() or ['no word'])[-1].removeprefix('sslctl: ')}"]
    return [line for line in done.stdout.splitlines() if line.startswith(("time  ", "memory  "))]
