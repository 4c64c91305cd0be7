"""The command line: what it refuses and how, what it prints, completion, paths, bare words and sweeps."""

import json
import os
import pickle
import re
import shlex
import shutil
import sys
from dataclasses import fields
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
import yaml

from sslctl.cli import VERBS
from sslctl.config.schema import CONFIGS, SCHEMAS
from sslctl.training.plan import choose_device
from tests.conftest import QUICK, write_images

PLAN = (*QUICK, "plan_only=true")


def listing(folder: Path) -> list[str]:
    """Everything below a folder."""
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


@pytest.fixture
def refuse(cli, workdir):
    """refuse(*words, lines=1): a command that must end with status 2, so many short lines, and nothing written.

    Returns what it said.
    """

    def run(*words, lines=1):
        before = listing(workdir)
        result = cli(*words)
        printed = result.err.splitlines()
        assert result.status == 2, result
        assert "Traceback" not in result.out + result.err
        assert all(line.startswith("sslctl: ") for line in printed), printed
        assert len(printed) == lines, printed
        assert max(map(len, printed)) <= 400, printed
        assert listing(workdir) == before
        return result.err

    return run


# --- Bad input ---

MISTAKES = {
    "verb": ("pretrian", "'pretrian'", "nearest: pretrain"),
    "key": ("pretrain optimizer.lrr=1", "optimizer.lrr", "nearest: optimizer.base_lr"),
    "key-of-method": ("pretrain method.queue_siz=5", "method.queue_siz", "MoCo", "nearest: method.queue_size"),
    "key-of-trainer": ("pretrain trainer.epoch=3", "trainer.epoch ", "nearest: trainer.epochs"),
    "key-deep-down": ("pretrain augmentation.globl.flip=0.5", "augmentation.globl.flip", "augmentation.global.flip"),
    "key-of-other-verb": ("runs trainer.epochs=1", "trainer.epochs", "not a key of runs"),
    "key-of-views": ("views imagess=2", "imagess", "nearest: images"),
    "word-where-no-run-is-asked-for": ("pretrain moko", "moko"),
    "plus": ("pretrain +optimizer.lrr=1", "+optimizer.lrr=1", "nearest: optimizer.base_lr"),
    "plus-new-group": ("pretrain +optimiser.lr=1", "+optimiser.lr=1", "none can be added"),
    "plus-plus": ("pretrain ++optimizer.base_lr=1", "++optimizer.base_lr=1", "optimizer.base_lr=… without the mark"),
    "tilde": ("pretrain ~optimizer.momentum", "~optimizer.momentum"),
    "plus-kwargs-of-another-group": ("pretrain +method.kwargs.depth=1", "+method.kwargs.depth=1"),
    "kwargs-without-plus": ("pretrain backbone=timm backbone.kwargs.depth=1", "backbone.kwargs.depth"),
    "epochs-word": ("pretrain trainer.epochs=abc", "trainer.epochs=abc", "a whole number"),
    "epochs-fraction": ("pretrain trainer.epochs=1.5", "trainer.epochs=1.5", "a whole number"),
    "epochs-null": ("pretrain trainer.epochs=null", "trainer.epochs=null"),
    "base-lr-word": ("pretrain optimizer.base_lr=abc", "optimizer.base_lr=abc", "a number"),
    "base-lr-negative": ("pretrain optimizer.base_lr=-1", "optimizer.base_lr=-1", "more than 0"),
    "queue-size-fraction": ("pretrain method.queue_size=1.5", "method.queue_size=1.5", "a whole number"),
    "widths-number": ("pretrain backbone.widths=8", "backbone.widths=8", "list"),
    "flip": ("pretrain augmentation.global.flip=2", "augmentation.global.flip=2", "at most 1"),
    "keep-last": ("pretrain trainer.keep_last=1", "trainer.keep_last=1", "at least 2"),
    "nan": ("pretrain optimizer.base_lr=nan", "optimizer.base_lr=nan", "a finite number"),
    "larger-than-any-tensor": ("pretrain seed=99999999999999999999", "seed=99999999999999999999", "below 2^63"),
    "schedule-word": ("pretrain scheduler.end=abc", "scheduler.end=abc", "a number"),
    "milestones": (
        "pretrain scheduler=multistep scheduler.milestones_share=[a]",
        "milestones_share",
        "list of numbers",
    ),
    "entry-of-a-list": ("pretrain optimizer=adamw optimizer.betas=[0.9,x]", "optimizer.betas=x", "expected a number"),
    "temperature": ("pretrain method.temperature=-1", "method.temperature=-1", "more than 0"),
    "target-number": ("pretrain method._target_=1", "method._target_=1", "name of a class"),
    "target-of-our-tools": (
        "pretrain method._target_=sslctl.schedules.step",
        "sslctl.methods",
        "a package that allow=",
    ),
    "target-of-another-kind": ("pretrain method._target_=torch.optim.SGD", "torch.optim.SGD", "expected a Method"),
    "list-of-methods": ("pretrain method=[moco]", "method=[moco]", "the name of one method, found a list"),
    "no-package": (
        "pretrain --cfg job --package optimiser",
        "--package optimiser: no such part",
        "(nearest: optimizer)",
    ),
    "lone-package": ("pretrain --package optimizer", "--package optimizer: goes with --cfg"),
    "no-width": ("pretrain backbone=mlp backbone.widths=[]", "backbone.widths=[]: expected at least one value"),
    "option-value": ("pretrain --cfg nothing", "--cfg nothing", "job, hydra, all"),
    "value-of-a-flag": ("pretrain --help=x", "--help takes no value"),
    "hydra": ("pretrain hydra.job.name=['']", "hydra.job.name=['']", "string"),
    "folder-of-hydra": ("pretrain hydra.run.dir=x", "hydra.run.dir=x: nothing lies", "run_dir=FOLDER"),
    "choice-of-hydra": ("pretrain hydra/output=${.}", "hydra/output=${.}: extraneous"),
    "no-name": ("pretrain dataset=digits names.dataset=null", "names.dataset=None: no name for a folder"),
    "name-above": ("pretrain dataset=digits names.method=..", "names.method=..: no name for a folder"),
    "pack-of-nothing": ("pack out=absent/pack", "dataset.root is not set"),
    "node-of-hydra": ("pretrain hydra.callbacks=${oc.env:HOME}", "hydra.callbacks=${oc.env:HOME}: nothing that Hydra"),
    "number-for-a-file": ("data dataset.root=. out=${oc.select:nowhere,3}", "out=3: expected a .html or a .json file"),
    "null-in-a-list": ("evaluate run probe.lr=[null]", "probe.lr=[null]: null is no float"),
    "long-choice": (f"pretrain backbone={'x' * 400}", f"{'x' * 91} …: no such backbone"),
    "value-in-a-sweep": ("pretrain -m seed=abc,1", "seed=abc", "a whole number"),
    "long-name": (f"runs {'x' * 300}", "not a name that a file can have"),
    "precision": ("pretrain trainer.precision=fp61", "trainer.precision=fp61", "fp32", "nearest: fp16"),
    "drops": ("pretrain dataset.drops=[hflip]", "dataset.drops=hflip", "nearest: flip"),
    "seed-unknown-variable": ("pretrain seed=${nowhere}", "seed", "nowhere"),
    "unreadable": ("pretrain optimizer.base_lr=(", "optimizer.base_lr=(", "cannot be read"),
    "method": ("pretrain method=moca", "method=moca", "nearest: moco", "byol", "--help lists all"),
    "dataset": ("pretrain dataset=digit", "dataset=digit", "nearest: digits", "imagefolder"),
    "optimizer": ("pretrain optimizer=adamz", "optimizer=adamz", "nearest: adam", "lars"),
    "eval-dataset": ("pretrain eval_dataset=digit", "eval_dataset=digit", "nearest: digits"),
    "scale": ("pretrain scale=tin", "scale=tin: no such scale", "nearest: tiny", "imagenet"),
    "method-null": ("pretrain method=null", "method"),
    "group-number": ("pretrain trainer=5", "trainer"),
    "method-in-a-sweep": ("pretrain -m method=simclr,moca", "moca", "nearest: moco"),
    "key-in-a-sweep": ("pretrain -m optimizer.lrr=1,2", "optimizer.lrr", "nearest: optimizer.base_lr"),
    "sweep-without-m": ("pretrain seed=0,1", "seed=0,1", "-m"),
    "batch-too-large": ("pretrain trainer.batch_size=5000", "1438 images", "trainer.batch_size=5000"),
    "root-of-digits": ("pretrain dataset.root=images", "dataset=folder"),
    "root-missing": ("pretrain dataset=folder", "dataset.root is not set"),
    "root-of-unknown-user": ("pretrain dataset=folder dataset.root=~nobody-here/images", "~nobody-here/images"),
    "warmup-twice": (
        "pretrain scheduler.warmup_epochs=1 scheduler.warmup_steps=5",
        "scheduler.warmup_epochs",
        "scheduler.warmup_steps",
    ),
    "scheduler-shape": ("pretrain scheduler.shape=cosin", "scheduler.shape=cosin", "cosine"),
    "timm-model": ("pretrain backbone=timm backbone.model=resnet19", "backbone.model=resnet19", "resnet18"),
    "batchnorm-groups": (
        "pretrain plan_only=true trainer.threads=1 method.batchnorm_groups=7",
        "128",
        "batchnorm_groups=7",
    ),
    "probe-without-settings": ("pretrain plan_only=true backbone=mlp trainer.threads=1 probe.lr=[]", "probe.lr"),
    "foreign-target": ("pretrain method._target_=os.system", "os.system", "allow=[os]"),
    "config-dir": ("pretrain --config-dir nowhere", "nowhere", "no such directory"),
    "run": ("linear-eval nowhere", "ckpt=nowhere", "no such run"),
    "ckpt": ("knn-eval ckpt=nowhere", "ckpt=nowhere", "no such run"),
    "nothing-to-evaluate": ("linear-eval", "ckpt=runs/latest"),
    "protocol": ("linear-eval protocol=cachd", "protocol=cachd", "nearest: cached"),
    "runs": ("runs nowhere", "nowhere", "not a directory"),
    "picture": ("views out=picture.gif", "picture.gif", ".png"),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_bad_input_is_refused_in_one_line_and_writes_nothing(refuse, case):
    line, *fragments = MISTAKES[case]
    printed = refuse(*line.split())
    for fragment in fragments:
        assert fragment in printed


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_an_absent_device_is_refused_with_those_that_are_there(refuse):
    printed = refuse("pretrain", "trainer.device=cuda")
    assert "trainer.device=cuda" in printed
    assert "cpu" in printed


def test_several_mistakes_are_reported_together(refuse):
    printed = refuse("pretrain", "optimizer.lrr=1", "trainer.epoch=3", "method=moca", "trainer.batch_size=x", lines=4)
    for fragment in ("optimizer.lrr", "trainer.epoch ", "method=moca", "trainer.batch_size=x"):
        assert printed.count(fragment) == 1, printed


def test_several_values_out_of_range_are_reported_together(refuse):
    printed = refuse("pretrain", "trainer.epochs=0", "optimizer.base_lr=-1", "trainer.keep_last=1", lines=3)
    for fragment in ("trainer.epochs=0", "optimizer.base_lr=-1", "trainer.keep_last=1"):
        assert fragment in printed


def test_an_unknown_option_is_named_without_a_traceback(cli, workdir):
    result = cli("pretrain", "--folder")
    assert result.status == 2
    assert "--folder" in result.err
    assert "Traceback" not in result.err
    assert listing(workdir) == []


def test_debug_shows_the_traceback(cli, monkeypatch):
    assert "Traceback" not in cli("pretrain", "trainer.keep_last=1").err
    monkeypatch.setenv("SSLCTL_DEBUG", "1")
    result = cli("pretrain", "trainer.keep_last=1")
    assert result.status == 2
    assert "Traceback" in result.err


# --- Folders that cannot be trained on ---


@pytest.fixture
def folders(workdir):
    """Folders and a file that hold too little."""
    (workdir / "empty").mkdir()
    (workdir / "texts").mkdir()
    (workdir / "texts" / "notes.txt").write_text("no image")
    (workdir / "file").write_text("no folder")
    write_images(workdir / "few", count=4)
    return workdir


@pytest.mark.parametrize(
    ("root", "fragments"),
    [
        ("empty", ("no images in empty", ".png")),
        ("texts", ("no images in texts", "1 .txt")),
        ("nowhere", ("dataset.root=nowhere", "no such folder")),
        ("file", ("dataset.root=file", "not a folder")),
        ("few", ("4 images", "trainer.batch_size=16")),
    ],
)
def test_a_folder_without_enough_images_is_refused(refuse, folders, root, fragments):
    printed = refuse("pretrain", "trainer.batch_size=16", "dataset=folder", f"dataset.root={root}")
    assert all(fragment in printed for fragment in fragments), printed


@pytest.mark.parametrize("run_dir", ["file", "file/run", "file/deep/run"])
def test_a_run_directory_below_a_regular_file_is_refused(refuse, folders, run_dir):
    assert f"run_dir={run_dir} cannot be written" in refuse("pretrain", *QUICK, f"run_dir={run_dir}")
    assert (folders / "file").read_text() == "no folder"


def test_a_picture_below_a_regular_file_is_refused(refuse, folders):
    assert "file/views.png" in refuse("views", "images=1", "draws=1", "out=file/views.png")


# --- Runs and weights that are none ---


@pytest.mark.parametrize("verb", ["linear-eval", "knn-eval"])
@pytest.mark.parametrize(
    ("word", "fragment"), [("nowhere", "no such run"), ("empty", "no run directory there"), ("file", "is a file")]
)
def test_a_checkpoint_that_is_none_is_refused(refuse, folders, verb, word, fragment):
    printed = refuse(verb, f"ckpt={word}")
    assert f"ckpt={word}" in printed
    assert fragment in printed


def test_a_checkpoint_of_another_backbone_is_refused_with_its_differences(refuse, finished_run):
    before = listing(finished_run)
    printed = refuse("linear-eval", str(finished_run), "backbone=resnet18", lines=4)
    assert "is of another model" in printed
    for kind in ("missing", "unexpected", "of another shape"):
        assert re.search(rf"\d+ tensors {kind}", printed), printed
    assert listing(finished_run) == before


class Malicious:
    """Unpickling it makes a file."""

    def __init__(self, canary: Path):
        self.canary = canary

    def __reduce__(self):
        return os.mkdir, (str(self.canary),)


@pytest.fixture
def malicious(workdir, tmp_path_factory):
    """A function that writes a malicious file in one of two formats; and the folder that unpickling it would make."""
    canary = tmp_path_factory.mktemp("canaries") / "canary"

    def write(kind):
        path = workdir / f"{kind}.pt"
        if kind == "torch":
            torch.save({"state_dict": Malicious(canary)}, path)
            torch.load(path, weights_only=False)
        else:
            path.write_bytes(pickle.dumps({"state_dict": Malicious(canary)}))
            pickle.loads(path.read_bytes())
        assert canary.exists()  # the trap works
        canary.rmdir()
        return path

    return write, canary


@pytest.mark.parametrize("kind", ["torch", "pickle"])
@pytest.mark.parametrize(
    "words",
    [
        "linear-eval ckpt={}",
        "knn-eval {}",
        "linear-eval dataset=digits backbone=mlp backbone.weights={}",
        "pretrain backbone=mlp backbone.weights={}",
    ],
)
def test_a_malicious_pickle_is_refused_and_never_run(refuse, malicious, recwarn, kind, words):
    write, canary = malicious
    path = write(kind)
    printed = refuse(*words.format(path.name).split())
    assert path.name in printed
    assert "weights_only" not in printed  # no advice to load it in a way that would run it
    assert not canary.exists()
    assert not [str(w.message) for w in recwarn if issubclass(w.category, UserWarning)]  # they would go to stderr too


# --- What it prints ---


@pytest.mark.parametrize("words", [("--help",), ("-h",), ()])
def test_help_lists_every_verb(cli, words):
    result = cli(*words)
    assert result.status == 0
    for verb in VERBS:
        assert re.search(rf"^  {verb} ", result.out, re.MULTILINE), verb


SOME = ("pretrain", "linear-eval", "runs")  # with many groups, one and none; tests of `sslctl check` compose every verb


@pytest.mark.parametrize("verb", SOME)
def test_help_of_a_verb_shows_its_keys(cli, verb):
    result = cli(verb, "--help")
    assert result.status == 0
    assert result.err == ""
    for field in fields(SCHEMAS[verb.replace("-", "_")]):
        assert re.search(rf"^{field.name}:", result.out, re.MULTILINE), field.name


@pytest.mark.parametrize("verb", SOME)
def test_cfg_job_prints_the_composed_configuration(cli, workdir, verb):
    result = cli(verb, "--cfg", "job")
    assert result.status == 0
    assert yaml.safe_load(result.out).keys() == {field.name for field in fields(SCHEMAS[verb.replace("-", "_")])}
    assert listing(workdir) == []


@pytest.mark.parametrize("optimizer", ["sgd", "adamw", "lars"])
def test_cfg_job_resolves_interpolations_when_asked(cli, optimizer):
    result = cli("pretrain", f"optimizer={optimizer}", "--cfg", "job", "--resolve")
    assert result.status == 0, result.err
    assert "${" not in result.out
    assert isinstance(yaml.safe_load(result.out)["optimizer"]["base_lr"], float)


def test_options_may_stand_between_overrides(cli):
    result = cli("pretrain", "seed=3", "--cfg", "job", "method=simclr")
    assert result.status == 0, result.err
    config = yaml.safe_load(result.out)
    assert config["seed"] == 3
    assert config["method"]["_target_"].endswith("SimCLR")


def test_version_names_the_package_torch_and_the_device(cli):
    result = cli("--version")
    device = torch.cuda.get_device_name() if choose_device("auto").type == "cuda" else choose_device("auto").type
    assert result.out.startswith(f"sslctl {version('sslctl')} (torch {torch.__version__}, device {device}")
    if device == "cpu":
        assert result.out.endswith(f", device cpu, {len(os.sched_getaffinity(0))} threads)\n")


def test_version_without_torch_says_so(cli, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)  # its import fails
    result = cli("--version")
    assert result.status == 0
    assert re.fullmatch(rf"sslctl {version('sslctl')} \(torch cannot be imported: .+\)\n", result.out)


# --- Completion ---


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("sslctl pre", {"pretrain", "predict"}),
        ("sslctl ", set(VERBS)),
        ("sslctl pretrain method=mo", {f"method={f.stem}" for f in (CONFIGS / "method").glob("mo*.yaml")}),
        ("sslctl pretrain trainer.ep", {"trainer.epochs="}),
        ("sslctl pretrain method=simclr trainer.ep", {"trainer.epochs="}),
        ("sslctl linear-eval prot", {"protocol=", "protocols="}),
        ("sslctl views augmentation=li", {"augmentation=linear"}),
    ],
)
def test_completion_offers_verbs_keys_and_choices(cli, monkeypatch, line, expected):
    monkeypatch.setenv("COMP_LINE", line)
    result = cli("-sc", "query=bash")
    assert (result.status, result.err) == (0, "")
    assert set(result.out.split()) == expected


