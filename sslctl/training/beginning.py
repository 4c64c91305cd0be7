"""How a run begins: with which images, networks and weights, and which directory is its own."""

from dataclasses import dataclass
from typing import Any

import torch
from omegaconf import OmegaConf

from sslctl import distributed
from sslctl.data.sources import Source
from sslctl.factory.backbone_file import save_backbone
from sslctl.factory.continued import ContinuedRun, same_run
from sslctl.factory.expectation import as_expected, has_weights
from sslctl.factory.exportable import judged_network
from sslctl.factory.from_config import (
    adapt_backbone,
    build_backbone,
    build_method,
    build_source,
    build_views,
    refuse_other_views,
    refuse_sizes,
)
from sslctl.factory.from_run import as_in_run
from sslctl.factory.teacher import load_teacher, save_teacher
from sslctl.methods.base import Method
from sslctl.models.preprocess import Preprocess, TextPreprocess, preprocess_of
from sslctl.models.teacher import Teacher
from sslctl.models.weights import weights_sha256
from sslctl.runs.atomic import write_text
from sslctl.runs.continuing import find_run
from sslctl.runs.directory import BACKBONE, GIVEN, TOKENIZER
from sslctl.runs.generators import seed_generators
from sslctl.runs.ownership import steps_on_disk
from sslctl.training.plan import Plan, Run, make_plan


@dataclass(frozen=True)
class Images:
    """What is trained on, and what a backbone gets to see of it.

    node: the dataset's configuration; normalization: a sentence, whose mean and std are taken where the run begins with
    weights.
    """

    node: Any
    source: Source
    preprocess: Preprocess | TextPreprocess
    normalization: str | None = None


@dataclass(frozen=True)
class Networks:
    """A method around its backbone, with all weights that it is given.

    hashes: of what decides the run as much as its configuration does: "data", and what weights are read from.
    """

    plan: Plan
    method: Method
    teacher: Teacher | None
    hashes: dict[str, str]
    notes: list[str]


@dataclass(frozen=True)
class Beginning:
    """A run before anything of it is written, or read from its checkpoints.

    continued: the other run that it begins from; notes: for its plan.
    """

    run: Run
    images: Images
    networks: Networks
    continued: ContinuedRun | None
    notes: list[str]

    def save_given(self, backbone_node: Any) -> None:
        """Writes what the run was given and could not get again: its teacher, its backbone's weights, the tokenizer."""
        run_dir, teacher = self.run.run_dir, self.networks.teacher
        if teacher is not None:
            save_teacher(teacher, run_dir)
        given = run_dir / GIVEN
        begins = not steps_on_disk(run_dir) and not (run_dir / BACKBONE).exists()  # runs of 0.1 keep none
        if has_weights(backbone_node) and begins and not given.exists():
            node = OmegaConf.to_container(backbone_node, resolve=True)
            save_backbone(given, self.run.method.backbone, node, self.images.preprocess)
        if self.run.source.tokenizer:
            write_text(run_dir / TOKENIZER, self.run.source.tokenizer)


def begin(config: Any, resolved: dict) -> Beginning:
    """Builds the run that a configuration asks for, in every process. Raises InputError where its parts do not fit.

    resolved: the configuration as plain values, of which the run's name is made.
    """
    # Data first: channels, image size and steps follow from it.
    continued = ContinuedRun.named(config.continue_run) if config.continue_run else None
    images = read_images(config, continued)
    networks = build_networks(config, images, continued)
    run_dir, candidates, notes = distributed.on_main_process(lambda: find_run(config, resolved, networks.hashes))

    # The same run on other images, in its own directory or, by default, beside it: where it can, it goes on.
    if unchanged := distributed.main_process_first(lambda: same_run(candidates, images.node, images.source)):
        run_dir, source, preprocess = unchanged
        images, notes = Images(images.node, source, preprocess), []
        networks = build_networks(config, images, continued)

    # Views, and whether data, views, method and networks fit one another.
    plan, method, source = networks.plan, networks.method, images.source
    views = build_views(config, source, method.backbone.network)
    refuse_other_views(method, source, views, config.names)
    refuse_sizes(method.backbone, views, source.image_size)
    if networks.teacher is not None:
        networks.teacher.refuse_size(views.sizes()["global"][1], config.method.teacher)
    run = Run(plan, method, source, views, run_dir)
    return Beginning(run, images, networks, continued, [*networks.notes, *notes])


def read_images(config: Any, continued: ContinuedRun | None) -> Images:
    """Reads the images of a configuration, as the run that it continues does, normalised as given weights expect it."""
    node = as_in_run(config.dataset, continued.run) if continued else config.dataset
    source = distributed.main_process_first(lambda: build_source(node, "train"))
    preprocess, normalization = as_expected(preprocess_of(node, source), config.backbone)
    if continued:
        preprocess = continued.normalized(preprocess)
    return Images(node, source, preprocess, normalization)


def build_networks(config: Any, images: Images, continued: ContinuedRun | None) -> Networks:
    """Builds a configuration's method: each network drawn from the seed, then with the weights that it is given.

    What networks read from files decides the run as much as its configuration does.
    """
    plan, source = make_plan(config, images.source), images.source
    torch.set_num_threads(plan.threads)
    seed_generators(config.seed)
    hashes, notes = {"data": source.content_hash}, []

    # The backbone, with backbone.weights= or backbone.pretrained=true; it may download.
    backbone = distributed.main_process_first(lambda: build_backbone(config.backbone, images.preprocess))
    if has_weights(config.backbone):
        hashes["weights"] = weights_sha256(backbone)

    # A teacher that is imitated, method.teacher=.
    teacher = None
    if "teacher" in config.method:
        teacher = load_teacher(
            config.method.teacher,
            config.method.get("teacher_backbone"),
            images.preprocess,
            {name: config.method.get(f"teacher_{name}") for name in ("mean", "std")},
        )
        hashes["teacher"] = weights_sha256(teacher.network)

    # The method, with all that another run has learned, continue_run=.
    facts = plan.facts(len(source.classes) if source.labelled else 0)
    method = build_method(config.method, backbone, facts, teacher)
    method.judged = config.get("network")
    if method.judged:
        judged_network(method, method.judged)  # or a refusal
    adapt_backbone(method, config.backbone, weights=has_weights(config.backbone) or continued is not None)
    if continued:
        notes.append(f"begins with {continued.load(method)}")
        hashes["continued run"] = continued.digest
    return Networks(plan, method, teacher, hashes, notes)
