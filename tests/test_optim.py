import copy
import math
from types import SimpleNamespace

import pytest
import torch
from omegaconf import OmegaConf
from torch import nn

from sslctl.cli import main
from sslctl.config.command_line import Prepared
from sslctl.config.diagnose import compose_choices
from sslctl.data.sources import digits
from sslctl.methods.base import Method, teacher_of
from sslctl.schedules import Schedule, cosine_between, scaled_lr, warmed_up
from sslctl.training.optim import LARS, clip, parameter_groups
from sslctl.training.plan import _schedule, make_plan
from sslctl.training.setup import build_optimizer
from tests.by_hand import facts, moco

# --- LARS ---


def norm(values):
    return math.sqrt(sum(v * v for v in values))


def reference_lars(weight, gradients, rates, *, weight_decay, momentum, trust, adapt):
    """The update rule on lists of Python floats; one list of gradients and one learning rate a step."""
    weight, buffer = list(weight), [0.0] * len(weight)
    for gradient, lr in zip(gradients, rates, strict=True):
        update = [g + weight_decay * w for g, w in zip(gradient, weight, strict=True)]
        ratio = 1.0
        if adapt and norm(weight) > 0 and norm(update) > 0:
            ratio = trust * norm(weight) / norm(update)
        buffer = [momentum * m + ratio * u for m, u in zip(buffer, update, strict=True)]
        weight = [w - lr * m for w, m in zip(weight, buffer, strict=True)]
    return weight


def random_run(steps, shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    start = torch.randn(*shape, generator=generator, dtype=torch.float64)
    gradients = torch.randn(steps, *shape, generator=generator, dtype=torch.float64)
    return start, gradients


def run_lars(optimizer, weight, gradients, rates):
    for gradient, lr in zip(gradients, rates, strict=True):
        for group in optimizer.param_groups:
            group["lr"] = lr
        weight.grad = gradient.clone()
        optimizer.step()
    return weight.detach()


@pytest.mark.parametrize("weight_decay", [0.0, 1e-2])
@pytest.mark.parametrize("adapt", [True, False])
def test_lars_equals_plain_python(weight_decay, adapt):
    """The learning rate changes from step to step, so a rate inside the momentum buffer would show."""
    start, gradients = random_run(6, (3, 4))
    rates = [0.1, 0.2, 0.4, 0.3, 0.05, 0.0]
    weight = nn.Parameter(start.clone())
    groups = [{"params": [weight], "weight_decay": weight_decay, "adapt": adapt}]
    optimizer = LARS(groups, lr=0.1, momentum=0.9, trust=1e-2)
    actual = run_lars(optimizer, weight, gradients, rates)
    expected = reference_lars(
        start.flatten().tolist(),
        [g.flatten().tolist() for g in gradients],
        rates,
        weight_decay=weight_decay,
        momentum=0.9,
        trust=1e-2,
        adapt=adapt,
    )
    torch.testing.assert_close(actual.flatten(), torch.tensor(expected, dtype=torch.float64), atol=1e-12, rtol=0)


def test_lars_without_weight_decay_still_adapts():
    """The first step moves by lr · trust · |w| whatever the size of the gradient."""
    start, gradients = random_run(1, (5, 5))
    for size in (1e-3, 1.0, 1e3):
        weight = nn.Parameter(start.clone())
        run_lars(LARS([weight], lr=1.0, momentum=0.9, trust=1e-3), weight, gradients * size, [0.5])
        moved = (weight.detach() - start).norm().item()
        assert moved == pytest.approx(0.5 * 1e-3 * start.norm().item(), rel=1e-9)


def test_lars_of_an_excluded_group_is_momentum_sgd():
    start, gradients = random_run(5, (7,))
    ours, theirs = nn.Parameter(start.clone()), nn.Parameter(start.clone())
    groups = [{"params": [ours], "weight_decay": 0.0, "adapt": False}]
    actual = run_lars(LARS(groups, lr=0.1, momentum=0.9, trust=1e-3, weight_decay=1.0), ours, gradients, [0.1] * 5)
    expected = run_lars(torch.optim.SGD([theirs], lr=0.1, momentum=0.9), theirs, gradients, [0.1] * 5)
    torch.testing.assert_close(actual, expected, atol=1e-14, rtol=0)


@pytest.mark.parametrize("zero", ["weight", "gradient"])
def test_lars_of_a_zero_norm_uses_a_ratio_of_one(zero):
    start, gradients = random_run(1, (3, 3))
    start, gradients = (start * 0, gradients) if zero == "weight" else (start, gradients * 0)
    weight = nn.Parameter(start.clone())
    actual = run_lars(LARS([weight], lr=0.1, momentum=0.9, trust=1e-3), weight, gradients, [0.1])
    assert torch.equal(actual, start - 0.1 * gradients[0])


@pytest.mark.parametrize(("size", "expected"), [(1e-24, 1e-24), (1e-15, 1e-3)])
def test_lars_of_a_norm_that_fp32_cannot_hold_uses_a_ratio_of_one(size, expected):
    """The squares of 1e-24 are 0 there; those of 1e-15 are not, and the update is as large as for any gradient."""
    weight = nn.Parameter(torch.ones(2, 2))
    optimizer = LARS([weight], lr=0.1, momentum=0.9, trust=1e-3)
    weight.grad = torch.full((2, 2), size)
    optimizer.step()
    torch.testing.assert_close(optimizer.state[weight]["momentum"], torch.full((2, 2), expected), atol=0, rtol=1e-5)


def test_lars_leaves_alone_what_has_no_gradient():
    used, unused = nn.Parameter(torch.ones(2, 2)), nn.Parameter(torch.ones(2, 2))
    optimizer = LARS([used, unused], lr=0.1, momentum=0.9, trust=1e-3, weight_decay=0.1)
    used.grad = torch.ones(2, 2)
    optimizer.step()
    assert torch.equal(unused, torch.ones(2, 2))
    assert not torch.equal(used, torch.ones(2, 2))
    assert unused not in optimizer.state


def test_lars_continues_from_its_saved_state():
    start, gradients = random_run(6, (4, 4))
    straight, stopped = nn.Parameter(start.clone()), nn.Parameter(start.clone())
    options = {"lr": 0.1, "momentum": 0.9, "trust": 1e-2, "weight_decay": 1e-3}
    run_lars(LARS([straight], **options), straight, gradients, [0.1] * 6)
    first = LARS([stopped], **options)
    run_lars(first, stopped, gradients[:3], [0.1] * 3)
    state, resumed = copy.deepcopy(first.state_dict()), LARS([stopped], **options)
    resumed.load_state_dict(state)
    run_lars(resumed, stopped, gradients[3:], [0.1] * 3)
    assert torch.equal(stopped, straight)


# --- Parameter groups and learning rates ---


class Network(nn.Module):
    def __init__(self):
        super().__init__()
        self.student = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4, 2))
        self.teacher = teacher_of(self.student)
        self.scale = nn.Parameter(torch.ones(()))


