"""What must hold for every method that compares embeddings: teachers, resume, processes, precision, and that it learns."""

import os
import signal
from types import SimpleNamespace

import pytest
import torch
from omegaconf import OmegaConf
from safetensors.torch import save_file

import sslctl.methods.deepcluster_v2
from sslctl.cli import main
from sslctl.errors import InputError
from sslctl.factory.from_config import refuse_other_views
from sslctl.factory.from_run import load_method
from sslctl.factory.teacher import load_teacher, save_teacher
from sslctl.methods.base import clip_each_, enqueue
from sslctl.models.backbones import ResNet
from sslctl.models.preprocess import Preprocess
from sslctl.runs import checkpoint
from sslctl.runs.checkpoint import load_tensors
from tests.built import DISTILLED, JOINT_EMBEDDING, SIDE, built, teacher_run, words_of
from tests.test_distributed import LOOKED_AT, distance, steps_of
from tests.training import (
    SIMCLR,
    differences,
    finish,
    in_processes,
    metrics,
    own,
    pretrain,
    slow,
    tensors,
)

TEACHERS = ("moco_v3", "byol", "dino", "ibot", "msn")
FAST = ("nnclr", "swav", "seed")


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    made = {}

    def run(name):
        if name not in made:
            made[name] = finish(tmp_path_factory.mktemp("straight") / "run", *words_of(name))
        return made[name]

    return run


# --- Teachers, frozen parts, queues ---


# --- What does not fit ---


@pytest.mark.parametrize("name", sorted({*JOINT_EMBEDDING, "simclr", "moco"} - {"cpc", "dcl-w", *DISTILLED}))
def test_too_few_views_are_refused(name):
    source, views = SimpleNamespace(gives="global"), SimpleNamespace(sizes=lambda: {"global": (1, SIDE)})
    with pytest.raises(InputError, match=f"method={name} compares 2 global views"):
        refuse_other_views(built(name).method, source, views, SimpleNamespace(method=name))


def test_too_few_views_are_refused_before_anything_is_written(tmp_path, capsys):
    words = (*words_of("swav"), "augmentation=lejepa", "augmentation.global.count=1")
    assert pretrain(tmp_path / "run", *words) == 2
    assert "method=swav compares 2 global views" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", ["ibot", "msn"])
def test_an_augmentation_without_the_local_views_that_a_method_counts_is_refused(name, tmp_path, capsys):
    assert pretrain(tmp_path / "run", *words_of(name), "augmentation=simclr") == 2
    said = capsys.readouterr().err
    assert said == (
        "sslctl: augmentation.local: this augmentation has no local views, which are asked for: augmentation=swav, dino"
        " or lejepa\n"
    )


@pytest.mark.parametrize("name", ["nnclr", "moco", "seed", "compress"])
def test_an_empty_queue_is_refused(name, tmp_path, capsys):
    size = "method.memory_size=0" if name == "compress" else "method.queue_size=0"
    words = words_of(name) if name in JOINT_EMBEDDING else ("method=moco",)
    assert pretrain(tmp_path / "run", *words, size) == 2
    assert "of 0 embeddings: expected at least 1" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["ibot", "msn"])
@pytest.mark.parametrize(
    ("words", "found"), [((), "global_pool=avg"), (("+backbone.kwargs.class_token=false",), "no class token")]
)
def test_a_class_token_is_needed_where_it_is_learnt_by(name, words, found, tmp_path, capsys):
    assert pretrain(tmp_path / "run", *words_of(name), "+backbone.kwargs.global_pool=avg", *words) == 2
    assert f"learns by the class token, this backbone has {found}" in capsys.readouterr().err


@pytest.mark.parametrize("name", TEACHERS)
def test_the_teacher_takes_no_gradient_and_moves_by_one_minus_momentum(name):
    method = built(name).method
    teachers = {n: p for n, p in method.named_parameters() if n.startswith("teacher_")}
    assert teachers
    assert not any(p.requires_grad for p in teachers.values())
    before = {n: p.clone() for n, p in teachers.items()}
    with torch.no_grad():
        for parameter in method.parameters():
            parameter.add_(parameter.requires_grad * torch.randn_like(parameter))
    s = method.schedules(0) | {"teacher_momentum": 0.9}
    method.before_step(s)
    centre = next((buffer for n, buffer in method.named_buffers() if n in ("center", "centers")), torch.zeros(0))
    method.after_step(s, {"logits": torch.zeros(1, *centre.shape)})  # of one process
    students = dict(method.named_parameters())
    for n, p in teachers.items():
        torch.testing.assert_close(p, 0.9 * before[n] + 0.1 * students[n.removeprefix("teacher_")])


