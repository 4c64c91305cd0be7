"""What the runs of small_benchmark.py are: three tables, in each a common recipe, and what a method has instead.

Chosen on training images (the online kNN), never on the test split. A name is a method's, with its variant behind a hyphen.
"""

from dataclasses import dataclass

SEEDS = (0, 1, 2)
NAMED = ("simclr", "moco", "byol", "simsiam", "swav", "vicreg", "diet", "distill")  # with three seeds
_COMMON = (
    *("backbone=small_resnet", "trainer.batch_size=64", "trainer.epochs=1", "trainer.threads=1", "trainer.device=cpu"),
    *("trainer.tensorboard=false", "evaluation.closing=false", "evaluation.knn_every_epochs=null"),
)
_SGD = ("optimizer=sgd", "optimizer.base_lr=0.12", "optimizer.weight_decay=5e-4", "scheduler.warmup_epochs=0.05")
_ADAMW = ("optimizer=adamw", "optimizer.lr_scaling=none", "optimizer.base_lr=1e-3", "scheduler.warmup_epochs=0.05")
_VIT = ("backbone=small_vit", *_ADAMW)
_CROPS = ("augmentation.global.scale=[0.2,1.0]",)  # of the area; 0.08 loses small clothes
_MOCO = (*_SGD, *_CROPS, "method.temperature=0.1", "method.batchnorm_groups=1", "method.queue_size=4096")
_DINO = ("augmentation=byol", "method.head_norm=true", "method.clip_grad=null")  # two views, lightly's way
_DINO += ("method.teacher_temperature_start=0.04", "method.teacher_temperature=0.04")
_LARGER = ("augmentation.local.scale=[0.3,1.0]", "dataset.scale.local_views=2", "method.teacher_momentum=0.95")
_MSN = (*_LARGER, "method.entropy_weight=5")
_IBOT = (*_LARGER, "augmentation.global.scale=[0.4,1.0]", "method.patch_weight=0.2")
_TEACHER = ("method.teacher={folder}/moco-s0", *_SGD)  # of the same table

_FASHION = {
    "simclr": (*_SGD, *_CROPS, "method.temperature=0.2"),
    "moco": _MOCO,
    "moco_v1": _MOCO,
    "moco_v2plus": _MOCO,
    "moco_v3": (*_SGD, *_CROPS, "method.temperature=0.2"),
    "nnclr": (*_SGD, *_CROPS),
    "dcl": (*_SGD, *_CROPS),
    "cpc": (*_ADAMW,),
    "diet": (*_ADAMW, *_CROPS),
    "byol": (*_SGD, *_CROPS),
    "simsiam": (*_ADAMW, *_CROPS),
    "dino": (*_SGD, *_CROPS, *_DINO),
    "ibot": (*_VIT, *_IBOT),
    "dinov2": (*_VIT, *_IBOT),
    "dinov3": (*_VIT, *_IBOT),
    "swav": (*_ADAMW, *_CROPS, "method.epsilon=0.02"),
    "deepcluster_v2": (*_SGD, *_CROPS),
    "msn": (*_VIT, *_MSN),
    "barlow_twins": (*_ADAMW, *_CROPS),
    "vicreg": (*_SGD, *_CROPS),
    "wmse": (*_ADAMW, "method.whitening_size=64", "method.out_dim=32"),
    "lejepa": (*_ADAMW,),
    "seed": _TEACHER,
    "compress": _TEACHER,
    "distill": ("method.teacher={folder}/moco-s0", *_ADAMW, *_CROPS),
    "rotation": _SGD,
    "relative_patch": (*_SGD, "augmentation.global.scale=[0.8,1.0]"),
    "jigsaw": _SGD,
    "autoencoder": _ADAMW,
    "vae": _ADAMW,
    "inpainting": _ADAMW,
    "mae": _VIT,
    "simmim": _VIT,
    "ijepa": _VIT,
    "supcon": (*_SGD, *_CROPS, "method.temperature=0.1"),
    "supervised": (*_SGD,),
}

