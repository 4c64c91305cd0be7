"""What lies in files, configurations and names is never executed: docs/security.md, each promise by an attempt to break it."""

import ast
import hashlib
import json
import logging
import pickle
import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import yaml
from hydra.core.config_store import ConfigStore
from omegaconf import OmegaConf
from safetensors.torch import load_file, save_file

import sslctl
from sslctl.cli import VERBS
from sslctl.config import diagnose
from sslctl.config.command_line import prepare, recorded_words, shell_words
from sslctl.config.literal import as_config
from sslctl.config.targets import refuse_targets, target_of
from sslctl.errors import InputError, say, shown
from sslctl.evaluation.predictor import build_predictor, preprocess_of
from sslctl.export.format import FILE, Lines, arguments, literal
from sslctl.export.formats import FORMATS
from sslctl.runs.checkpoint import newest_valid
from sslctl.runs.classifiers import read
from tests.runs import forget_run, unsigned, unsigned_metadata
from tests.test_report import commands_of

FAST = ("device=cpu", "cache=false", "images=1", "map_images=10", "neighbours=1", "detailed=1")


@pytest.fixture
def marker(workdir):
    """A file that only executed code would make, in the working directory."""
    return workdir / "marker"


@pytest.fixture
def foreign(finished_run, workdir):
    """foreign(name): somebody's run under this name; a copy, that may be changed."""

    def copy(name="run"):
        return Path(shutil.copytree(finished_run, workdir / name, symlinks=True))

    return copy


# --- Files never become code ---

KEY = "drop_rate=open('marker', 'w') and 0.0, in_chans"  # an argument where a call is written as text


def test_the_payload_would_run_where_a_key_is_pasted(marker):
    exec(f"dict({KEY}=1)")
    assert marker.exists()


@pytest.mark.parametrize("format", FORMATS)
def test_export_refuses_a_key_that_is_no_name(foreign, cli, marker, format):
    run = foreign()
    forget_run(run)
    config = yaml.safe_load((run / "config.yaml").read_text())
    config["backbone"] = {
        "_target_": "sslctl.models.backbones.Timm",
        "model": "resnet18",
        "kwargs": {KEY: None},
    }
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    result = cli("export", run, f"format={format}")
    assert result.status == 2
    assert f"backbone.kwargs.{KEY}: expected the name of an argument" in result.err
    assert not marker.exists()
    assert not (run / "export").exists()


@pytest.mark.parametrize("key", ["checkpoint_path", "pretrained", "pretrained_cfg"])
def test_a_file_of_weights_names_no_other_file(foreign, key):
    path = foreign() / "backbone.safetensors"
    node = {"_target_": "sslctl.models.backbones.Timm", "model": "resnet18", "kwargs": {key: "evil.pth"}}
    about = unsigned_metadata(path)
    save_file(load_file(path), path, about | {"backbone": json.dumps(node)})
    with pytest.raises(InputError, match=rf"backbone.kwargs.{key}: weights come from backbone.weights"):
        sslctl.load(path)


@pytest.mark.parametrize(
    "named", [{KEY: 1}, {"class": 1}, {"x": object()}, {"x": [Path()]}, {"x": {1: print}}, {"x": float("nan")}]
)
def test_lines_hold_names_and_plain_values_alone(named):
    with pytest.raises(InputError, match="expected"):
        arguments(**named)


def test_plain_values_come_back_from_their_lines():
    values = {"a": "'); open('marker', 'w'); ('", "b": [1, -0.5, None, (True, "\\\n\0```")], "c": {"FILE": 1e300}}
    call = ast.parse(f"f({arguments('x', **values)})").body[0].value
    assert [ast.literal_eval(a) for a in call.args] == ["x"]
    assert {k.arg: ast.literal_eval(k.value) for k in call.keywords} == values


def test_a_files_name_is_one_string_of_its_lines():
    name = Path("a'); open('marker', 'w'); ('\n\0")
    lines = Lines([f"model = load({literal(FILE)}, {FILE})"], "")
    first, second = ast.parse("\n".join(lines.script(name))).body[0].value.args
    assert (ast.literal_eval(first), ast.literal_eval(second)) == (FILE, str(name))


