"""sslctl adapt: choose a recipe → pretrain from given weights → compare before and after, on the same images and labels."""

import time
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf

from sslctl import distributed
from sslctl.commands._adaptation_choices import choose, final_epochs, rounds_of, time_lines
from sslctl.commands._adaptation_jobs import pretraining, typed_words, words_of_run
from sslctl.commands.pretrain import pretrain
from sslctl.config.command_line import command_line
from sslctl.data.sources import Source
from sslctl.errors import InputError, Stopped, say, user_path
from sslctl.evaluation.before_after import Measures, tells_classes
from sslctl.evaluation.conclusion import NO_LABELS, conclude, score_of_trial
from sslctl.evaluation.knn import Knn
from sslctl.evaluation.linear import ProbeGrid
from sslctl.evaluation.runner import judged_images
from sslctl.evaluation.task import Reader, label_amount
from sslctl.factory.expectation import expectation_of, has_weights
from sslctl.factory.from_config import build_source
from sslctl.factory.from_run import as_in_run, dataset_of
from sslctl.runs.adaptation import TRIALS, Adaptation, read_adaptation, refuse_another
from sslctl.runs.checksums import digest_of_file
from sslctl.runs.claim import refuse_unwritable, take
from sslctl.runs.directory import BACKBONE, run_named_by
from sslctl.runs.fingerprint import default_directory, fingerprint_keys
from sslctl.runs.ownership import refuse_other
from sslctl.runs.reading import read_config
from sslctl.signals import Interrupted, Signals
from sslctl.training.plan import choose_device
from sslctl.training.progress import duration
from sslctl.training.sizing import choose_epochs

_NOT_COUNTED = ("sizes", "few_labels", "draws", "knn", "neighbours")  # of adapt's own keys: they only judge


def adapt(config: Any) -> None:
    """Adapts given weights to the images of a dataset, or goes on with that, and says whether it has helped."""
    if distributed.is_distributed():
        raise InputError(
            "adapt is one process, which starts those of its trainings: trainer.processes=2 instead of torchrun",
            advice=["trainer.processes=2"],
        )
    if not has_weights(config.backbone):
        raise InputError("nothing to adapt: name weights, backbone=timm backbone.model=MODEL backbone.weights=FILE")
    if config.continue_run is not None:
        raise InputError("continue_run= goes with sslctl pretrain; adapt begins with backbone.weights=")
    how = judging(config)  # what is wrong with it is said before anything is trained
    source = build_source(_streamed(config.dataset), "train")
    refuse_missing_judges(config)
    identity = identity_of(config, source)
    run_dir = directory_of(config, identity)
    refuse_unwritable(run_dir)
    refuse_other(run_dir)
    command_words = typed_words(config.recipes[0])

    # What was chosen when this began holds to its end, whatever the machine does now.
    adaptation = read_adaptation(run_dir)
    if adaptation:
        refuse_another(run_dir, adaptation, identity)
    else:
        began = time.monotonic()
        choices, steps = choose(config, source, command_words, run_dir)
        seconds = {"choosing": time.monotonic() - began}
        adaptation = Adaptation(command_line(), identity, choices, steps, seconds=seconds)
        if not config.plan_only:
            lock = take(run_dir)
            adaptation = read_adaptation(run_dir) or adaptation  # another process may have been faster
            adaptation.write(run_dir)
            lock.release()
    say(*adaptation.lines(), *time_lines(config, adaptation))
    if config.plan_only:
        epochs = final_epochs(config, adaptation, config.recipes[0])
        words = words_of_run(command_words, config.recipes[0], adaptation.choices, run_dir, epochs, "plan_only=true")
        with pretraining(words) as job:
            pretrain(job)
        return
    if is_judged(config, adaptation, run_dir):
        say(f"already finished: {run_dir}", adaptation.verdict["sentence"])
        return

    # Several recipes: each for a while, then the better half, until one is left, which begins anew with the given weights.
    if adaptation.recipe is None:
        adaptation.recipe = try_recipes(config, adaptation, command_words, run_dir, how)
        adaptation.epochs = final_epochs(config, adaptation, adaptation.recipe)
        adaptation.write(run_dir)

    # The run itself is a pretraining, whose command is recorded with it and can be given alone.
    words = words_of_run(command_words, adaptation.recipe, adaptation.choices, run_dir, adaptation.epochs)
    with adaptation.timed("training", run_dir), pretraining(words) as job:
        pretrain(job)

    # Before and after, on the test split.
    torch.set_num_threads(config.trainer.threads or distributed.default_threads())
    lock = take(run_dir)
    with Signals() as signals:
        try:
            with adaptation.timed("judging", run_dir):
                adaptation.verdict = conclude(run_dir, judges_of(config, run_dir), sizes_of(config), **how)
        except Interrupted as interruption:
            say(f"stopped; the same command continues {run_dir}")
            raise Stopped(signals.status) from interruption
        finally:
            lock.release()
    parts = ", ".join(f"{part} {duration(seconds)}" for part, seconds in adaptation.seconds.items())
    say(f"time       {parts}", adaptation.verdict["sentence"])


# --- What makes this adaptation, and where it lies ---


def _streamed(node: Any) -> Any:
    """Returns a dataset's configuration whose images are not read into memory: nothing is asked but what they are."""
    return OmegaConf.merge(node, {"memory_gb": 0}) if "memory_gb" in node else node


def refuse_missing_judges(config: Any) -> None:
    """Raises InputError, with the key that they have here, for labelled images that cannot be found."""
    if config.eval_dataset is None:
        return
    try:
        build_source(_streamed(config.eval_dataset), "train")
    except InputError as error:
        messages, advice = (
            [f"eval_{text}" if text.startswith("dataset.") else text for text in texts]
            for texts in (error.messages, error.advice)
        )
        raise InputError(*messages, advice=advice) from error