def names_of(module, group):
    names = {parameter: name for name, parameter in module.named_parameters()}
    return {names[parameter] for parameter in group["params"]}


def test_parameter_groups_leave_out_the_teacher_and_exclude_biases_and_norms():
    network = Network()
    weights, others = parameter_groups([{"params": list(network.parameters())}], 0.1, exclude_bias_and_norm=True)
    assert names_of(network, weights) == {"student.0.weight", "student.3.weight"}
    assert names_of(network, others) == {
        "student.0.bias",
        "student.1.weight",
        "student.1.bias",
        "student.3.bias",
        "scale",
    }
    assert (weights["weight_decay"], weights["adapt"]) == (0.1, True)
    assert (others["weight_decay"], others["adapt"]) == (0.0, False)


def test_parameter_groups_without_exclusion_are_one_of_everything_trained():
    network = Network()
    (group,) = parameter_groups([{"params": list(network.parameters())}], 0.1, exclude_bias_and_norm=False)
    trained = {name for name, _ in network.named_parameters() if not name.startswith("teacher")}
    assert names_of(network, group) == trained
    assert (group["weight_decay"], group["adapt"]) == (0.1, True)


@pytest.mark.parametrize("excluding", [True, False])
def test_groups_keep_their_scales_of_learning_rate_and_weight_decay(excluding):
    own = {"lr_scale": 0.5, "weight_decay_scale": 3.0, "scheduled": False}
    layer, head = nn.Linear(3, 2), nn.Linear(2, 2)
    groups = [{"params": list(layer.parameters()), **own}, {"params": list(head.parameters())}]
    rows = [
        (len(g["params"]), g["lr_scale"], g["weight_decay"], g["decay_scale"], g["adapt"], g["scheduled"])
        for g in parameter_groups(groups, 0.1, excluding, vector_lr_scale=4.0)
    ]
    first = [(1, 0.5, pytest.approx(0.3), 3.0, True, False), (1, 2.0, 0.0, 0.0, False, False)]
    second = [(1, 1.0, 0.1, 1.0, True, True), (1, 4.0, 0.0, 0.0, False, True)]
    whole = [(2, 0.5, pytest.approx(0.3), 3.0, True, False), (2, 1.0, 0.1, 1.0, True, True)]
    assert rows == (first + second if excluding else whole)


