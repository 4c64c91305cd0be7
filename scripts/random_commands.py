"""Random command lines of every verb: keys of the real configurations with values of every kind, and what is no key."""

import random
import string
from collections.abc import Iterator
from typing import Any

import yaml

from sslctl.cli import VERBS
from sslctl.config.schema import CONFIGS

# What lies in the folder of every command.
RUN, IMAGES, FILE, EMPTY, WEIGHTS = "run", "images", "notes.txt", "empty", "weights.pt"

_GROUPS = {  # of each verb that has any, and their packages
    "pretrain": ("dataset", "augmentation", "backbone", "optimizer", "scheduler", "trainer", "method", "experiment"),
    "adapt": ("dataset", "augmentation", "backbone", "optimizer", "scheduler", "trainer", "method"),
    "linear-eval": ("dataset", "augmentation", "backbone", "optimizer", "scheduler"),
    "finetune": ("dataset", "augmentation", "backbone", "optimizer", "scheduler"),
    "knn-eval": ("dataset", "backbone"),
    "evaluate": ("dataset", "backbone", "protocols"),
    "export": ("dataset", "backbone"),
    "embed": ("dataset", "backbone"),
    "predict": ("dataset",),
    "views": ("dataset", "augmentation"),
}
_OF_RUNS = (
    "linear-eval",
    "knn-eval",
    "finetune",
    "evaluate",
    "embed",
    "predict",
    "export",
    "runs",
    "report",
    "pictures",
)
_PLANNED = ("pretrain", "adapt", "linear-eval", "knn-eval", "finetune", "evaluate")  # they take plan_only


def _split(text: str) -> list[str]:
    return text.split()


# Small enough that a command that is right ends soon.
_TINY = dict(
    word.split("=")
    for word in _split("""
    dataset.image_size=8 backbone.widths=[4,8] method.out_dim=16 method.hidden_dim=32
    method.queue_size=256 trainer.batch_size=64 trainer.epochs=1 scheduler.warmup_epochs=0
    evaluation.closing=false evaluation.knn_every_epochs=null evaluation.cache_gb=0 probe.epochs=1
    probe.batch_size=128 probe.lr=[0.1] probe.weight_decay=[0.0] clustering.restarts=1
    clustering.iterations=2 clustering.images=100 label_free.images=64 label_free.pairs=64
    label_free.lidar_images=8 label_free.lidar_views=2 map_images=50 rows=100
    images=4 draws=2 least_steps=1 minutes=0.01 few_labels=[1]
""")
)
_NUMBERS = _split("""
    0 1 -1 2 3 0.5 1.5 -0.5 1e-3 7 64 100 1e9 1000000000 -1000000000 99999999999999999999 1e30 1e308 1e400 1e-320
    nan inf -inf 0x10 1_000 1e 00
""")
_WORDS = _split("""
    null true false no abc '' none None auto all - -- = a=b ??? é 名前 a:b a/b a.b @ $ $HOME %s {} * ? [a-z] glob(*)
    glob(s*) choice(1,2) range(1,3) interval(0,1) shuffle(1,2) sort(2,1) int(3) int(abc) str(5) float('x')
    json_str(1) bool(x) extend_list(1) cast(1) 1,2 a,b 1, , 'unclosed [1,2 {a:1 ( ) a'b `id` # a#b ! | &
""")
_WORDS += [
    "",
    "' '",
    '""',
    "\x1b[31mred",
    "a\tb",
    "a\nb",
    "\udcff",
    "\u202e",
    "a b",
    '"unclosed',
    "\\",
    "\\'",
    "'a\\'b'",
]
_CONTAINERS = _split("""
    [] [1] [0] [-1] [1,2] [1.5] [abc] [''] [null] [true] [[1]] [[1],[2]] [{a:1}] [1,abc] [nan] [inf,1] [1e30]
    [0.5,0.5] [1,1,1,1] {} {a:1} {a:{b:1}} {1:2} {a:[1]} {'':1} {_target_:1} {_target_:os.system}
    {_target_:torch.optim.SGD} [${seed}] {a:${nowhere}}
""")
_INTERPOLATIONS = _split("""
    ${seed} ${nowhere} ${nowhere.at.all} ${ ${} ${seed $${seed} ${seed:1} ${oc.env:HOME} ${.} ${..}
    ${oc.env:NOT_THERE} ${oc.env:NOT_THERE,5} ${oc.select:nowhere,3} ${oc.decode:'[1'} ${now:%Y}
    ${oc.dict.keys:trainer} ${oc.create:{a:1}} ${hydra:job.name} ${hydra:nowhere} ${python_version:} ${eval:1+1}
    a${seed}b ${dataset} ${trainer} ${trainer.epochs} ${${seed}}
""")
_INTERPOLATIONS += ["${oc.select:a b}"]
_PATHS = _split("""
    run images notes.txt empty weights.pt notes.txt/below absent absent/deep . .. ~ ~nobody/x ./run/ new.png
    new.html new.npz run/results.jsonl run/checkpoints file://x http://127.0.0.1:9/x
""")
_PATHS += ["x" * 300]
_TARGETS = _split("""
    1 [1] null '' os.system os . a..b sslctl. sslctl.schedules.Schedule sslctl.cli.main torch.optim
    sslctl.methods.moco.MoCo sslctl.methods.moco sslctl.methods.moco.nothing sslctl.data.sources.digits
    torch.nn.Linear sslctl.data.sources.folder torch.optim.SGD torch.optim.LBFGS torch.optim.lr_scheduler.StepLR
    builtins.print sslctl.evaluation.knn.Knn sslctl.models.small_resnet.SmallResNet sslctl.data.sources.np.load é.ü
    ${seed}
""")
_HYDRA = _split("""
    output_subdir run.dir sweep.dir sweep.subdir job.chdir job.name job.config_name job.env_set.A verbose searchpath
    mode launcher._target_ launcher.n_jobs sweeper._target_ sweeper.max_batch_size sweeper.params job_logging
    hydra_logging job_logging.version callbacks callbacks.a._target_ runtime.cwd runtime.choices.method
    overrides.task help.header help.template nothing job env output_subdir.a job.override_dirname
""")
_HYDRA_GROUPS = _split("""
    launcher sweeper job_logging hydra_logging help output nothing env
""")
_OPTIONS = """
    --help; -h; --hydra-help; --cfg job; --cfg all; --cfg hydra; --cfg nothing; --cfg; -c job --resolve; --resolve;
    --info; --info searchpath; --info defaults; --info config; --info plugins; --info x; -p trainer --cfg job;
    --version; --package nothing --cfg job; --package=; --config-dir nowhere; --config-dir images; --config-dir;
    -cd notes.txt; --run; -r; -m; --multirun; -m -m; --config-name x; --config-path .; --nothing; -x; ---;
    --cfg=job; --experimental-rerun x;
"""
_OPTIONS = [words.split() for words in _OPTIONS.split(";") if words.strip()]
_ALLOW = _split("""
    allow= allow=[] allow=[sslctl] allow=sslctl allow=nothing allow=1 allow=[a,b] allow allow=[[ +allow=x
""")
# These decide how many processes are started: never a number between a few and what is refused.
_FEW = {
    "processes": ("1", "0", "-1", "1.5", "abc", "null"),
    "workers": ("0", "1", "-1", "1.5", "abc", "null", "1000000000"),
}


