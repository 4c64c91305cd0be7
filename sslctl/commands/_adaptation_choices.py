"""What an adaptation chooses: image size, batch and epochs, and how its minutes are divided among trials and training."""

from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from sslctl.commands._adaptation_jobs import own_directories, pretraining, words_of_run
from sslctl.config.recipes import key_of, recipe_words
from sslctl.data.sources import Source
from sslctl.errors import InputError
from sslctl.evaluation.online import Online
from sslctl.factory.from_config import build_backbone
from sslctl.models.preprocess import preprocess_of
from sslctl.models.vit import patch_size_of
from sslctl.runs.adaptation import Adaptation
from sslctl.runs.description import with_absolute_roots
from sslctl.training.beginning import begin
from sslctl.training.progress import duration
from sslctl.training.setup import Setup, set_up
from sslctl.training.sizing import (
    choose_batch,
    choose_epochs,
    choose_size,
    fit_memory,
    kept_bytes,
    time_step,
)

_MANY = 1000  # epochs of a run whose first steps are timed


def choose(
    config: Any, source: Source, command_words: list[str], run_dir: Path
) -> tuple[dict[str, str], dict[str, list[float]]]:
    """Returns the words that are chosen for this command, each with its reason, and by recipe what a step takes here, how many
    an epoch has, and what an online evaluation takes.

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
        setup, look = _first_steps(command_words, recipe, choices, run_dir)
        if "trainer.batch_size" not in keys:
            plan = setup.plan
            batch, reason = fit_memory(plan.batch_size, kept_bytes(setup), plan.device)
            if reason:
                choices = {word: why for word, why in choices.items() if key_of(word) != "trainer.batch_size"}
                choices[f"trainer.batch_size={batch}"] = reason
            setup, look = _first_steps(command_words, recipe, choices, run_dir)
        if times_steps:
            steps[recipe] = [*time_step(setup, config.trainer.processes), look.seconds(setup.method.eval())]
    return choices, steps


def _first_steps(command_words: list[str], recipe: str, choices: dict[str, str], run_dir: Path) -> tuple[Setup, Online]:
    """Returns what the first steps of a recipe are taken with and looked at by, in memory; its epochs, which nobody knows yet,
    are many. Raises InputError, which names the recipe where the command does, for a network that does not suit it."""
    with pretraining(words_of_run(command_words, recipe, choices, run_dir, _MANY)) as job:
        try:
            beginning = begin(job, with_absolute_roots(OmegaConf.to_container(job, resolve=True)))
        except InputError as error:
            named = f"recipes=[{recipe}]: " if any(key_of(word) == "recipes" for word in command_words) else ""
            raise InputError(*(named + message for message in error.messages), advice=error.advice) from error
        setup, preprocess = set_up(job, beginning.run), beginning.images.preprocess
        return setup, Online(job.evaluation.knn, beginning.run.source, preprocess, setup.plan, job.trainer.workers)


def final_epochs(config: Any, adaptation: Adaptation, recipe: str) -> int | None:
    """Returns the epochs of the run itself; None where they were typed."""
    if recipe not in adaptation.steps:
        return None
    share = 1 - config.trial_share if len(config.recipes) > 1 else 1
    return choose_epochs(share * config.minutes, *adaptation.steps[recipe])


def rounds_of(recipes: int) -> list[int]:
    """Returns how many recipes are left in each round of successive halving; [] where there is nothing to choose."""
    return [] if recipes < 2 else [recipes, *rounds_of((recipes + 1) // 2)]


def time_lines(config: Any, adaptation: Adaptation) -> list[str]:
    """Says for the plan how the minutes are divided, and where they are less than the least that can be trained."""
    if not adaptation.steps:
        return []
    rounds, minutes = rounds_of(len(adaptation.steps)), config.minutes
    trials = f"trials {config.trial_share * minutes:.3g}, training " if rounds else "training "
    share = 1 - config.trial_share if rounds else 1
    lines = [f"minutes    {trials}{share * minutes:.3g}; judging comes after"]
    epoch = max(seconds * steps for seconds, steps, *_ in adaptation.steps.values())
    least = (sum(rounds) + 1) * epoch
    if least > 60 * minutes:
        trainings = f"{sum(rounds) + 1} trainings of an epoch each take" if rounds else "one epoch takes"
        fewer = "fewer recipes, " if rounds else ""
        lines.append(
            f"note       {trainings} {duration(least)}, longer than minutes={minutes:g}: {fewer}a smaller"
            " dataset.image_size, or more minutes"
        )
    return lines
