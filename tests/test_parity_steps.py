"""The harness of scripts/parity_steps.py without official code: what it calls a difference, what it says of missing folders."""

import sys

import parity_steps
import pytest
import torch
from parity_harness import (
    Comparison,
    ParityError,
    Side,
    compare,
    copy_weights,
    in_double,
)
from parity_networks import Without, batch, convolutional, descend, facts, optimizer_of, ours
from parity_official import REPOSITORIES, Missing, Official, absent
from torch import nn

from sslctl.losses import negative_cosine
from sslctl.methods.simsiam import SimSiam


def simsiam() -> SimSiam:
    torch.manual_seed(1)
    sizes = {"projector_layers": 2, "hidden_dim": None, "out_dim": 6, "predictor_dim": 4, "constant_predictor_lr": True}
    return SimSiam(convolutional(), facts(), **sizes).double()


def sides(*, scale: float = 1.0, noise: float = 0.0, views: tuple[int, int] = (0, 1)) -> tuple[Side, Side]:
    """SimSiam's own steps, and the same ones written out, with a fault or without."""
    mine, other = simsiam(), simsiam()
    parts = [[m.backbone, m.projector, m.predictor] for m in (mine, other)]
    copy_weights(*parts)
    with torch.no_grad():
        other.predictor[0].weight += noise * torch.randn(
            other.predictor[0].weight.shape, generator=torch.Generator().manual_seed(2)
        )
    optimizer = torch.optim.SGD(other.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-3)

    def step(number):
        z = [other.projector(other.backbone(x)) for x in batch(number).views["global"]]
        p = [other.predictor(x) for x in z]
        loss = sum(negative_cosine(p[i], z[j]) for i, j in (views, views[::-1])) / 2
        return descend(optimizer, scale * loss)

    own = optimizer_of(mine, "sgd", lr=0.05, weight_decay=1e-3, exclude=False)
    return ours(mine, own, batch, parts[0]), Side(step, parts[1])


@pytest.fixture(autouse=True)
def double():
    with in_double():
        yield


def test_the_same_steps_do_not_differ():
    differences = compare(*sides(), steps=3)
    assert set(differences) == {"loss", "gradient", "parameter", "state"}
    assert max(d.largest for d in differences.values()) < 1e-12
    assert differences["gradient"].tensors == differences["parameter"].tensors == 27


@pytest.mark.parametrize("fault", [{"scale": 1.001}, {"noise": 1e-6}, {"views": (0, 0)}])
def test_a_small_fault_is_a_difference(fault):
    differences = compare(*sides(**fault), steps=2)
    assert differences["gradient"].largest > 1e-8
    assert differences["parameter"].largest > 1e-8


def test_a_gradient_that_rounding_alone_makes_is_none():
    weights = [[nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3))] for _ in range(2)]

    def side(leaves, rounding):
        def step(_):
            leaves[0].grad, leaves[1].grad = torch.ones(3), torch.full((3,), rounding)
            return torch.ones(())

        return Side(step, leaves)

    assert compare(side(weights[0], 1e-17), side(weights[1], -2e-17), 1)["gradient"].largest < 1e-12
    assert compare(side(weights[0], 1e-17), side(weights[1], 1e-5), 1)["gradient"].largest > 1e-3


def test_nan_is_the_largest_difference():
    mine, other = sides()
    broken = Side(lambda number: other.step(number) * (float("nan") if number == 1 else 1), other.trained)
    assert compare(mine, broken, steps=3)["loss"].where == "loss of step 1"


def test_other_tensors_are_refused():
    mine, other = sides()
    with pytest.raises(ParityError, match=r"gradient 26 of step 0: 2\.\S+ \(6,\) here, nothing there"):
        compare(mine, Side(other.step, [*other.trained[:2], Without(other.trained[2], "3.bias")]), steps=1)
    method = simsiam()
    with pytest.raises(ParityError, match="1 trained parameters of SimSiam are not compared"):
        ours(method, None, batch, [method.backbone, method.projector, Without(method.predictor, "3.bias")])


def test_a_missing_repository_is_named_with_the_command(tmp_path):
    with pytest.raises(Missing, match=r"dino is missing: git clone https://github.com/facebookresearch/dino "):
        Official(tmp_path).folder("dino")


def test_modules_of_repositories_do_not_meet(tmp_path):
    for name, value in (("dino", 1), ("mae", 2)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "utils.py").write_text(f"value = {value}")
        (tmp_path / name / "script.py").write_text("import utils, apex.parallel\nvalue = utils.value")
    (tmp_path / "dino" / ".commit").write_text("0123456789")
    official, before = Official(tmp_path), set(sys.modules)
    stubs = absent("apex", "apex.parallel")
    assert [official.load(name, "script", stubs).value for name in ("dino", "mae")] == [1, 2]
    assert not {"utils", "script", "apex", "apex.parallel"} & (set(sys.modules) - before)
    assert [official.commit(name) for name in ("dino", "mae")] == ["0123456", "unknown"]
    assert not list(tmp_path.rglob("__pycache__"))


def table(tmp_path, monkeypatch, *arguments):
    document = tmp_path / "parity.md"
    if not document.exists():
        old = ("SimSiam", "simsiam 1234567", "x", "5", "1e-15", "-", "-", "-", "agrees", "")
        document.write_text(parity_steps.with_rows("before\n<!-- steps -->\n<!-- /steps -->\nafter\n", [old]))
    monkeypatch.setattr(
        sys, "argv", ["parity_steps.py", "--official", str(tmp_path), "--markdown", str(document), *arguments]
    )
    parity_steps.main()
    return parity_steps.rows_of(document.read_text()), document.read_text()


def test_a_row_whose_repository_is_missing_stays(tmp_path, monkeypatch, capsys):
    rows, text = table(tmp_path, monkeypatch)
    assert rows["SimSiam"][1:5] == ("simsiam 1234567", "x", "5", "1e-15")
    assert rows["MAE"][-2] == "not executed"
    assert list(rows) == [c.method for c in parity_steps.COMPARISONS]
    assert text.startswith(f"before\n<!-- steps -->\n{parity_steps.VERSIONS}:\n\n| method |")
    assert text.endswith("<!-- /steps -->\nafter\n")
    assert "MAE: " in (errors := capsys.readouterr().err)
    assert errors.count("is missing: git clone") == len(parity_steps.COMPARISONS)


@pytest.mark.parametrize(("scale", "verdict"), [(1.0, "agrees"), (1.01, "DIFFERS")])
def test_what_ran_is_written_down(tmp_path, monkeypatch, scale, verdict):
    row = Comparison("SimSiam", "simsiam", "a copy", lambda _: sides(scale=scale), 2)
    monkeypatch.setattr(parity_steps, "COMPARISONS", [row])
    (tmp_path / "simsiam").mkdir()
    if verdict == "DIFFERS":
        with pytest.raises(SystemExit):
            table(tmp_path, monkeypatch)
        rows = parity_steps.rows_of((tmp_path / "parity.md").read_text())
    else:
        rows, _ = table(tmp_path, monkeypatch)
    assert rows["SimSiam"][:4] == ("SimSiam", "simsiam unknown", "a copy", "2")
    assert rows["SimSiam"][-2] == verdict


def test_every_row_has_a_repository_of_its_own_name():
    names = [c.method for c in parity_steps.COMPARISONS]
    assert len(set(names)) == len(names)
    assert {c.repository for c in parity_steps.COMPARISONS} == set(REPOSITORIES)
