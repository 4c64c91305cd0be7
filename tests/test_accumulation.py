"""Gradient accumulation: parts of a batch equal the batch where that is possible, and are refused where it is not."""

from types import SimpleNamespace

import pytest
import torch
from omegaconf import OmegaConf
from torch import nn

from sslctl.config.schema import CONFIGS
from sslctl.config.targets import target_of
from sslctl.errors import InputError
from sslctl.methods.base import Batch
from sslctl.methods.moco import MoCo
from sslctl.methods.supervised import Supervised
from sslctl.models.backbones import Backbone
from sslctl.models.batchnorm import takes_batch_statistics
from sslctl.ops.timing import Clock
from sslctl.training.accumulation import accumulation_blockers, merge_outputs, refuse_inexact_accumulation
from sslctl.training.precision import Precision
from sslctl.training.setup import build_optimizer
from sslctl.training.train import train_step
from tests.by_hand import AS_IT_IS, MEAN, SIDE, STD, facts, make_batch, moco, simclr, tiny_backbone
from tests.methods import VIT as SMALL_VIT
from tests.methods import WITHOUT_BATCHNORM, built, words_of
from tests.own_methods import own
from tests.runs import MOCO, SIMCLR, SUPERVISED, differences, finish, metrics, pretrain, slow, tensors
from tests.test_resume import VIT

COUNT = 8
MOCO_VIT = ("method=moco", "method.queue_size=600", "method.batchnorm_groups=1", *VIT)


class Plain(nn.Module):
    """A network without BatchNorm."""

    embed_dim = 6

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Conv2d(3, 4, 3), nn.GELU(), nn.Flatten(), nn.Linear(4 * (SIDE - 2) ** 2, 6))

    def forward(self, x):
        return self.layers(x)


def plain_backbone():
    torch.manual_seed(0)
    return Backbone(Plain(), MEAN, STD)


def supervised(backbone, frozen):
    torch.manual_seed(1)
    return Supervised(backbone, facts(), frozen=frozen, **AS_IT_IS).train()


METHODS = {
    "moco": lambda: moco(plain_backbone()),
    "symmetric moco": lambda: moco(plain_backbone(), symmetric=True),
    "supervised": lambda: supervised(plain_backbone(), False),
    "frozen": lambda: supervised(tiny_backbone(), True),
    "moco with BatchNorm": moco,
    "simclr": simclr,
}


def stepped(method, parts, batch=None, precision="fp32"):
    """(loss and metrics, gradients, tensors afterwards) of one training step in so many parts."""
    device, gradients = torch.device("cpu"), []
    plan = SimpleNamespace(
        device=device,
        steps_per_epoch=10,
        lr=0.1,
        lr_at=lambda step: 0.1,
        weight_decay_at=lambda step: 0.0,
        accumulate_steps=parts,
        clip_grad_norm=None,
        precision=precision,
    )
    node = {"base_lr": 0.1, "lr_scaling": "none", "weight_decay": 0.0, "exclude_bias_and_norm": False}
    optimizer = build_optimizer(OmegaConf.create({"_target_": "torch.optim.SGD", **node}), method, plan)
    trained = [p for p in method.parameters() if p.requires_grad]
    optimizer.register_step_pre_hook(lambda *_: gradients.extend(p.grad.clone() for p in trained))
    setup = SimpleNamespace(
        plan=plan,
        method=method,
        optimizer=optimizer,
        precision=Precision(precision, device, method, str),
        clock=Clock(device),
        freezing=None,
        embed=None,
    )
    _, _, out, _ = train_step(setup, 0, batch or make_batch(COUNT))
    return out, gradients, method.state_dict()


def far(left, right):
    """The largest difference of two lists of tensors."""
    return max((a - b).abs().max().item() for a, b in zip(left, right, strict=True))


# --- Equal where every image stands alone ---