@pytest.mark.parametrize(
    "line",
    ["sslctl nope x", "sslctl pretrain method=nope opt", "sslctl linear-eval runs/a ", "sslctl pretrain optimizer.x=("],
)
def test_completion_of_a_wrong_line_stays_silent(cli, monkeypatch, line):
    monkeypatch.setenv("COMP_LINE", line)
    result = cli("-sc", "query=bash")
    assert (result.status, result.err) == (0, "")


def test_completion_can_be_installed(cli):
    result = cli("-sc", "install=bash")
    assert result.status == 0
    assert "complete " in result.out


# --- Torch is imported only when work starts ---


def imported(spawn, *words, **environment) -> set[str]:
    """The modules that a command imports."""
    result = spawn(*words, program=("-X", "importtime", "-m", "sslctl"), **environment)
    modules = set(re.findall(r"\| +(\S+)$", result.err, re.MULTILINE))
    assert "sslctl.cli" in modules, result.err
    return modules


@pytest.mark.parametrize(
    "words",
    [
        "--help",
        "pretrain --help",
        "pretrain --cfg job",
        "pretrian",
        "pretrain method=moca",
        "pretrain trainer.epochs=a",
    ],
)
def test_help_and_typos_do_not_import_torch(spawn, words):
    assert "torch" not in imported(spawn, *words.split())


