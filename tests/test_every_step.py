"""No training step waits for a GPU, and what it launches there is little: on one that is not there (scripts/pretended_gpu.py)."""

from types import SimpleNamespace

import pytest
import torch
from omegaconf import OmegaConf
from pretended_gpu import CUDA, Watch, move, on_gpu, pretended_gpu
from torch import Tensor, nn

from sslctl.data.batch import Batch
from sslctl.data.loader import batches
from sslctl.data.sources import digits
from sslctl.methods.base import clip_each_
from sslctl.models.batchnorm import group_batchnorm
from sslctl.ops.masks import some_blocks
from sslctl.ops.timing import Clock
from sslctl.training.optim import clip
from sslctl.training.precision import Precision
from sslctl.training.setup import build_optimizer
from sslctl.training.train import train_step
from sslctl.views import Key, ViewMaker
from tests.methods import built, composed
from tests.test_config import choices

BOTH = ("simclr", "moco", "ibot")  # are tried in fp32 too, which leaves out casts alone
FUSED = ("adagrad", "adam", "adamw", "lars", "sgd")


def take_steps(its, trained, *precisions):
    """Takes a step in each precision on the pretended GPU; the parameters so named get gradients that are made up."""
    method, batch, index = its.method, its.batch, on_gpu(its.batch.index)
    move(method)
    if hasattr(method, "teacher"):
        move(method.teacher.network)
    views = {group: on_gpu(tensor) for group, tensor in batch.views.items()}
    batch = Batch(views, on_gpu(batch.label), index, batch.key.of(index), host_index=batch.index)
    rates = {"lr": 0.1, "lr_at": lambda _: 0.1, "weight_decay_at": lambda _: 1e-4}
    plan = SimpleNamespace(device=CUDA, accumulate_steps=1, clip_grad_norm=1.0, **rates)
    optimizer = build_optimizer(its.config.optimizer, method, plan)
    setup = SimpleNamespace(plan=plan, method=method, optimizer=optimizer, freezing=None)
    setup.clock = SimpleNamespace(lap=lambda _: None)

    def backward(loss):
        for name in trained:
            method.get_parameter(name).grad = torch.zeros_like(method.get_parameter(name))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Tensor, "backward", backward)
        for step, name in enumerate(precisions):
            setup.precision = Precision(name, CUDA, method, str)
            train_step(setup, step, batch)


@pytest.mark.parametrize(
    "name",
    [n if n in ("simclr", "moco", "ibot") else pytest.param(n, marks=pytest.mark.slow) for n in choices("method")],
)
def test_no_step_waits_for_a_gpu(name):
    its = built(name)
    loss = its.loss()
    with Watch(everywhere=True) as backward:  # reads no value: on the CPU, which has an autograd engine
        loss.backward()
    trained = [its_name for its_name, parameter in its.method.named_parameters() if parameter.grad is not None]
    with pretended_gpu() as watch:
        take_steps(its, trained, *(["fp32"] if name in BOTH else []), "bf16")
    assert not backward.waits
    assert not watch.waits


def test_a_step_with_a_loss_scale_waits_once_whether_it_counts():
    its = built("rotation")
    with pretended_gpu() as watch:
        take_steps(its, ["classifier.weight"], "fp16")
    ((what, place),) = watch.waits.elements()
    assert what == "_local_scalar_dense"
    assert place.startswith("training/precision.py:")


def faulty(x):
    """A view, with everything that would wait for a GPU."""
    scale = x.mean().item() + float(x.sum() > 0)  # a value, and a branch's
    picked = x[x > 0].mean() + x[:, [0]].mean() + x[torch.zeros(1, dtype=torch.long)].mean()
    constant = torch.tensor([1.0], device=x.device) + torch.zeros(1).pin_memory().to(x.device)
    counted = torch.bincount(torch.zeros(3, dtype=torch.long, device=x.device), minlength=2)[0]
    seen = x.mean().cpu().to(x.device, non_blocking=True) + x.nonzero().float().mean()
    return x * scale * picked * constant * counted * seen