def test_compress_moves_its_key_network_and_one_pointer():
    method = built("compress", "method.memory_size=64").method
    before = method.key_backbone.network.conv1.weight.clone()
    with torch.no_grad():
        method.backbone.network.conv1.weight.add_(1.0)
    student, teacher = torch.randn(4, 8), torch.randn(4, 8)
    method.after_step({}, {"student": student, "teacher": teacher})
    torch.testing.assert_close(method.key_backbone.network.conv1.weight, before + (1 - method.key_momentum))
    assert torch.equal(method.student_memory[:4], student)
    assert torch.equal(method.teacher_memory[:4], teacher)
    assert method.memory_pointer == 4


@pytest.mark.parametrize("name", DISTILLED)
def test_a_frozen_teacher_stays_as_it_is_and_is_no_part_of_the_state(name, tmp_path):
    run = finish(tmp_path / "run", *words_of(name))
    method = load_method(run).train()
    assert not any("network" in key and key.startswith("teacher.") for key in method.state_dict())
    assert not any(module.training for module in method.teacher.network.modules())
    assert not any(p.requires_grad for p in method.teacher.network.parameters())
    kept, source = load_tensors(run / "teacher.safetensors"), load_tensors(teacher_run() / "backbone.safetensors")
    assert kept.keys() == source.keys()
    assert all(torch.equal(kept[key], source[key]) for key in kept)


def test_a_distilled_run_is_evaluated_without_its_teachers_run(tmp_path, capsys):
    run = finish(tmp_path / "run", *words_of("seed"))
    teacher = teacher_run()
    away = teacher.rename(teacher.with_name("away"))
    try:
        assert main(["knn-eval", str(run), "features=teacher", "cache_gb=0"]) == 0
    finally:
        away.rename(teacher)