def identity_of(config: Any, source: Source) -> dict[str, Any]:
    """Returns the keys that make this adaptation and no other, with hashes of its images and of the weights' file."""
    weights = str(config.backbone.get("model"))
    if weights_name := config.backbone.get("weights"):
        path = user_path(weights_name)
        path = run_named_by(path) or path
        path = path / BACKBONE if path.is_dir() else path
        if not path.is_file():
            raise InputError(f"backbone.weights={weights_name}: no such file, or run that has finished")
        weights = digest_of_file(path)
    resolved = OmegaConf.to_container(config, resolve=True)
    deciding_keys = {key: value for key, value in resolved.items() if key not in _NOT_COUNTED}
    return fingerprint_keys(deciding_keys, {"data": source.content_hash, "weights": weights}) | {"seed": config.seed}


def directory_of(config: Any, identity: dict[str, Any]) -> Path:
    """Returns run_dir=, or runs/<dataset>/adapt-<backbone>-<fingerprint>-s<seed>."""
    if config.run_dir:
        return user_path(config.run_dir)
    keys = {key: value for key, value in identity.items() if key != "seed"}
    return default_directory(config, keys, "adapt")


# --- Several recipes ---


def try_recipes(
    config: Any, adaptation: Adaptation, command_words: list[str], run_dir: Path, how: dict[str, Any]
) -> str:
    """Returns the recipe that is best by successive halving (Jamieson & Talwalkar 2016), the only one where there is one.

    All rounds take the same time, shared by the recipes that are left. Each is scored on labels that are held out of the
    training split, or by RankMe where there are none. how: networks are compared, and read, see `judging`.
    """
    candidates = list(dict.fromkeys(config.recipes))
    rounds = rounds_of(len(candidates))
    for _ in rounds:
        minutes = config.trial_share * config.minutes / len(rounds) / len(candidates)
        trials = {recipe: run_dir / TRIALS / f"{recipe}-{len(candidates)}" for recipe in candidates}
        for recipe, trial in trials.items():
            epochs = choose_epochs(minutes, *adaptation.steps[recipe]) if adaptation.steps else None
            if trial.name not in adaptation.scores:
                say(f"trial      {recipe}: {duration(60 * minutes)}")
                words = words_of_run(command_words, recipe, adaptation.choices, trial, epochs)
                with adaptation.timed("trials", run_dir):
                    with pretraining(words) as job:
                        pretrain(job)
                    _score(config, trial, adaptation, how)
        # Since this was stopped other measures may have been asked for, or have come with another version.
        if len({tuple(adaptation.measures.get(trial.name, ())) for trial in trials.values()}) > 1:
            for trial in trials.values():
                _score(config, trial, adaptation, how)
            adaptation.write(run_dir)
        scores = {recipe: adaptation.scores[trial.name] for recipe, trial in trials.items()}
        candidates = sorted(candidates, key=lambda recipe: -scores[recipe])[: (len(candidates) + 1) // 2]
        say(*(f"trial      {recipe}: {score:.4g}" for recipe, score in scores.items()))
    return candidates[0]


def _score(config: Any, trial: Path, adaptation: Adaptation, how: dict[str, Any]) -> None:
    """Notes a trial's score and its measures."""
    score, measures = score_of_trial(trial, judges_of(config, trial), **how)
    adaptation.scores[trial.name], adaptation.measures[trial.name] = score, measures


# --- Before and after ---


def is_judged(config: Any, adaptation: Adaptation, run_dir: Path) -> bool:
    """Tells whether there is a verdict that stands. One for want of labels does not where the command names some by now."""
    if adaptation.verdict is None:
        return False
    wants_labels = adaptation.verdict["kind"] == NO_LABELS and config.eval_dataset is not None
    return not wants_labels or judges_of(config, run_dir)[1] is None


def judges_of(config: Any, run_dir: Path) -> tuple[Source, Source | None]:
    """Returns the images a run is judged on, (train, test); test is None where there are no labels, or none to judge by.

    They are those of eval_dataset=, which may have been named after the training only; else the run's own.
    """
    if config.eval_dataset is None:
        node = dataset_of(run_dir, "eval_dataset" if read_config(run_dir).get("eval_dataset") else "dataset")
    else:
        node = as_in_run(config.eval_dataset, run_dir, "eval_dataset")
    train, test = judged_images(build_source(node, "train"), node)
    if test is not None and not tells_classes(train):
        say(f"not judged: all {len(train):,} labelled images are of one class, {train.classes[int(train.labels[0])]}")
        return train, None
    return train, test


def sizes_of(config: Any) -> list[int]:
    """Returns the sizes, in pixels, that before and after are judged at besides that of training: sizes=, or the weights' own."""
    expectation = expectation_of(config.backbone)
    return list(config.sizes or ([expectation.size] if expectation and expectation.size else []))


def judging(config: Any) -> dict[str, Any]:
    """Returns how networks are compared, and read."""
    grid = ProbeGrid(**OmegaConf.to_container(config.probe, resolve=True))
    knn = Knn([config.knn.k], config.knn.temperature)
    for amount in config.few_labels:
        label_amount(amount, "few_labels")
    device = choose_device(config.trainer.device)
    return {
        "measures": Measures(knn, grid, tuple(config.few_labels), config.draws),
        "read": Reader(device, config.trainer.workers, config.evaluation.cache_gb),
        "seed": config.seed,
        "neighbours": config.neighbours,
    }
