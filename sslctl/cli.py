"""sslctl VERB key=value …: each verb is a Hydra application over configs/VERB.yaml.

Nothing here imports torch: help, completion and a typo answer at once. Exit status: 0 done, 2 bad input found before the
first step, 1 failure while running, 130 or 143 stopped by a signal, 75 to be started again.
"""

import importlib
import os
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

from sslctl.config import command_line as overrides
from sslctl.config import diagnose as explain
from sslctl.config import jobs
from sslctl.config.recipes import choose_recipe
from sslctl.config.running import running_job
from sslctl.config.schema import CONFIGS, SCHEMAS
from sslctl.config.targets import allow, refuse_targets
from sslctl.config.validation import mistakes
from sslctl.data.scale import choose_patch, choose_scale
from sslctl.ending import end, guarded, refuse, report, status_of
from sslctl.errors import InputError, first_line, nearest, shown
from sslctl.ops.allocator import keep_freed_memory
from sslctl.runs.continuing import named_run, words_of
from sslctl.runs.scratch import scratch_folder

VERBS = {  # each is the function of its name in sslctl/commands/<name>.py
    "pretrain": "trains a backbone without labels, then evaluates it",
    "adapt": "a public backbone on one's own images, and whether that has helped: before and after, with the interval",
    "linear-eval": "linear probe on the frozen features of a run or of given weights",
    "knn-eval": "weighted nearest neighbours on the frozen features",
    "evaluate": "every protocol from one feature extraction, and what shows without labels",
    "export": "the backbone as a file for torchvision, timm, ONNX or torch.export, checked numerically",
    "embed": "features, labels and file names of a dataset to disk",
    "finetune": "end-to-end fine-tuning on all labels or a few, beside scratch",
    "predict": "class, probability and nearest labelled images of a folder's images, by a classifier that was kept",
    "views": "a picture of what the augmentation does to the dataset's images",
    "data": "what a folder of images holds, before any training: damaged files, duplicates, shared splits",
    "pack": "a dataset as one memory-mapped folder, which dataset=hf reads",
    "pictures": "what a run's method makes of some images: reconstructions, masks, colours",
    "report": "one HTML page over runs: health, curves, figures, neighbours, and how to repeat them",
    "runs": "the runs on disk, and the command that resumes each",
    "check": "composes every configuration and binds every signature",
}

USAGE = """sslctl: pretrains vision backbones without labels and says truthfully what came out.

  sslctl VERB key=value …

{verbs}

  sslctl pretrain method=moco                       train on the embedded digits, then evaluate
  sslctl pretrain method=simclr dataset=folder dataset.root=~/images
  sslctl linear-eval runs/latest                    words without = are runs (ckpt=…)
  sslctl finetune runs/latest labels=5              fine-tune on five labels a class, beside scratch
  sslctl predict runs/latest dataset.root=~/new     classes of new images, to a .csv or .parquet file
  sslctl pretrain -m seed=0,1,2                     a sweep
  sslctl VERB --help | --cfg job                    choices and keys | the composed configuration

The same command again continues its run, exactly. Bad input ends with status 2 and a short message; SSLCTL_DEBUG=1 shows
the traceback. Shell completion: eval "$(sslctl -sc install=bash)"
"""