@pytest.mark.parametrize("parts", [2, 4])
@pytest.mark.parametrize("name", ["moco", "symmetric moco", "supervised", "frozen"])
def test_parts_give_the_loss_and_gradients_of_the_batch(name, parts):
    (whole, expected, after), (actual, gradients, left) = (stepped(METHODS[name](), n) for n in (1, parts))
    torch.testing.assert_close(actual["loss"], whole["loss"], atol=1e-6, rtol=0)
    assert far(gradients, expected) < 1e-6
    assert max(g.abs().max() for g in expected) > 1e-3
    for tensor in after:
        torch.testing.assert_close(left[tensor], after[tensor], atol=1e-6, rtol=0)


OF_EARLIER_BATCHES = {  # what images are compared with: centres, queues, memories, rows of a classifier
    "diet": (WITHOUT_BATCHNORM, ("classifier.weight",)),
    "dino": (WITHOUT_BATCHNORM, ("center", "teacher_head.1.weight")),
    "ibot": (SMALL_VIT, ("centers", "teacher_head.1.weight")),
    "seed": (WITHOUT_BATCHNORM, ("queue", "queue_pointer")),
    "compress": (WITHOUT_BATCHNORM, ("student_memory", "teacher_memory", "memory_pointer")),
}


@pytest.mark.parametrize("name", OF_EARLIER_BATCHES)
def test_four_parts_equal_the_batch_where_images_meet_earlier_ones_only(name):
    network, state = OF_EARLIER_BATCHES[name]
    words = ("method.freeze_epochs=0",) if name in ("dino", "ibot") else ()
    whole, parts = (built(name, *words, network=network) for _ in range(2))
    assert accumulation_blockers(whole.method) == []
    start = {part: whole.method.state_dict()[part].clone() for part in state}
    (out, expected, after), (actual, gradients, left) = (
        stepped(its.method, count, its.batch) for its, count in ((whole, 1), (parts, 4))
    )
    assert actual["loss"].item() == pytest.approx(out["loss"].item(), rel=2e-5)
    largest = max(gradient.abs().max() for gradient in expected)
    assert largest > 1e-3
    assert far(gradients, expected) < 2e-5 * largest
    for part, before in start.items():
        assert not torch.equal(after[part], before), part
        torch.testing.assert_close(left[part], after[part], atol=1e-6, rtol=0)


@pytest.mark.parametrize("name", ["moco", "symmetric moco"])
@pytest.mark.parametrize("queue_size", [64, 7])  # 7: fewer than a batch's keys
def test_parts_leave_the_same_queue_in_the_same_order(name, queue_size):
    def result():
        return moco(plain_backbone(), symmetric=name != "moco", queue_size=queue_size)

    (_, _, whole), (_, _, parts) = stepped(result(), 1), stepped(result(), 4)
    written = COUNT * (2 if name != "moco" else 1)
    assert torch.equal(parts["queue_index"], whole["queue_index"])
    assert parts["queue_pointer"] == whole["queue_pointer"]
    assert (parts["queue_index"] >= 0).sum() == min(written, queue_size)
    torch.testing.assert_close(parts["queue"], whole["queue"], atol=1e-6, rtol=0)


@pytest.mark.parametrize("name", ["moco with BatchNorm", "simclr"])
def test_parts_differ_where_images_meet(name):
    (_, expected, _), (_, gradients, _) = stepped(METHODS[name](), 1), stepped(METHODS[name](), 2)
    assert far(gradients, expected) > 1e-3


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_parts_equal_the_batch_in_lower_precision_to_its_rounding(precision):
    (_, expected, _), (_, gradients, _) = (stepped(METHODS["moco"](), n, precision=precision) for n in (1, 4))
    assert far(gradients, expected) < 0.02 * max(g.abs().max() for g in expected)


def test_metrics_are_means_over_the_parts():
    method, batch = METHODS["supervised"](), make_batch(COUNT)
    each = [method(part, {}) for part in batch.split(4)]
    out, *_ = stepped(METHODS["supervised"](), 4, batch)
    for name in ("loss", "top1", "feature_std"):
        torch.testing.assert_close(out[name], torch.stack([part[name].detach() for part in each]).mean())
        assert out[name].shape == ()


