"""sslctl adapt: choose a recipe → pretrain from given weights → compare before and after, on the same images and labels."""

from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf

from sslctl import distributed
from sslctl.commands._adaptation_jobs import own_directories, pretraining, typed_words, words_of_run
from sslctl.commands.pretrain import pretrain
from sslctl.config.command_line import command_line
from sslctl.config.recipes import key_of, recipe_words
from sslctl.data.sources import Source
from sslctl.errors import InputError, Stopped, say, user_path
from sslctl.evaluation.before_after import Measures
from sslctl.evaluation.conclusion import conclude, score_of_trial
from sslctl.evaluation.knn import Knn
from sslctl.evaluation.linear import ProbeGrid
from sslctl.evaluation.runner import judged_images
from sslctl.evaluation.task import Reader, label_amount
from sslctl.factory.expectation import expectation_of, has_weights
from sslctl.factory.from_config import build_backbone, build_source
from sslctl.factory.from_run import dataset_of
from sslctl.models.preprocess import preprocess_of
from sslctl.models.vit import patch_size_of
from sslctl.runs.adaptation import TRIALS, Adaptation, read_adaptation, refuse_another
from sslctl.runs.checksums import digest_of_file
from sslctl.runs.claim import refuse_unwritable, take
from sslctl.runs.description import with_absolute_roots
from sslctl.runs.directory import BACKBONE, run_named_by
from sslctl.runs.fingerprint import default_directory, fingerprint_keys
from sslctl.runs.ownership import refuse_other
from sslctl.runs.reading import read_config
from sslctl.signals import Interrupted, Signals
from sslctl.training.plan import choose_device
from sslctl.training.setup import Setup
from sslctl.training.sizing import (
    choose_batch,
    choose_epochs,
    choose_size,
    fit_memory,
    kept_bytes,
    set_up_trial,
    time_step,
)

_MANY = 1000  # epochs
_NOT_COUNTED = ("sizes", "few_labels", "draws", "knn", "neighbours")  # of adapt's own keys: they only judge


def adapt(config: Any) -> None:
    """Adapts given weights to the images of a dataset, or goes on with that, and says whether it has helped."""
    if not has_weights(config.backbone):
        raise InputError("nothing to adapt: name weights, backbone=timm backbone.model=MODEL backbone.weights=FILE")
    if config.continue_run is not None:
        raise InputError("continue_run= goes with sslctl pretrain; adapt begins with backbone.weights=")
    how = judging(config)  # what is wrong with it is said before anything is trained
    source = build_source(_streamed(config.dataset), "train")
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
        adaptation = Adaptation(command_line(), identity, *choose(config, source, command_words, run_dir))
        if not config.plan_only:
            lock = take(run_dir)
            adaptation = read_adaptation(run_dir) or adaptation  # another process may have been faster
            adaptation.write(run_dir)
            lock.release()
    say(*adaptation.lines())
    if config.plan_only:
        epochs = final_epochs(config, adaptation, config.recipes[0])
        words = words_of_run(command_words, config.recipes[0], adaptation.choices, run_dir, epochs, "plan_only=true")
        with pretraining(words) as job:
            pretrain(job)
        return
    if adaptation.verdict:
        say(f"already finished: {run_dir}", adaptation.verdict["sentence"])
        return

    # Several recipes: each for a while, then the better half, until one is left, which begins anew with the given weights.
    if adaptation.recipe is None:
        adaptation.recipe = try_recipes(config, adaptation, command_words, run_dir, how)
        adaptation.epochs = final_epochs(config, adaptation, adaptation.recipe)
        adaptation.write(run_dir)

    # The run itself is a pretraining, whose command is recorded with it and can be given alone.
    with pretraining(
        words_of_run(command_words, adaptation.recipe, adaptation.choices, run_dir, adaptation.epochs)
    ) as job:
        pretrain(job)

    # Before and after, on the test split.
    torch.set_num_threads(config.trainer.threads or distributed.default_threads())
    lock = take(run_dir)
    with Signals() as signals:
        try:
            adaptation.verdict = conclude(run_dir, judges_of(run_dir), sizes_of(config), **how)
            adaptation.write(run_dir)
        except Interrupted as interruption:
            say(f"stopped; the same command continues {run_dir}")
            raise Stopped(signals.status) from interruption
        finally:
            lock.release()
    say(adaptation.verdict["sentence"])


# --- What makes this adaptation, and where it lies ---


def _streamed(node: Any) -> Any:
    """Returns a dataset's configuration whose images are not read into memory: nothing is asked but what they are."""
    return OmegaConf.merge(node, {"memory_gb": 0}) if "memory_gb" in node else node


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


# --- Choices ---


