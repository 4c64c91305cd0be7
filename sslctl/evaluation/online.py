"""The evaluation while a run trains: kNN among its images, and figures that need no labels."""

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sslctl.data.sampler import permuted
from sslctl.data.sources import Source
from sslctl.evaluation.features import Features, extract, refuse_non_finite
from sslctl.evaluation.knn import accuracy, knn_votes, neighbours, shares_of
from sslctl.evaluation.label_free import centred_cosine, feature_std, rankme
from sslctl.evaluation.multi_label import mean_average_precision
from sslctl.factory.exportable import feature_function, feature_names
from sslctl.methods.base import Method
from sslctl.models.batchnorm import calibrating
from sslctl.models.preprocess import Preprocess
from sslctl.runs.generators import generator_states, restore_generators
from sslctl.training.plan import Plan

MOST_QUERIES, MOST_BANK = 5_000, 20_000
MOST_FOLLOWED = 500  # images whose features are compared with those of the weights that a run began with
WARMING, TIMED = 16, 128  # images by which the time of all is estimated
BATCH, CALIBRATING = 512, 8  # images that are embedded at a time, batches that BatchNorm is calibrated by


def online_rows(size: int, groups: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Returns (queries, bank): a fixed tenth of the training images, at most 5,000, and at most 20,000 others; of no seed.

    groups: (size,) of the images; none of those asked about answers for its own then, and queries are about as many.
    """
    order = torch.from_numpy(permuted(np.arange(size), size, seed=0, epoch=-3))
    queries = min(MOST_QUERIES, max(1, size // 10))
    if groups is None:
        return order[:queries], order[queries : queries + MOST_BANK]
    is_query = torch.isin(groups[order], groups[order[: max(1, queries * len(groups.unique()) // size)]])  # (size,)
    if is_query.all():
        is_query[1:] = False  # one group alone
    return order[is_query][:MOST_QUERIES], order[~is_query][:MOST_BANK]


def class_facts(source: Source) -> dict[str, float]:
    """Counts the classes and images that kNN is asked about, and the share of the largest class; {} without labels."""
    if not source.labelled:
        return {}
    majority = source.labels.bincount().max().item() / len(source)
    return {"num_classes": len(source.classes), "majority": majority, "knn_images": len(online_rows(len(source))[0])}


@dataclass(frozen=True)
class EmbeddedImages:
    """Features of some images, extracted once. rows: (N,) which images; features: (N, D); the first `queries` are asked
    about, the others answer."""

    rows: Tensor
    features: Tensor
    queries: int


@dataclass(frozen=True)
class Online:
    """Figures of the features while they are trained: kNN among labelled images, and what needs no labels.

    source: the images that are looked at, most often those that are trained on. settings: evaluation.knn. given: (n, D) features
    that the weights which a run began with make of the first images asked about.
    """

    settings: Any
    source: Source
    preprocess: Preprocess
    plan: Plan
    workers: int
    given: Tensor | None = None

    def embed(self, method: Method, rows: Tensor) -> Tensor:
        """Returns the features (n, D) of the images at rows. In eval mode."""
        judged = feature_names(method, self.preprocess)[0]
        return extract(
            feature_function(method, judged, self.preprocess),
            self.source,
            rows,
            resize=self.preprocess.resize,
            workers=self.workers,
            device=self.plan.device,
        )

    def seconds(self, method: Method) -> float:
        """Returns about how long it takes to embed what is looked at, by a few images of it. In eval mode."""
        rows = torch.cat(online_rows(len(self.source), self.source.groups))
        some = rows[:TIMED]
        self.embed(method, some[:WARMING])
        began = time.monotonic()
        self.embed(method, some)
        return (time.monotonic() - began) * len(rows) / len(some)

    def with_given(self, method: Method) -> "Online":
        """Returns these figures with how far features have moved from those that a method makes now, before its first step.

        The generators are as before.
        """
        states = generator_states()
        method.to(self.plan.device).eval()
        queries, _ = online_rows(len(self.source), self.source.groups)
        given = self.embed(method, queries[:MOST_FOLLOWED])
        restore_generators(states)
        return replace(self, given=given)

    def __call__(self, method: Method) -> tuple[dict[str, float], EmbeddedImages]:
        """Measures top-1 of kNN where there are labels, RankMe and the spread, all from one extraction. In eval mode."""
        queries, bank = online_rows(len(self.source), self.source.groups)
        rows = torch.cat([queries, bank])
        both = self.embed(method, rows)
        refuse_non_finite(both, f"features of {self.source.name} that the network in training makes")
        figures = {}
        if self.source.labelled:
            labelled = Features(both[len(queries) :], self.source.labels[bank], len(self.source.classes))
            votes = knn_votes(both[: len(queries)], labelled, **self.settings)
            figures["knn"] = accuracy(votes, self.source.labels[queries])["top1"]
        elif self.source.has_several:
            similarity, rows = neighbours(both[: len(queries)], both[len(queries) :], self.settings["k"])
            temperature = self.settings["temperature"]
            scores = shares_of(similarity, self.source.targets[bank], rows, temperature=temperature)
            figures["knn_mAP"] = mean_average_precision(scores, self.source.targets[queries])
        if self.given is not None:
            figures["given_cosine"] = centred_cosine(both[: len(self.given)], self.given)
        figures |= {"rankme": rankme(both), "backbone_std": feature_std(both) * both.shape[1] ** 0.5}
        return figures, EmbeddedImages(rows, both, len(queries))


@dataclass(frozen=True)
class Embedder:
    """What `Method.start_epoch` embeds with, see sslctl.methods.base.Embed."""

    method: Method
    source: Source
    preprocess: Preprocess
    plan: Plan
    workers: int

    def __call__(self, function: Callable[[Tensor], Tensor], *, calibrate: bool = False) -> Tensor:
        embed = partial(
            extract,
            function,
            self.source,
            resize=self.preprocess.resize,
            batch_size=BATCH,
            workers=self.workers,
            device=self.plan.device,
        )
        everything = np.arange(len(self.source))
        self.method.eval()
        try:
            if calibrate:
                whole = max(1, min(CALIBRATING, len(everything) // BATCH)) * BATCH  # no batch of a few images
                with torch.compiler.set_stance("force_eager"), calibrating(self.method):  # not compiled for these few
                    embed(permuted(everything, len(everything), seed=0, epoch=-4)[:whole])
            return embed(everything)
        finally:
            self.method.train()
