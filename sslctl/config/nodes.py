"""The typed nodes of a configuration: the keys below `trainer`, a view of `augmentation`, a protocol of `evaluate`."""

from dataclasses import dataclass
from typing import Any

from omegaconf import MISSING

from sslctl.config.keys import key, node

DEVICES = ("auto", "cpu", "cuda", "mps")

# --- Views: one group of an augmentation, global or local ---


@dataclass
class JitterConfig:
    probability: Any = MISSING  # a number, or a list with one entry a view
    strength: float = key(low=0)
    brightness: float = key(low=0)
    contrast: float = key(low=0)
    saturation: float = key(low=0)
    hue: float = key(low=0, high=0.5)


@dataclass
class BlurConfig:
    probability: Any = MISSING
    sigma: list[float] = key(above=0)


@dataclass
class SolarizeConfig:
    probability: Any = MISSING
    threshold: float = key(low=0, high=1)


@dataclass
class ViewGroupConfig:
    count: int = key(low=1)
    size: float = key(above=0)
    scale: list[float] = MISSING
    ratio: list[float] = MISSING
    interpolation: str = key(choices=("bilinear", "bicubic"))
    flip: float = key(low=0, high=1)
    jitter: JitterConfig = node(JitterConfig)
    grayscale: float = key(low=0, high=1)
    grayscale_first: bool = MISSING
    blur: BlurConfig = node(BlurConfig)
    solarize: SolarizeConfig = node(SolarizeConfig)


# --- Training: what of it counts in a run's fingerprint and what only watches it ---


@dataclass
class TrainerConfig:
    epochs: int = key(low=1)
    batch_size: int = key(low=2)
    precision: str = key(choices=("fp32", "bf16", "fp16"))
    tf32: bool = MISSING
    accumulate_steps: int = key(low=1)
    accumulate_approximately: bool = MISSING
    processes: int = key(low=1, high=1024, fingerprint=False)
    timeout_minutes: float = key(above=0, fingerprint=False)
    max_hours: float | None = key(above=0, fingerprint=False)
    requeue_signal: str | None = key(choices=("USR1", "USR2"), fingerprint=False)
    activation_checkpointing: bool = key(fingerprint=False)
    compile: bool = MISSING
    deterministic: bool = MISSING
    device: str = key(choices=DEVICES, fingerprint=False)
    channels_last: bool = MISSING
    clip_grad_norm: float | None = key(above=0)
    workers: int = key(low=0, high=1024, fingerprint=False)
    threads: int | None = key(low=1, high=1024, fingerprint=False)
    log_every_steps: int = key(low=1, fingerprint=False)
    save_every_epochs: float | None = key(above=0, fingerprint=False)
    save_every_steps: int | None = key(low=1, fingerprint=False)
    keep_last: int = key(low=2, fingerprint=False)
    resume: str = key(choices=("auto", "must"), fingerprint=False)
    tensorboard: bool = key(fingerprint=False)
    on_collapse: str = key(choices=("warn", "stop"), fingerprint=False)


@dataclass
class NamesConfig:
    """The choices of files that name a run."""

    dataset: str | None = MISSING
    method: str | None = MISSING
    backbone: str | None = MISSING
    scale: str | None = MISSING


# --- Evaluation: of pretraining, then of each protocol ---


@dataclass
class KnnConfig:
    k: int = key(low=1)
    temperature: float = key(above=0)


@dataclass
class OnlineConfig:
    """Evaluation during and at the end of pretraining."""

    knn_every_epochs: float | None = key(above=0)
    knn: KnnConfig = node(KnnConfig)
    closing: bool = MISSING
    cache_gb: float = key(low=0)
    keep_mb: float = key(low=0)


@dataclass
class ProbeConfig:
    """The grid of a cached linear probe."""

    epochs: int = key(low=1)
    most_steps: int | None = key(low=1)
    batch_size: int = key(low=1)
    lr: list[float] = key(above=0, filled=True)
    weight_decay: list[float] = key(low=0, filled=True)
    validation: float = key(above=0, high=0.5)


@dataclass
class NeighboursConfig:
    k: list[int] = key(low=1, filled=True)
    temperature: float = key(above=0)


@dataclass
class ClusteringConfig:
    restarts: int = key(low=1)
    iterations: int = key(low=1)
    images: int = key(low=1)


@dataclass
class RetrievalConfig:
    recall: list[int] = key(low=1, filled=True)
    depth: int = key(low=1)


@dataclass
class LabelFreeConfig:
    images: int = key(low=2)
    pairs: int = key(low=2)
    lidar_images: int = key(low=2)
    lidar_views: int = key(low=2)