def test_another_teacher_is_another_run(tmp_path, capsys):
    run = finish(tmp_path / "run", *words_of("seed"))
    other = finish(
        tmp_path / "other", *SIMCLR, "scheduler.warmup_epochs=0", "trainer.epochs=1", "backbone.widths=[4,12]", "seed=1"
    )
    assert pretrain(run, *words_of("seed"), f"method.teacher={other}") == 2
    assert "content of teacher" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ((), "method.teacher is missing"),
        (("method.teacher={empty}/nothing",), "nothing: no such run or file"),
        (("method.teacher={empty}",), ": no run there"),
        (("method.teacher={empty}/bare.safetensors",), "backbone@method.teacher_backbone="),
        (("method.teacher={teacher}/metrics.jsonl", "backbone@method.teacher_backbone=resnet18"), "metrics.jsonl"),
        (
            ("method.teacher={empty}/bare.safetensors", "backbone@method.teacher_backbone=resnet18"),
            "tensors missing",
        ),
        (("method.teacher={teacher}", "backbone@method.teacher_backbone=resnet18"), "says itself which network"),
        (("method=compress", "method.teacher={teacher}", "method.variant=1q"), "backbones of equal width"),
    ],
)
def test_a_teacher_that_does_not_fit_is_refused_in_a_line(words, said, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    save_file(load_tensors(teacher_run() / "backbone.safetensors"), tmp_path / "empty" / "bare.safetensors")
    words = [word.format(teacher=teacher_run(), empty=tmp_path / "empty") for word in words]
    assert pretrain(tmp_path / "run", "method=seed", "scheduler.warmup_epochs=0", *words) == 2
    err = capsys.readouterr().err
    assert said in err
    assert "Traceback" not in err
    assert not (tmp_path / "run").exists()


def test_a_teacher_that_takes_other_sizes_only_is_refused(tmp_path, capsys):
    teacher = finish(
        tmp_path / "teacher",
        *("method=simclr", "backbone=mlp", "backbone.widths=[12]", "scheduler.warmup_epochs=0", "trainer.epochs=1"),
        *("dataset.image_size=10", "augmentation=moco_v2"),
    )
    assert pretrain(tmp_path / "run", "method=seed", "scheduler.warmup_epochs=0", f"method.teacher={teacher}") == 2
    assert "cannot take views of 8 pixels, its own images had 10: " in capsys.readouterr().err


def test_a_teachers_weights_may_come_from_a_file(tmp_path):
    save_file(load_tensors(teacher_run() / "backbone.safetensors"), tmp_path / "bare.safetensors")
    teacher = f"method.teacher={tmp_path}/bare.safetensors"
    network = ("backbone@method.teacher_backbone=small_resnet", "method.teacher_backbone.widths=[4,12]")
    run = finish(tmp_path / "run", *words_of("seed"), teacher, *network)
    straight = finish(tmp_path / "straight", *words_of("seed"))
    assert differences(tensors(run), tensors(straight)) == []  # the same teacher, whatever names it


COLOUR = Preprocess(3, 32, 32, [0.4, 0.5, 0.6], [0.2, 0.3, 0.25])
RESNET18 = {"_target_": "sslctl.models.backbones.ResNet", "depth": 18, "zero_init_residual": False, "norm": "batch"}


@pytest.mark.parametrize(
    ("stem", "own", "mean"),
    [
        ("imagenet", {}, [0.485, 0.456, 0.406]),
        ("small", {"mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5]}, [0.5, 0.5, 0.5]),
    ],
)
def test_a_teacher_from_elsewhere_keeps_its_stem_and_its_normalisation(stem, own, mean, tmp_path):
    """Small images would choose another stem, and the student's normalisation is that of other images."""
    network = ResNet(18, stem, False, "batch", 3, 224)
    torch.save(
        {"state_dict": {f"module.encoder_q.{n}": t for n, t in network.state_dict().items()}}, tmp_path / "a.pth"
    )
    node = OmegaConf.create(RESNET18 | {"stem": "auto", "weights": None, "partial": False})
    teacher = load_teacher(str(tmp_path / "a.pth"), node, COLOUR, own)
    assert teacher.network.mean.flatten().tolist() == pytest.approx(mean)
    save_teacher(teacher, tmp_path)  # and so when the run goes on
    again = load_teacher(str(tmp_path / "teacher.safetensors"), None, COLOUR)
    images = torch.rand(2, 3, 32, 32)
    assert torch.equal(teacher(images), again(images))
    expected = network.eval()((images - teacher.network.mean) / teacher.network.std)
    torch.testing.assert_close(teacher(images), expected)


def test_a_teachers_normalisation_has_a_value_for_each_channel(tmp_path):
    torch.save(ResNet(18, "small", False, "batch", 3, 32).state_dict(), tmp_path / "a.pth")
    node = OmegaConf.create(RESNET18 | {"stem": "small", "weights": None, "partial": False})
    with pytest.raises(InputError, match="expected 3 values each"):
        load_teacher(str(tmp_path / "a.pth"), node, COLOUR, {"mean": [0.5]})


def test_deepcluster_assigns_every_image_and_keeps_unit_centroids(tmp_path):
    run = finish(tmp_path / "run", *words_of("deepcluster_v2"))
    state = tensors(run)
    assert 0 <= state["method/assignments"].min() <= state["method/assignments"].max() < 20
    for name in ("memory", "centroids"):
        norms = state[f"method/{name}"].norm(dim=-1)
        torch.testing.assert_close(norms, torch.ones_like(norms))
    memory, centroids = state["method/memory"], state["method/centroids"]
    fresh = pretrain(tmp_path / "first", *words_of("deepcluster_v2"), stop_after=1)
    assert fresh == 143
    first = tensors(tmp_path / "first")  # after one step all but that batch's rows are the clean images' embeddings
    same = (first["method/memory"][0] == first["method/memory"][1]).all(1).sum()
    assert same == len(memory[0]) - 256
    nearest = (first["method/centroids"][0] @ first["method/centroids"][0].T).argmax(1)
    assert torch.equal(nearest, torch.arange(20))  # a centroid is its own cluster's
    assert centroids.shape == (2, 20, 16)
    assert first["method/centroids"][0].mean(0).norm() < 0.9  # 0.997 where the first BatchNorms had seen no image


@pytest.mark.parametrize("epoch", [0, 1])
def test_a_signal_while_the_clusters_are_made_is_heeded(epoch, straight, tmp_path, monkeypatch):
    """Before the first step of an epoch; the clusters are made anew when the run goes on, and are the same."""
    real = sslctl.methods.deepcluster_v2.spherical_kmeans

    def kmeans(*args):
        if len(begun) == 2 * epoch:  # two heads
            os.kill(os.getpid(), signal.SIGTERM)
        begun.append(None)
        return real(*args)

    begun = []
    with monkeypatch.context() as patch:
        patch.setattr("sslctl.methods.deepcluster_v2.spherical_kmeans", kmeans)
        assert pretrain(tmp_path / "run", *words_of("deepcluster_v2")) == 143
    assert [path.name for path in checkpoint.steps_on_disk(tmp_path / "run")] == (["step-5"] if epoch else [])
    run = finish(tmp_path / "run", *words_of("deepcluster_v2"))
    assert differences(tensors(run), tensors(straight("deepcluster_v2"))) == []
    assert metrics(run) == metrics(straight("deepcluster_v2"))


def test_a_plan_embeds_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("sslctl.evaluation.online.extract", lambda *args, **keywords: pytest.fail("embedded"))
    words = (*words_of("deepcluster_v2"), "plan_only=true")
    assert pretrain(tmp_path / "run", *words) == 0
    assert "images/s" in capsys.readouterr().out


def test_a_plan_begins_an_epoch_all_the_same(tmp_path, capsys):
    """A user's method may not be able to take a step otherwise."""
    assert pretrain(tmp_path / "run", *SIMCLR, *own("BeginningSimCLR"), "plan_only=true") == 0
    assert "images/s" in capsys.readouterr().out


def test_prototypes_stay_as_they_are_while_frozen(tmp_path):
    for name, weight in (("dino", "head.1.weight"), ("swav", "prototypes.weight"), ("ibot", "head.1.weight")):
        run = tmp_path / name
        assert pretrain(run, *words_of(name), stop_after=1) == 143
        frozen = tensors(run)[f"method/{weight}"]
        finish(run, *words_of(name), stops=(2,))
        start = load_method(run).state_dict()[weight]
        torch.testing.assert_close(frozen, start, atol=1e-6, rtol=0)
        assert not torch.allclose(tensors(run)[f"method/{weight}"], start, atol=1e-4)


def test_sgd_trains_prototypes_that_were_frozen(tmp_path):
    run = finish(tmp_path / "run", *words_of("swav"), "optimizer=sgd")  # torch's fused SGD would fail at the thaw
    assert metrics(run)[-1]["prototypes_frozen"] == 0


def test_simsiams_predictor_keeps_its_learning_rate(tmp_path):
    run = finish(tmp_path / "run", *words_of("simsiam"))
    groups = {key: value for key, value in tensors(run).items() if key.endswith("/lr")}
    assert sorted(groups.values())[-1] == pytest.approx(0.05)
    assert sorted(groups.values())[0] < 0.01


def test_a_queue_wraps_and_keeps_the_newest():
    queue, pointer = torch.zeros(5, 1), torch.tensor(3)
    enqueue(queue, pointer, torch.arange(1.0, 4.0)[:, None])
    assert queue[:, 0].tolist() == [3, 0, 0, 1, 2]
    assert pointer == 1
    enqueue(queue, pointer, torch.arange(10.0, 17.0)[:, None])
    assert sorted(queue[:, 0].tolist()) == [12, 13, 14, 15, 16]


def test_each_gradient_is_clipped_by_itself():
    small, large = torch.nn.Parameter(torch.zeros(3)), torch.nn.Parameter(torch.zeros(2))
    small.grad, large.grad = torch.tensor([0.1, 0.0, 0.0]), torch.tensor([30.0, 40.0])
    clip_each_([small, large], 3.0)
    assert small.grad.norm() == pytest.approx(0.1)
    assert large.grad.norm() == pytest.approx(3.0)


# --- Processes, precision, accumulation ---


def flat(gradients):
    return torch.cat([gradients[name].flatten() for name in sorted(gradients)])


@pytest.mark.parametrize("name", [slow(name) for name in JOINT_EMBEDDING])
def test_two_processes_give_the_loss_gradients_and_state_of_one(name, tmp_path):
    """The state: queues, centres, memories, clusters, teachers, in each of the first steps."""
    words = (*words_of(name), "optimizer=sgd", "optimizer.base_lr=0.01")
    (one,) = in_processes(steps_of, tmp_path / "one", words, count=1)
    two = in_processes(steps_of, tmp_path / "two", words)
    for its in two:
        tolerance = 1e-2 if name == "wmse" else 1e-3  # an inverse of the covariance multiplies a rounding
        for step in range(LOOKED_AT):
            assert distance(its[step]["values"], one[step]["values"]) < tolerance
            # Together: a bias in front of a BatchNorm has no gradient but rounding.
            found, expected = ({"all": flat(run[step]["gradients"])} for run in (its, one))
            assert distance(found, expected) < tolerance
            torch.testing.assert_close(its[step]["kept"], one[step]["kept"], rtol=0, atol=1e-4)
            assert all(torch.equal(kept, two[0][step]["kept"][name]) for name, kept in its[step]["kept"].items())


@pytest.mark.parametrize("name", ["nnclr", "barlow_twins", "swav", "byol"])
def test_accumulation_is_refused_with_the_reason(name, tmp_path, capsys):
    assert pretrain(tmp_path / "run", *words_of(name), "trainer.accumulate_steps=2") == 2
    said = capsys.readouterr().err
    assert "BatchNorm takes its statistics over the batch" in said
    assert not (tmp_path / "run").exists()


def test_labels_are_asked_for_where_they_are_needed(tmp_path, capsys):
    folder = tmp_path / "images"
    folder.mkdir()
    from PIL import Image

    for number in range(4):
        Image.new("RGB", (16, 16), (60 * number, 0, 0)).save(folder / f"{number}.png")
    words = ["pretrain", "method=supcon", "dataset=folder", f"dataset.root={folder}", "trainer.batch_size=2"]
    assert main([*words, f"run_dir={tmp_path / 'run'}"]) == 2
    assert "supcon needs labels" in capsys.readouterr().err
