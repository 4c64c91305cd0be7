"""network=: which of a method's networks a run judges and keeps, the student or its teacher."""

import pytest
import torch
from torch import nn

import sslctl
from sslctl.cli import main
from sslctl.evaluation import subjects
from sslctl.factory.exportable import feature_function, feature_names
from sslctl.models.preprocess import Preprocess
from sslctl.runs.checkpoint import load_tensors
from sslctl.runs.fingerprint import fingerprint_keys
from sslctl.runs.metrics import read_metrics
from tests.by_hand import moco
from tests.methods import SIDE, built
from tests.runs import MOCO, command, differences, finish, newest, results, tensors

STUDENT_FIRST, TEACHER_FIRST = ("moco", "moco_v3", "byol"), ("dino", "ibot", "msn", "ijepa")


@pytest.mark.parametrize("name", STUDENT_FIRST + TEACHER_FIRST)
def test_either_network_of_a_method_with_a_teacher_can_be_its_result(name):
    """By default the one that is first; all features are there whichever is."""
    method, preprocess = built(name).method.eval(), Preprocess(1, SIDE, SIDE, [0.5], [0.3])
    default = feature_names(method, preprocess)
    networks = {"backbone": method.backbone, "teacher": method.teacher_backbone}
    first = method.feature_networks()[default[0]][0]
    assert first is networks["teacher" if name in TEACHER_FIRST else "backbone"]
    for choice, network in networks.items():
        method.judged = choice
        names = feature_names(method, preprocess)
        assert sorted(names) == sorted(default)
        assert method.feature_networks()[names[0]][0] is network
        assert subjects.method_subject("trained", method, preprocess, None, 1).features == names[0]


@pytest.mark.parametrize("name", STUDENT_FIRST + TEACHER_FIRST)
def test_features_cost_the_forward_of_their_own_network_alone(name):
    method, preprocess = built(name).method.eval(), Preprocess(1, SIDE, SIDE, [0.5], [0.3])
    images, calls = torch.rand(3, 1, SIDE, SIDE, generator=torch.Generator().manual_seed(1)), []
    networks = {"backbone": method.backbone, "teacher": method.teacher_backbone}
    for which, network in networks.items():
        conv = next(module for module in network.modules() if isinstance(module, nn.Conv2d))
        conv.register_forward_hook(lambda *_, which=which: calls.append(which))
    with torch.no_grad():
        expected = method.features(images)
        for feature, (network, _) in method.feature_networks().items():
            function = feature_function(method, feature, preprocess)
            calls.clear()
            assert torch.equal(function(images), expected[feature])
            assert [networks[which] for which in calls] == [network]


def test_features_whose_declared_network_says_something_else_are_the_methods():
    method, preprocess = built("simclr").method.eval(), Preprocess(1, SIDE, SIDE, [0.5], [0.3])
    method.features = lambda images: {"backbone": 2 * method.backbone(images)}
    images = torch.rand(3, 1, SIDE, SIDE, generator=torch.Generator().manual_seed(1))
    assert torch.equal(feature_function(method, "backbone", preprocess)(images), 2 * method.backbone(images))


def test_mocos_teacher_is_its_key_encoder():
    method, images = moco().eval(), torch.rand(2, 3, 8, 8)
    method.teacher_backbone.network.conv1.weight.data.mul_(2)
    assert torch.equal(method.features(images)["teacher"], method.teacher_backbone(images))
    assert not torch.equal(method.features(images)["teacher"], method.features(images)["backbone"])


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The same training twice: with the default, and with its teacher as the result."""
    words = (*MOCO, "evaluation.knn_every_epochs=2", "method.teacher_momentum=0.9", "trainer.epochs=1")
    folder = tmp_path_factory.mktemp("judged")
    return finish(folder / "student", *words), finish(folder / "teacher", *words, "network=teacher")


def test_the_run_keeps_and_judges_its_teacher_from_the_same_training(runs, tmp_path):
    student, teacher = runs
    assert differences(tensors(student), tensors(teacher)) == []
    stored = load_tensors(newest(teacher) / "weights.safetensors")
    for run, network in ((student, "backbone."), (teacher, "teacher_backbone.")):
        own = {name.removeprefix(network): tensor for name, tensor in stored.items() if name.startswith(network)}
        assert differences(load_tensors(run / "backbone.safetensors"), own) == []
    images = torch.rand(3, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    subject = subjects.trained(teacher, newest(teacher), None)
    with torch.no_grad():
        assert torch.equal(sslctl.load(teacher)[0](images), subject.function(images))
    words = ("device=cpu", "cache=false", "subjects=[trained]", f"out={tmp_path / 'out.jsonl'}")
    assert main(["knn-eval", str(teacher), *words]) == 0
    assert {record["features"] for record in results(tmp_path / "out.jsonl")} == {"teacher"}


def test_the_figures_while_training_are_those_of_the_network_that_is_judged(runs):
    student, teacher = ([r for r in read_metrics(run) if "rankme" in r] for run in runs)
    assert student[0]["rankme"] == teacher[0]["rankme"]  # they begin alike
    assert student[-1]["rankme"] != teacher[-1]["rankme"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("method=simclr", "network=teacher"), "network=teacher: SimCLR has no teacher of its own: network=null"),
        ((*MOCO, "network=student"), "network=student: expected one of backbone, teacher"),
    ],
)
def test_a_network_that_a_method_has_not_is_refused(words, message, tmp_path, capsys):
    assert main(command(tmp_path / "run", *words)) == 2
    assert message in capsys.readouterr().err


def test_a_run_without_the_key_has_the_name_that_it_had():
    assert fingerprint_keys({"network": None}, {}) == {}
    assert fingerprint_keys({"network": "teacher"}, {}) == {"network": "teacher"}
