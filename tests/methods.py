"""Methods as their configurations make them, but small: built without a run, or as a tiny run of each."""

import atexit
import functools
import pickle
import re
import shutil
import tempfile
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig, OmegaConf
from torch import Tensor, nn

from sslctl.config.command_line import Prepared
from sslctl.config.diagnose import compose_choices
from sslctl.data.batch import Batch
from sslctl.data.modality import TEXTS, VIDEOS
from sslctl.data.text import CLS
from sslctl.factory.from_config import build_backbone, build_method
from sslctl.methods.base import Facts, Method
from sslctl.models.preprocess import Preprocess, TextPreprocess
from sslctl.models.teacher import Teacher
from sslctl.models.vit import patch_size_of
from sslctl.ops.image_size import ImageSize, height_width
from sslctl.training.setup import build_optimizer
from sslctl.views import Key, ViewMaker
from tests.runs import SIMCLR, finish, image_folder

SIDE, ROWS, IMAGES, LENGTH, VOCABULARY = 16, 8, 100, 32, 60
RESNET = ("backbone=small_resnet", "backbone.widths=[4,8]")
WITHOUT_BATCHNORM = (*RESNET, "backbone.norm=layer")
VIT = ("backbone=small_vit", "backbone.kwargs.patch_size=4", "backbone.kwargs.embed_dim=16")
VIT += ("backbone.kwargs.depth=1", "backbone.kwargs.num_heads=2")
SCALE = {"head_dim": 16, "predictor_dim": 8, "prototypes": 20, "queue_size": 64, "whitened_dim": 4, "local_views": 2}
SCALE |= {"tile_dim": 8, "code_dim": 8, "decoder_dim": 16, "decoder_depth": 1, "decoder_heads": 2, "patch_dim": 8}
NETWORKS = dict.fromkeys(("ibot", "dinov2", "dinov3", "msn", "mae", "simmim", "ijepa"), VIT)
NETWORKS |= {"masked_language": ("backbone.embed_dim=16", "backbone.depth=1", "backbone.heads=2")}
OWN = {  # what a method needs besides to be small
    **dict.fromkeys(("moco", "moco_v1", "moco_v2plus"), ("method.batchnorm_groups=4",)),
    "wmse": ("method.whitening_size=8",),
    "lejepa": ("method.slices=16",),
    "jigsaw": ("method.permutations=8",),
    "frame_order": ("method.hidden_dim=8",),
    "dinov3": tuple(f"method.gram_{name}=0.0" for name in ("teacher_from", "start", "ramp")),  # anchored at once
}


@dataclass(frozen=True)
class Built:
    config: DictConfig
    method: Method
    batch: Batch

    def loss(self) -> Tensor:
        """Of the batch at step 0."""
        return self.method(self.batch, self.method.schedules(0))["loss"]

    def step(self) -> dict:
        """One step of the method's own optimizer; returns what the method did."""
        method, optimizer, s = self.method, self.optimizer(), self.method.schedules(0)
        method.before_step(s)
        out = method(self.batch, s)
        out["loss"].backward()
        method.after_backward(s)
        optimizer.step()
        method.after_step(s, out.get("carry", {}))
        return out

    def optimizer(self) -> torch.optim.Optimizer:
        """The method's own one, at a learning rate of 0.1."""
        plan = SimpleNamespace(lr=0.1, device=torch.device("cpu"))
        return build_optimizer(self.config.optimizer, self.method, plan)


@dataclass(frozen=True)
class Embedder:
    """sslctl.methods.base.Embed over random images of a shape."""

    shape: tuple[int, ...]

    def __call__(self, function, *, calibrate=False):
        return function(torch.rand(self.shape))


@functools.cache
def composed(*words: str) -> DictConfig:
    """What compose_choices gives for a pretraining: files are composed once for all values that are set on top of them."""
    values = [word for word in words if re.match(r"[\w.]+\.\w+=", word)]
    config = pickle.loads(_of_files(*(word for word in words if word not in values)))
    for word in values:
        OmegaConf.update(config, *_key_and_value(word))
    return config


@functools.cache
def _of_files(*choices: str) -> bytes:
    return pickle.dumps(compose_choices("pretrain", Prepared(), list(choices)))


@functools.cache
def _key_and_value(word: str) -> tuple[str, Any]:
    override = OverridesParser.create().parse_override(word)
    return override.key_or_group, override.value()