def test_completion_does_not_import_torch(spawn):
    assert "torch" not in imported(spawn, "-sc", "query=bash", COMP_LINE="sslctl pretrain method=mo")


@pytest.mark.slow
def test_a_resnet_is_trained_without_packages_that_others_need(spawn):
    modules = imported(spawn, "pretrain", *QUICK, "backbone=small_resnet")
    assert {"torch", "sslctl.runs.checkpoint"} <= modules  # so that these tests can fail
    assert not modules & {"timm", "torchvision", "sklearn", "scipy", "tensorboard", "pandas", "jinja2"}


# --- Paths ---

NAMES = [
    "two words, [a](b){c} #1: 50%",
    "a=b",
    "it's",
    'say "no"',
    "a$b",
    "a${x}b",
    "Größe 画像",
    "back\\slash\\",
    "back\\${x}",
]


@pytest.mark.parametrize("name", NAMES)
def test_paths_with_special_characters_work(cli, workdir, name):
    write_images(workdir / name)
    result = cli("pretrain", *PLAN, "dataset=folder", f"dataset.root={name}", f"run_dir={name}/run")
    assert result.status == 0, result.err
    assert f"data       {name} (train): 16 images" in result.out
    assert f"run        {name}/run\n" in result.out


def test_a_run_with_special_characters_in_its_paths_finishes_and_continues(cli, workdir):
    name = "[a], it's ${x} = Größe"
    write_images(workdir / name, count=32)
    words = ("pretrain", *QUICK, "dataset=folder", f"dataset.root={name}", f"run_dir={name}/run")
    assert cli(*words).status == 0
    assert (workdir / name / "run" / "backbone.safetensors").exists()
    config = yaml.safe_load((workdir / name / "run" / "config.yaml").read_text())
    assert (config["dataset"]["root"], config["as_typed"]) == (str(workdir / name), {"dataset.root": name})
    again = cli(*words)
    assert again.status == 0
    assert f"already finished: {name}/run" in again.out
    recorded = shlex.split(json.loads((workdir / name / "run" / "environment.json").read_text())["command"])
    assert recorded[0] == "sslctl"
    assert f"already finished: {name}/run" in cli(*recorded[1:]).out