def test_the_note_beside_an_export_holds_names_as_text(foreign, cli, marker, workdir):
    run = foreign("<b>'); open('marker', 'w')\n```\n# x")
    out = workdir / "x'); open('marker', 'w'); ('.safetensors"
    result = cli("export", run, f"out={out}")
    assert result.status == 0, result.err
    (block,) = re.findall(r"```python\n(.*?)\n```", Path(f"{out}.md").read_text(), re.DOTALL)
    load = ast.parse(block).body[1].value
    assert ast.literal_eval(load.args[0]) == out.name
    assert ast.unparse(load.func) == "sslctl.load"
    assert "&lt;b&gt;" in Path(f"{out}.md").read_text()
    assert not marker.exists()


def test_a_runs_names_lead_out_of_no_folder(foreign, cli, workdir):
    run = foreign()
    config = yaml.safe_load((run / "config.yaml").read_text())
    config["names"]["backbone"] = "../../outside"
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    assert cli("export", run).status == 0
    assert [f.name for f in (run / "export").glob("*.safetensors")] == [".._.._outside.safetensors"]
    assert [f.name for f in workdir.iterdir()] == ["run"]


@pytest.fixture
def kept(foreign, cli):
    """kept(kind): a foreign run, and the file of a classifier that it keeps."""

    def keep(kind):
        run = foreign()
        words = ("knn.k=5",) if kind == "knn" else ("probe.epochs=1", "probe.lr=[0.1]", "probe.weight_decay=[0.0]")
        words = (f"{kind}-eval", run, *words, "device=cpu", "cache=false", "subjects=[trained]")
        assert cli(*words).status == 0
        return run, next((run / "classifiers").iterdir())

    return keep


def rewritten(path, tensors, about):
    """Writes other tensors and other words into a kept classifier, without its checksum, as whoever changes it on purpose."""
    said = json.loads(unsigned_metadata(path)["classifier"]) | about
    save_file({**load_file(path), **tensors}, path, {"classifier": json.dumps(said)})


FOREIGN_CLASSIFIERS = {
    "knn": [
        ({"labels": torch.full((32,), 2)}, {}),
        ({"labels": torch.full((32,), -1)}, {}),
        ({"names": torch.zeros(3, dtype=torch.uint8)}, {}),
        ({"features": torch.full((32, 8), float("nan"))}, {}),
        ({"features": torch.ones(32, 9)}, {}),
        ({"more": torch.ones(1)}, {}),
        ({}, {"settings": {"k": 0, "temperature": 0.1, "depth": 32}}),
        ({}, {"settings": {"k": 5, "temperature": 0.1, "depth": 32, "more": 1}}),
        ({}, {"several": True}),
        ({}, {"classes": ["a", "b", "c"], "value": float("nan")}),
    ],
    "linear": [
        ({"weight": torch.ones(8, 3)}, {}),
        ({"weight": torch.ones(9, 2), "mean": torch.ones(9), "std": torch.ones(9)}, {}),
        ({"bias": torch.ones(2, dtype=torch.int64)}, {}),
        ({}, {"kind": "knn"}),
        ({}, {"format": 2}),
        ({}, {"preprocess": {"tokenizer": "x"}}),
        ({}, {"features": "nothing"}),
        ({}, {"classes": "ab"}),
        ({}, {"step": "2"}),
    ],
}


@pytest.mark.parametrize("kind", FOREIGN_CLASSIFIERS)
def test_a_foreign_classifier_is_tensors_and_plain_values_or_refused(kept, cli, labelled_images, marker, workdir, kind):
    run, path = kept(kind)
    whole = path.read_bytes()

    def build():
        classifier = read(path)
        preprocess_of(classifier, run)
        build_predictor(run, newest_valid(run), classifier, classifier if kind == "knn" else None, 1)

    build()
    for tensors, about in FOREIGN_CLASSIFIERS[kind]:
        path.write_bytes(whole)
        rewritten(path, tensors, about)
        with pytest.raises(InputError, match="features=nothing" if "features" in about else re.escape(str(path))):
            build()
    path.write_bytes(pickle.dumps(Payload()))
    words = ("predict", run, f"dataset.root={labelled_images}/test/a", "device=cpu", "out=x.csv")
    refused = cli(*words)
    assert (refused.status, "left out: " in refused.out, len(refused.err.splitlines())) == (2, True, 1)
    assert not marker.exists()
    assert not (workdir / "x.csv").exists()


class Payload:
    def __reduce__(self):
        return open, ("marker", "w")