def options_of(group: str) -> list[str]:
    """The files of a group of configs/."""
    return sorted(f.stem for f in (CONFIGS / group).glob("*.yaml"))


def _read(name: str) -> dict:
    return yaml.load((CONFIGS / f"{name}.yaml").read_text(), yaml.CSafeLoader) or {}


def _leaves(node: Any, path: str) -> Iterator[tuple[str, Any]]:
    if isinstance(node, dict) and node:
        for name, value in node.items():
            yield from _leaves(value, f"{path}.{name}".lstrip("."))
    else:
        yield path, node


def keys_of(verb: str, choices: dict[str, str]) -> dict[str, Any]:
    """Key -> what its file says, of a verb with these choices."""
    keys = dict(_leaves({k: v for k, v in _read(verb.replace("-", "_")).items() if k != "defaults"}, ""))
    for name in ("_evaluation", "_probe") if verb in ("linear-eval", "knn-eval", "evaluate", "pretrain") else ():
        keys |= dict(_leaves(_read(name), ""))
    for group, choice in choices.items():
        content = {k: v for k, v in _read(f"{group}/{choice}").items() if k != "defaults"}
        whole = group in ("method", "experiment")  # their package is the configuration itself
        keys |= dict(_leaves(content if whole else {group: content}, ""))
    if "augmentation" in choices:
        keys |= dict(_leaves({"augmentation": {"global": _read("_view_group")}}, ""))
    if "dataset" in choices:
        keys |= dict(_leaves({"dataset": {"scale": _read("scale/tiny")}}, ""))
    return keys


def command(rng: random.Random) -> list[str]:
    """The words of one command line after `sslctl`."""
    if rng.random() < 0.01:
        return rng.choice(
            [["--help"], ["help"], ["--version"], ["pretrian"], [""], ["-x"], ["seed=1"], ["\x1b[31m"], []]
        )
    verb = "pretrain" if rng.random() < 0.4 else rng.choice([v for v in VERBS if v != "check" or rng.random() < 0.1])
    choices = _choices(verb, rng)
    keys = keys_of(verb, choices)
    words = [verb]
    if verb in _OF_RUNS and ("dataset" not in choices or verb == "predict" or rng.random() < 0.8):
        words.append(RUN)
    words += [f"{group}={choice}" for group, choice in choices.items() if rng.random() < 0.9]
    if choices.get("dataset") in ("folder", "imagefolder", "frames", "text"):
        words.append(f"dataset.root={IMAGES}")
    if verb == "adapt":
        words += ["backbone=small_resnet", f"backbone.weights={WEIGHTS}", f"dataset.root={IMAGES}"]
    words += [f"{key}={value}" for key, value in _TINY.items() if key in keys]
    if verb in _PLANNED and rng.random() < 0.9:
        words.append("plan_only=true")
    faults = [
        word for _ in range(rng.choice((0, 1, 1, 1, 1, 1, 1, 2, 2, 4))) for word in _fault(verb, keys, choices, rng)
    ]
    if rng.random() < 0.1:
        faults = ["-m", *faults, rng.choice(("seed=0,1", "seed=0,abc", *faults, *words[1:]))]
    if faults and rng.random() < 0.05:
        faults.append(faults[0])
    return [word.replace("\0", "") for word in (*words, *faults)]