def test_variables_in_paths_are_replaced_and_each_job_of_a_sweep_has_its_own(cli, workdir, monkeypatch):
    write_images(workdir / "images")
    monkeypatch.setenv("DATA", str(workdir))
    words = ("dataset=folder", "dataset.root=${oc.env:DATA}/images", "run_dir=runs/x-${seed}")
    result = cli("pretrain", "-m", *PLAN, *words, "seed=3,4")
    assert result.status == 0, result.err
    assert "images (train): 16 images" in result.out
    assert "scale      tiny" in result.out  # counted before the configuration is composed
    for seed in (3, 4):
        assert f"run        runs/x-{seed}\n" in result.out


def test_a_word_with_an_equals_sign_that_exists_is_a_path(cli, workdir, finished_run):
    shutil.copytree(finished_run, workdir / "runs" / "lr=0.1")
    assert cli("runs", "runs/lr=0.1").status == 0
    assert "runs/lr is not a key of runs" in cli("runs", "runs/lr=0.2").err
    (workdir / "images=2").touch()  # a key stays one
    assert "views.png: 2 images" in cli("views", "images=2").out
    teacher = ("method=seed", "method.teacher=runs/lr=0.1", "dataset=imagefolder", "dataset.root=nowhere")
    assert cli("pretrain", *teacher).err == "sslctl: dataset.root=nowhere: no such folder\n"