def test_a_foreign_classifier_leads_out_of_no_run(kept, cli, labelled_images, workdir):
    run, path = kept("linear")
    other = path.with_name(path.name.replace("linear", "finetune"))
    shutil.copy(run / "backbone.safetensors", workdir / "backbone.safetensors")
    digest = hashlib.sha256((workdir / "backbone.safetensors").read_bytes()).hexdigest()
    head = {"weight": torch.ones(2, 8), "bias": torch.ones(2)}
    for directory in ("..", str(workdir), ""):
        settings = {"network": "backbone", "pool": "own", "directory": directory, "sha256": digest}
        said = json.loads(unsigned_metadata(path)["classifier"]) | {"kind": "finetune", "settings": settings}
        save_file(head, other, {"classifier": json.dumps(said)})
        words = (
            "predict",
            run,
            "classifier=finetune",
            f"dataset.root={labelled_images}/test/a",
            "device=cpu",
            "neighbours=0",
        )
        refused = cli(*words)
        assert refused.status == 2
        assert f"names {directory!r}, no directory in {run}/probes" in refused.err
    # The same network in its place is taken: it is the name that is refused.
    (run / "probes" / "x").mkdir(parents=True)
    shutil.move(workdir / "backbone.safetensors", run / "probes" / "x")
    save_file(head, other, {"classifier": json.dumps(said | {"settings": settings | {"directory": "x"}})})
    result = cli(*words)
    assert result.status == 0, result.err


def test_the_package_executes_no_text():
    """No eval, exec or compile of a text, no shell, no import by a name but those of targets, verbs and optional packages."""
    imports = []
    for path in Path(sslctl.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call):
                call = ast.unparse(node.func)
                assert call not in ("eval", "exec", "compile", "__import__", "os.system", "os.popen"), path
                assert not [k for k in node.keywords if k.arg == "shell"], path
                imports += [path.name] if call.endswith("import_module") else []
                assert call.rpartition(".")[2] != "package" or isinstance(node.args[0], ast.Constant), path
    assert sorted(imports) == ["arrays.py", "cli.py", "targets.py"]


def test_what_a_run_says_is_looked_up_nowhere(foreign, cli, workdir, monkeypatch):
    """No ${…} of a file is read: neither the environment, nor other files."""
    monkeypatch.setenv("TOKEN", "hunter2")
    run = foreign()
    forget_run(run)
    config = yaml.safe_load((run / "config.yaml").read_text())
    config["names"] |= {"backbone": "${oc.env:TOKEN}", "method": "${oc.env:TOKEN}"}
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    for words in (
        ("export", run, "out=x.safetensors"),
        ("embed", run, "out=x.csv"),
        ("report", run, *FAST, "out=x.html"),
    ):
        result = cli(*words)
        assert result.status == 0, result.err
        assert "hunter2" not in result.out + result.err
    assert not any(b"hunter2" in path.read_bytes() for path in workdir.rglob("*") if path.is_file())
    assert list(as_config({"a": ["${oc.env:TOKEN}", "\\${b}"]}).a) == ["${oc.env:TOKEN}", "\\${b}"]


@pytest.mark.parametrize("text", ["[" * 100_000, "1", '{"_target_": 3}', "{", '{"_target_": "${oc.env:HOME}"}'])
def test_a_file_of_weights_that_says_nonsense_of_its_backbone_is_refused(foreign, text):
    path = foreign() / "backbone.safetensors"
    about = unsigned_metadata(path)
    save_file(load_file(path), path, about | {"backbone": text})
    with pytest.raises(InputError):
        sslctl.load(path)


# --- Names of code come from the command line, or from sslctl's own parts ---


@pytest.mark.parametrize(
    "name",
    [
        *("os.system", "system", "", 3, "sslctl.cli.main", "sslctl.commands.pretrain.pretrain", "sslctl.datax.f"),
        *("sslctl.data.files.np.load", "sslctl.data.files.Path", "sslctl.models.weights.load_tensors"),
    ],
)
def test_a_target_is_a_part_of_sslctl(name):
    with pytest.raises(InputError, match="_target_"):
        target_of(OmegaConf.create({"_target_": name}), "dataset")


def test_a_target_that_nobody_reads_is_refused_too():
    config = OmegaConf.create({"a": {"b": [1, {"c": "${d}"}]}, "d": {"_target_": "os.system"}, "e": None, "f": "???"})
    with pytest.raises(InputError, match=r"^a\.b\.1\.c\._target_=os\.system is not sslctl's own: add allow=\[os\]"):
        refuse_targets(config)


