"""The typed spine of a configuration: every verb's keys, types and ranges. Values live in configs/*.yaml only."""

import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import MISSING

from sslctl.config.keys import key, node
from sslctl.config.nodes import (
    DEVICES,
    ClusteringConfig,
    KnnConfig,
    LabelFreeConfig,
    NamesConfig,
    NeighboursConfig,
    OnlineConfig,
    ProbeConfig,
    RetrievalConfig,
    TrainerConfig,
    ViewGroupConfig,
)

_LARGEST_SEED = 2**32 - 1  # of numpy's generator

# --- What several verbs have in common: a key has the same meaning and range wherever it stands ---


@dataclass
class _OfNetworks:
    """The networks: runs, or backbone= with weights and a dataset."""

    ckpt: Any = key(path=True)
    out: str | None = key(path=True)
    dataset: dict[str, Any] | None = MISSING
    backbone: dict[str, Any] | None = MISSING


@dataclass
class _OfFeatures:
    """Features of images, extracted on a device."""

    features: str | None = MISSING
    workers: int = key(low=0, high=1024)
    device: str = key(choices=DEVICES)


@dataclass
class _OfCachedFeatures(_OfFeatures):
    cache: bool = MISSING
    cache_gb: float = key(low=0)


@dataclass
class _OfTraining:
    """A classifier that is trained by fit()."""

    seed: int = key(low=0, high=_LARGEST_SEED)
    labels: Any = MISSING
    draws: int = key(low=1)
    augmentation: dict[str, ViewGroupConfig] = MISSING
    optimizer: dict[str, Any] = MISSING
    scheduler: dict[str, Any] = MISSING
    trainer: TrainerConfig = node(TrainerConfig)
    recipe: dict[str, Any] = MISSING


@dataclass
class _EvaluationConfig(_OfNetworks, _OfCachedFeatures):
    keep_mb: float = key(low=0)
    subjects: list[str] = MISSING
    plan_only: bool = MISSING


# --- The verbs: what each adds. Values and comments of the keys are in configs/VERB.yaml ---


@dataclass
class PretrainConfig:
    seed: int = key(low=0, high=_LARGEST_SEED, fingerprint=False)  # stands in the directory's name itself
    run_dir: str | None = key(path=True, fingerprint=False)
    continue_run: str | None = key(path=True, fingerprint=False)  # the content of its weights counts
    continue_optimizer: bool = key(old_behaviour=False)
    on_data_change: str = key(choices=("refuse", "continue"), fingerprint=False)
    network: str | None = key(choices=("backbone", "teacher"), old_behaviour=None)
    plan_only: bool = key(fingerprint=False)
    names: NamesConfig = node(NamesConfig, fingerprint=False)
    dataset: dict[str, Any] = MISSING
    eval_dataset: dict[str, Any] | None = key(fingerprint=False)
    augmentation: dict[str, ViewGroupConfig] = MISSING
    backbone: dict[str, Any] = MISSING
    optimizer: dict[str, Any] = MISSING
    scheduler: dict[str, Any] = MISSING
    trainer: TrainerConfig = node(TrainerConfig)
    method: dict[str, Any] = MISSING
    recipe: dict[str, Any] = key(fingerprint=False)
    evaluation: OnlineConfig = node(OnlineConfig, fingerprint=False)
    probe: ProbeConfig = node(ProbeConfig, fingerprint=False)


@dataclass
class AdaptConfig(PretrainConfig):
    recipes: list[str] = key(filled=True)
    minutes: float = key(above=0)
    trial_share: float = key(above=0, high=0.9)
    sizes: list[int] | None = key(low=1, high=16384, filled=True)
    few_labels: list[float] = key(above=0)
    draws: int = key(low=2)
    knn: KnnConfig = node(KnnConfig)
    neighbours: int = key(low=1, high=32)


@dataclass
class LinearEvalConfig(_EvaluationConfig, _OfTraining):
    protocol: str = key(choices=("cached", "augmented"))
    probe: ProbeConfig = node(ProbeConfig)


@dataclass
class KnnEvalConfig(_EvaluationConfig):
    knn: KnnConfig = node(KnnConfig)


@dataclass
class EvaluateConfig(_EvaluationConfig):
    seed: int = key(low=0, high=_LARGEST_SEED)
    eval_dataset: dict[str, Any] | None = MISSING
    protocols: dict[str, Any] = MISSING
    few_labels: list[float] = key(above=0)
    draws: int = key(low=2)
    knn: NeighboursConfig = node(NeighboursConfig)
    probe: ProbeConfig = node(ProbeConfig)
    clustering: ClusteringConfig = node(ClusteringConfig)
    retrieval: RetrievalConfig = node(RetrievalConfig)
    label_free: LabelFreeConfig = node(LabelFreeConfig)