def test_carries_are_put_together_in_the_order_of_the_images():
    parts = [{"loss": torch.tensor(float(i)), "carry": {"keys": torch.full((2, 3), i)}} for i in range(3)]
    out = merge_outputs(parts)
    assert out["loss"] == 1
    assert out["carry"]["keys"][:, 0].tolist() == [0, 0, 1, 1, 2, 2]


def test_the_teacher_moves_once_a_step():
    calls = []

    class Counting(MoCo):
        def before_step(self, schedules):
            calls.append("before")

        def after_step(self, schedules, carry):
            calls.append(len(carry["keys"]))

    method = METHODS["moco"]()
    method.__class__ = Counting
    stepped(method, 4)
    assert calls == ["before", COUNT]


class Line(nn.Module):
    """A method whose loss has the gradients 3 and 4, which notes what a step calls."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Parameter(torch.tensor(3.0)), nn.Parameter(torch.tensor(4.0))
        self.calls = []

    def schedules(self, step):
        return {"momentum": float(step)}

    def before_step(self, schedules):
        self.calls.append(("before_step", schedules["momentum"]))

    def forward(self, batch, schedules):
        return {"loss": 3 * self.a + 4 * self.b, "carry": {"keys": batch.index}}

    def after_backward(self, schedules):
        self.calls.append(("after_backward", self.a.grad.item(), self.b.grad.item()))

    def after_step(self, schedules, carry):
        self.calls.append(("after_step", carry["keys"].tolist(), round(self.a.item(), 4)))


@pytest.mark.parametrize("parts", [1, 2])
def test_a_step_sets_the_rates_of_groups_and_clips_what_the_method_leaves(parts):
    method, device = Line(), torch.device("cpu")
    groups = [
        {"params": [method.a], "lr_scale": 0.5, "decay_scale": 2.0, "scheduled": True},
        {"params": [method.b], "lr_scale": 1.0, "decay_scale": 0.0, "scheduled": False},
    ]
    plan = {"lr": 0.7, "lr_at": lambda step: step / 10, "weight_decay_at": lambda step: step / 100}
    plan |= {"accumulate_steps": parts, "clip_grad_norm": 1.0}
    setup = SimpleNamespace(
        plan=SimpleNamespace(**plan),
        method=method,
        optimizer=torch.optim.SGD(groups, lr=0.0),
        precision=Precision("fp32", device, method, str),
        clock=Clock(device),
        freezing=None,
    )
    schedules, lr, _, norm = train_step(setup, 3, make_batch(4))
    a, b = 3 - 0.15 * (3 / 5 + 0.06 * 3), 4 - 0.7 * 4 / 5  # gradients of norm 5, clipped to 1
    assert (method.a.item(), method.b.item()) == pytest.approx((a, b))
    assert (schedules, lr, norm.item()) == ({"momentum": 3.0}, pytest.approx(0.3), pytest.approx(5))
    assert method.calls == [
        ("before_step", 3.0),
        ("after_backward", 3.0, 4.0),
        ("after_step", [0, 1, 2, 3], round(a, 4)),
    ]
    assert method.a.grad is None


# --- The parts of a batch ---


@pytest.mark.parametrize("parts", [1, 2, 4])
def test_the_parts_of_a_batch_are_its_images_in_order(parts):
    batch = make_batch(COUNT, start=3, epoch=2)
    batch = Batch(batch.views, batch.label, batch.index, batch.key, {"mask": torch.arange(COUNT)}, batch.index.clone())
    result = batch.split(parts)
    assert [len(part.index) for part in result] == [COUNT // parts] * parts
    assert torch.equal(torch.cat([part.views["global"] for part in result], 1), batch.views["global"])
    for name in ("index", "label", "host_index"):
        assert torch.equal(torch.cat([getattr(part, name) for part in result]), getattr(batch, name))
    assert torch.equal(torch.cat([part.targets["mask"] for part in result]), batch.targets["mask"])


def test_the_parts_draw_the_random_numbers_of_the_batch():
    batch = make_batch(COUNT, start=3, epoch=2)
    parts = batch.split(4)
    for draw in (
        lambda key: key.uniform("mask", 5),
        lambda key: key.permutation("order", 4),
        lambda key: key.bits("x"),
    ):
        assert torch.equal(torch.cat([draw(part.key) for part in parts]), draw(batch.key))
        assert torch.equal(torch.cat([draw(part.host_key) for part in parts]), draw(batch.key))
    assert torch.equal(batch.key.select(torch.tensor([5, 1])).uniform("mask"), batch.key.uniform("mask")[[5, 1]])


# --- Whole runs ---


@pytest.mark.parametrize(
    "words",
    [
        (*MOCO_VIT, "trainer.accumulate_steps=4"),
        slow((*MOCO_VIT, "trainer.accumulate_steps=2")),
        slow((*MOCO_VIT, "method.symmetric=true", "trainer.accumulate_steps=2")),
        (*SUPERVISED, "method.frozen=true", "trainer.accumulate_steps=4"),
    ],
    ids=["moco-4", "moco-2", "symmetric-2", "frozen-4"],
)
def test_a_run_in_parts_equals_the_run_of_whole_batches_to_rounding(words, tmp_path):
    parts, whole = finish(tmp_path / "parts", *words), finish(tmp_path / "whole", *words, "trainer.accumulate_steps=1")
    actual, expected = tensors(parts), tensors(whole)
    for name, tensor in expected.items():
        if name.startswith("method/"):
            torch.testing.assert_close(actual[name], tensor, atol=1e-4, rtol=0)
    for left, right in zip(metrics(parts), metrics(whole), strict=True):
        assert left["loss"] == pytest.approx(right["loss"], abs=1e-4)


@pytest.mark.parametrize("stops", [(1, 7), slow((4, 5, 6))])
def test_resume_with_accumulation_equals_the_straight_run(stops, tmp_path):
    words = (*MOCO_VIT, "trainer.accumulate_steps=4", "+backbone.kwargs.drop_rate=0.1")
    parts, whole = finish(tmp_path / "parts", *words, stops=stops), finish(tmp_path / "whole", *words)
    assert differences(tensors(parts), tensors(whole)) == []
    assert metrics(parts) == metrics(whole)


NEGATIVES, BATCHNORM = (
    "its negatives are the other images of the batch",
    "BatchNorm takes its statistics over the batch",
)


@pytest.mark.parametrize(
    ("words", "reasons", "others"),
    [
        (SIMCLR, (NEGATIVES, BATCHNORM), ()),
        ((*SIMCLR, *VIT, "method.norm=false"), (NEGATIVES,), (BATCHNORM,)),
        (MOCO, (BATCHNORM,), (NEGATIVES,)),
        (SUPERVISED, (BATCHNORM,), (NEGATIVES,)),
        ((*SIMCLR, *own("Silent")), ("does not say that each image's loss stands alone",), (NEGATIVES,)),
    ],
    ids=["simclr", "simclr without BatchNorm", "moco", "supervised", "a user's own"],
)
def test_parts_that_are_not_the_batch_are_refused_with_the_reason(words, reasons, others, tmp_path, capsys):
    assert pretrain(tmp_path / "run", *words, "trainer.accumulate_steps=2") == 2
    printed = capsys.readouterr().err
    for reason in (*reasons, "trainer.accumulate_steps=2", "trainer.accumulate_approximately=true"):
        assert reason in printed
    assert not any(other in printed for other in others)
    assert len(printed.strip().splitlines()) == 1
    assert not (tmp_path / "run").exists()


MEET = {  # method: where its images meet, in its own words
    "distill": "images are compared with the others of their batch",
    **dict.fromkeys(("simclr", "moco_v3", "nnclr", "dcl"), NEGATIVES),
    "supcon": "its positives and negatives are the other images of the batch",
    "cpc": "its negatives are the patches of the batch",
    "swav": "codes are assigned to the batch as a whole",
    "msn": "its mean prediction and its balanced targets are the batch's",
    **dict.fromkeys(
        ("dinov2", "dinov3"), "its targets share the prototypes over the batch, and class tokens keep apart in it"
    ),
    "barlow_twins": "the correlation of two dimensions is taken over the batch",
    "vicreg": "variance and covariance are taken over the batch",
    "wmse": "the covariance that is whitened is the batch's",
    "lejepa": "SIGReg compares the distribution of the batch with a Gaussian",
    "ijepa": "blocks and contexts have one size in the whole batch",
    "inpainting": "one hole is drawn for the whole batch",
}


@pytest.mark.slow
@pytest.mark.parametrize("name", MEET)
def test_parts_are_refused_with_the_methods_own_reason_without_batchnorm_too(name):
    network = SMALL_VIT if name in ("msn", "ijepa", "dinov2", "dinov3") else WITHOUT_BATCHNORM
    words = ("method.hole=blobs",) if name == "inpainting" else ()
    method = built(name, *words, network=network).method
    assert not takes_batch_statistics(method.backbone)
    with pytest.raises(InputError) as refused:
        refuse_inexact_accumulation(SimpleNamespace(accumulate_steps=2), method, approximately=False)
    assert MEET[name] in str(refused.value)
    refuse_inexact_accumulation(SimpleNamespace(accumulate_steps=1), method, approximately=False)


def test_every_method_whose_images_meet_has_its_reason_looked_at():
    nodes = {path.stem: OmegaConf.load(path).method for path in (CONFIGS / "method").glob("*.yaml")}
    batch_coupling = {
        name: target_of(node, "method").batch_coupling for name, node in nodes.items() if "_target_" in node
    }
    assert len(batch_coupling) > 30
    assert {name for name, reason in batch_coupling.items() if reason} == MEET.keys()


@pytest.mark.parametrize("words", [SIMCLR, slow(MOCO)])
def test_they_can_be_asked_for_and_train_something_else(words, tmp_path):
    more = ("trainer.accumulate_steps=2", "trainer.accumulate_approximately=true")
    parts, whole = finish(tmp_path / "parts", *words, *more), finish(tmp_path / "whole", *words)
    assert abs(metrics(parts)[0]["loss"] - metrics(whole)[0]["loss"]) > 3e-4
    assert metrics(parts)[-1]["step"] == metrics(whole)[-1]["step"]


def test_a_batch_that_does_not_divide_is_refused_together_with_other_mistakes(tmp_path, capsys):
    assert pretrain(tmp_path / "run", *MOCO_VIT, "trainer.accumulate_steps=3", "optimizer.base_lr=-1") == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 2
    (about,) = [line for line in lines if "accumulate" in line]
    assert "trainer.batch_size=256" in about
    assert "trainer.accumulate_steps=3" in about
    assert not (tmp_path / "run").exists()


# --- Processes, precision, accumulation ---


@pytest.mark.parametrize("name", ["nnclr", "barlow_twins", "swav", "byol"])
def test_accumulation_is_refused_with_the_reason(name, tmp_path, capsys):
    assert pretrain(tmp_path / "run", *words_of(name), "trainer.accumulate_steps=2") == 2
    printed = capsys.readouterr().err
    assert "BatchNorm takes its statistics over the batch" in printed
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", ["mae", "simmim"])
def test_parts_of_a_batch_add_up_where_images_do_not_meet(name, tmp_path):
    whole = pretrain(tmp_path / "whole", *words_of(name), "optimizer=sgd", stop_after=1)
    parts = pretrain(tmp_path / "parts", *words_of(name), "optimizer=sgd", "trainer.accumulate_steps=4", stop_after=1)
    assert (whole, parts) == (143, 143)
    left, right = (tensors(tmp_path / name) for name in ("whole", "parts"))
    for key in (key for key in left if key.startswith("method/")):
        torch.testing.assert_close(left[key], right[key], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("name", "printed"), [("ijepa", "one size in the whole batch"), ("inpainting", "one hole is drawn")]
)
def test_accumulation_is_refused_where_the_batch_shares_a_draw(name, printed, tmp_path, capsys):
    assert pretrain(tmp_path / "run", *words_of(name), "trainer.accumulate_steps=2") == 2
    assert printed in capsys.readouterr().err
