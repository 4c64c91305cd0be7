"""Teachers: without a gradient, moved by their momentum, or frozen and kept with the run; what is refused."""

import pytest
import torch
from omegaconf import OmegaConf
from safetensors.torch import save_file

from sslctl.cli import main
from sslctl.errors import InputError
from sslctl.factory.from_run import load_method
from sslctl.factory.teacher import load_teacher, save_teacher
from sslctl.methods.base import teacher_of
from sslctl.models.backbones import ResNet
from sslctl.models.preprocess import Preprocess
from sslctl.runs.checkpoint import load_tensors
from tests.methods import DISTILLED, built, teacher_run, words_of
from tests.runs import SIMCLR, differences, finish, pretrain, tensors

TEACHERS = ("dino", "ibot", "dinov2", "dinov3", "msn")


# --- What does not fit ---


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


def test_a_teacher_drops_nothing_and_its_student_what_it_did():
    from timm.layers import DropPath

    student = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.Dropout(0.5), DropPath(0.4))
    teacher = teacher_of(student)
    assert (student[1].p, student[2].drop_prob, teacher[1].p, teacher[2].drop_prob) == (0.5, 0.4, 0.0, 0.0)
    assert student[0].weight.requires_grad
    assert not teacher[0].weight.requires_grad


def test_the_centre_of_dino_moves_towards_the_mean_of_all_processes():
    method = built("dino", "method.center_momentum=0.75").method
    method.center.copy_(torch.randn(method.center.shape))
    before, logits = method.center.clone(), torch.randn(3, method.center.shape[1])  # of three processes
    method.after_step(method.schedules(0), {"logits": logits})
    torch.testing.assert_close(method.center, 0.75 * before + 0.25 * (logits[0] + logits[1] + logits[2])[None] / 3)


@pytest.mark.slow
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
    ("words", "printed"),
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
def test_a_teacher_that_does_not_fit_is_refused_in_a_line(words, printed, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    save_file(load_tensors(teacher_run() / "backbone.safetensors"), tmp_path / "empty" / "bare.safetensors")
    words = [word.format(teacher=teacher_run(), empty=tmp_path / "empty") for word in words]
    assert pretrain(tmp_path / "run", "method=seed", "scheduler.warmup_epochs=0", *words) == 2
    err = capsys.readouterr().err
    assert printed in err
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