def test_tilde_is_expanded(cli, workdir, monkeypatch):
    monkeypatch.setenv("HOME", str(workdir / "home"))
    write_images(workdir / "home" / "my images")
    result = cli("pretrain", *PLAN, "dataset=folder", "dataset.root=~/my images", "run_dir=~/my run")
    assert result.status == 0, result.err
    assert "my images (train): 16 images" in result.out
    assert f"run        {workdir}/home/my run\n" in result.out


@pytest.mark.parametrize("form", ["{}", "ckpt={}"])
@pytest.mark.parametrize("name", [n for n in NAMES if "=" not in n])
def test_words_and_ckpt_name_runs(refuse, workdir, form, name):
    if "${" in name:  # no variable, as there is one of this name
        (workdir / name).mkdir()
    missing = "no run directory there" if "${" in name else "no such run"
    assert f"ckpt={name}: {missing}" in refuse("knn-eval", form.format(name))


def test_several_words_are_several_runs(cli, workdir, finished_run):
    for name in ("first run", "b, [c]"):
        shutil.copytree(finished_run, workdir / name, symlinks=True)
    result = cli("knn-eval", "first run", "b, [c]", "plan_only=true")
    assert result.status == 0, result.err
    for name in ("first run", "b, [c]"):
        assert f"{workdir}/{name} at step-2" in result.out


