"""A step without memory: one line that says what would fit, and a run that goes on."""

import platform
from types import SimpleNamespace

import pytest
import torch

from sslctl.ops.allocator import keep_freed_memory
from sslctl.training.memory import OutOfMemory, explain_out_of_memory
from tests.by_hand import moco
from tests.own_methods import own
from tests.processes import call
from tests.runs import MOCO, command, differences, finish, newest, pretrain, tensors
from tests.test_timing import MOCO_VIT

# --- Memory ---

LIMITED = ("trainer.save_every_steps=2", *own("HungryMoCo"))


@pytest.mark.parametrize("kind", ["cuda", "torch", "cpu", "python"])
def test_a_step_without_memory_ends_in_one_line_that_says_what_would_fit(kind, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("TEST_MEMORY", kind)
    assert pretrain(tmp_path / "run", *MOCO, *LIMITED) == 1
    printed = capsys.readouterr().err.strip()
    assert len(printed.splitlines()) == 1
    for word in ("trainer.batch_size=256", "trainer.accumulate_steps=2", "trainer.accumulate_approximately=true"):
        assert word in printed
    assert newest(tmp_path / "run").name == "step-2"
    tensors(tmp_path / "run")  # verifies it
    assert not list((tmp_path / "run" / "checkpoints").glob(".*"))


@pytest.mark.parametrize("given", [1, 4])
def test_accumulation_is_proposed_as_it_is_where_it_is_exact(given, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("TEST_MEMORY", "cpu")
    words = (*MOCO_VIT, *LIMITED, f"trainer.accumulate_steps={given}")
    assert pretrain(tmp_path / "run", *words) == 1
    printed = capsys.readouterr().err
    assert f"trainer.accumulate_steps={2 * given}" in printed
    assert "approximately" not in printed


@pytest.mark.parametrize(
    ("batch", "processes", "given", "proposed"),
    [(250, 1, 2, 5), (9, 1, 1, 3), (7, 1, 1, 7), (256, 2, 1, 2), (6, 2, 1, 3), (4, 1, 4, None), (2, 2, 1, None)],
)
def test_the_proposed_accumulation_divides_the_batch(batch, processes, given, proposed):
    recomputed = batch == 9
    sizes = {"batch_size": batch, "processes": processes, "accumulate_steps": given}
    plan = SimpleNamespace(**sizes, recomputed=recomputed, compiled=False)
    with pytest.raises(OutOfMemory) as raised, explain_out_of_memory(plan, moco()):
        raise MemoryError
    assert ("trainer.activation_checkpointing=true" in str(raised.value)) != recomputed
    if proposed is None:
        assert "accumulate" not in str(raised.value)
    else:
        assert f"trainer.accumulate_steps={proposed} " in str(raised.value)


def test_a_run_without_memory_continues_exactly_when_there_is_some(tmp_path, monkeypatch):
    monkeypatch.setenv("TEST_MEMORY", "cuda")
    assert pretrain(tmp_path / "run", *MOCO, *LIMITED) == 1
    words = (*MOCO, "trainer.save_every_steps=2")
    straight = finish(tmp_path / "straight", *words)
    monkeypatch.setattr("tests.own_methods.HungryMoCo.starve", staticmethod(lambda kind, batch: None))
    finish(tmp_path / "run", *MOCO, *LIMITED)
    actual = tensors(tmp_path / "run")
    assert differences(actual, tensors(straight)) == []


def test_a_plan_that_does_not_fit_says_so(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("TEST_MEMORY", "torch")
    assert pretrain(tmp_path / "run", *MOCO, *LIMITED, "plan_only=true") == 1
    assert "trainer.batch_size=256" in capsys.readouterr().err


def test_other_errors_keep_their_words(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("TEST_MEMORY", "none")
    assert pretrain(tmp_path / "run", *MOCO, *LIMITED) == 1
    printed = capsys.readouterr().err
    assert "mat1 and mat2" in printed
    assert "batch_size" not in printed


@pytest.mark.slow
def test_a_process_that_reaches_its_limit_leaves_valid_checkpoints(tmp_path):
    run = tmp_path / "run"
    assert call(command(run, *MOCO, *LIMITED), tmp_path, environment={"TEST_MEMORY": "limit"}) == 1
    last = (tmp_path / "output").read_text().strip().splitlines()[-1]
    for word in ("out of memory with trainer.batch_size=256", "trainer.accumulate_steps=2", "DefaultCPUAllocator"):
        assert word in last
    assert newest(run).name == "step-2"
    tensors(run)


def test_the_allocator_can_be_set_again():
    for _ in range(3):
        keep_freed_memory()
        blocks = [torch.full((1 << 20,), float(i)) for i in range(20)]
        assert [block.sum().item() for block in blocks] == [float(i << 20) for i in range(20)]


FAULTS = """
import ctypes, resource
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_void_p]
libc.memset.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t]
def faults():
    first = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    block = libc.malloc(40 << 20)
    libc.memset(block, 1, 40 << 20)
    libc.free(block)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - first
faults()
print(min(faults() for _ in range(5)))
"""


@pytest.mark.slow
@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other C libraries have no mallopt")
def test_a_command_keeps_the_memory_that_it_frees(spawn, workdir):
    """A block that is asked for again faults in every page of it, unless a command was started in this process."""
    command = "from sslctl.cli import main\nassert main(['runs', '.']) == 0\n"
    returned, kept = (int(spawn(program=("-c", code)).out.split()[-1]) for code in (FAULTS, command + FAULTS))
    assert kept < returned / 5