@pytest.mark.parametrize("limit", [None, 1.0, 100.0])
def test_gradients_are_clipped_together_by_their_global_norm(limit):
    layer = nn.Linear(2, 2)
    layer.weight.grad, layer.bias.grad = torch.tensor([[3.0, 0.0], [0.0, 4.0]]), torch.tensor([12.0, 0.0])
    unused = nn.Linear(1, 1)
    assert clip(nn.ModuleList([layer, unused]), limit).item() == pytest.approx(13)  # before clipping
    factor = 1 / 13 if limit == 1.0 else 1.0
    torch.testing.assert_close(layer.weight.grad, torch.tensor([[3.0, 0.0], [0.0, 4.0]]) * factor)
    torch.testing.assert_close(layer.bias.grad, torch.tensor([12.0, 0.0]) * factor)
    assert unused.weight.grad is None


def test_parameter_groups_hold_no_empty_group():
    (group,) = parameter_groups(
        [{"params": list(nn.Linear(3, 2, bias=False).parameters())}], 0.1, exclude_bias_and_norm=True
    )
    assert len(group["params"]) == 1
    (group,) = parameter_groups([{"params": list(nn.BatchNorm1d(3).parameters())}], 0.1, exclude_bias_and_norm=True)
    assert group["adapt"] is False


@pytest.mark.parametrize(
    ("batch_size", "scaling", "expected"),
    [(256, "linear", 0.3), (4096, "linear", 4.8), (64, "linear", 0.075), (1024, "sqrt", 0.6), (4096, "none", 0.3)],
)
def test_scaled_lr_is_per_256_images(batch_size, scaling, expected):
    assert scaled_lr(0.3, batch_size, scaling) == pytest.approx(expected)


def test_scaled_lr_of_simclr_is_the_papers():
    """Appendix B.1: 0.075 · √4096 = 4.8 = 0.3 · 4096 / 256."""
    assert scaled_lr(0.075 * 16, 4096, "sqrt") == pytest.approx(0.075 * math.sqrt(4096))
    assert scaled_lr(0.3, 4096, "linear") == pytest.approx(0.075 * math.sqrt(4096))


# --- Schedules ---


@pytest.mark.parametrize(
    ("shape", "arguments", "points"),
    [
        ("constant", {}, {0: 1, 50: 1, 99: 1}),
        ("step", {"every": 30, "gamma": 0.1}, {0: 1, 29: 1, 30: 0.1, 59: 0.1, 60: 0.01, 99: 0.001}),
        ("multistep", {"milestones": [60, 80], "gamma": 0.1}, {0: 1, 59: 1, 60: 0.1, 79: 0.1, 80: 0.01, 99: 0.01}),
        ("multistep", {"milestones": [], "gamma": 0.1}, {0: 1, 99: 1}),
        ("cosine", {"end": 0.0}, {0: 1, 25: (2 + math.sqrt(2)) / 4, 50: 0.5, 75: (2 - math.sqrt(2)) / 4, 100: 0}),
        ("cosine", {"end": 0.2}, {0: 1, 50: 0.6, 100: 0.2, 130: 0.2}),
        (
            "cosine_restarts",
            {"end": 0.0, "period": 10, "growth": 2},  # anew at 10, 30 and 70
            {0: 1, 5: 0.5, 9: (1 + math.cos(0.9 * math.pi)) / 2, 10: 1, 20: 0.5, 30: 1, 50: 0.5, 70: 1},
        ),
        ("cosine_restarts", {"end": 0.1, "period": 20, "growth": 1}, {0: 1, 10: 0.55, 20: 1, 30: 0.55, 80: 1}),
    ],
)
def test_schedule_passes_through_its_points(shape, arguments, points):
    schedule = Schedule(shape, total_steps=100, warmup_steps=0, arguments=arguments)
    for at, expected in points.items():
        assert schedule(at) == pytest.approx(expected, abs=1e-12), at


