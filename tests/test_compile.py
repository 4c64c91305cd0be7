"""Compiled graphs: the numbers of eager ones, exact resume, checkpoints of one kind."""

import shutil

import pytest
import torch
from torch._dynamo.utils import counters

import sslctl
from sslctl.models.freezing import Freezing
from sslctl.runs.checkpoint import load, load_tensors
from tests.by_hand import make_batch, moco, tiny_backbone
from tests.runs import MOCO, SUPERVISED, differences, finish, metrics, tensors

# --- Compiled graphs ---

COMPILED = "trainer.compile=true"
needs_compiler = pytest.mark.skipif(
    shutil.which("g++") is None, reason="torch.compile needs a C++ compiler: no g++ here"
)
EVALUATED = (*MOCO, "backbone=mlp", "backbone.widths=[8]")
EVALUATED += ("evaluation.knn_every_epochs=1",)  # other graphs, those of evaluation, in between


def small_moco():
    """A MoCo whose few layers take a compiler little time: a convolution, BatchNorm, a residual sum."""
    return moco(tiny_backbone(widths=[4]))


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    """The straight compiled run."""
    return finish(tmp_path_factory.mktemp("compiled") / "run", *EVALUATED, COMPILED)


@pytest.mark.slow
@needs_compiler
def test_compiled_parts_give_the_loss_and_gradients_of_eager_ones():
    torch.compiler.reset()
    batch, results = make_batch(8), []
    for graphs in (False, True):
        method = small_moco()
        for child in method.children() if graphs else ():
            child.compile(dynamic=False)
        out = method.train()(batch, {})
        out["loss"].backward()
        results.append((out["loss"].detach(), {n: p.grad for n, p in method.named_parameters() if p.grad is not None}))
    (expected, plain), (actual, gradients) = results
    torch.testing.assert_close(actual, expected, atol=1e-4, rtol=0)
    assert gradients.keys() == plain.keys()
    for name in plain:
        torch.testing.assert_close(gradients[name], plain[name], atol=1e-4, rtol=1e-4)


@pytest.mark.slow
@needs_compiler
def test_a_compiled_run_resumes_exactly_around_its_evaluations(compiled, tmp_path):
    run = finish(tmp_path / "run", *EVALUATED, COMPILED, stops=(1, 5, 7, 10))
    assert differences(tensors(run), tensors(compiled)) == []
    assert metrics(run) == metrics(compiled)


@pytest.mark.slow
@needs_compiler
def test_compiled_parts_freeze_and_thaw_as_eager_ones():
    torch.compiler.reset()
    batch, results = make_batch(8), []
    for graphs in (False, True):
        method = small_moco().train()
        if graphs:
            method.backbone.compile(dynamic=False)
        freezing = Freezing(method, 2, until=1)
        for step in (0, 1):
            freezing.at(step)
            method.zero_grad(set_to_none=True)
            method(batch, {})["loss"].backward()
            gradients = {n: p.grad for n, p in method.backbone.named_parameters() if p.grad is not None}
            results.append(gradients | dict(method.backbone.named_buffers()))
            results[-1] = {name: tensor.clone() for name, tensor in results[-1].items()}
    frozen, thawed = results[:2]
    assert 0 < len(frozen) < len(thawed)
    for expected, actual in zip(results[:2], results[2:], strict=True):
        assert actual.keys() == expected.keys()
        for name in expected:
            torch.testing.assert_close(actual[name], expected[name], atol=1e-4, rtol=1e-4)


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
    eager = finish(tmp_path / "eager", *EVALUATED)
    actual, expected = tensors(compiled), tensors(eager)
    assert actual.keys() == expected.keys()
    losses = [[record["loss"] for record in metrics(run) if "loss" in record] for run in (compiled, eager)]
    assert losses[0] == pytest.approx(losses[1], abs=1e-3)
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
