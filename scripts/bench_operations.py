"""Counts what a training step launches on a GPU, without one: python scripts/bench_operations.py [METHOD …]

Every method as its configuration makes it, in bf16 on images of 32 pixels in memory, at its second step, when the optimizer has
its state. No clock is read: the figures are exact, see pretended_gpu.py. Forward holds loss and figures; backward is counted on
the CPU, whose layers take other operations in places; optimizer holds what there is besides: gradients, clipping and teachers.
"""

import argparse
import sys
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import torch
from omegaconf import OmegaConf
from pretended_gpu import CUDA, Watch, move, on_gpu, pretended_gpu
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1]))  # the tests' methods
from sslctl.config.schema import CONFIGS
from sslctl.data.batch import Batch
from sslctl.data.modality import IMAGES
from sslctl.factory.from_config import build_backbone, build_method
from sslctl.methods.base import Facts
from sslctl.models.preprocess import Preprocess
from sslctl.models.teacher import Teacher
from sslctl.models.vit import patch_size_of
from sslctl.training.precision import Precision
from sslctl.training.setup import build_optimizer
from sslctl.training.train import train_step
from sslctl.views import ViewMaker
from sslctl.views.maker import dropped_operations
from tests.methods import Built, Embedder, built, composed, noise

PHASES = ("views", "forward", "backward", "optimizer")
SIDE, ROWS, CHANNELS, IMAGES_OF_ALL, CLASSES = 32, 16, 3, 512, 10
OWN = {  # of so few images
    "wmse": ("method.whitening_size=8", "method.out_dim=4"),
    "deepcluster_v2": ("method.prototypes=100",),
}


def build(name: str) -> Built:
    """Returns a method on images like CIFAR-10's; of frames and texts, small ones."""
    if name in ("frame_order", "masked_language"):
        return built(name, rows=ROWS)
    config = composed(f"method={name}", "dataset=cifar10", *OWN.get(name, ()))
    preprocess = Preprocess(CHANNELS, SIDE, SIDE, [0.5] * CHANNELS, [0.3] * CHANNELS)
    backbone, teacher = build_backbone(config.backbone, preprocess), None
    if "teacher" in config.method:
        teacher = Teacher(build_backbone(config.backbone, preprocess), {}, preprocess)
    facts = Facts(CHANNELS, SIDE, IMAGES_OF_ALL, CLASSES, ROWS, IMAGES_OF_ALL // ROWS, total_steps=100)
    method = build_method(config.method, backbone, facts, teacher).train()
    with torch.no_grad():
        method.start_epoch(0, Embedder((IMAGES_OF_ALL, CHANNELS, SIDE, SIDE)))
    return Built(config, method, noise(config, method, ROWS))


def count(name: str) -> dict[str, int]:
    """Returns the operations of each phase of a method's step."""
    its = build(name)
    backward, trained = count_backward(its)
    with pretended_gpu() as watch:
        batch = make_batch(its, watch)
        take_steps(its, batch, trained, watch)
        return {phase: watch.counted(phase) for phase in PHASES} | {"backward": backward}


def count_backward(its: Built) -> tuple[int, list[str]]:
    """Returns the operations of a backward pass in bf16 on the CPU, and the parameters that it gives a gradient."""
    with torch.autocast("cpu", torch.bfloat16):
        loss = its.loss()
    with Watch(everywhere=True) as watch:
        loss.backward()
    trained = [name for name, parameter in its.method.named_parameters() if parameter.grad is not None]
    its.method.zero_grad(set_to_none=True)
    return watch.counted(""), trained


def make_batch(its: Built, watch: Watch) -> Batch:
    """Returns the batch on the pretended GPU; views of images are made there."""
    method, given = its.method, its.batch
    index = on_gpu(given.index)
    key, views = given.key.of(index), {group: on_gpu(tensor) for group, tensor in given.views.items()}
    if method.modality == IMAGES:
        settings = OmegaConf.to_container(its.config.augmentation, resolve=True)
        dropped = tuple(dropped_operations(settings, list(its.config.dataset.get("drops") or []), CHANNELS))
        maker = ViewMaker(settings, SIDE, dropped, patch_size_of(method.backbone.network))
        images = torch.empty(ROWS, CHANNELS, SIDE, SIDE, dtype=torch.uint8, device=CUDA)
        with watch.during("views"):
            views = maker(images, key)
    return Batch(views, on_gpu(given.label), index, key, host_index=given.index)


def take_steps(its: Built, batch: Batch, trained: list[str], watch: Watch) -> None:
    """Takes two steps, of which the second stays counted."""
    method = its.method
    move(method)
    if hasattr(method, "teacher"):
        move(method.teacher.network)
    rates = {"lr": 0.1, "lr_at": lambda _: 0.1, "weight_decay_at": lambda _: 1e-4}
    plan = SimpleNamespace(device=CUDA, accumulate_steps=1, clip_grad_norm=its.config.trainer.clip_grad_norm, **rates)
    setup = SimpleNamespace(plan=plan, method=method, freezing=None, clock=SimpleNamespace(lap=lambda _: None))
    setup.optimizer = build_optimizer(its.config.optimizer, method, plan)
    setup.precision = Precision("bf16", CUDA, method, str)
    forward = method.forward

    def counted(*args):
        with watch.during("forward"):
            return forward(*args)

    def backward(loss: Tensor) -> None:
        with watch.during("made up"):
            for name in trained:
                method.get_parameter(name).grad = torch.zeros_like(method.get_parameter(name))

    with mock.patch.object(method, "forward", counted), mock.patch.object(Tensor, "backward", backward):
        for step in range(2):
            for key in [key for key in watch.operations if key[0] != "views"]:
                del watch.operations[key]
            with watch.during("optimizer"):
                train_step(setup, step, batch)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    names = sorted(path.stem for path in (CONFIGS / "method").glob("*.yaml"))
    parser.add_argument("methods", nargs="*", metavar="METHOD", default=names)
    print(f"| method | {' | '.join(PHASES)} |\n|---|{'---:|' * len(PHASES)}")
    for name in parser.parse_args().methods:
        counts = count(name)
        print(f"| {name} | {' | '.join(f'{counts[phase]:,}' for phase in PHASES)} |", flush=True)


if __name__ == "__main__":
    main()