def test_a_directory_is_searched_for_runs(cli, workdir, finished_run):
    for name in ("x/a", "x/deep/b"):
        shutil.copytree(finished_run, workdir / name, symlinks=True)
    result = cli("knn-eval", "x", "plan_only=true")
    assert result.status == 0, result.err
    assert [line for line in result.out.splitlines() if line.endswith("at step-2")] == [
        f"{workdir}/x/{name} at step-2" for name in ("a", "deep/b")
    ]


# --- Sweeps ---


def jobs(result) -> list[str]:
    return re.findall(r"^── job (\d+):", result.out, re.MULTILINE)


@pytest.mark.parametrize("place", ["first", "between"])
def test_a_sweep_of_plans_runs_every_job_and_writes_nothing(cli, workdir, place):
    words = ("-m", *PLAN, "seed=0,1") if place == "first" else (*PLAN, "-m", "seed=0,1")
    result = cli("pretrain", *words)
    assert result.status == 0, result.err
    assert jobs(result) == ["0", "1"]
    assert len(re.findall(r"^run        .*-s([01])$", result.out, re.MULTILINE)) == 2
    assert listing(workdir) == []


def test_a_sweep_writes_its_runs_and_nothing_else(cli, workdir, labelled_images):
    result = cli("pretrain", "-m", *QUICK, "dataset=imagefolder", f"dataset.root={labelled_images}", "seed=0,1")
    assert result.status == 0, result.err
    assert os.listdir(workdir) == ["runs"]
    runs = sorted(path.parent.name for path in workdir.rglob("backbone.safetensors") if "latest" not in path.parts)
    assert [name[-3:] for name in runs] == ["-s0", "-s1"]
    assert not [path for path in listing(workdir) if re.search(r"multirun|\.hydra|outputs|\.log$", path)]