@pytest.mark.parametrize("shape", ["constant", "cosine", "cosine_restarts"])
def test_schedule_warms_up_linearly_to_the_peak(shape):
    arguments = {"constant": {}, "cosine": {"end": 0.0}, "cosine_restarts": {"end": 0.0, "period": 20, "growth": 1}}
    schedule = Schedule(shape, total_steps=110, warmup_steps=10, arguments=arguments[shape])
    assert [schedule(at) for at in range(10)] == pytest.approx([(at + 1) / 10 for at in range(10)])
    assert schedule(10) == 1.0


def test_schedule_begins_its_cosine_after_the_warm_up():
    cosine = Schedule("cosine", total_steps=110, warmup_steps=10, arguments={"end": 0.0})
    assert cosine(60) == pytest.approx(0.5)
    assert cosine(110) == pytest.approx(0.0)
    restarts = Schedule(
        "cosine_restarts", total_steps=110, warmup_steps=10, arguments={"end": 0, "period": 40, "growth": 1}
    )
    assert [restarts(at) for at in (30, 50, 70)] == pytest.approx([0.5, 1.0, 0.5])


def test_schedule_counts_milestones_from_the_start_of_the_run():
    schedule = Schedule("multistep", 100, 20, {"milestones": [30], "gamma": 0.5})
    assert [schedule(at) for at in (0, 19, 20, 29, 30)] == pytest.approx([0.05, 1.0, 1.0, 1.0, 0.5])


@pytest.mark.parametrize(
    ("words", "milestones", "gamma"),
    [
        (["method=moco_v1"], [60, 80], 0.1),
        (["method=compress"], [69, 92], 0.2),
        (["method=wmse", "scheduler.warmup_epochs=0"], [95, 98], 0.2),
        (["method=moco_v1", "scheduler.milestones_epochs=[2,4.5]"], [20, 45], 0.1),
        (["method=moco_v1", "scheduler.milestones_steps=[7]", "scheduler.milestones_epochs=[2]"], [7], 0.1),
    ],
)
def test_milestones_are_steps_or_epochs_or_shares_of_the_run(words, milestones, gamma):
    scheduler = compose_choices("pretrain", Prepared(config_dirs=[]), ["dataset=cifar10", *words]).scheduler
    schedule = _schedule(scheduler, steps_per_epoch=10, total=100)
    drops = [at for at in range(1, 100) if schedule(at) != schedule(at - 1)]
    assert drops == milestones
    assert schedule(99) == pytest.approx(gamma ** len(milestones))


@pytest.mark.parametrize(
    ("word", "printed"),
    [
        ("milestones_share=[60,80]", "expected parts of the run, between 0 and 1"),
        ("milestones_share=0.5", "expected a list"),
        ("milestones_epochs=100", "expected a list"),
        (
            "milestones_share=null",
            "milestones_epochs, scheduler.milestones_share or scheduler.milestones_steps must be set",
        ),
    ],
)
def test_milestones_that_mean_nothing_are_refused(word, printed, capsys):
    assert main(["pretrain", "method=moco_v1", f"scheduler.{word}", "plan_only=true"]) == 2
    assert printed in capsys.readouterr().err


def plan_of(*words):
    """Of 1,438 images in batches of 64: 22 steps an epoch."""
    common = ["dataset=digits", "method=simclr", "optimizer=sgd", "trainer.batch_size=64", "trainer.epochs=10"]
    common += ["optimizer.base_lr=0.2", "optimizer.weight_decay=0.04", "trainer.device=cpu"]
    return make_plan(compose_choices("pretrain", Prepared(config_dirs=[]), [*common, *words]), digits("train", 16))