def _choices(verb: str, rng: random.Random) -> dict[str, str]:
    """Choices of files for some of a verb's groups; the small and quick ones come often."""
    usual = {"dataset": "folder" if verb == "predict" else "digits", "backbone": "small_resnet"}
    choices = {}
    for group in _GROUPS.get(verb, ()):
        rarely = group in ("protocols", "experiment", "trainer") or verb not in ("pretrain", "views", "predict")
        if rarely and rng.random() < 0.93:
            continue
        choices[group] = usual[group] if group in usual and rng.random() < 0.6 else rng.choice(options_of(group))
    return choices


def value(key: str, default: Any, rng: random.Random) -> str:
    """A value for a key, of any kind."""
    leaf = key.rpartition(".")[2]
    if leaf in _FEW:
        return rng.choice(_FEW[leaf])
    if leaf == "_target_":
        return rng.choice(_TARGETS)
    if isinstance(default, int | float) and not isinstance(default, bool) and rng.random() < 0.4:
        return f"{default * rng.choice((-1, 0, 0.3, 0.5, 2, 3, 10)):g}"  # of the right kind
    if isinstance(default, list | str) and rng.random() < 0.2:
        return rng.choice(
            ("1", "2", "3", "5", "7", "0.3", "0.99", "[1,2]", "[0.2,0.4]", "[3,3]", "true", "false", "null")
        )
    likely = {"a number": _NUMBERS, "a path": _PATHS}[
        "a path" if leaf in ("root", "out", "ckpt", "run_dir", "weights") else "a number"
    ]
    kinds = (_NUMBERS, _WORDS, _CONTAINERS, _INTERPOLATIONS, _PATHS, likely, likely)
    return rng.choice(rng.choice(kinds))


def _fault(verb: str, keys: dict[str, Any], choices: dict[str, str], rng: random.Random) -> list[str]:
    """One or several words that are probably wrong."""
    key = rng.choice([*keys, "seed"])
    given = value(key, keys.get(key), rng)
    group = rng.choice(_GROUPS.get(verb, ("method",)))
    option, other = rng.choice(options_of(group)), rng.choice(options_of(group))
    mark = rng.choice(("", "", "", "+", "~", "++"))
    free = rng.choice(_split("backbone.kwargs method.teacher_backbone.kwargs recipe names dataset trainer protocols"))
    kinds = {
        "a value": (55, [f"{key}={given}"]),
        "a misspelt key": (5, [f"{_misspelt(key, rng)}={given}"]),
        "a marked key": (
            5,
            [rng.choice((f"+{key}={given}", f"++{key}={given}", f"~{key}", f"{key}@a.b={given}", key))],
        ),
        "an inner node": (5, [f"{key.rpartition('.')[0] or key}={given}"]),
        "a choice": (6, [f"{mark}{group}{rng.choice(('', '', '@', '@_global_', '@a'))}={rng.choice((option, given))}"]),
        "choices": (
            4,
            [f"{group}={rng.choice((f'[{option}]', f'[{option},{other}]', f'{{{option}:1}}', f'{option},{other}'))}"],
        ),
        "a file": (1, [f"{group}={rng.choice((f'../{group}/{option}', f'{option}.yaml', f'/{option}'))}"]),
        "Hydra's": (4, [f"{mark}hydra.{rng.choice(_HYDRA)}={value('', None, rng)}"]),
        "Hydra's choice": (2, [f"{mark}hydra/{rng.choice(_HYDRA_GROUPS)}={value('', None, rng)}"]),
        "a new key": (4, [f"{mark}{free}.{rng.choice(_split('a depth _target_ a.b é img_size name'))}={given}"]),
        "an option": (5, rng.choice(_OPTIONS)),
        "allow": (2, [rng.choice(_ALLOW)]),
        "a word": (1, [rng.choice((*_PATHS, *_WORDS))]),
        "junk": (2, ["".join(rng.choices(string.printable, k=rng.randrange(1, 12)))]),
    }
    return rng.choices([words for _, words in kinds.values()], [weight for weight, _ in kinds.values()])[0]


def _misspelt(key: str, rng: random.Random) -> str:
    at = rng.randrange(len(key))
    return rng.choice(
        (
            key[:at] + key[at + 1 :],
            key[:at] + key[at] + key[at:],
            key[:at] + rng.choice("abc._-/ é*@=") + key[at + 1 :],
            key.upper(),
        )
    )
