"""The package as users install it: a wheel that finds its own configurations."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import yaml

from sslctl.config.schema import CONFIGS
from tests.conftest import REPOSITORY

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """A wheel built from the repository, with nothing downloaded."""
    pytest.importorskip("hatchling")
    folder = tmp_path_factory.mktemp("wheel")
    pip(folder, "wheel", "--no-build-isolation", str(REPOSITORY), "--wheel-dir", str(folder))
    (made,) = folder.glob("sslctl-*.whl")
    return made


def pip(cwd: Path, verb: str, *words: str) -> None:
    command = [sys.executable, "-m", "pip", verb, "--quiet", "--disable-pip-version-check", "--no-deps", *words]
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr


def test_the_wheel_holds_the_package_its_configurations_and_nothing_else(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    for file in CONFIGS.rglob("*.yaml"):
        assert f"sslctl/configs/{file.relative_to(CONFIGS)}" in names
    for file in (REPOSITORY / "sslctl").rglob("*.py"):
        assert str(file.relative_to(REPOSITORY)) in names
    for file in ("template.html", "style.css", "page.js"):
        assert f"sslctl/report/{file}" in names
    assert {name.partition("/")[0].partition("-")[0] for name in names} == {"sslctl"}
    assert not [name for name in names if "__pycache__" in name or name.startswith("tests")]


def test_the_installed_wheel_finds_its_configurations(wheel, tmp_path):
    target, elsewhere = tmp_path / "target", tmp_path / "elsewhere"
    elsewhere.mkdir()
    pip(elsewhere, "install", "--target", str(target), str(wheel))
    environment = {**os.environ, "PYTHONPATH": str(target), "OMP_NUM_THREADS": "1"}

    def python(*words: str) -> str:
        done = subprocess.run(
            [sys.executable, *words],
            cwd=elsewhere,
            env=environment,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    found = python("-c", "from sslctl.cli import CONFIGS; print(CONFIGS)").strip()
    assert Path(found) == target / "sslctl" / "configs"
    config = yaml.safe_load(python("-m", "sslctl", "pretrain", "method=simclr", "--cfg", "job"))
    assert config["method"]["_target_"] == "sslctl.methods.simclr.SimCLR"
    assert config["optimizer"]["_target_"] == "sslctl.training.optim.LARS"
    assert list(elsewhere.iterdir()) == []