@pytest.mark.slow
@pytest.mark.parametrize("choice", ["optimizer.base_lr=0.1,-1,0.2", "trainer.batch_size=16,5000,32"])
def test_a_failing_job_does_not_end_the_sweep(cli, workdir, choice):
    key, _, values = choice.partition("=")
    good, bad, other = values.split(",")
    result = cli("pretrain", "-m", *(word for word in PLAN if not word.startswith(key)), choice)
    assert result.status == 2
    assert jobs(result) == ["0", "1", "2"]
    assert result.out.count("nothing was trained or written") == 2
    summary = result.err.partition("1 of the sweep's 3 jobs failed; its status is 2")[2]
    assert "job 1, status 2 (" in summary
    assert f"{key}={bad}" in summary
    assert f"{key}={good} " not in summary
    assert f"{key}={other} " not in summary
    assert "Traceback" not in result.err
    assert listing(workdir) == []


@pytest.mark.slow
def test_a_job_that_exits_does_not_end_the_sweep(cli, workdir):
    (workdir / "own" / "method").mkdir(parents=True)
    (workdir / "own" / "leaves.py").write_text(
        "import sys\n"
        "from sslctl.methods.base import Method\n\n"
        "class Leaves(Method):\n"
        "    def training_step(self, batch, s):\n"
        "        sys.exit(0)\n"
    )
    (workdir / "own" / "method" / "leaves.yaml").write_text(
        "# @package _global_\ndefaults:\n- override /optimizer: sgd\nmethod:\n  _target_: leaves.Leaves\n"
    )
    before = listing(workdir)
    words = [word for word in PLAN if not word.startswith("method=")]
    result = cli("pretrain", "-m", "--config-dir", "own", "allow=[leaves]", *words, "method=leaves,simclr")
    assert result.status == 1
    assert jobs(result) == ["0", "1"]
    assert result.out.count("nothing was trained or written") == 1
    summary = result.err.partition("1 of the sweep's 2 jobs failed; its status is 1")[2]
    assert "job 0, status 1 (" in summary
    assert "method=leaves" in summary
    assert "sys.exit(0)" in summary
    assert [path for path in listing(workdir) if "__pycache__" not in path] == before