def built(
    name: str, *words: str, network: tuple[str, ...] | None = None, rows: int = ROWS, size: ImageSize = SIDE
) -> Built:
    """method=name as configs/method has it, at the start of an epoch and with weights that are always the same.

    words: other values. network: the words of another backbone. rows: images of the batch. size: of these, in pixels.
    """
    scale = (
        () if name in ("frame_order", "masked_language") else tuple(f"dataset.scale.{k}={v}" for k, v in SCALE.items())
    )
    config = composed(f"method={name}", *scale, *(network or NETWORKS.get(name, RESNET)), *OWN.get(name, ()), *words)
    channels = 3 if name == "colorization" else 1
    preprocess = Preprocess(channels, size, min(height_width(size)), [0.5] * channels, [0.3] * channels)
    if name == "masked_language":
        preprocess, size = TextPreprocess(VOCABULARY, LENGTH, ""), LENGTH
    torch.manual_seed(0)
    backbone, teacher = build_backbone(config.backbone, preprocess), None
    if "teacher" in config.method:
        teacher = Teacher(build_backbone(composed(*RESNET).backbone, preprocess), {}, preprocess)
    facts = Facts(channels, size, IMAGES, 4, rows, steps_per_epoch=10, total_steps=100)
    method = build_method(config.method, backbone, facts, teacher).train()
    with torch.no_grad():
        method.start_epoch(0, Embedder((IMAGES, channels, *height_width(size))))
    return Built(config, method, noise(config, method, rows))


def noise(config: DictConfig, method: Method, rows: int, seed: int = 0) -> Batch:
    """Random images, frames or tokens, always the same, and the views that the configuration makes of them by a seed."""
    index = torch.arange(rows)
    key, generator = Key(seed, 0, index), torch.Generator().manual_seed(0)
    if method.modality == TEXTS:
        ids = torch.randint(4, VOCABULARY, (1, rows, LENGTH), generator=generator)
        ids[..., 0] = CLS
        return Batch({"tokens": ids}, index % 4, index, key)
    if method.modality == VIDEOS:
        shape = (1, rows, config.dataset.frames, method.facts.channels, SIDE, SIDE)
        return Batch({"frames": torch.rand(shape, generator=generator)}, index % 4, index, key)
    size = method.facts.image_size
    pixels = torch.randint(0, 256, (rows, method.facts.channels, *height_width(size)), generator=generator)
    settings = OmegaConf.to_container(config.augmentation, resolve=True)
    views = ViewMaker(settings, size, ("saturation", "hue", "grayscale"), patch_size_of(method.backbone.network))
    return Batch(views(pixels.to(torch.uint8), key), index % 4, index, key)


# --- Runs of every method that takes images, by sslctl pretrain: see tests.runs ---