def test_a_plan_counts_in_steps():
    words = ("scheduler.warmup_epochs=2", "trainer.save_every_epochs=0.5", "evaluation.knn_every_epochs=3")
    plan = plan_of("optimizer.lr_scaling=linear", *words, "trainer.save_every_steps=null")
    assert (plan.steps_per_epoch, plan.total_steps, plan.num_images) == (22, 220, 1438)
    assert (plan.save_every_steps, plan.knn_every_steps, plan.schedule.warmup_steps) == (11, 66, 44)
    assert plan.lr == pytest.approx(0.05)
    assert [plan.lr_at(step) for step in (0, 43, 44)] == pytest.approx([0.05 / 44, 0.05, 0.05])
    assert plan.lr_at(132) == pytest.approx(0.025)  # half-way from 44 to 220
    assert [step for step in range(1, 221) if plan.evaluates_online_after(step)] == [66, 132, 198, 220]


def test_weight_decay_stays_or_goes_to_its_end_along_half_a_cosine():
    assert [plan_of().weight_decay_at(step) for step in (0, 100, 219)] == [0.04] * 3
    plan = plan_of("+optimizer.weight_decay_end=0.4", "scheduler.warmup_epochs=2")
    for step in (0, 50, 110, 220):  # from the first step on: the warm-up is the learning rate's
        expected = 0.04 + 0.36 * (1 - math.cos(math.pi * step / 220)) / 2
        assert plan.weight_decay_at(step) == pytest.approx(expected)


def test_a_warm_up_as_long_as_the_run_is_shortened_and_said():
    plan = plan_of("scheduler.warmup_epochs=10")
    assert plan.schedule.warmup_steps == 22
    assert [plan.lr_at(step) for step in (0, 21, 22)] == pytest.approx([plan.lr / 22, plan.lr, plan.lr])
    (line,) = (line for line in plan.lines() if line.startswith("lr "))
    assert "warm-up 22 steps, a tenth of the run, as the scheduler's 220 would not end in it" in line
    plan = plan_of("scheduler.warmup_epochs=9.9")
    assert plan.schedule.warmup_steps == 218
    assert "a tenth" not in "".join(plan.lines())


def test_schedule_of_a_run_that_is_all_warm_up_ends_at_the_peak():
    schedule = Schedule("cosine", total_steps=10, warmup_steps=10, arguments={"end": 0.0})
    assert [schedule(at) for at in (9, 10, 11)] == [1.0, 1.0, 0.0]


def test_a_stretched_schedule_is_cut_off_where_the_run_ends():
    stretched = Schedule("cosine", 100, 10, {"end": 0.0}, stretch=1.25)
    longer = Schedule("cosine", 125, 10, {"end": 0.0})
    assert [stretched(at) for at in range(100)] == [longer(at) for at in range(100)]
    assert stretched(99) > 0.1


@pytest.mark.parametrize(("at", "expected"), [(0, 0.04), (15, 0.055), (30, 0.07), (100, 0.07)])
def test_temperatures_warm_up_in_equal_steps(at, expected):
    assert warmed_up(0.04, 0.07, at, 30) == pytest.approx(expected)
    assert warmed_up(0.04, 0.07, at, 0) == 0.07


@pytest.mark.parametrize(("start", "end"), [(0.99, 1.0), (0.04, 0.4), (0.996, 0.9)])
def test_cosine_between_runs_from_start_to_end(start, end):
    values = [cosine_between(start, end, step, 200) for step in range(201)]
    assert values[0] == pytest.approx(start)
    assert values[100] == pytest.approx((start + end) / 2)
    assert values[200] == pytest.approx(end)
    assert values == sorted(values, reverse=end < start)


def test_cosine_between_is_byols_momentum():
    """BYOL, section 3.3: 1 - (1 - m) · (cos(π t / T) + 1) / 2."""
    for step in (0, 17, 333, 1000):
        expected = 1 - (1 - 0.996) * (math.cos(math.pi * step / 1000) + 1) / 2
        assert cosine_between(0.996, 1.0, step, 1000) == pytest.approx(expected, abs=1e-12)


# --- Optimizers ---

SETTINGS = {
    "SGD": {"momentum": 0.9, "nesterov": True},
    "Adam": {"betas": [0.9, 0.99]},
    "AdamW": {"betas": [0.9, 0.99]},
    "RMSprop": {"momentum": 0.9},
}


def optimizer_of(target, module, **settings):
    node = {"base_lr": 0.1, "lr_scaling": "none", "weight_decay": 0.05, "exclude_bias_and_norm": True, **settings}
    plan = SimpleNamespace(lr=0.1, device=torch.device("cpu"))
    return build_optimizer(OmegaConf.create({"_target_": target, **node}), Method(module, facts()), plan)


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 7), nn.ReLU(), nn.Linear(7, 3))


