"""Figures of features that need no labels: functions of a matrix Z (N, D), calculated in double precision."""

import dataclasses
import json
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from sslctl.config.literal import as_config
from sslctl.data.loader import drawn_views
from sslctl.data.modality import IMAGES
from sslctl.data.sampler import permuted
from sslctl.data.sources import Source
from sslctl.evaluation.features import cached, refuse_non_finite
from sslctl.evaluation.provenance import settings as settings_of
from sslctl.evaluation.results import make_result
from sslctl.evaluation.subjects import Subject
from sslctl.evaluation.task import Protocol, Task, features_of, key_of
from sslctl.factory.from_run import views_of
from sslctl.runs.metrics import read_metrics
from sslctl.runs.reading import read_config
from sslctl.runs.results import Result
from sslctl.views import ViewMaker

_BLOCK = 1024  # rows compared with all others at a time
DELTA = 1e-4  # on the diagonal of LiDAR's covariance within images
_FIRST, _LAST = 11, 100  # ranks of the eigenvalues that α-ReQ fits


def rankme(z: Tensor) -> float:
    """Counts the directions that the features use: exp of the entropy of their singular values, not centred.

    z: (N, D); N of 25,600 in the paper. Between 1 and min(N, D); compare runs of one method.
    RankMe (Garrido et al. 2023, arXiv:2210.02885, eq. 1).
    """
    return effective_rank(_squared_singular_values(z.double()).sqrt())


def effective_rank(values: Tensor) -> float:
    """Returns exp(-Σ p ln p) with p = values / their sum + 1e-7. values: (K,), none negative."""
    p = values / values.sum().clamp(min=torch.finfo(values.dtype).tiny) + 1e-7
    return torch.special.entr(p).sum().exp().item()


def alpha_req(z: Tensor) -> float | None:
    """Fits the exponent α with which the eigenvalues of the covariance fall, λ_j ∝ j^-α. z: (N, D). Near 1 is good.

    None where fewer than three of the fitted eigenvalues are more than rounding. α-ReQ (Agrawal et al. 2022).
    """
    z = z.double()
    return decay_exponent(_squared_singular_values(z - z.mean(0)) / (len(z) - 1))


def decay_exponent(eigenvalues: Tensor) -> float | None:
    """Fits α to descending eigenvalues (D,) by weighted least squares on log λ over log j, weights 1/j, j = 11 … 100."""
    largest = eigenvalues[0]
    fitted = eigenvalues[_FIRST - 1 : _LAST]
    fitted = fitted[fitted > 1e-12 * largest]
    if len(fitted) < 3:
        return None
    j = torch.arange(_FIRST, _FIRST + len(fitted), dtype=torch.float64)
    x, y, weight = j.log(), fitted.double().log(), 1 / j
    x = x - (weight * x).sum() / weight.sum()
    return (-(weight * x * y).sum() / (weight * x * x).sum()).item()


def lidar(z: Tensor, delta: float = DELTA) -> float:
    """Counts the directions that tell images apart by more than their views vary. z: (n, q, D), q views of each of n images.

    The effective rank of the eigenvalues of Σ_w^-½ Σ_b Σ_w^-½, Σ_w with delta on its diagonal; at most min(D, n - 1).
    LiDAR (Thilak et al. 2023, arXiv:2312.04000, section 4).
    """
    z = z.double()
    n, q, dim = z.shape
    centres = z.mean(1)  # (n, D)
    apart, within = centres - centres.mean(0), (z - centres[:, None]).reshape(-1, dim)
    between = apart.T @ apart / n
    noise = within.T @ within / (n * q) + delta * torch.eye(dim, dtype=z.dtype)
    factor = torch.linalg.cholesky(noise)  # Σ_w = L Lᵀ: L⁻¹ Σ_b L⁻ᵀ has the eigenvalues of Σ_w^-½ Σ_b Σ_w^-½
    half = torch.linalg.solve_triangular(factor, between, upper=False)
    whitened = torch.linalg.solve_triangular(factor, half.T, upper=False)
    return effective_rank(torch.linalg.eigvalsh((whitened + whitened.T) / 2).clamp(min=0))