def test_the_watch_sees_what_waits(monkeypatch):
    """The negative control: faults in a method that has none."""
    its = built("rotation")
    backbone = its.method.backbone.forward
    monkeypatch.setattr(its.method.backbone, "forward", lambda x: backbone(faulty(x)))
    with pretended_gpu() as watch:
        take_steps(its, ["classifier.weight"], "fp32")
    counts = {
        "_local_scalar_dense": 2,
        "index by a mask": 1,
        "index on the CPU": 1,
        "copy to cuda": 4,  # of a list of places, of the constant, of pinned memory, and of memory that is not pinned
        "copy to cpu": 1,
        "bincount": 1,
        "nonzero": 1,
    }
    assert {what: sum(n for (kind, _), n in watch.waits.items() if kind == what) for what in counts} == counts
    assert sum(watch.waits.values()) == sum(counts.values())


def test_batches_in_memory_are_made_without_waiting():
    settings = OmegaConf.to_container(composed("method=byol").augmentation, resolve=True)
    views = ViewMaker(settings, 16, ("saturation", "hue", "grayscale"))
    with pretended_gpu() as watch:
        reading = {"batch_size": 32, "seed": 0, "first_step": 0, "total_steps": 3, "workers": 0}
        feed = batches(digits("train", 16), views, **reading, device=CUDA, clock=Clock(CUDA))
        next(feed)  # the images go to the GPU
        watch.waits.clear()
        batch = next(feed)
    assert not watch.waits
    assert batch.views["global"].device == CUDA
    assert batch.host_index.device.type == batch.host_key.index.device.type == "cpu"


# --- What is launched ---


def launched(function, *arguments):
    """How many operations a function launches."""
    with pretended_gpu() as watch:
        arguments = [on_gpu(argument) if isinstance(argument, Tensor) else argument for argument in arguments]
        if isinstance(function, nn.Module):
            move(function)
        watch.operations.clear()
        function(*arguments)
    return sum(watch.operations.values())


def test_masks_of_all_views_are_drawn_together():
    def draw(index):
        host = torch.arange(len(index))
        some_blocks(Key(0, 0, index), Key(0, 0, host), [f"ibot/{view}" for view in range(2)], 14, 14, 0.5, 0.1, 0.5)

    assert launched(draw, torch.arange(6)) < 250


def test_batchnorm_groups_cost_nothing_each():
    x = torch.randn(16, 4, 3, 3)
    for images in (x, x.contiguous(memory_format=torch.channels_last)):
        counts = [launched(group_batchnorm(nn.BatchNorm2d(4), groups), images) for groups in (2, 8)]
        assert counts == [9, 9]


class Parameters(nn.Sequential):
    """Weights and biases with gradients, as the optimizer is given them."""

    def __init__(self):
        super().__init__(nn.Linear(4, 3), nn.Linear(3, 3), nn.BatchNorm1d(3))

    def parameter_groups(self):
        return [{"params": list(self.parameters())}]

    def set_gradients(self):
        for parameter in self.parameters():
            parameter.grad = torch.zeros_like(parameter)


def test_lists_of_tensors_are_one_launch_where_they_are_alike():
    weights, scales = [torch.ones(2, 3), torch.ones(4)], [torch.ones(()), torch.ones(())]
    turned = [torch.ones(3, 2).T, torch.ones(4)]

    def multiply(*tensors):
        torch._foreach_mul_(tensors[:2], tensors[2:])

    assert [launched(multiply, *weights, *others) for others in (weights, scales, turned)] == [1, 2, 2]


@pytest.mark.parametrize("name", FUSED)
def test_an_optimizer_takes_a_few_operations_for_all_weights(name):
    parameters, config = Parameters(), composed("method=simclr", f"optimizer={name}").optimizer

    def step():
        parameters.set_gradients()
        optimizer.step()

    with pretended_gpu() as watch:
        move(parameters)
        optimizer = build_optimizer(config, parameters, SimpleNamespace(lr=0.1, device=CUDA))
        step()  # the state is made
        parameters.set_gradients()
        watch.operations.clear()
        optimizer.step()
    ratios = 2 if name == "lars" else 0  # each of the two matrices is multiplied by its own
    assert 0 < sum(watch.operations.values()) <= 10 + ratios
    assert not watch.waits


@pytest.mark.parametrize(
    ("clipped", "factors"), [(lambda p: clip(p, 1.0), 0), (lambda p: clip_each_(p.parameters(), 1.0), 6)]
)
def test_clipping_takes_a_few_operations_and_what_each_gradient_is_multiplied_by(clipped, factors):
    parameters = Parameters()
    with pretended_gpu() as watch:
        move(parameters)
        parameters.set_gradients()
        watch.operations.clear()
        clipped(parameters)
    assert 0 < sum(watch.operations.values()) <= 10 + factors