_FAMILIES = {
    "contrastive": ("simclr", "moco", "moco_v1", "moco_v2plus", "moco_v3", "nnclr", "dcl", "cpc", "diet"),
    "self-distillation": ("byol", "simsiam", "dino", "ibot", "dinov2", "dinov3"),
    "clustering": ("swav", "deepcluster_v2", "msn"),
    "decorrelation": ("barlow_twins", "vicreg", "wmse", "lejepa"),
    "distillation of the table's MoCo": ("seed", "compress", "distill"),
    "pretext": ("rotation", "relative_patch", "jigsaw"),
    "reconstruction": ("autoencoder", "vae", "inpainting"),
    "masked": ("mae", "simmim", "ijepa"),
    "from labels": ("supcon", "supervised"),
}


_COLOUR = {
    "moco": _MOCO,
    "colorization": _ADAMW,
    "colorization-regression": (*_ADAMW, "method.form=regression"),
}
_VIDEOS = ("dataset.root={videos}", "backbone.widths=[16,32]", "augmentation.global.flip=0", *_ADAMW)
_SEQUENCES = {
    "frame_order": (*_VIDEOS, "trainer.epochs=60"),
    "frame_order-order": (*_VIDEOS, "trainer.epochs=60", "method.task=order"),
    "masked_language": (
        *("dataset.root={texts}", "backbone=small_transformer", "backbone.embed_dim=64", "dataset.vocabulary=600"),
        *("dataset.length=32", "trainer.epochs=80", "trainer.batch_size=64", "scheduler.warmup_epochs=2"),
    ),
}


@dataclass(frozen=True)
class Table:
    """common: overrides of every run. random: the runs whose random weights are rows, in words. pixels: the same.

    fine_tuned: runs that are fine-tuned on a draw of 1 % of the labels too, beside the same network from scratch.
    """

    common: tuple[str, ...]
    recipes: dict[str, tuple[str, ...]]
    families: dict[str, tuple[str, ...]]
    columns: tuple[str, ...]
    random: dict[str, str]
    pixels: str | None
    epoch: int | None  # images
    fine_tuned: tuple[str, ...] = ()


_COLUMNS = ("kNN", "linear", "5 labels a class", "feature std", "images/s", "MiB")
_TUNED = ("1 % fine-tuned", "1 % from scratch")
_OWN = ("own task", "chance", "kNN", "random weights, kNN", "linear", "random weights, linear", "MiB")
TABLES = {
    "fashion_mnist": Table(
        common=(*_COMMON, "dataset=fashion_mnist", "trainer.log_every_steps=50"),
        recipes=_FASHION,
        families=_FAMILIES,
        columns=(*_COLUMNS[:3], *_TUNED, *_COLUMNS[3:]),
        random={"moco": "small_resnet", "ibot": "small_vit, class token", "mae": "small_vit, mean of the patches"},
        pixels="moco",
        epoch=60_000,
        fine_tuned=("mae", "simmim", "ijepa"),
    ),
    "cifar10": Table(
        common=(*_COMMON, "dataset=cifar10", "dataset.root={root}", "trainer.log_every_steps=50"),
        recipes=_COLOUR,
        families={"colour": ("colorization", "colorization-regression"), "contrastive, for comparison": ("moco",)},
        columns=_COLUMNS,
        random={"moco": "small_resnet, in colour", "colorization": "small_resnet, of the lightness"},
        pixels="moco",
        epoch=50_000,
    ),
    "sequences": Table(
        common=(*_COMMON, "trainer.batch_size=32", "scheduler.warmup_epochs=0", "trainer.log_every_steps=5"),
        recipes=_SEQUENCES,
        families={"videos": ("frame_order", "frame_order-order"), "texts": ("masked_language",)},
        columns=_OWN,
        random={},
        pixels=None,
        epoch=None,
    ),
}