def feature_std(z: Tensor) -> float:
    """Returns the mean over dimensions of the standard deviation of unit rows. z: (N, D). 1/√D: spread evenly; 0: collapsed.

    SimSiam, arXiv:2011.10566, section 4.1. What training logs under this name is √D times as much.
    """
    return F.normalize(z.double(), dim=1).std(0).mean().item()


def centred_cosine(z: Tensor, other: Tensor) -> float:
    """Returns the mean cosine of two features of the same images, each less the mean of its own. z, other: (N, D).

    1: they differ by a shift and their lengths; near 0: nothing is left of the other.
    """
    z, other = (x.double() - x.double().mean(0) for x in (z, other))
    return F.cosine_similarity(z, other, dim=1).mean().item()


def alignment(x: Tensor, y: Tensor, power: float = 2) -> float:
    """Returns the mean ‖x̄ - ȳ‖^power of two views of the same images, unit rows. x, y: (N, D).

    Wang & Isola 2020, arXiv:2005.10242.
    """
    x, y = F.normalize(x.double(), dim=1), F.normalize(y.double(), dim=1)
    return (x - y).norm(dim=1).pow(power).mean().item()


def uniformity(z: Tensor, t: float = 2) -> float:
    """Returns the log of the mean over pairs i < j of exp(-t ‖z̄_i - z̄_j‖²), unit rows (Wang & Isola 2020). z: (N, D), N ≥ 2.

    0: all in one place; -2 t at the least for two points; near -4 on a sphere of many dimensions, t = 2.
    """
    z = F.normalize(z.double(), dim=1)
    total = z.new_zeros(())
    for start in range(0, len(z), _BLOCK):
        rows = z[start : start + _BLOCK]
        squared = (2 - 2 * rows @ z[start:].T).clamp_(min=0)  # (b, N - start)
        total += squared.mul_(-t).exp_().triu_(diagonal=1).sum()
    return (total / (len(z) * (len(z) - 1) / 2)).log().item()


def _squared_singular_values(z: Tensor) -> Tensor:
    """Returns (min(N, D),) descending: the eigenvalues of the smaller of ZᵀZ and ZZᵀ."""
    gram = z.T @ z if z.shape[1] <= len(z) else z @ z.T
    return torch.linalg.eigvalsh(gram).clamp(min=0).flip(0)


# --- The protocol ---


