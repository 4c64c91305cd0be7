"""MoCo: the teacher's average, the queue, BatchNorm in groups with shuffled keys."""

import pytest
import torch
import torch.nn.functional as F
import yaml
from timm.layers import BatchNormAct2d
from torch import nn

from sslctl.config.schema import CONFIGS
from sslctl.methods.base import ema_update, teacher_of
from sslctl.models.backbones import MLP, Backbone
from sslctl.models.batchnorm import GroupedBatchNorm2d, group_batchnorm
from tests.by_hand import (
    MEAN,
    SIDE,
    STD,
    assert_same,
    make_batch,
    moco,
    tiny_backbone,
)

# --- MoCo: the teacher ---


def test_moco_teacher_starts_as_the_student():
    method = moco()
    assert_same(method.teacher_backbone.state_dict(), method.backbone.state_dict())
    assert_same(method.teacher_projector.state_dict(), method.projector.state_dict())


def disturb(method):
    """Moves the student away from the teacher, parameters and BatchNorm statistics."""
    torch.manual_seed(5)
    for tensor in [*method.backbone.parameters(), *method.projector.parameters()]:
        tensor.data.add_(torch.randn_like(tensor))
    for name, tensor in method.backbone.named_buffers():
        if "running" in name:
            tensor.add_(torch.rand_like(tensor))


def test_moco_teacher_moves_by_exactly_one_minus_momentum():
    method = moco()
    disturb(method)
    before = {name: p.clone() for name, p in method.named_parameters()}
    method.before_step({"teacher_momentum": 0.75})
    for part in ("backbone", "projector"):
        for name, _ in getattr(method, part).named_parameters():
            student, teacher = before[f"{part}.{name}"], before[f"teacher_{part}.{name}"]
            moved = method.get_parameter(f"teacher_{part}.{name}") - teacher
            torch.testing.assert_close(moved, 0.25 * (student - teacher), atol=1e-6, rtol=0)
            assert torch.equal(method.get_parameter(f"{part}.{name}"), student)


def test_moco_teacher_after_many_steps_has_the_closed_form():
    """A student that stands still: teacher_k = m^k · teacher_0 + (1 - m^k) · student."""
    method, momentum, steps = moco().double(), 0.9, 13
    disturb(method)
    start = {name: p.clone() for name, p in method.named_parameters()}
    for _ in range(steps):
        method.before_step({"teacher_momentum": momentum})
    kept = momentum**steps
    for name, parameter in method.teacher_backbone.named_parameters():
        expected = kept * start[f"teacher_backbone.{name}"] + (1 - kept) * start[f"backbone.{name}"]
        torch.testing.assert_close(parameter, expected, atol=1e-12, rtol=0)


@pytest.mark.parametrize(("momentum", "source"), [(1.0, "teacher"), (0.0, "student")])
def test_ema_update_at_its_ends_keeps_or_copies(momentum, source):
    student = nn.Linear(3, 3)
    teacher = teacher_of(student)
    student.weight.data.add_(1.0)
    expected = {"teacher": teacher, "student": student}[source].weight.clone()
    ema_update(teacher, student, momentum)
    torch.testing.assert_close(teacher.weight, expected, atol=1e-7, rtol=0)


# --- MoCo: the queue ---


def test_moco_queue_starts_as_unit_rows_of_no_image():
    method = moco()
    torch.testing.assert_close(method.queue.norm(dim=1), torch.ones(16))
    assert torch.equal(method.queue_index, torch.full((16,), -1))
    assert method.queue_pointer == 0
    assert {"queue", "queue_index", "queue_pointer"} <= method.state_dict().keys()


def keys_of(output):
    """(V·B, D), the halves one after the other, from the (B, V, D) that a step carries."""
    return output["carry"]["keys"].transpose(0, 1).flatten(0, 1)


