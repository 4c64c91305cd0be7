"""What features look like without labels: functions of a matrix Z (N, D), calculated in double precision."""

import dataclasses
import json
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from omegaconf import OmegaConf
from torch import Tensor

from sslctl.data.loader import drawn_views
from sslctl.data.sampler import permuted
from sslctl.data.sources import Source
from sslctl.errors import InputError
from sslctl.evaluation import label_free
from sslctl.evaluation.features import Features, cached
from sslctl.evaluation.provenance import settings as settings_of
from sslctl.evaluation.results import make_result
from sslctl.evaluation.subjects import Subject
from sslctl.evaluation.task import Reader, Task, key_of
from sslctl.factory.from_config import build_source
from sslctl.factory.from_run import dataset_of, views_of
from sslctl.runs.directory import ENVIRONMENT, METRICS, read_config, read_json, read_lines
from sslctl.runs.results import Result
from sslctl.training.plan import choose_device
from sslctl.views import ViewMaker

_BLOCK = 1024  # rows compared with all others at a time
DELTA = 1e-4  # on the diagonal of LiDAR's covariance within images
_FIRST, _LAST = 11, 100  # ranks of the eigenvalues that α-ReQ fits


def rankme(z: Tensor) -> float:
    """How many directions the features use: exp of the entropy of their singular values, not centred.

    z: (N, D); N of 25,600 in the paper. Between 1 and min(N, D); compare runs of one method.
    RankMe (Garrido et al. 2023, arXiv:2210.02885, eq. 1).
    """
    return effective_rank(_squared_singular_values(z.double()).sqrt())


def effective_rank(values: Tensor) -> float:
    """exp(-Σ p ln p) with p = values / their sum + 1e-7. values: (K,), none negative."""
    p = values / values.sum().clamp(min=torch.finfo(values.dtype).tiny) + 1e-7
    return torch.special.entr(p).sum().exp().item()


def alpha_req(z: Tensor) -> float | None:
    """The exponent α with which the eigenvalues of the covariance fall, λ_j ∝ j^-α. z: (N, D). Near 1 is good.

    None where fewer than three of the fitted eigenvalues are more than rounding. α-ReQ (Agrawal et al. 2022).
    """
    z = z.double()
    return decay_exponent(_squared_singular_values(z - z.mean(0)) / (len(z) - 1))


def decay_exponent(eigenvalues: Tensor) -> float | None:
    """α of descending eigenvalues (D,): weighted least squares on log λ over log j, weights 1/j, j = 11 … 100."""
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
    """How many directions tell images apart by more than their views vary. z: (n, q, D), q views of each of n images.

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
    """Mean over dimensions of the standard deviation of unit rows. z: (N, D). 1/√D: spread evenly; 0: collapsed.

    SimSiam, arXiv:2011.10566, section 4.1. What training logs under this name is √D times as much.
    """
    return F.normalize(z.double(), dim=1).std(0).mean().item()


def alignment(x: Tensor, y: Tensor, power: float = 2) -> float:
    """Mean ‖x̄ - ȳ‖^power of two views of the same images, unit rows (Wang & Isola 2020, arXiv:2005.10242). (N, D) each."""
    x, y = F.normalize(x.double(), dim=1), F.normalize(y.double(), dim=1)
    return (x - y).norm(dim=1).pow(power).mean().item()


def uniformity(z: Tensor, t: float = 2) -> float:
    """log of the mean over pairs i < j of exp(-t ‖z̄_i - z̄_j‖²), unit rows (Wang & Isola 2020). z: (N, D), N ≥ 2.

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
    """(min(N, D),) descending: the eigenvalues of the smaller of ZᵀZ and ZZᵀ."""
    gram = z.T @ z if z.shape[1] <= len(z) else z @ z.T
    return torch.linalg.eigvalsh(gram).clamp(min=0).flip(0)


def pretrained_on(task: Task, tell: Callable[[str], None]) -> Source:
    """The training images that label-free figures are of: a run's own, wherever it is judged; else the task's."""
    if task.run is None:
        return task.train
    node = dataset_of(task.run)
    source = task.train
    if node != task.dataset:
        try:
            source = build_source(OmegaConf.merge(node, {"memory_gb": 0}) if "memory_gb" in node else node, "train")
        except InputError as error:
            tell(
                f"figures without labels are of {task.train.name}, those pretrained on are not there any more: {error}"
            )
            return task.train
    trained_on = read_json(task.run / ENVIRONMENT).get("hashes", {}).get("data")
    if trained_on and source.content_hash != trained_on:
        tell(f"figures without labels: {source.name} has changed since the run was trained on it")
    return task.train if source.version == task.train.version else source


def sampled(subject: Subject, task: Task, source: Source, held: dict[str, Features], read: Reader) -> Tensor:
    """(n, D): the features that label-free figures are of, of some of a source's images. held: the task's own, by split."""
    rows = _some(task.config.label_free.images, len(source))
    if source is task.train:
        return held[source.split].features[rows]
    if len(rows) == len(source):  # all of them, under the same key as other evaluations
        return read(subject, source).features[rows]
    return read(subject, source.subset(rows)).features