def main(argv: list[str] | None = None) -> int:
    """Runs one command line; returns the exit status."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if "-sc" in arguments or "--shell-completion" in arguments:
        return _complete(arguments)
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(USAGE.format(verbs="\n".join(f"  {verb:<12} {purpose}" for verb, purpose in VERBS.items())))
        return 0
    if arguments[0] == "--version":
        print(_describe_version())
        return 0
    verb = arguments[0]
    if verb not in VERBS:
        return refuse(InputError(f"unknown verb {verb!r}{nearest(verb, VERBS)}; the verbs are {', '.join(VERBS)}"))
    return guarded(lambda: _run_verb(verb, arguments[1:]))


def _describe_version() -> str:
    """Describes in one line the versions of sslctl and torch and the device that a run takes by itself."""
    from importlib.metadata import version

    own = f"sslctl {version('sslctl')}"
    try:
        import torch
    except (ImportError, OSError) as error:  # OSError: one of its libraries does not load
        return f"{own} (torch cannot be imported: {first_line(error)})"
    from sslctl.distributed import default_threads

    if torch.cuda.is_available():
        device = torch.cuda.get_device_name()
    else:
        device = "mps" if torch.backends.mps.is_available() else f"cpu, {default_threads()} threads"
    return f"{own} (torch {torch.__version__}, device {device})"


def _run_verb(verb: str, arguments: list[str]) -> int:
    """Prepares one verb's command line, refuses what cannot be meant, and runs it."""
    prepared = overrides.prepare(arguments, verb)
    _allow(prepared)
    keys = {f.name for f in fields(SCHEMAS[verb.replace("-", "_")])}
    if prepared.runs and "ckpt" not in keys:
        raise InputError(f"{' '.join(prepared.runs)}: {verb} takes key=value words only")
    if verb == "pretrain":
        _take_over_words(prepared)
    if verb == "adapt":
        prepared.overrides[:0] = choose_recipe(prepared)
    explain.refuse_folders_of_hydra(prepared)
    explain.refuse_lists_of_choices(prepared)
    explain.refuse_new_keys(verb, prepared)
    if "augmentation" in keys and (scale := choose_scale(prepared)):
        prepared.overrides.append(f"{overrides.PLACED['scale']}={scale}")
    if "augmentation" in keys and (patch := choose_patch(prepared)):
        prepared.overrides.append(f"{overrides.CHOSEN_PATCH}{patch}")
    return _run(verb, prepared)


def _take_over_words(prepared: overrides.Prepared) -> None:
    """Puts the words of the run that continue_run= names before those of this command, which win."""
    run = next((path for word in prepared.overrides if (path := overrides.path_of(word, "continue_run"))), None)
    if run:
        options = [f"allow={prepared.allow}"] * bool(prepared.allow) + ["--config-dir="] * bool(prepared.config_dirs)
        prepared.overrides[:0] = words_of(named_run(run), [*prepared.overrides, *options])


def _allow(prepared: overrides.Prepared) -> None:
    allow(prepared.allow, [*prepared.config_dirs, Path.cwd()])


def _run(verb: str, prepared: overrides.Prepared) -> int:
    """Composes one verb's configuration and does its job, or leaves both to Hydra where it is more than one plain job."""
    if not prepared.is_plain:
        return _run_hydra(verb, prepared)
    with running_job(
        verb, prepared
    ) as config:  # hydra.main would compose twice, first to find out whether it is a sweep
        _do_job(verb, config)
    return 0


def _do_job(verb: str, config: Any) -> None:
    """Checks a composed configuration and calls the verb's function with it."""
    name = verb.replace("-", "_")
    if problems := mistakes(SCHEMAS[name], config):
        raise InputError(*problems)
    refuse_targets(config)
    overrides.refuse_other_choices(config)
    keep_freed_memory()  # before tensors are made: a step asks for the same blocks again and again
    try:
        getattr(importlib.import_module(f"sslctl.commands.{name}"), name)(config)
    except SystemExit as stop:
        raise RuntimeError(f"the job called sys.exit({stop.code})") from stop


