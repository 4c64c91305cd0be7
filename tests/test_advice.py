"""What a refusal tells to do is done, and works: messages carry their advice as data (`InputError.advice`)."""

import ast
import re
import shlex
import shutil
from pathlib import Path

import pytest

import sslctl
from sslctl import cli as command_line
from sslctl.errors import InputError
from tests.conftest import QUICK, write_images

ROOT = Path(sslctl.__file__).parent
GROUPS = "dataset|trainer|optimizer|method|backbone|format|labels|subjects|protocol|layer_decay"
VALUE = re.compile(rf"(?:^|[ (])(?:{GROUPS})(?:\.\w+)?=\w")
PLANNED = ("pretrain", "linear-eval", "knn-eval", "finetune", "evaluate")
EVALUATED = ("device=cpu", "cache=false", "subjects=[trained]")
PRETRAIN = ("pretrain", *QUICK)
RUN, LABELLED = "RUN", "LABELLED"
FOREIGN = ("backbone=mlp", "backbone.widths=[8]", "backbone.weights=RUN", "device=cpu", "cache=false")

# A command that is refused, and all that is needed for what it is told to do to be done.
REFUSED = {
    "train alone": ("knn-eval", *FOREIGN, "dataset=imagefolder", "dataset.root=ALONE", "subjects=[trained]"),
    "no classes": (*PRETRAIN, "dataset=imagefolder", "dataset.root=FLAT"),
    "channels": ("knn-eval", RUN, "dataset=imagefolder", "dataset.root=LABELLED", "dataset.channels=1", *EVALUATED),
    "views": (*PRETRAIN, "augmentation.global.count=1"),
    "parts": (*PRETRAIN, "trainer.accumulate_steps=2"),
    "batch": (*PRETRAIN, "dataset=folder", "dataset.root=FLAT", "trainer.batch_size=64"),
    "device": (*PRETRAIN, "trainer.device=mps"),
    "unreadable": (*PRETRAIN, "dataset=folder", "dataset.root=BROKEN", "dataset.on_error=skip", "trainer.batch_size=4"),
    "labels": ("linear-eval", RUN, "protocol=augmented", "labels=5", "device=cpu"),
    "processes": (
        "finetune",
        RUN,
        "layer_decay=1",
        "trainer.processes=2",
        "trainer.device=cpu",
        "trainer.batch_size=8",
    ),
    "torchvision": ("export", RUN, "format=torchvision"),
    "pictures": ("views", "dataset=folder", "dataset.root=FLAT", "out=FLAT/views.png", "images=1", "draws=1"),
    "nothing kept": ("predict", "OWN", "dataset.root=FLAT", "device=cpu"),
    "code": (*PRETRAIN, "method._target_=own_method.Own"),
    "optimizer": (*PRETRAIN, "continue_run=RUN", "optimizer.exclude_bias_and_norm=false", "continue_optimizer=true"),
}


@pytest.fixture
def places(workdir, labelled_images, finished_run):
    """Writes the folders that the commands name, and says where they and the run are."""
    write_images(workdir / "alone", "train/a", "train/b", count=8)
    write_images(workdir / "flat", count=16)
    write_images(workdir / "broken", count=16)
    (workdir / "broken" / "003.png").write_bytes(b"none")
    (workdir / "own_method.py").write_text("from sslctl.methods.simclr import SimCLR as Own\n")
    names = {"ALONE": "alone", "FLAT": "flat", "BROKEN": "broken"}
    return {name: str(workdir / folder) for name, folder in names.items()} | {
        RUN: str(finished_run),
        "OWN": str(shutil.copytree(finished_run, workdir / "own", symlinks=True)),
        LABELLED: str(labelled_images),
    }


def refusal(words):
    """The error of a command that is refused."""
    with pytest.raises(InputError) as caught:
        command_line._run_verb(words[0], list(words[1:]))
    return caught.value


def advised(words, advice):
    """The command with what it was told to say: words instead of those of the same key, or a command of its own."""
    if advice.startswith("sslctl "):
        return shlex.split(advice)[1:]
    new = shlex.split(advice)
    keys = {word.partition("=")[0] for word in new}
    return [*(word for word in words if word.partition("=")[0] not in keys), *new]


@pytest.mark.slow
@pytest.mark.parametrize("case", REFUSED)
def test_what_a_refusal_tells_to_do_works(case, places, cli, monkeypatch):
    words = list(REFUSED[case])
    for name, place in places.items():
        words = [word.replace(name, place) for word in words]
    words += ["plan_only=true"] if words[0] in PLANNED else []
    error = refusal(words)
    assert error.advice, error
    for advice in error.advice:
        assert advice.split("=")[-1] in str(error), "the advice stands in the message"
        followed = cli(*advised(words, advice))
        assert followed.status == 0, f"{advice}: {followed.err}"


@pytest.mark.parametrize(
    ("words", "key"),
    [
        (("lr=0.1",), "optimizer.base_lr"),
        (("epochs=2",), "trainer.epochs"),
        (("batch_size=8",), "trainer.batch_size"),
        (("trainer.lr=0.1",), "optimizer.base_lr"),
        (("optimizer.base_l=0.1",), "optimizer.base_lr"),
    ],
)
def test_the_nearest_key_is_the_one_that_is_meant(words, key):
    assert f"(nearest: {key}" in str(refusal(["pretrain", *words]))


def test_every_refusal_that_names_a_value_carries_it():
    """Of messages of InputError: what stands behind the first colon, and is a key with a value that can be said as it is."""
    without = []
    for path in sorted(ROOT.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            refuses = isinstance(node, ast.Call) and getattr(node.func, "id", "") in ("InputError", "NoTestSplit")
            if (
                refuses
                and not any(keyword.arg == "advice" for keyword in node.keywords)
                and VALUE.search(message(node))
            ):
                without.append(f"{path.relative_to(ROOT)}:{node.lineno}: {message(node)}")
    assert without == [], "\n".join(without)


def message(call):
    """What a message says behind its first colon, where none of it is a placeholder such as FOLDER."""
    constants = (
        part.value for argument in call.args[:1] for part in ast.walk(argument) if isinstance(part, ast.Constant)
    )
    words = "".join(value for value in constants if isinstance(value, str)).partition(": ")[2]
    return "" if re.search(r"=(?:[A-Z]{3}|…)", words) else words