def trained(module, optimizer, steps=8):
    generator = torch.Generator().manual_seed(1)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = 0.02 * (step + 1)
        module(torch.randn(16, 5, generator=generator)).pow(2).mean().backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return module.state_dict()


@pytest.mark.parametrize("name", SETTINGS)
def test_optimizers_equal_torchs_plain_ones_to_rounding(name):
    module, reference = network(), network()
    optimizer = optimizer_of(f"torch.optim.{name}", module, **SETTINGS[name])
    assert bool(optimizer.defaults.get("fused")) == (name not in ("RMSprop", "SGD"))  # none; fails on thawed weights
    decayed, others = [reference[0].weight, reference[2].weight], [reference[0].bias, reference[2].bias]
    groups = [{"params": decayed, "weight_decay": 0.05}, {"params": others, "weight_decay": 0.0}]
    plain = getattr(torch.optim, name)(groups, lr=0.1, foreach=False, **SETTINGS[name])
    actual, expected = trained(module, optimizer), trained(reference, plain)
    for tensor in expected:
        torch.testing.assert_close(actual[tensor], expected[tensor], atol=1e-6, rtol=1e-5)
        assert not torch.equal(expected[tensor], network().state_dict()[tensor])


def test_a_user_can_choose_the_plain_optimizer():
    assert not optimizer_of("torch.optim.SGD", network(), fused=False).defaults["fused"]


def test_lars_is_sslctls_own():
    optimizer = optimizer_of("sslctl.training.optim.LARS", network(), momentum=0.9, trust=0.01)
    assert type(optimizer) is LARS
    assert [group["adapt"] for group in optimizer.param_groups] == [True, False]
    assert "fused" not in optimizer.defaults


class TwoRates(Method):
    """A method whose backbone learns at a tenth of its head's rate, which does not follow the schedule."""

    def __init__(self, backbone):
        super().__init__(backbone, facts())
        self.head = nn.Linear(8, 2)

    def parameter_groups(self):
        head = {"params": list(self.head.parameters()), "scheduled": False}
        return [{"params": list(self.backbone.parameters()), "lr_scale": 0.1, "weight_decay_scale": 2.0}, head]


def test_in_pretraining_layers_learn_the_slower_the_deeper_and_heads_learn_at_the_full_rate():
    """0.5 to the power of the layers in between; times what the method itself asks for."""
    method = TwoRates(moco().backbone)
    plan = SimpleNamespace(lr=0.1, device=torch.device("cpu"))
    node = {"_target_": "torch.optim.SGD", "base_lr": 0.1, "weight_decay": 0.05, "exclude_bias_and_norm": True}
    optimizer = build_optimizer(OmegaConf.create({**node, "layer_decay": 0.5}), method, plan)
    names = {id(p): name for name, p in method.named_parameters()}
    groups = {names[id(p)]: group for group in optimizer.param_groups for p in group["params"]}
    assert groups.keys() == set(names.values())
    scales = {"backbone.network.conv1": 0.0125, "backbone.network.bn1": 0.0125, "head": 1.0}
    scales |= {"backbone.network.layers.0": 0.025, "backbone.network.layers.1": 0.05}
    for name, group in groups.items():
        assert group["lr_scale"] == pytest.approx(next(s for part, s in scales.items() if name.startswith(part))), name
        assert group["scheduled"] == name.startswith("backbone")
    assert groups["backbone.network.conv1.weight"]["weight_decay"] == pytest.approx(
        0.1
    )  # decay_scale stays the method's


def test_the_teacher_has_no_part_in_the_layers_rates():
    method = moco()
    plan = SimpleNamespace(lr=0.1, device=torch.device("cpu"))
    node = {"_target_": "torch.optim.SGD", "weight_decay": 0.0, "exclude_bias_and_norm": False, "layer_decay": 0.5}
    optimizer = build_optimizer(OmegaConf.create(node), method, plan)
    trained = [id(p) for group in optimizer.param_groups for p in group["params"]]
    assert sorted(trained) == sorted(id(p) for p in method.parameters() if p.requires_grad)
    assert len({group["lr_scale"] for group in optimizer.param_groups}) == 4  # stem, two blocks, projector
