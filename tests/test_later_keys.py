"""A key that a later version adds: runs of the version before continue, unless the key asks for something else."""

from dataclasses import dataclass

import pytest
import yaml

from sslctl.config.keys import UNTYPED, KeyFacts, key, node
from sslctl.config.nodes import TrainerConfig
from sslctl.config.schema import SCHEMAS, PretrainConfig
from sslctl.errors import InputError
from sslctl.runs.claim import refuse_another_config
from sslctl.runs.description import saved_description
from sslctl.runs.directory import find_runs
from sslctl.runs.fingerprint import fingerprint, fingerprint_keys
from tests.runs import CONFIG, SIMCLR, command, differences, metrics, signal_at, tensors
from tests.test_run_directory import start


@dataclass
class LaterTrainer(TrainerConfig):
    label_noise: float = key(low=0, old_behaviour=0.0)


@dataclass
class LaterPretrain(PretrainConfig):
    trainer: LaterTrainer = node(LaterTrainer)


@pytest.fixture
def later(cli, tmp_path, monkeypatch):
    """later(*words): runs sslctl of a version with one more key, trainer.label_noise."""
    (tmp_path / "later" / "trainer").mkdir(parents=True)
    (tmp_path / "later" / "trainer" / "later.yaml").write_text("defaults: [default, _self_]\nlabel_noise: 0.0\n")

    def run(*words):
        with monkeypatch.context() as patch:
            patch.setitem(SCHEMAS, "pretrain", LaterPretrain)
            return cli(*words, "trainer=later", f"--config-dir={tmp_path / 'later'}")

    return run


@pytest.mark.slow
def test_a_run_continues_under_a_version_with_one_more_key(cli, later, workdir):
    words = [word for word in command(workdir, *SIMCLR) if not word.startswith("run_dir=")]
    assert cli(*words, "run_dir=straight").status == 0
    with signal_at(4):
        assert cli(*words).status == 143
    (run,) = find_runs(workdir / "runs")
    saved = (run / "config.yaml").read_text()
    assert "label_noise" not in yaml.safe_load(saved)["trainer"]

    other = later(*words, "trainer.label_noise=0.1", "plan_only=true")
    assert other.status == 0, other.err
    assert "runs/digits/simclr-" in other.out
    assert run.name not in other.out
    refused = later(*words, "trainer.label_noise=0.1", f"run_dir={run}")
    assert refused.status == 2
    assert "sslctl:   trainer.label_noise: 0.0 → 0.1\n" in refused.err

    continued = later(*words)
    assert continued.status == 0, continued.err
    assert find_runs(workdir / "runs") == [run]
    assert (run / "config.yaml").read_text() == saved
    assert differences(tensors(run), tensors(workdir / "straight")) == []
    assert metrics(run) == metrics(workdir / "straight")


@pytest.fixture
def added(monkeypatch):
    """The later key as one of a method's node."""
    monkeypatch.setitem(UNTYPED, "method.noise", KeyFacts(old_behaviour=None))


WITHOUT, OLD, NEW = ({**CONFIG, "method": {"size": 3} | noise} for noise in ({}, {"noise": None}, {"noise": 0.1}))


@pytest.mark.usefixtures("added")
def test_only_another_value_than_that_of_the_old_behaviour_counts():
    marks = [fingerprint(fingerprint_keys(config, {})) for config in (WITHOUT, OLD, NEW)]
    assert marks[0] == marks[1]
    assert marks[0] != marks[2]


@pytest.mark.usefixtures("added")
@pytest.mark.parametrize("there", [WITHOUT, OLD])
def test_the_old_behaviour_is_what_a_run_without_the_key_is_said_to_have(there, tmp_path):
    start(tmp_path / "old", there)
    start(tmp_path / "new", NEW)
    refuse_another_config(tmp_path / "old", saved_description(tmp_path / "old"), OLD, {"data": "abc"})
    with pytest.raises(InputError, match=r"method\.noise: None → 0\.1"):
        refuse_another_config(tmp_path / "old", saved_description(tmp_path / "old"), NEW, {"data": "abc"})
    with pytest.raises(InputError, match=r"method\.noise: 0\.1 → None"):
        refuse_another_config(tmp_path / "new", saved_description(tmp_path / "new"), there, {"data": "abc"})


def test_a_key_without_an_old_behaviour_counts_at_once():
    assert fingerprint_keys(WITHOUT, {}) != fingerprint_keys(OLD, {})