@dataclass
class ExportConfig(_OfNetworks):
    format: str = key(choices=("torchvision", "timm", "safetensors", "onnx", "torch_export"))
    features: str | None = MISSING
    images: int = key(low=3)
    tolerance: float = key(above=0)


@dataclass
class EmbedConfig(_OfNetworks, _OfFeatures):
    split: str = key(choices=("train", "test", "all"))
    format: str | None = key(choices=("npz", "csv", "parquet"))
    batch_size: int = key(low=1)


@dataclass
class PredictConfig:
    ckpt: Any = key(path=True)
    classifier: str | None = key(choices=("linear", "knn", "finetune"))
    neighbours: int = key(low=0, high=100)
    split: str = key(choices=("train", "test", "all"))
    format: str | None = key(choices=("csv", "parquet"))
    out: str | None = key(path=True)
    batch_size: int = key(low=1)
    workers: int = key(low=0, high=1024)
    device: str = key(choices=DEVICES)
    dataset: dict[str, Any] = MISSING


@dataclass
class FinetuneConfig(_OfNetworks, _OfTraining):
    subjects: list[str] = MISSING
    least_steps: int = key(low=1)
    layer_decay: float = key(above=0, high=1)
    classifier_lr_scale: float = key(above=0)
    network: str | None = key(choices=("backbone", "teacher"))
    pool: str | None = key(choices=("own", "mean"))
    plan_only: bool = MISSING


@dataclass
class ViewsConfig:
    seed: int = key(low=0, high=_LARGEST_SEED)
    out: str = key(path=True)
    images: int = key(low=1, high=64)
    draws: int = key(low=1, high=64)
    dataset: dict[str, Any] = MISSING
    augmentation: dict[str, ViewGroupConfig] = MISSING


@dataclass
class DataConfig:
    seed: int = key(low=0)
    out: Any = key(path=True)
    seconds: float = key(low=0)
    dataset: dict[str, Any] = MISSING


@dataclass
class PackConfig:
    seed: int = key(low=0)
    out: str | None = key(path=True)
    dataset: dict[str, Any] = MISSING


@dataclass
class PicturesConfig:
    seed: int = key(low=0, high=_LARGEST_SEED)
    ckpt: Any = key(path=True)
    out: str | None = key(path=True)
    images: int = key(low=1, high=64)


@dataclass
class ReportConfig(_OfCachedFeatures):
    seed: int = key(low=0, high=_LARGEST_SEED)
    ckpt: Any = key(path=True)
    out: str | None = key(path=True)
    images: int = key(low=1, high=32)
    neighbours: int = key(low=1, high=32)
    map_images: int = key(low=10, high=5000)
    rows: int = key(low=10)
    detailed: int = key(low=1)


@dataclass
class RunsConfig:
    ckpt: Any = key(path=True)
    repair: bool = key()


@dataclass
class CheckConfig:
    seed: int = key(low=0, high=_LARGEST_SEED)


# --- Where they are found: by verb, and by the defaults lists of configs/ ---

SCHEMAS = {
    "pretrain": PretrainConfig,
    "adapt": AdaptConfig,
    "linear_eval": LinearEvalConfig,
    "knn_eval": KnnEvalConfig,
    "evaluate": EvaluateConfig,
    "export": ExportConfig,
    "embed": EmbedConfig,
    "finetune": FinetuneConfig,
    "predict": PredictConfig,
    "views": ViewsConfig,
    "data": DataConfig,
    "pack": PackConfig,
    "pictures": PicturesConfig,
    "report": ReportConfig,
    "runs": RunsConfig,
    "check": CheckConfig,
}
# Inside the package of a wheel, beside it in a checkout.
CONFIGS = next(
    (d for d in (Path(__file__).parents[1] / "configs", Path(__file__).parents[2] / "configs") if d.is_dir()),
    Path(__file__).parents[1] / "configs",
)


def register_schema(verb: str) -> None:
    """Puts a verb's dataclass where the defaults list of configs/VERB.yaml looks for it."""
    name = verb.replace("-", "_")
    _store(f"{name}_schema", SCHEMAS[name])


@functools.cache
def _store(name: str, schema: type) -> None:
    from hydra.core.config_store import ConfigStore

    ConfigStore.instance().store(name=name, node=schema)
