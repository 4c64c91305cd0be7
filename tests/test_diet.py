"""DIET: the classes are the images' positions, wherever these come from; a classifier beyond the memory is refused."""

import math
from types import SimpleNamespace

import pytest
import torch
from omegaconf import OmegaConf
from torch import nn

from sslctl.errors import InputError
from sslctl.factory.from_config import build_source
from sslctl.methods import diet
from sslctl.methods.diet import DIET
from sslctl.ops import memory
from sslctl.runs.reading import read_config
from sslctl.training.memory import refuse_beyond_memory
from tests.by_hand import facts, tiny_backbone
from tests.methods import built, coloured_images, words_of
from tests.runs import differences, finish, metrics, pretrain, tensors

FOLDER = ("method=diet", "scheduler.warmup_epochs=1", "dataset=imagefolder", "trainer.batch_size=16")
SETTINGS = {"label_smoothing": 0.8, "unit_features": False, "head_epochs": 0.0}


def test_it_comes_to_know_every_image_of_a_batch():
    its = built("diet", "method.label_smoothing=0.2")
    optimizer = torch.optim.AdamW(its.method.parameters(), lr=0.01)
    for _ in range(40):
        out = its.method(its.batch, its.method.schedules(0))
        optimizer.zero_grad()
        out["loss"].backward()
        optimizer.step()
    assert out["top1"] == 1
    share = 0.2 / its.method.facts.num_images  # of each of 100 images, and 0.8 more of the own one
    least = -(0.8 + share) * math.log(0.8 + share) - 99 * share * math.log(share)
    assert least <= out["loss"] < least + 0.5  # 4.6 before


def test_the_classes_are_the_images_of_the_training_part(tmp_path):
    """A fifth is held out of a folder without a test split: those images have no row."""
    run = finish(tmp_path / "run", *FOLDER, f"dataset.root={coloured_images()}", "dataset.image_size=16")
    dataset = OmegaConf.create(read_config(run)["dataset"])
    train, test = (len(build_source(dataset, split)) for split in ("train", "test"))
    assert tensors(run)["method/classifier.weight"].shape == (train, 8)
    assert (train + test, 80 < train < 110) == (120, True)


@pytest.mark.slow
@pytest.mark.parametrize("epochs", [0.0, 1.0])
def test_the_backbone_stays_as_it_is_while_the_classifier_alone_is_trained(epochs, tmp_path):
    words = (*words_of("diet"), f"method.head_epochs={epochs}", "evaluation.knn_every_epochs=0.4")
    states = {}
    for steps in (1, 5):
        assert pretrain(tmp_path / f"{steps}", *words, stop_after=steps) == 143
        states[steps] = tensors(tmp_path / f"{steps}")
    changed = differences(states[1], states[5])
    assert "method/classifier.weight" in changed
    assert any(name.startswith("method/backbone.") for name in changed) == (epochs == 0.0)  # BatchNorm statistics, too
    run = finish(tmp_path / "5", *words)
    assert any(name.startswith("method/backbone.") for name in differences(tensors(run), states[5]))
    assert [m["backbone_frozen"] for m in metrics(run) if "loss" in m] == [
        float(step < 5 * epochs) for step in range(10)
    ]


def test_a_run_on_more_images_begins_with_a_classifier_of_theirs(tmp_path, capsys):
    first = finish(tmp_path / "first", "method=diet", "scheduler.warmup_epochs=1")
    again = (*FOLDER, f"dataset.root={coloured_images()}", f"continue_run={first}", "dataset.channels=1")
    assert pretrain(tmp_path / "second", *again, stop_after=1) == 143
    assert "classifier.weight begin anew" in capsys.readouterr().out


@pytest.mark.parametrize("smoothing", [-0.1, 1.0])
def test_a_smoothing_that_leaves_no_image_a_class_is_refused(smoothing):
    with pytest.raises(ValueError, match="expected 0 or more, and less than 1"):
        DIET(tiny_backbone(), facts(), **SETTINGS | {"label_smoothing": smoothing})


# --- Memory ---


@pytest.mark.parametrize(
    ("there_is_a_gpu", "gib", "refused"), [(False, 3.9, True), (False, 4.1, False), (True, 3.9, False)]
)
def test_a_classifier_beyond_the_memory_is_refused_before_it_is_built(there_is_a_gpu, gib, refused, monkeypatch):
    """2²⁸ weights: 1 GiB, and 4 with the gradient and Adam's moments, of which a GPU's machine holds the weights alone."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: there_is_a_gpu)
    monkeypatch.setattr(diet, "total_memory", lambda device: int(gib * 2**30))
    made = []
    monkeypatch.setattr(nn, "Linear", lambda *sizes, bias: made.append(sizes) or nn.Identity())
    backbone = SimpleNamespace(embed_dim=2**8)
    if refused:
        with pytest.raises(
            InputError, match=r"256 weights for each of 1,048,576 images: 1\.0 GiB, and 4\.0 GiB with"
        ) as error:
            DIET(backbone, facts(num_images=2**20), **SETTINGS)
        assert "This machine has 3.9 GiB" in str(error.value)
        assert made == []
    else:
        DIET(backbone, facts(num_images=2**20), **SETTINGS)
        assert made == [(2**8, 2**20)]


@pytest.mark.parametrize(("device", "processes", "copies"), [("cpu", 1, 4), ("cpu", 2, 8), ("cuda", 2, 4)])
def test_what_is_trained_must_fit_its_device_with_gradients_and_moments(device, processes, copies, monkeypatch):
    method = nn.Linear(2**10, 2**10, bias=False)  # 4 MiB
    plan = SimpleNamespace(device=torch.device(device), processes=processes)
    adam = {"betas": [0.9, 0.999]}
    for bytes_there, fits in ((copies * 2**22, True), (copies * 2**22 - 1, False)):
        monkeypatch.setattr("sslctl.training.memory.total_memory", lambda device, there=bytes_there: there)
        if fits:
            refuse_beyond_memory(plan, method, adam)
        else:
            with pytest.raises(InputError, match=f"take {4 * copies}.0 MiB, .*weight alone has weights of 4.0 MiB"):
                refuse_beyond_memory(plan, method, adam)
    refuse_beyond_memory(plan, method, {"momentum": 0.9})  # one copy fewer
    method.requires_grad_(False)
    refuse_beyond_memory(plan, method, adam)


def test_a_containers_limit_is_the_machines_memory(tmp_path, monkeypatch):
    cpu, limit = torch.device("cpu"), tmp_path / "memory.max"
    whole = memory.total_memory(cpu)
    assert whole > 2**28
    monkeypatch.setattr(memory, "_LIMITS", (str(limit), str(tmp_path / "missing")))
    limit.write_text("max\n")
    assert memory.total_memory(cpu) >= whole
    limit.write_text("1048576\n")
    assert memory.total_memory(cpu) == 2**20


def test_the_plan_says_what_the_classifier_takes():
    (note,) = built("diet").method.notes()
    assert "a row for each of 100 images: 0.0 MiB" in note