# --- --config-dir is data: Hydra's own node ---

EVIL = """
class Callback:
    def __init__(self, **settings):
        open("marker", "w")

    def __getattr__(self, name):
        return lambda **settings: None
"""
BUILT = {"_target_": "evil_code.Callback"}
FORMATTER = {"version": 1, "formatters": {"f": {"()": "evil_code.Callback"}}, "root": {"handlers": []}}
HANDLER = {"handlers": {"h": {"class": "evil_code.Callback"}}, "root": {"handlers": ["h"]}, "version": 1}
OUTSIDE = {
    "handlers": {"h": {"class": "logging.StreamHandler", "stream": "ext://evil_code.x"}},
    "version": 1,
    "root": {},
}
# What a file says of Hydra -> the key that is refused.
PLACES = {
    "callback": ({"callbacks": {"x": BUILT}}, "callbacks.x._target_"),
    "callback elsewhere": ({"callbacks": {"x": "${names}"}}, "callbacks.x"),
    "callback's name elsewhere": ({"callbacks": {"x": {"_target_": "${names.method}"}}}, "callbacks.x._target_"),
    "Hydra's tools": ({"callbacks": {"x": {"_target_": "hydra.utils.get_class"}}}, "callbacks.x._target_"),
    "launcher": ({"launcher": BUILT}, "launcher._target_"),
    "sweeper": ({"sweeper": {"_target_": "evil_code.Callback"}}, "sweeper._target_"),
    "formatter": ({"job_logging": FORMATTER}, "job_logging.formatters.f.()"),
    "handler": ({"hydra_logging": HANDLER}, "hydra_logging.handlers.h.class"),
    "stream": ({"hydra_logging": OUTSIDE}, "hydra_logging.handlers.h.class"),
    "environment": ({"job": {"env_set": {"LD_PRELOAD": "evil.so"}}}, "job.env_set.LD_PRELOAD"),
    "verbosity": ({"verbose": True}, "verbose"),
    "mode": ({"mode": "MULTIRUN"}, "mode"),
    "overrides": ({"overrides": {"hydra": ["hydra.launcher._target_=evil_code.Callback"]}}, "overrides"),
}


@pytest.fixture
def checkout(tmp_path_factory, monkeypatch):
    """checkout(node): a directory for --config-dir whose method=evil sets this of Hydra, beside a module that is not imported."""

    def write(node, name="method/evil.yaml"):
        folder = tmp_path_factory.mktemp("checkout")
        (folder / "evil_code.py").write_text(EVIL)
        (folder / name).parent.mkdir(parents=True)
        text = yaml.safe_dump({"hydra": node} if name.startswith("method") else node)
        head = "# @package _global_\ndefaults: [simclr, _self_]\n" if name.startswith("method") else ""
        (folder / name).write_text(head + text)
        return folder

    return write


@pytest.mark.slow
@pytest.mark.parametrize("place", PLACES)
def test_a_file_of_a_config_dir_sets_nothing_that_hydra_builds(checkout, workdir, place):
    node, key = PLACES[place]
    prepared = prepare(["--config-dir", str(checkout(node)), "method=evil"])
    with pytest.raises(InputError, match=rf"^a file of --config-dir sets hydra\.{re.escape(key)}"):
        diagnose.compose_choices("pretrain", prepared, prepared.overrides, with_hydra=True)


WAYS = {
    "job": (),
    "job through Hydra": ("hydra.verbose=false",),
    "sweep": ("-m",),
    "configuration": ("--cfg", "job"),
    "all of it": ("--cfg", "all", "--resolve"),
    "help": ("--help",),
    "Hydra's help": ("--hydra-help",),
    "information": ("--info", "config"),
}


@pytest.fixture
def logging_as_before():
    """Python's loggers, which --info sets up."""
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    yield
    root.handlers[:], root.level = handlers, level