def choose(
    config: Any, source: Source, command_words: list[str], run_dir: Path
) -> tuple[dict[str, str], dict[str, list[float]]]:
    """Returns the words that are chosen for this command, each with its reason, and by recipe what a step takes here.

    A word that was typed is not chosen. Nothing is timed where trainer.epochs was typed.
    """
    keys, choices = {word.partition("=")[0] for word in command_words}, {}
    if "dataset.image_size" not in keys and "image_size" in config.dataset:
        network = build_backbone(config.backbone, preprocess_of(config.dataset, source), with_weights=False).network
        size, reason = choose_size(source, config.trainer.device, patch_size_of(network))
        choices[f"dataset.image_size={size}"] = reason
    if "trainer.batch_size" not in keys:
        words = dict(word.partition("=")[::2] for word in recipe_words(config.recipes[0], own_directories()))
        batch, reason = choose_batch(len(source), int(words.get("trainer.batch_size", config.trainer.batch_size)))
        choices[f"trainer.batch_size={batch}"] = reason
    steps, times_steps = {}, "trainer.epochs" not in keys
    for recipe in config.recipes if times_steps or "trainer.batch_size" not in keys else ():
        setup = _trial_setup(command_words, recipe, choices, run_dir)
        if "trainer.batch_size" not in keys:
            plan = setup.plan
            batch, reason = fit_memory(plan.batch_size, kept_bytes(setup), plan.device)
            if reason:
                choices = {word: why for word, why in choices.items() if key_of(word) != "trainer.batch_size"}
                choices[f"trainer.batch_size={batch}"] = reason
            setup = _trial_setup(command_words, recipe, choices, run_dir)
        if times_steps:
            steps[recipe] = list(time_step(setup, config.trainer.processes))
    return choices, steps


def _trial_setup(command_words: list[str], recipe: str, choices: dict[str, str], run_dir: Path) -> Setup:
    """Returns what the first steps of a recipe are taken with, in memory; its epochs, which nobody knows yet, are many."""
    with pretraining(words_of_run(command_words, recipe, choices, run_dir, _MANY)) as job:
        return set_up_trial(job, with_absolute_roots(OmegaConf.to_container(job, resolve=True)))


def final_epochs(config: Any, adaptation: Adaptation, recipe: str) -> int | None:
    """Returns the epochs of the run itself; None where they were typed."""
    if recipe not in adaptation.steps:
        return None
    share = 1 - config.trial_share if len(config.recipes) > 1 else 1
    return choose_epochs(share * config.minutes, *adaptation.steps[recipe])


def try_recipes(
    config: Any, adaptation: Adaptation, command_words: list[str], run_dir: Path, how: dict[str, Any]
) -> str:
    """Returns the recipe that is best by successive halving (Jamieson & Talwalkar 2016), the only one where there is one.

    All rounds take the same time, shared by the recipes that are left. Each is scored on labels that are held out of the
    training split, or by RankMe where there are none. how: networks are compared, and read, see `judging`.
    """
    candidates = list(dict.fromkeys(config.recipes))
    rounds = (len(candidates) - 1).bit_length()
    while len(candidates) > 1:
        minutes = config.trial_share * config.minutes / rounds / len(candidates)
        trials = {recipe: run_dir / TRIALS / f"{recipe}-{len(candidates)}" for recipe in candidates}
        for recipe, trial in trials.items():
            epochs = choose_epochs(minutes, *adaptation.steps[recipe]) if adaptation.steps else None
            if trial.name not in adaptation.scores:
                say(f"trial      {recipe}: {minutes:.1f} minutes")
                with pretraining(words_of_run(command_words, recipe, adaptation.choices, trial, epochs)) as job:
                    pretrain(job)
                _score(trial, adaptation, how)
                adaptation.write(run_dir)
        # Since this was stopped other measures may have been asked for, or have come with another version.
        if len({tuple(adaptation.measures.get(trial.name, ())) for trial in trials.values()}) > 1:
            for trial in trials.values():
                _score(trial, adaptation, how)
            adaptation.write(run_dir)
        scores = {recipe: adaptation.scores[trial.name] for recipe, trial in trials.items()}
        candidates = sorted(candidates, key=lambda recipe: -scores[recipe])[: (len(candidates) + 1) // 2]
        say(*(f"trial      {recipe}: {score:.4g}" for recipe, score in scores.items()))
    return candidates[0]


def _score(trial: Path, adaptation: Adaptation, how: dict[str, Any]) -> None:
    """Notes a trial's score and its measures."""
    adaptation.scores[trial.name], adaptation.measures[trial.name] = score_of_trial(trial, judges_of(trial), **how)


# --- Before and after ---


def judges_of(run_dir: Path) -> tuple[Source, Source | None]:
    """Returns the images a run is judged on, (train, test); test is None where there are no labels, or none to judge by."""
    node = dataset_of(run_dir, "eval_dataset" if read_config(run_dir).get("eval_dataset") else "dataset")
    return judged_images(build_source(node, "train"), node)


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
