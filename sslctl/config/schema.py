"""The typed spine of a configuration: the keys of every verb, their types and ranges. Values live in configs/*.yaml only."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omegaconf import MISSING


def _in(low: float | None = None, high: float | None = None, choices: tuple = (), above: float | None = None) -> Any:
    """A key with a range: low <= value <= high, value > above, or one of the choices."""
    return field(default=MISSING, metadata={"low": low, "high": high, "choices": choices, "above": above})


@dataclass
class JitterConfig:
    probability: Any = MISSING  # a number, or a list with one entry a view
    strength: float = _in(low=0)
    brightness: float = _in(low=0)
    contrast: float = _in(low=0)
    saturation: float = _in(low=0)
    hue: float = _in(low=0, high=0.5)


@dataclass
class BlurConfig:
    probability: Any = MISSING
    sigma: list[float] = MISSING


@dataclass
class SolarizeConfig:
    probability: Any = MISSING
    threshold: float = _in(low=0, high=1)


@dataclass
class ViewGroupConfig:
    count: int = _in(low=1)
    size: float = _in(above=0)
    scale: list[float] = MISSING
    ratio: list[float] = MISSING
    interpolation: str = _in(choices=("bilinear", "bicubic"))
    flip: float = _in(low=0, high=1)
    jitter: JitterConfig = field(default_factory=JitterConfig)
    grayscale: float = _in(low=0, high=1)
    grayscale_first: bool = MISSING
    blur: BlurConfig = field(default_factory=BlurConfig)
    solarize: SolarizeConfig = field(default_factory=SolarizeConfig)


@dataclass
class TrainerConfig:
    epochs: int = _in(low=1)
    batch_size: int = _in(low=2)
    precision: str = _in(choices=("fp32", "bf16", "fp16"))
    tf32: bool = MISSING
    accumulate_steps: int = _in(low=1)
    accumulate_approximately: bool = MISSING
    processes: int = _in(low=1)
    compile: bool = MISSING
    deterministic: bool = MISSING
    device: str = _in(choices=("auto", "cpu", "cuda", "mps"))
    channels_last: bool = MISSING
    clip_grad_norm: float | None = _in(above=0)
    workers: int = _in(low=0)
    threads: int | None = _in(low=1)
    log_every_steps: int = _in(low=1)
    save_every_epochs: float | None = _in(above=0)
    save_every_steps: int | None = _in(low=1)
    keep_last: int = _in(low=2)
    resume: str = _in(choices=("auto", "must"))
    tensorboard: bool = MISSING
    on_collapse: str = _in(choices=("warn", "stop"))


@dataclass
class KnnConfig:
    k: int = _in(low=1)
    temperature: float = _in(above=0)


@dataclass
class OnlineConfig:
    """Evaluation during and at the end of pretraining."""

    knn_every_epochs: float | None = _in(above=0)
    knn: KnnConfig = field(default_factory=KnnConfig)
    closing: bool = MISSING
    cache_gb: float = _in(low=0)


@dataclass
class ProbeConfig:
    """The grid of a cached linear probe."""

    epochs: int = _in(low=1)
    most_steps: int | None = _in(low=1)
    batch_size: int = _in(low=1)
    lr: list[float] = MISSING
    weight_decay: list[float] = MISSING
    validation: float = _in(above=0, high=0.5)


@dataclass
class PretrainConfig:
    seed: int = _in(low=0)
    run_dir: str | None = MISSING
    plan_only: bool = MISSING
    names: dict[str, str] = MISSING
    dataset: dict[str, Any] = MISSING
    eval_dataset: dict[str, Any] | None = MISSING
    augmentation: dict[str, ViewGroupConfig] = MISSING
    backbone: dict[str, Any] = MISSING
    optimizer: dict[str, Any] = MISSING
    scheduler: dict[str, Any] = MISSING
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    method: dict[str, Any] = MISSING
    recipe: dict[str, Any] = MISSING
    evaluation: OnlineConfig = field(default_factory=OnlineConfig)
    probe: ProbeConfig = field(default_factory=ProbeConfig)


@dataclass
class _EvaluationConfig:
    ckpt: Any = MISSING
    out: str | None = MISSING
    features: str | None = MISSING
    subjects: list[str] = MISSING
    cache: bool = MISSING
    cache_gb: float = _in(low=0)
    dataset: dict[str, Any] | None = MISSING
    backbone: dict[str, Any] | None = MISSING
    plan_only: bool = MISSING
    workers: int = _in(low=0)
    device: str = _in(choices=("auto", "cpu", "cuda", "mps"))


@dataclass
class LinearEvalConfig(_EvaluationConfig):
    seed: int = _in(low=0)
    protocol: str = _in(choices=("cached", "augmented"))
    labels: Any = MISSING
    draws: int = _in(low=1)
    probe: ProbeConfig = field(default_factory=ProbeConfig)
    augmentation: dict[str, ViewGroupConfig] = MISSING
    optimizer: dict[str, Any] = MISSING
    scheduler: dict[str, Any] = MISSING
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    recipe: dict[str, Any] = MISSING


@dataclass
class KnnEvalConfig(_EvaluationConfig):
    knn: KnnConfig = field(default_factory=KnnConfig)


@dataclass
class NeighboursConfig:
    k: list[int] = field(default=MISSING, metadata={"low": 1})
    temperature: float = _in(above=0)


@dataclass
class ClusteringConfig:
    restarts: int = _in(low=1)
    iterations: int = _in(low=1)
    images: int = _in(low=1)


@dataclass
class RetrievalConfig:
    recall: list[int] = field(default=MISSING, metadata={"low": 1})
    depth: int = _in(low=1)


@dataclass
class LabelFreeConfig:
    images: int = _in(low=2)
    pairs: int = _in(low=2)
    lidar_images: int = _in(low=2)
    lidar_views: int = _in(low=2)


@dataclass
class EvaluateConfig(_EvaluationConfig):
    seed: int = _in(low=0)
    eval_dataset: dict[str, Any] | None = MISSING
    few_labels: list[float] = field(default=MISSING, metadata={"above": 0})
    draws: int = _in(low=2)
    knn: NeighboursConfig = field(default_factory=NeighboursConfig)
    probe: ProbeConfig = field(default_factory=ProbeConfig)
    clustering: ClusteringConfig = field(default_factory=ClusteringConfig)
    retrieval: RetrievalConfig = field(default_factory=RetrievalConfig)
    label_free: LabelFreeConfig = field(default_factory=LabelFreeConfig)


@dataclass
class ExportConfig:
    ckpt: Any = MISSING
    format: str = _in(choices=("torchvision", "timm", "safetensors", "onnx", "torch_export"))
    out: str | None = MISSING
    features: str | None = MISSING
    dataset: dict[str, Any] | None = MISSING
    backbone: dict[str, Any] | None = MISSING
    images: int = _in(low=3)
    tolerance: float = _in(above=0)


@dataclass
class EmbedConfig:
    ckpt: Any = MISSING
    split: str = _in(choices=("train", "test", "all"))
    format: str | None = _in(choices=("npz", "csv", "parquet"))
    out: str | None = MISSING
    features: str | None = MISSING
    dataset: dict[str, Any] | None = MISSING
    backbone: dict[str, Any] | None = MISSING
    batch_size: int = _in(low=1)
    workers: int = _in(low=0)
    device: str = _in(choices=("auto", "cpu", "cuda", "mps"))


@dataclass
class FinetuneConfig:
    ckpt: Any = MISSING
    out: str | None = MISSING
    seed: int = _in(low=0)
    subjects: list[str] = MISSING
    labels: Any = MISSING
    draws: int = _in(low=1)
    least_steps: int = _in(low=1)
    layer_decay: float = _in(above=0, high=1)
    classifier_lr_scale: float = _in(above=0)
    network: str | None = _in(choices=("backbone", "teacher"))
    pool: str | None = _in(choices=("own", "mean"))
    plan_only: bool = MISSING
    dataset: dict[str, Any] | None = MISSING
    backbone: dict[str, Any] | None = MISSING
    augmentation: dict[str, ViewGroupConfig] = MISSING
    optimizer: dict[str, Any] = MISSING
    scheduler: dict[str, Any] = MISSING
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    recipe: dict[str, Any] = MISSING


@dataclass
class ViewsConfig:
    seed: int = _in(low=0)
    out: str = MISSING
    images: int = _in(low=1, high=64)
    draws: int = _in(low=1, high=64)
    dataset: dict[str, Any] = MISSING
    augmentation: dict[str, ViewGroupConfig] = MISSING


@dataclass
class PicturesConfig:
    seed: int = _in(low=0)
    ckpt: Any = MISSING
    out: str | None = MISSING
    images: int = _in(low=1, high=64)


@dataclass
class ReportConfig:
    ckpt: Any = MISSING
    out: str | None = MISSING
    images: int = _in(low=1, high=32)
    neighbours: int = _in(low=1, high=32)
    map_images: int = _in(low=10, high=5000)
    rows: int = _in(low=10)
    detailed: int = _in(low=1)
    features: str | None = MISSING
    seed: int = _in(low=0)
    cache: bool = MISSING
    cache_gb: float = _in(low=0)
    workers: int = _in(low=0)
    device: str = _in(choices=("auto", "cpu", "cuda", "mps"))


@dataclass
class RunsConfig:
    ckpt: Any = MISSING


@dataclass
class CheckConfig:
    seed: int = _in(low=0)


SCHEMAS = {
    "pretrain": PretrainConfig,
    "linear_eval": LinearEvalConfig,
    "knn_eval": KnnEvalConfig,
    "evaluate": EvaluateConfig,
    "export": ExportConfig,
    "embed": EmbedConfig,
    "finetune": FinetuneConfig,
    "views": ViewsConfig,
    "pictures": PicturesConfig,
    "report": ReportConfig,
    "runs": RunsConfig,
    "check": CheckConfig,
}


CONFIGS = next(
    (d for d in (Path(__file__).parents[1] / "configs", Path(__file__).parents[2] / "configs") if d.is_dir()),
    Path(__file__).parents[1] / "configs",
)


def register_schemas() -> None:
    """Puts the dataclasses of sslctl.config.schema where the defaults lists of configs/ look for them."""
    from hydra.core.config_store import ConfigStore

    store = ConfigStore.instance()
    for name, schema in SCHEMAS.items():
        store.store(name=f"{name}_schema", node=schema)