def _run_hydra(verb: str, prepared: overrides.Prepared) -> int:
    """Hands one verb's arguments to Hydra (a sweep, --help, --cfg …) and turns Hydra's errors into sslctl's."""
    import hydra
    from hydra.errors import HydraException

    explain.prepare_hydra(verb)
    explain.refuse_unknown_package(verb, prepared)
    failures: list[Exception] = []  # of a job that is no sweep's, which Hydra would report in its own words
    ended: list[jobs.Outcome] = []
    begun = False

    def job(config) -> None:
        from hydra.core.hydra_config import HydraConfig
        from hydra.types import RunMode

        nonlocal begun
        begun = True
        if HydraConfig.get().mode == RunMode.MULTIRUN:
            _do_job_of_sweep(verb, prepared, config, Path(scratch))
            return
        try:
            _do_job(verb, config)
        except Exception as error:
            failures.append(error)

    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra raises instead of printing and exiting
    before, sys.argv = sys.argv, ["sslctl"]
    try:
        with scratch_folder("sweep") as scratch:
            if prepared.sweeps:  # Hydra insists on writing multirun.yaml somewhere
                sys.argv.append(f"hydra.sweep.dir={scratch}")
            # Hydra's parser takes overrides in one piece only.
            sys.argv += [*prepared.search_path, *prepared.overrides, *prepared.options]
            try:
                hydra.main(config_path=str(CONFIGS), config_name=verb.replace("-", "_"), version_base="1.3")(job)()
            except SystemExit as stop:  # Hydra's --help and the like end so
                return 2 if stop.code else 0
            finally:
                ended = jobs.outcomes_in(Path(scratch))
                for line in jobs.summary(ended):
                    print(f"sslctl: {shown(line)}", file=sys.stderr)
    except InputError:
        raise
    except Exception as error:
        if begun and not isinstance(error, HydraException):
            raise
        refusal = explain.explain(verb, prepared, error)  # Hydra could not compose it
        if not ended:
            raise refusal from error
        report(refusal)
        ended.append(jobs.Outcome(len(ended), "not begun", 2))
    finally:
        sys.argv = before
    if failures:
        raise failures[0]
    return jobs.worst(ended)


def _do_job_of_sweep(verb: str, prepared: overrides.Prepared, config: Any, folder: Path) -> None:
    """Does one job of a sweep, perhaps in a launcher's process, and leaves in the folder how it ended: the others go on."""
    from hydra.core.hydra_config import HydraConfig

    number, choices = HydraConfig.get().job.num, " ".join(overrides.task_overrides())
    print(shown(f"── job {number}: {choices}"), flush=True)
    jobs.record(folder, jobs.Outcome(number, choices, 1, "its process ended without a word"))
    _allow(prepared)
    outcome = jobs.Outcome(number, choices, 0)
    try:
        _do_job(verb, config)
    except Exception as error:
        report(error, prefix=f"job {number}: ")
        outcome = jobs.Outcome(number, choices, status_of(error), first_line(error))
    jobs.record(folder, outcome)


def _complete(arguments: list[str]) -> int:
    """Completes a line of the shell: the verbs, then Hydra's own completion of one verb's keys and choices."""
    flag = next(a for a in arguments if a in ("-sc", "--shell-completion"))
    line = os.environ.get("COMP_LINE", "")
    words = line.split()
    if "query" in arguments[-1] and (len(words) < 2 or (len(words) == 2 and not line.endswith(" "))):
        prefix = words[1] if len(words) == 2 else ""
        print(" ".join(verb for verb in VERBS if verb.startswith(prefix)))
        return 0
    if "query" in arguments[-1] and words[1] not in VERBS:
        return 0
    verb = words[1] if len(words) > 1 else "pretrain"
    rest = line[len(line.rstrip()) :]
    # Hydra completes the last word; before it, it reads nothing but overrides.
    for_hydra = [w for i, w in enumerate(words) if i == 0 or "=" in w or (1 < i == len(words) - 1 and not rest)]
    os.environ["COMP_LINE"] = " ".join(for_hydra) + rest
    try:
        return _run(verb, overrides.Prepared(options=[flag, *arguments[arguments.index(flag) + 1 :]]))
    except InputError:
        return 0  # a half-written line: nothing to offer, and no place for a message


def command() -> None:
    """Runs the installed `sslctl`."""
    end(main())