@pytest.mark.usefixtures("logging_as_before")
@pytest.mark.parametrize(
    ("place", "way"),
    [*(("callback", way) for way in WAYS), *(("handler", way) for way in ("sweep", "help", "information"))],
)
def test_every_way_of_a_command_refuses_it_before_anything_is_built(checkout, cli, marker, way, place):
    node, key = PLACES[place]
    choice = "hydra/" + next(iter(node))
    folder = checkout(next(iter(node.values())), f"{choice}/evil.yaml")
    result = cli("runs", "--config-dir", folder, f"{choice}=evil", *WAYS[way])
    assert result.status == 2
    assert (
        result.err
        == f"sslctl: a file of --config-dir sets hydra.{key}=evil_code.Callback: add allow=[evil_code] to the"
        + (" command if you trust it\n")
    )
    assert not marker.exists()


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_refuses_it(checkout, cli, marker, verb):
    folder = checkout({"x": BUILT}, "hydra/callbacks/evil.yaml")
    result = cli(verb, "--config-dir", folder, "hydra/callbacks=evil")
    assert (result.status, len(result.err.splitlines())) == (2, 1)
    assert "add allow=[evil_code]" in result.err
    assert not marker.exists()


def test_a_job_of_a_sweep_that_brings_it_is_refused_before_its_logging(checkout, cli, marker):
    folder = checkout(PLACES["formatter"][0])
    result = cli("pretrain", "-m", "--config-dir", folder, "method=evil,simclr", "dataset=none_of_this_name")
    assert result.status == 2
    assert not marker.exists()
    result = cli("views", "-m", "--config-dir", folder, "augmentation=moco_v2", "+method=evil,simclr")
    assert result.status == 2
    assert not marker.exists()


def test_completion_builds_nothing(checkout, cli, marker, monkeypatch):
    folder = checkout({"x": BUILT}, "hydra/callbacks/evil.yaml")
    line = f"sslctl runs --config-dir={folder} hydra.searchpath=[{folder}] hydra/callbacks=evil ckp"
    monkeypatch.setenv("COMP_LINE", line)
    assert cli("-sc", "query=bash").status == 0
    assert not marker.exists()


def test_allowed_code_is_built(checkout, cli, marker):
    folder = checkout({"x": BUILT}, "hydra/callbacks/evil.yaml")
    (marker.parent / "runs").mkdir()
    result = cli("runs", "--config-dir", folder, "hydra/callbacks=evil", "allow=[evil_code]")
    assert result.status == 0, result.err
    assert marker.exists()


@pytest.mark.parametrize(
    "option", ["--config-name=evil", "--config-path=/", "--config-n=evil", "--experimental-rerun=x"]
)
def test_options_that_read_other_files_are_no_options(cli, option):
    result = cli("runs", option)
    assert result.status == 2
    assert f"{option.partition('=')[0]}: no such option" in result.err


@dataclass
class LauncherConf:
    _target_: str = "hydra_plugins.hydra_joblib_launcher.joblib_launcher.JoblibLauncher"
    n_jobs: int = 10


@pytest.fixture
def joblib_launcher(monkeypatch):
    """Hydra's plugin for joblib, as far as its configuration goes; in its processes the class is imported twice."""
    store, name = ConfigStore.instance(), LauncherConf._target_
    store.store(group="hydra/launcher", name="joblib", node=LauncherConf, provider="test")
    monkeypatch.setattr(sys.modules[__name__], "LauncherConf", None)  # pickle finds another one under its name
    yield name
    del store.repo["hydra"]["launcher"]["joblib.yaml"]


def test_a_launcher_is_the_command_lines_choice(checkout, joblib_launcher, workdir):
    def composed(*words):
        prepared = prepare(["--config-dir", str(folder), *words])
        return diagnose.compose_choices("pretrain", prepared, prepared.overrides, with_hydra=True).hydra.launcher

    folder = checkout({"launcher": {"n_jobs": 3}})
    (folder / "method" / "other.yaml").write_text(
        "# @package _global_\ndefaults: [simclr, override /hydra/launcher: joblib]\n"
    )
    assert composed("hydra/launcher=joblib", "hydra.launcher.n_jobs=2") == {"_target_": joblib_launcher, "n_jobs": 2}
    with pytest.raises(InputError, match=r"hydra\.launcher\.n_jobs=3: only the command line may set it"):
        composed("hydra/launcher=joblib", "method=evil")
    with pytest.raises(InputError, match=r"hydra.launcher._target_=hydra_plugins\..*add allow=\[hydra_plugins\]"):
        composed("method=other")


# --- Names are words of a shell, text of a page, and seen ---

NAMES = (
    "a b; touch marker",
    "$(touch marker)",
    "'`touch marker`'",
    '"; touch marker; "',
    "-x",
    "a\x1b[2J\n\u202e&& touch marker",
)