@dataclass(frozen=True)
class LabelFree(Protocol):
    """RankMe, α-ReQ and the spread of features; LiDAR and alignment where the run's own views can be made; entropies.

    They are of the images that the run was pretrained on, wherever it is evaluated. images, pairs: at most so many, for
    RankMe and α-ReQ, and for uniformity. lidar_images, lidar_views: for LiDAR and alignment.
    """

    needs_labels = False
    images: int
    pairs: int
    lidar_images: int
    lidar_views: int

    def __call__(self, subject: Subject, task: Task) -> list[Result]:
        source = task.pretraining_images
        # Of features without views: the spectrum and the spread.
        z = self.sample(subject, task, source)
        pairs, dim, of_images = z[: self.pairs], z.shape[1], {"images": len(z)}

        def make(
            metric: str, value: float, healthy: str, params: dict, seed: int | None = None, **more: float
        ) -> Result:
            details = {"images": params["images"], "healthy": healthy, **more}
            measured = {"metric": metric, "values": [value], "params": params, "details": details, "seed": seed}
            return make_result(subject, source, protocol="label-free", share=False, labels="none", **measured)

        even = f"1/√D = {dim**-0.5:.3g}; 0: collapsed"
        results = [
            make("rankme", rankme(z), f"of at most {min(z.shape):,}; more is better, within one method", of_images),
            make("feature_std", feature_std(z), even, of_images, dim=dim),
            make("uniformity", uniformity(pairs), "towards -4; 0: collapsed", {"images": len(pairs)}),
        ]
        alpha = alpha_req(z)
        if alpha is None:
            reason = f"too few directions vary for a slope from rank 11 on ({dim} dimensions)"
            task.omitted.append(f"α-ReQ of {subject.name}: {reason}")
        else:
            results.append(make("alpha_req", alpha, "near 1; far above: few directions carry everything", of_images))
        # Of several views of an image, made as the run made them.
        maker, reason = views_of_run(subject, task, source)
        if maker is None:
            task.omitted.append(f"LiDAR and alignment of {subject.name}: {reason}")
            return results
        views = self.view_features(subject, task, source, maker)  # (n, q, D)
        count, half = len(views), views.shape[1] // 2
        x, y = (part.flatten(0, 1) for part in (views[:, :half], views[:, half : 2 * half]))
        pipeline = {"images": count, "views": views.shape[1], "augmentation": settings_of(maker.augmentation)}
        pipeline["dropped"] = list(maker.dropped)
        healthy = f"of at most {min(dim, count - 1):,}; more is better, within one method"
        results += [
            make("lidar", lidar(views), healthy, pipeline | {"delta": DELTA}, seed=task.seed),
            make("alignment", alignment(x, y), "near 0 while uniformity is low", pipeline, seed=task.seed),
        ]
        return results + _logged_entropy(subject, task, make)

    def sample(self, subject: Subject, task: Task, source: Source) -> Tensor:
        """Returns the features (n, D) of at most `images` images, the same for every subject."""
        rows = choose_rows(self.images, len(source))
        if source is task.train or len(rows) == len(source):  # under the same key as other evaluations
            return task.read(subject, source).features[rows]
        return task.read(subject, source.subset(rows)).features

    def view_features(self, subject: Subject, task: Task, source: Source, maker: ViewMaker) -> Tensor:
        """Returns (n, q, D): q views of each of n training images as the run would make them, through the cache."""
        rows, count = choose_rows(self.lidar_images, len(source)), self.lidar_views
        epochs = -(-count // maker.augmentation["global"]["count"])
        pipeline = json.dumps([vars(maker), len(rows), count, task.seed], sort_keys=True)

        @torch.no_grad()
        def compute() -> Tensor:
            subject.module.to(task.read.device)
            parts = []
            for images in drawn_views(source, maker, rows, epochs, task.seed):
                images = images[:, :count]  # (b, q, C, h, w)
                features = subject.function(images.flatten(0, 1).to(task.read.device)).float().cpu()
                parts.append(features.unflatten(0, images.shape[:2]))
            return refuse_non_finite(torch.cat(parts), f"{features_of(subject, source)}, by its views,")

        return cached((*key_of(subject, source), "views", pipeline), compute, task.read.cache_gb)


def _logged_entropy(subject: Subject, task: Task, make: Callable[..., Result]) -> list[Result]:
    """Returns the entropy of the teacher's prototypes that training logged last before these weights, if it logged any."""
    if subject.name != "trained":
        return []
    logged = [m for m in read_metrics(task.run) if "teacher_entropy" in m and m["step"] <= subject.step]
    if not logged:
        return []
    config = read_config(task.run)
    prototypes, images = config["method"].get("prototypes"), {"images": config["trainer"]["batch_size"]}
    most = f"ln {prototypes} = {np.log(prototypes):.3g}" if prototypes else "its most"
    value, healthy = logged[-1]["teacher_entropy"], f"0: collapsed; {most}: uniform"
    return [make("teacher_entropy", value, healthy, images, logged_at_step=logged[-1]["step"])]


def choose_rows(count: int, size: int) -> Tensor:
    """Returns at most so many rows of a source, the same for every subject. (n,) int64."""
    return torch.from_numpy(permuted(np.arange(min(count, size)), size, seed=0, epoch=-5))


def views_of_run(subject: Subject, task: Task, source: Source) -> tuple[ViewMaker | None, str]:
    """Returns what makes the views that the subject's run was trained on; else None and the reason."""
    if task.run is None:
        return None, "given weights have no views of their own"
    if subject.backbone is None:
        return None, "they were trained on no views"
    if source.modality != IMAGES:
        return None, f"{source.name} has {source.summary()}, not images"
    views = views_of(as_config(read_config(task.run)), source, subject.method)
    return dataclasses.replace(views, augmentation={"global": views.augmentation["global"]}), ""