SMALL = (
    *(f"dataset.scale.{name}={width}" for name, width in {"head_dim": 16, "prototypes": 20, "tile_dim": 8}.items()),
    *("dataset.scale.code_dim=8", "dataset.scale.decoder_dim=16", "dataset.scale.decoder_depth=1"),
    *("dataset.scale.local_views=2", "dataset.scale.tiled_view=5", "dataset.scale.paired_view=5"),
)
SMALLER_VIT = ("backbone=small_vit", "backbone.kwargs.patch_size=2", "backbone.kwargs.embed_dim=16")
SMALLER_VIT += ("backbone.kwargs.depth=1", "backbone.kwargs.num_heads=2")
# In so small a network neighbours hardly differ, and the gradient of KoLeo divides by their distance.
_DINOV2 = (
    "method.koleo_weight=0.01",
    "method.bottleneck_dim=8",
    "method.patch_prototypes=12",
    "method.freeze_epochs=0.4",
)
JOINT_EMBEDDING = {
    "moco_v3": (),
    "nnclr": ("method.queue_size=600",),
    "dcl": (),
    "supcon": (),
    "byol": (),
    "simsiam": ("method.predictor_dim=8",),
    "dino": (
        *("method.bottleneck_dim=8", "method.freeze_epochs=0.4", "method.teacher_temperature_warmup_epochs=1"),
        *(
            "optimizer.base_lr=5e-4",
            "method.teacher_temperature_start=0.04",
            "method.teacher_temperature=0.07",
        ),  # the paper's
    ),
    "swav": ("method.queue_size=512", "method.queue_epochs=0.6", "method.freeze_epochs=0.4"),
    "barlow_twins": (),
    "vicreg": (),
    "wmse": ("method.whitening_size=128", "method.draws=2"),  # of 64 rows a covariance multiplies a rounding by more
    "lejepa": ("method.slices=32",),
    "cpc": ("method.grid=3", "method.reach=2", "method.context_blocks=1"),
    "ibot": (*SMALLER_VIT, "method.bottleneck_dim=8", "method.freeze_epochs=0.4"),
    "dinov2": (*SMALLER_VIT, *_DINOV2),
    "dinov2-centred": (*SMALLER_VIT, *_DINOV2, "method.centered=true"),
    "dinov3": (  # of 10 steps: anchored from 4 on, in full from 5 on, the Gram teacher taken after 2 and 7
        *(
            *SMALLER_VIT,
            *_DINOV2,
            "augmentation.gram.size=1.25",
            "method.gram_teacher_from=0.2",
            "method.gram_start=0.4",
        ),
        *("method.gram_ramp=0.1", "method.gram_refresh=0.3", "method.gram_refreshes=1"),
    ),
    "deepcluster_v2": ("method.heads=2",),
    "msn": (*SMALLER_VIT, "method.drop_ratio=0.5"),
    "seed": ("method.queue_size=600",),
    "compress": ("method.memory_size=600",),
    "compress-1q": ("method.memory_size=600", "method.variant=1q", "backbone.widths=[4,12]"),  # as wide as the teacher
    "distill": ("method.queue_size=600",),
    "dcl-w": ("method.sigma=0.5",),
}
SINGLE_VIEW = {
    "diet": (),
    "rotation": (),
    "relative_patch": (),
    "jigsaw": ("method.permutations=8",),
    "autoencoder": ("method.noise_std=0.2", "method.hidden=0.25", "method.hidden_size=2"),
    "vae": ("method.beta_warmup_epochs=1",),
    "colorization": ("method.hidden_dim=8", "method.resolution=0.5"),
    "inpainting": ("method.hole=blobs", "method.adversarial=0.001"),
    "mae": SMALLER_VIT,
    "simmim": (*SMALLER_VIT, "method.mask_size=2"),
    "ijepa": SMALLER_VIT,
}
METHODS = JOINT_EMBEDDING | SINGLE_VIEW
DISTILLED = ("seed", "compress", "compress-1q", "distill")


@functools.cache
def teacher_run() -> Path:
    """A finished run that others learn from."""
    words = (*SIMCLR, "scheduler.warmup_epochs=0", "trainer.epochs=1", "backbone.widths=[4,12]")
    return finish(_temporary_folder() / "teacher", *words)


@functools.cache
def coloured_images() -> Path:
    """120 images, of which about 96 are for training: noise in colour."""
    return image_folder(_temporary_folder() / "images", 120)


def _temporary_folder() -> Path:
    """A folder that goes with this process."""
    folder = Path(tempfile.mkdtemp())
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def words_of(name: str) -> tuple[str, ...]:
    """The overrides of a tiny run of a method of the table, its teacher or its coloured images among them."""
    words = (f"method={name.partition('-')[0]}", "scheduler.warmup_epochs=1", *METHODS[name])
    if name == "colorization":
        data = ("dataset=imagefolder", f"dataset.root={coloured_images()}", "dataset.image_size=16")
        return (*data, "trainer.batch_size=16", *words)
    return (*words, *SMALL, *((f"method.teacher={teacher_run()}",) if name in DISTILLED else ()))


# --- Networks that say what they are told ---


def tell(module: nn.Module, *outputs: Tensor) -> None:
    """Makes a network say the given outputs, one call after the other and then again, whatever goes in."""
    printed = cycle(outputs)
    module.register_forward_hook(lambda *_: next(printed))


def silence(module: nn.Module) -> None:
    """Makes a network's outputs 0, and with them every similarity and every logit: its last layer has no weights left."""
    last = [layer for layer in module.modules() if isinstance(layer, nn.Linear | nn.Conv2d)][-1]
    with torch.no_grad():
        for parameter in last.parameters():
            parameter.zero_()


PREFIX = 1  # of built's vision transformers


def entrance(method: Method) -> nn.Module:
    """What takes the visible part: a vision transformer's blocks, a text's embedding, or the backbone."""
    network = method.backbone.network
    if hasattr(network, "model"):
        return network.model.blocks
    return getattr(network, "embedding", method.backbone)


def inputs_of(module: nn.Module) -> list[Tensor]:
    """Fills with a module's inputs, one a forward."""
    seen = []
    module.register_forward_pre_hook(lambda module, args: seen.append(args[0].detach().clone()))
    return seen


def step_of(method: Method, batch: Batch) -> dict:
    return method(batch, method.schedules(0))