def label_free_records(subject: Subject, task: Task, z: Tensor, leave_out: Callable[[str], None]) -> list[Result]:
    """RankMe, α-ReQ, the spread of features; LiDAR and alignment where the run's own views can be made; entropies.

    z: (n, D) of images of task.train, in any order.
    """
    config, train = task.config, task.train
    settings, dim = config.label_free, z.shape[1]
    pairs = z[: settings.pairs]
    make, all_of = partial(_figure, subject, train), {"images": len(z)}
    spread = f"1/√D = {dim**-0.5:.3g}; 0: collapsed"
    records = [
        make("rankme", label_free.rankme(z), f"of at most {min(z.shape):,}; more is better, within one method", all_of),
        make("feature_std", label_free.feature_std(z), spread, all_of, {"dim": dim}),
        make("uniformity", label_free.uniformity(pairs), "towards -4; 0: collapsed", {"images": len(pairs)}),
    ]
    alpha = label_free.alpha_req(z)
    if alpha is None:
        leave_out(f"α-ReQ of {subject.name}: too few directions vary for a slope from rank 11 on ({dim} dimensions)")
    else:
        records.append(make("alpha_req", alpha, "near 1; far above: few directions carry everything", all_of))
    seen, reason = views_of_run(subject, task)
    if seen is None:
        leave_out(f"LiDAR and alignment of {subject.name}: {reason}")
        return records
    views = view_features(subject, task, seen)  # (n, q, D)
    count, apart = len(views), f"of at most {min(dim, len(views) - 1):,}; more is better, within one method"
    half = views.shape[1] // 2
    x, y = (part.flatten(0, 1) for part in (views[:, :half], views[:, half : 2 * half]))
    pipeline = {"images": count, "views": views.shape[1], "augmentation": settings_of(seen.augmentation)}
    pipeline["dropped"] = list(seen.dropped)
    lidar = pipeline | {"delta": label_free.DELTA}
    make = partial(make, seed=config.seed)
    records.append(make("lidar", label_free.lidar(views), apart, lidar))
    records.append(make("alignment", label_free.alignment(x, y), "near 0 while uniformity is low", pipeline))
    return records + _logged_entropy(subject, task, make)


def _figure(
    subject: Subject,
    source: Any,
    metric: str,
    value: float,
    healthy: str,
    params: dict,
    more: dict | None = None,
    seed: int | None = None,
) -> Result:
    """seed: None for what is drawn from no seed."""
    return make_result(
        subject,
        source,
        protocol="label-free",
        metric=metric,
        values=[value],
        labels="none",
        seed=seed,
        epoch_rule="no training",
        params=params,
        details={"images": params["images"], "healthy": healthy, **(more or {})},
    )


def _logged_entropy(subject: Subject, task: Task, make: Any) -> list[Result]:
    """The entropy of the teacher's prototypes, as training logged it last before these weights; empty where it has none."""
    if subject.name != "trained":
        return []
    logged = [m for m in read_lines(task.run / METRICS) if "teacher_entropy" in m and m["step"] <= subject.step]
    if not logged:
        return []
    step, value, config = logged[-1]["step"], logged[-1]["teacher_entropy"], read_config(task.run)
    prototypes = config["method"].get("prototypes")
    most = f"ln {prototypes} = {np.log(prototypes):.3g}" if prototypes else "its most"
    more = {"logged_at_step": step}
    images = {"images": config["trainer"]["batch_size"]}
    return [make("teacher_entropy", value, f"0: collapsed; {most}: uniform", images, more, seed=None)]


def _some(count: int, size: int) -> Tensor:
    """At most so many rows, the same for every subject."""
    return torch.from_numpy(permuted(np.arange(min(count, size)), size, seed=0, epoch=-5))


def views_of_run(subject: Subject, task: Task) -> tuple[ViewMaker | None, str]:
    """What makes the views that the subject's run was trained on; else None and the reason."""
    if task.run is None:
        return None, "foreign weights have no views of their own"
    if subject.backbone is None:
        return None, "they were trained on no views"
    if task.train.gives != "global":
        return None, f"{task.train.name} has {task.train.summary()}, not images"
    views = views_of(OmegaConf.create(read_config(task.run)), task.train, subject.method)
    return dataclasses.replace(views, augmentation={"global": views.augmentation["global"]}), ""


def view_features(subject: Subject, task: Task, views: ViewMaker) -> Tensor:
    """(n, q, D): q views of each of n training images as the run would make them, through the cache."""
    config, train = task.config, task.train
    rows = _some(config.label_free.lidar_images, len(train))
    wanted, device = config.label_free.lidar_views, choose_device(config.device)
    epochs = -(-wanted // views.augmentation["global"]["count"])
    pipeline = json.dumps([vars(views), len(rows), wanted, config.seed], sort_keys=True)

    @torch.no_grad()
    def compute() -> Tensor:
        subject.module.to(device)
        parts = []
        for images in drawn_views(train, views, rows, epochs, config.seed):
            images = images[:, :wanted]  # (b, q, C, h, w)
            made = subject.function(images.flatten(0, 1).to(device)).float().cpu()
            parts.append(made.unflatten(0, images.shape[:2]))
        return torch.cat(parts)

    return cached((*key_of(subject, train), "views", pipeline), compute, config.cache_gb if config.cache else 0)