@pytest.mark.parametrize(("size", "batch"), [(8, 4), (8, 3), (7, 5), (8, 8), (4, 10), (1, 3)])
def test_moco_queue_wraps_and_holds_the_newest_keys(size, batch):
    """Against a list: place p of the queue holds the newest key whose running number leaves the rest p."""
    method = moco(queue_size=size)
    expected_keys, expected_index, written = method.queue.clone(), method.queue_index.clone(), 0
    for step in range(7):
        generator = torch.Generator().manual_seed(step)
        keys = F.normalize(torch.randn(batch, 5, generator=generator), dim=1)
        index = torch.arange(batch) + 100 * step
        method.after_step({}, {"keys": keys[:, None], "index": index})
        newest = range(max(0, batch - size), batch)
        for key, number in zip(keys[newest.start :], index[newest.start :], strict=True):
            expected_keys[written % size], expected_index[written % size] = key, number
            written += 1
        assert torch.equal(method.queue, expected_keys)
        assert torch.equal(method.queue_index, expected_index)
        assert method.queue_pointer == written % size


def test_moco_queue_holds_the_last_batch_when_the_pointer_is_back_at_the_start():
    method = moco(queue_size=12)
    for step in range(2):
        output = method(make_batch(start=10 * step), {})
        method.after_step({}, output["carry"])
    assert method.queue_pointer == 0
    assert torch.equal(method.queue[6:], keys_of(output))
    assert torch.equal(method.queue_index, torch.cat([torch.arange(6), torch.arange(10, 16)]))


def test_moco_notes_a_queue_longer_than_the_data():
    assert moco(queue_size=60).notes() == []
    (note,) = moco(queue_size=121).notes()
    assert "up to 3 keys" in note


@pytest.mark.parametrize(("name", "layers"), [("moco_v1", 1), ("moco", 2)])
def test_moco_projector_has_no_batchnorm(name, layers):
    settings = yaml.safe_load((CONFIGS / "method" / f"{name}.yaml").read_text())["method"]
    assert settings["projector_layers"] == layers
    projector = moco(projector_layers=layers).projector
    kinds = {1: [nn.Linear], 2: [nn.Linear, nn.ReLU, nn.Linear]}[layers]
    assert [type(module) for module in projector] == kinds
    assert all(module.bias is not None for module in projector if isinstance(module, nn.Linear))


# --- MoCo: BatchNorm in groups and shuffled keys ---


def norm2d(seed=0):
    torch.manual_seed(seed)
    norm = nn.BatchNorm2d(4)
    for tensor in (norm.weight.data, norm.bias.data, norm.running_mean):
        tensor.normal_()
    return norm


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("groups", [2, 3, 12])
def test_grouped_batchnorm_equals_a_plain_one_on_each_part(groups, layout):
    x = torch.randn(12, 4, 3, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float32) * 2 + 1
    x = x.contiguous(memory_format=layout)
    grouped = group_batchnorm(norm2d(), groups)
    actual = grouped(x)
    assert actual.is_contiguous(memory_format=layout)
    plain = [norm2d() for _ in range(groups)]
    expected = torch.cat([norm(part) for norm, part in zip(plain, x.chunk(groups), strict=True)])
    torch.testing.assert_close(actual, expected)
    for name in ("running_mean", "running_var"):
        mean = torch.stack([getattr(norm, name) for norm in plain]).mean(0)
        torch.testing.assert_close(getattr(grouped, name), mean)
    assert grouped.num_batches_tracked == 1
    assert not torch.allclose(actual, norm2d()(x), atol=1e-2)  # one statistic for all is something else


