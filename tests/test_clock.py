"""What a step costs: time by part, memory, fused optimizers, compiled graphs, and the words when memory is short."""

import json
import shutil
from types import SimpleNamespace

import pytest
import torch
from omegaconf import OmegaConf
from torch import nn
from torch._dynamo.utils import counters

import sslctl
import sslctl.ops.timing
from sslctl.methods.base import Method
from sslctl.ops.allocator import keep_freed_memory
from sslctl.ops.timing import PARTS, Clock, format_shares, shares
from sslctl.runs.checkpoint import load, load_tensors
from sslctl.training.accumulation import explain_out_of_memory
from sslctl.training.memory import OutOfMemory
from sslctl.training.optim import LARS
from sslctl.training.setup import build_optimizer
from tests.test_methods import facts, make_batch, moco, simclr, tiny_backbone
from tests.test_resume import VIT
from tests.training import (
    MOCO,
    SIMCLR,
    SUPERVISED,
    call,
    command,
    differences,
    finish,
    image_folder,
    metrics,
    newest,
    own,
    pretrain,
    slow,
    tensors,
)

MOCO_VIT = ("method=moco", "method.queue_size=600", "method.batchnorm_groups=1", *VIT)

# --- The clock ---


def test_the_parts_add_up_to_the_elapsed_time(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(sslctl.ops.timing, "time", SimpleNamespace(monotonic=lambda: now[0]))
    clock = Clock(torch.device("cpu"))
    for part, seconds in (("data", 1.0), ("forward", 2.0), ("data", 0.5), ("backward", 4.0)):
        now[0] += seconds
        clock.lap(part)
    now[0] += 8  # not yet anyone's
    assert clock.split() == {"data": 1.5, "forward": 2.0, "backward": 4.0}
    clock.lap("saving")
    assert clock.split() == {"saving": 8.0}
    assert clock.split() == {}


def test_shares_are_of_the_whole():
    seconds = {"forward": 3.0, "data": 1.0}
    assert shares(seconds) == {"time_data": 0.25, "time_forward": 0.75}
    assert format_shares(seconds) == "data 25 %, forward 75 %"
    assert shares({}) == {}
    assert format_shares({}) == ""


@pytest.fixture(scope="module")
def streamed(tmp_path_factory):
    root = image_folder(tmp_path_factory.mktemp("images"), images=20)
    return (
        *("dataset=imagefolder", f"dataset.root={root}", "dataset.image_size=16", "trainer.batch_size=4"),
        *("method=moco", "method.queue_size=20", "method.batchnorm_groups=2", "trainer.workers=0"),
    )


@pytest.mark.parametrize(
    "choice", ["memory", "streamed", slow("accumulated"), slow("fp16"), slow("evaluated and saved")]
)
def test_logged_shares_of_time_sum_to_one(choice, streamed, tmp_path):
    recipe = {
        "memory": SIMCLR,
        "streamed": streamed,
        "accumulated": (*MOCO_VIT, "trainer.accumulate_steps=2"),
        "fp16": (*MOCO, "trainer.precision=fp16"),
        "evaluated and saved": (*MOCO, "evaluation.knn_every_epochs=0.4", "trainer.save_every_steps=1"),
    }[choice]
    run = finish(tmp_path / "run", *recipe)
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    logged = [line for line in lines if "loss" in line]
    assert len(logged) == (8 if choice == "streamed" else 10)
    for line in logged:
        times = {name: value for name, value in line.items() if name.startswith("time_")}
        assert sum(times.values()) == pytest.approx(1)
        assert times.keys() <= {f"time_{part}" for part in PARTS}
        assert {"time_data", "time_views", "time_forward", "time_backward", "time_optimizer"} <= times.keys()
        assert all(value >= 0 for value in times.values())
    assert all(line["images_per_second"] > 0 for line in logged[1:])
    if choice == "evaluated and saved":
        assert any("time_evaluation" in line for line in logged)
        assert all("time_saving" in line for line in logged[1:])


# --- plan_only=true ---


@pytest.mark.parametrize(
    ("recipe", "steps"),
    [
        *((SIMCLR, 10), ((*MOCO, "trainer.epochs=1", "trainer.batch_size=1000"), 1)),
        *(slow((*MOCO, "trainer.epochs=2", "trainer.batch_size=1000"), 2), slow((*MOCO, "trainer.epochs=4"), 20)),
        slow((*MOCO, "trainer.epochs=3", "trainer.batch_size=1000"), 3),
        slow((*MOCO, "trainer.epochs=4", "trainer.batch_size=1000"), 4),
        slow((*MOCO_VIT, "trainer.accumulate_steps=4", "trainer.precision=fp16"), 10),
        slow(SUPERVISED, 10),
    ],
)
def test_a_plan_tells_what_a_run_will_cost_and_writes_nothing(recipe, steps, workdir, capsys):
    assert pretrain(workdir / "run", *recipe, "plan_only=true") == 0
    said = capsys.readouterr().out
    (cost,) = [line for line in said.splitlines() if line.startswith("time ")]
    assert "ms a step" in cost
    assert "images/s" in cost
    (spent,) = [line for line in said.splitlines() if line.startswith("spent on ")]
    percents = {w.rsplit(" ", 2)[0]: int(w.split()[-2]) for w in spent.removeprefix("spent on   ").split(", ")}
    assert percents.keys() == {"data", "views", "forward", "backward", "optimizer"}
    assert abs(sum(percents.values()) - 100) <= 3
    (memory,) = [line for line in said.splitlines() if line.startswith("memory ")]
    assert "a checkpoint takes" in memory
    assert f"{steps} = " in said
    assert list(workdir.iterdir()) == []


def test_the_time_of_a_plan_is_that_of_a_step(workdir, capsys):
    assert pretrain(workdir / "run", *MOCO, *own("NappingMoCo"), "trainer.epochs=4", "plan_only=true") == 0
    (cost,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("time ")]
    assert 50 <= int(cost.split()[1]) < 150  # the first steps, which take longer, are left out


# --- Memory ---

LIMITED = ("trainer.save_every_steps=2", *own("HungryMoCo"))


@pytest.mark.parametrize("kind", ["cuda", "torch", "cpu", "python"])
def test_a_step_without_memory_ends_in_one_line_that_says_what_would_fit(kind, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("TEST_MEMORY", kind)
    assert pretrain(tmp_path / "run", *MOCO, *LIMITED) == 1
    said = capsys.readouterr().err.strip()
    assert len(said.splitlines()) == 1
    for word in ("trainer.batch_size=256", "trainer.accumulate_steps=2", "trainer.accumulate_approximately=true"):
        assert word in said
    assert newest(tmp_path / "run").name == "step-2"
    tensors(tmp_path / "run")  # verifies it
    assert not list((tmp_path / "run" / "checkpoints").glob(".*"))


@pytest.mark.parametrize("given", [1, 4])
def test_accumulation_is_proposed_as_it_is_where_it_is_exact(given, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("TEST_MEMORY", "cpu")
    words = (*MOCO_VIT, *LIMITED, f"trainer.accumulate_steps={given}")
    assert pretrain(tmp_path / "run", *words) == 1
    said = capsys.readouterr().err
    assert f"trainer.accumulate_steps={2 * given}" in said
    assert "approximately" not in said


@pytest.mark.parametrize(
    ("batch", "processes", "given", "proposed"),
    [(250, 1, 2, 5), (9, 1, 1, 3), (7, 1, 1, 7), (256, 2, 1, 2), (6, 2, 1, 3), (4, 1, 4, None), (2, 2, 1, None)],
)
def test_the_proposed_accumulation_divides_the_batch(batch, processes, given, proposed):
    plan = SimpleNamespace(batch_size=batch, processes=processes, accumulate_steps=given)
    with pytest.raises(OutOfMemory) as raised, explain_out_of_memory(plan, moco()):
        raise MemoryError
    if proposed is None:
        assert "accumulate" not in str(raised.value)
    else:
        assert f"trainer.accumulate_steps={proposed} " in str(raised.value)


def test_a_run_without_memory_continues_exactly_when_there_is_some(tmp_path, monkeypatch):
    monkeypatch.setenv("TEST_MEMORY", "cuda")
    assert pretrain(tmp_path / "run", *MOCO, *LIMITED) == 1
    words = (*MOCO, "trainer.save_every_steps=2")
    straight = finish(tmp_path / "straight", *words)
    monkeypatch.setattr("tests.training.HungryMoCo.starve", staticmethod(lambda kind, batch: None))
    finish(tmp_path / "run", *MOCO, *LIMITED)
    found = tensors(tmp_path / "run")
    assert differences(found, tensors(straight)) == []


def test_a_plan_that_does_not_fit_says_so(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("TEST_MEMORY", "torch")
    assert pretrain(tmp_path / "run", *MOCO, *LIMITED, "plan_only=true") == 1
    assert "trainer.batch_size=256" in capsys.readouterr().err


def test_other_errors_keep_their_words(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("TEST_MEMORY", "none")
    assert pretrain(tmp_path / "run", *MOCO, *LIMITED) == 1
    said = capsys.readouterr().err
    assert "mat1 and mat2" in said
    assert "batch_size" not in said


@pytest.mark.slow
def test_a_process_that_reaches_its_limit_leaves_valid_checkpoints(tmp_path):
    run = tmp_path / "run"
    assert call(command(run, *MOCO, *LIMITED), tmp_path, environment={"TEST_MEMORY": "limit"}) == 1
    last = (tmp_path / "output").read_text().strip().splitlines()[-1]
    for word in ("out of memory with trainer.batch_size=256", "trainer.accumulate_steps=2", "DefaultCPUAllocator"):
        assert word in last
    assert newest(run).name == "step-2"
    tensors(run)


def test_the_allocator_can_be_told_again():
    for _ in range(3):
        keep_freed_memory()
        keep_freed_memory.__wrapped__()
        blocks = [torch.full((1 << 20,), float(i)) for i in range(20)]
        assert [block.sum().item() for block in blocks] == [float(i << 20) for i in range(20)]


# --- Optimizers ---

SETTINGS = {
    "SGD": {"momentum": 0.9, "nesterov": True},
    "Adam": {"betas": [0.9, 0.99]},
    "AdamW": {"betas": [0.9, 0.99]},
    "RMSprop": {"momentum": 0.9},
}


def built(target, module, **settings):
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
    optimizer = built(f"torch.optim.{name}", module, **SETTINGS[name])
    assert bool(optimizer.defaults.get("fused")) == (name not in ("RMSprop", "SGD"))  # none; fails on thawed weights
    decayed, others = [reference[0].weight, reference[2].weight], [reference[0].bias, reference[2].bias]
    groups = [{"params": decayed, "weight_decay": 0.05}, {"params": others, "weight_decay": 0.0}]
    plain = getattr(torch.optim, name)(groups, lr=0.1, foreach=False, **SETTINGS[name])
    found, expected = trained(module, optimizer), trained(reference, plain)
    for tensor in expected:
        torch.testing.assert_close(found[tensor], expected[tensor], atol=1e-6, rtol=1e-5)
        assert not torch.equal(expected[tensor], network().state_dict()[tensor])


def test_a_user_can_choose_the_plain_optimizer():
    assert not built("torch.optim.SGD", network(), fused=False).defaults["fused"]


def test_lars_is_sslctls_own():
    optimizer = built("sslctl.training.optim.LARS", network(), momentum=0.9, trust=0.01)
    assert type(optimizer) is LARS
    assert [group["adapt"] for group in optimizer.param_groups] == [True, False]
    assert "fused" not in optimizer.defaults


# --- Compiled graphs ---

COMPILED = "trainer.compile=true"
needs_compiler = pytest.mark.skipif(
    shutil.which("g++") is None, reason="torch.compile needs a C++ compiler: no g++ here"
)


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    """The straight compiled run."""
    return finish(tmp_path_factory.mktemp("compiled") / "run", *MOCO, COMPILED)


@pytest.mark.slow
@needs_compiler
@pytest.mark.parametrize("make", [simclr, moco])
def test_compiled_parts_give_the_loss_and_gradients_of_eager_ones(make):
    torch.compiler.reset()
    batch, results = make_batch(8), []
    for graphs in (False, True):
        method = make()
        for child in method.children() if graphs else ():
            child.compile(dynamic=False)
        out = method.train()(batch, {})
        out["loss"].backward()
        results.append((out["loss"].detach(), {n: p.grad for n, p in method.named_parameters() if p.grad is not None}))
    (expected, plain), (found, gradients) = results
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)
    assert gradients.keys() == plain.keys()
    for name in plain:
        torch.testing.assert_close(gradients[name], plain[name], atol=1e-4, rtol=1e-4)


@pytest.mark.slow
@needs_compiler
@pytest.mark.parametrize("stops", [(1, 4, 7), (10,)])
def test_a_compiled_run_resumes_exactly(stops, compiled, tmp_path):
    run = finish(tmp_path / "run", *MOCO, COMPILED, stops=stops)
    assert differences(tensors(run), tensors(compiled)) == []
    assert metrics(run) == metrics(compiled)


@pytest.mark.slow
@needs_compiler
def test_a_compiled_run_resumes_exactly_around_its_evaluations(tmp_path):
    words = (*SUPERVISED, COMPILED, "backbone=mlp", "backbone.widths=[8]", "evaluation.knn_every_epochs=1")
    parts, whole = finish(tmp_path / "parts", *words, stops=(5, 7)), finish(tmp_path / "whole", *words)
    assert differences(tensors(parts), tensors(whole)) == []
    assert metrics(parts) == metrics(whole)


@pytest.mark.slow
@needs_compiler
def test_every_job_of_a_sweep_is_compiled(tmp_path):
    """torch stops compiling a function, and goes on without, once it has been compiled for a number of shapes."""
    words = (*SUPERVISED, COMPILED, "backbone=mlp", "trainer.epochs=1")
    with torch._dynamo.config.patch(recompile_limit=1, fail_on_recompile_limit_hit=True):
        for width in (4, 8):
            before = counters["stats"]["unique_graphs"]
            finish(tmp_path / str(width), *words, f"backbone.widths=[{width}]")
            assert counters["stats"]["unique_graphs"] == before + 2  # backbone and classifier


@pytest.mark.slow
@needs_compiler
def test_compiled_and_eager_checkpoints_are_of_one_kind(compiled, tmp_path):
    eager = finish(tmp_path / "eager", *MOCO)
    found, expected = tensors(compiled), tensors(eager)
    assert found.keys() == expected.keys()
    assert metrics(compiled)[0]["loss"] == pytest.approx(metrics(eager)[0]["loss"], abs=1e-4)
    for run in (compiled, eager):
        backbone, _ = sslctl.load(run)
        stored = load_tensors(run / "backbone.safetensors")
        assert all(torch.equal(tensor, stored[name]) for name, tensor in backbone.state_dict().items())


@pytest.mark.slow
@needs_compiler
def test_checkpoints_load_into_compiled_and_eager_modules_alike(tmp_path):
    from sslctl.runs.checkpoint import save
    from tests.test_checkpoint import state_at

    for number, (first, second) in enumerate([(True, False), (False, True)]):
        source, target = moco(tiny_backbone(0)), moco(tiny_backbone(1))
        for method, graphs in ((source, first), (target, second)):
            for child in method.children() if graphs else ():
                child.compile(dynamic=False)
        load(save(tmp_path / str(number), 1, source, state_at(1), 2), target)
        assert all(torch.equal(tensor, target.state_dict()[name]) for name, tensor in source.state_dict().items())