@pytest.mark.parametrize("name", NAMES)
def test_a_shell_reads_words_back_and_does_nothing(name, marker):
    line = shell_words(["printf", "%s", name])
    assert line.isprintable()
    done = subprocess.run(["bash", "-c", line], cwd=marker.parent, capture_output=True, text=True, check=True)
    assert done.stdout == name
    assert not marker.exists()


@pytest.mark.parametrize("command", ["rm -rf ~", "sslctl", "sslctl; rm", "sslctl no-verb", "sslctl 'runs", "", None])
def test_a_recorded_command_is_one_of_sslctls(command):
    with pytest.raises(InputError, match=r"expected sslctl VERB"):
        recorded_words(command)


def _told(text, folder, marker):
    """The words of each command that bash reads from a text, run with an sslctl that only writes them down."""
    program = folder / "bin" / "sslctl"
    program.parent.mkdir(exist_ok=True)
    program.write_text('#!/bin/sh\nfor word; do printf "%s\\0" "$word"; done\n')
    program.chmod(0o755)
    path = f"PATH={shlex.quote(str(program.parent))}:$PATH"
    done = subprocess.run(["bash", "-c", f"{path}; {text}"], cwd=folder, capture_output=True, text=True, check=True)
    assert not list(folder.rglob(marker.name))
    return done.stdout.split("\0")[:-1]


@pytest.mark.parametrize("name", ["a b; touch marker", "<i>$(touch marker)\x1b[2J</i>"])
def test_commands_of_runs_and_report_are_words_of_a_shell(foreign, cli, marker, workdir, name):
    run = foreign(name)
    (run / "backbone.safetensors").unlink()  # not finished: `runs` says how to continue
    environment = unsigned(run / "environment.json")
    environment |= {
        "cwd": str(run),
        "command": shlex.join(["sslctl", "pretrain", f"run_dir={name}", "seed=0; touch marker"]),
    }
    (run / "environment.json").write_text(json.dumps(environment))
    result = cli("runs", run.parent)
    assert result.status == 0, result.err
    assert shown(name)[:9] in result.out
    assert re.sub(r"\n", "", result.out).isprintable()
    (command,) = re.findall(r"^  (\(cd .*\))$", result.out, re.MULTILINE)
    assert _told(command, workdir, marker) == ["pretrain", f"run_dir={name}", "seed=0; touch marker"]
    result = cli("report", run, *FAST, "out=page.html")
    assert result.status == 0, result.err
    page = (workdir / "page.html").read_text()
    assert "<i>" not in page.replace('<i class="', "")
    assert page.replace("\n", "").replace("\t", "").isprintable()
    actual = commands_of(page)
    assert len(actual) >= 3
    for command in actual:
        words = _told(command, workdir, marker)
        assert words[0] in VERBS
    assert any(str(run) in _told(command, workdir, marker) for command in actual)


@pytest.mark.parametrize("words", [("knn-eval", "no\x1b[2J\nrun"), ("runs", "no\x1b[2J\nrun"), ("\x1b[2J",)])
def test_control_characters_of_a_message_are_shown_as_escapes(cli, words):
    result = cli(*words)
    assert result.status == 2
    assert r"\x1b[2J" in result.err
    assert result.err.removesuffix("\n").isprintable()


# --- The page ---


def test_every_line_is_printed_with_its_control_characters_as_escapes(capsys):
    say("a\x1b[2J", "\udce9\n", Path("b\r"))
    assert capsys.readouterr().out == "a\\x1b[2J\n\\udce9\\n\nb\\r\n"
    plain = {"cli.py": "the text of --help", "ending.py": "", "signals.py": "", "errors.py": "say() itself"}
    for path in Path(sslctl.__file__).parent.rglob("*.py"):
        printing = re.search(r"(?<![.\w])print\(|console\(\)\.print\((?!table\))", path.read_text())
        assert not printing or path.name in plain, f"{path} prints without say()"


@pytest.mark.parametrize("page", ["security.md", "faults.md"])
def test_the_pages_on_security_and_faults_name_tests_that_exist(page):
    root, own = Path(__file__).parents[2], "".join(path.read_text() for path in Path(__file__).parent.glob("*.py"))
    tokens = re.findall(r"`(tests/[\w/]+\.py|test_\w+)`", (root / "docs" / page).read_text())
    assert len(tokens) > 20
    other = ""
    for token in tokens:
        if token.startswith("tests/"):
            other = (root / token).read_text()
        else:
            assert f"def {token}(" in own + other, token