def test_grouped_batchnorm_in_evaluation_and_with_one_group_is_a_plain_one():
    x = torch.randn(12, 4, 3, 3, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(group_batchnorm(norm2d(), 1)(x), norm2d()(x))
    torch.testing.assert_close(group_batchnorm(norm2d(), 4).eval()(x), norm2d().eval()(x))
    torch.testing.assert_close(group_batchnorm(norm2d(), 5).eval()(x), norm2d().eval()(x))  # 12 need not divide


def test_grouped_batchnorm_gives_each_part_a_gradient_of_its_own():
    x = torch.randn(6, 4, 2, 2, generator=torch.Generator().manual_seed(0)).requires_grad_()
    (group_batchnorm(norm2d(), 2)(x)[:3] ** 3).sum().backward()
    assert x.grad[:3].abs().amax((1, 2, 3)).min() > 0
    assert torch.equal(x.grad[3:], torch.zeros(3, 4, 2, 2))


def test_grouped_batchnorm_refuses_a_batch_that_does_not_divide():
    with pytest.raises(ValueError, match="a batch of 10 does not divide into 4 BatchNorm groups"):
        group_batchnorm(norm2d(), 4)(torch.zeros(10, 4, 2, 2))


def test_group_batchnorm_keeps_names_and_tensors():
    backbone = tiny_backbone()
    before = {name: tensor.clone() for name, tensor in backbone.state_dict().items()}
    assert group_batchnorm(backbone, 3) is backbone
    assert_same(backbone.state_dict(), before)
    norms = [m for m in backbone.modules() if isinstance(m, nn.BatchNorm2d)]
    assert len(norms) == 6
    assert all(type(m) is GroupedBatchNorm2d and m.groups == 3 for m in norms)
    group_batchnorm(backbone, 2)
    assert all(m.groups == 2 for m in norms)


def test_timms_batchnorm_when_grouped_keeps_its_activation():
    x = torch.randn(12, 4, 2, 2, generator=torch.Generator().manual_seed(0))
    norm = BatchNormAct2d(4, act_layer=nn.SiLU)
    norm.weight.data.uniform_(0.5, 2)
    expected = torch.cat([F.silu(F.batch_norm(part, None, None, norm.weight, norm.bias, True)) for part in x.chunk(3)])
    torch.testing.assert_close(group_batchnorm(norm, 3)(x), expected)
    by_running = F.silu(F.batch_norm(x, norm.running_mean, norm.running_var, norm.weight, norm.bias))
    torch.testing.assert_close(norm.eval()(x), by_running)


def test_group_batchnorm_refuses_a_norm_of_another_kind_but_not_for_one_group():
    """Whatever its forward does beside normalising, the grouped one would lose."""

    class Odd(nn.BatchNorm2d):
        pass

    with pytest.raises(ValueError, match="Odd"):
        group_batchnorm(nn.Sequential(Odd(3)), 2)
    assert type(group_batchnorm(nn.Sequential(Odd(3)), 1)[0]) is Odd


def test_moco_groups_the_batchnorm_of_a_network_of_linear_layers_too():
    """MLP normalises by BatchNorm1d; passing it over would give queries and keys statistics to recognise each other by."""
    torch.manual_seed(0)
    network = MLP([8], 3, SIDE)
    reference = [MLP([8], 3, SIDE) for _ in range(3)]
    for one in reference:
        one.load_state_dict(network.state_dict())
    backbone = moco(Backbone(network, MEAN, STD), batchnorm_groups=3).backbone
    views = make_batch().views["global"][0]
    parts = backbone.normalize(views).chunk(3)
    expected = torch.cat([one(part) for one, part in zip(reference, parts, strict=True)])
    torch.testing.assert_close(backbone(views), expected)


def test_moco_membership_differs_from_the_queries_and_from_step_to_step():
    orders = [make_batch(24, epoch=epoch).key.bits("moco/shuffle").argsort() for epoch in range(5)]
    orders += [torch.arange(24)]  # the queries' groups are the batch's own
    for number, first in enumerate(orders):
        for second in orders[:number]:
            same = [set(a.tolist()) == set(b.tolist()) for a, b in zip(first.chunk(4), second.chunk(4), strict=True)]
            assert not any(same)
