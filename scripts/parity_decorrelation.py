"""Decorrelation and distillation beside official code: VICReg, Barlow Twins, W-MSE, LeJEPA, CompRess, SEED."""

import ast
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from parity_harness import Comparison, Side, Sides, copy_weights, shake
from parity_networks import (
    EPSILON,
    MEAN,
    ROWS,
    SIDE,
    STD,
    Encoder,
    batch,
    convolutional,
    descend,
    facts,
    global_views,
    optimizer_of,
    ours,
    settings,
    sgd,
)
from parity_official import Official, absent, drawing
from parity_self_supervised import of_self_supervised
from torch import Tensor, nn

from sslctl.data.batch import Batch
from sslctl.methods.barlow_twins import BarlowTwins
from sslctl.methods.compress import CompRess
from sslctl.methods.lejepa import LeJEPA
from sslctl.methods.seed import SEED
from sslctl.methods.vicreg import VICReg
from sslctl.methods.wmse import WMSE
from sslctl.models.backbones import Backbone, SmallResNet
from sslctl.models.preprocess import Preprocess
from sslctl.models.teacher import Teacher
from sslctl.random import Key

LR, DECAY, HIDDEN, DIM = 0.05, 1e-3, 16, 8


def vicreg(official: Official) -> Sides:
    method = VICReg(
        convolutional(), facts(), hidden_dim=HIDDEN, out_dim=DIM, invariance=25.0, variance=25.0, covariance=1.0
    ).double()
    script = official.load("vicreg", "main_vicreg")
    script.resnet.tiny = lambda zero_init_residual: (convolutional(), 12)
    weights = {"sim_coeff": 25.0, "std_coeff": 25.0, "cov_coeff": 1.0}
    model = script.VICReg(settings(mlp=f"{HIDDEN}-{HIDDEN}-{DIM}", arch="tiny", batch_size=ROWS, **weights))
    trained, parts = [method.backbone, method.projector], [model.backbone, model.projector]
    copy_weights(trained, parts)
    plain = script.exclude_bias_and_norm
    optimizer = script.LARS(
        model.parameters(), lr=LR, weight_decay=DECAY, weight_decay_filter=plain, lars_adaptation_filter=plain
    )
    own = optimizer_of(method, "lars", lr=LR, weight_decay=DECAY)
    return ours(method, own, batch, trained), Side(lambda step: descend(optimizer, model(*global_views(step))), parts)


def barlow_twins(official: Official) -> Sides:
    def wide() -> Backbone:  # the official code has a ResNet-50's width in its projector
        torch.manual_seed(0)
        network = nn.Sequential(SmallResNet([6, 12], 1, 1, "batch", 3, SIDE), nn.Linear(12, 2048))
        network.embed_dim = 2048
        return Backbone(network, MEAN, STD).double()

    method = BarlowTwins(
        wide(), facts(), projector_layers=3, hidden_dim=HIDDEN, out_dim=DIM, lambda_=0.0051, scale=1.0
    ).double()
    script = official.load("barlowtwins", "main")
    script.torchvision = SimpleNamespace(models=SimpleNamespace(resnet50=lambda zero_init_residual: Encoder(wide())))
    model = script.BarlowTwins(settings(projector=f"{HIDDEN}-{HIDDEN}-{DIM}", lambd=0.0051, batch_size=ROWS))
    trained, parts = [method.backbone, method.projector], [model.backbone, model.projector]
    copy_weights(trained, parts)
    groups = [{"params": [p for p in model.parameters() if (p.ndim == 1) == one]} for one in (False, True)]
    optimizer = script.LARS(groups, lr=LR, weight_decay=DECAY, weight_decay_filter=True, lars_adaptation_filter=True)
    optimizer.param_groups[1]["lr"] = LR * 0.024
    own = optimizer_of(method, "lars", lr=LR, weight_decay=DECAY, vector_lr_scale=0.024)
    return ours(method, own, batch, trained), Side(lambda step: descend(optimizer, model(*global_views(step))), parts)


def wmse(official: Official) -> Sides:
    rows, size, draws, dim = 16, 8, 2, 4
    method = WMSE(
        convolutional(), facts(batch_size=rows), hidden_dim=HIDDEN, out_dim=dim, whitening_size=size, draws=draws
    ).double()
    configuration = settings(
        arch="", dataset="", knn=5, num_samples=2, eval_head=False, emb=dim, head_layers=2, head_size=HIDDEN
    )
    vars(configuration).update(add_bn=True, w_eps=0.0, norm=True, w_iter=draws, w_size=size, bs=rows)
    model = of_self_supervised(official, "w_mse", "WMSE")(configuration)
    trained, parts = [method.backbone, method.projector], [model.model, model.head]
    copy_weights(trained, parts)
    optimizer = torch.optim.Adam(model.parameters(), lr=LR / 10, weight_decay=DECAY, eps=EPSILON)

    def step(number: int) -> Tensor:
        data = batch(number, rows=rows)
        orders = data.key.bits("wmse/parts", draws).argsort(dim=0)  # our parts of the batch
        with drawing("randperm", *orders.T):
            loss = model(list(data.views["global"]))
        return descend(optimizer, loss)

    own = optimizer_of(method, "adam", lr=LR / 10, weight_decay=DECAY, exclude=False)
    return ours(method, own, partial(batch, rows=rows), trained), Side(step, parts)


def lejepa(official: Official) -> Sides:
    """The class in the repository's MINIMAL.md, in the few lines of its loop."""
    method = LeJEPA(convolutional(), facts(), hidden_dim=HIDDEN, out_dim=DIM, slices=256, weight=0.02).double()
    text = (official.folder("lejepa") / "MINIMAL.md").read_text()
    regularizer = class_of_markdown(text, "SIGReg", official.folder("lejepa"))().double()
    backbone, head = convolutional(), official_mlp(12, [HIDDEN, HIDDEN, DIM])
    trained, parts = [method.backbone, method.projector], [backbone, head]
    copy_weights(trained, parts)
    optimizer = torch.optim.AdamW(
        [*backbone.parameters(), *head.parameters()], lr=LR / 10, weight_decay=DECAY, eps=EPSILON
    )

    def batches(number: int) -> Batch:
        data = batch(number, {"global": (4, SIDE)})
        return replace(data, key=_DoubleKey(0, number, data.index))

    def step(number: int) -> Tensor:
        data = batches(number)
        columns = data.key.of(data.index[:1]).normal("lejepa/slices", DIM, 256)[0]
        x = data.views["global"]
        z = head(backbone(x.flatten(0, 1))).unflatten(0, x.shape[:2])
        with drawing("randn", columns):
            gaussian = regularizer(z)
        return descend(optimizer, 0.02 * gaussian + 0.98 * (z.mean(0) - z).square().mean())

    own = optimizer_of(method, "adamw", lr=LR / 10, weight_decay=DECAY, exclude=False)
    return ours(method, own, batches, trained), Side(step, parts)


class _DoubleKey(Key):
    """Directions in double precision."""

    def normal(self, name: str, *shape: int) -> Tensor:
        return super().normal(name, *shape).double()

    def of(self, index: Tensor) -> Key:
        return _DoubleKey(self.seed, self.epoch, index)


def official_mlp(width: int, widths: list[int]) -> nn.Module:
    from torchvision.ops import MLP

    return MLP(width, widths, norm_layer=nn.BatchNorm1d)


def class_of_markdown(text: str, name: str, where: Path) -> type:
    """Executes one class of a document's Python blocks. Raises ValueError where there is none."""
    for block in text.split("```python")[1:]:
        for node in ast.parse(block.partition("```")[0]).body:
            if isinstance(node, ast.ClassDef) and node.name == name:
                scope = {"torch": torch, "nn": nn, "F": F}
                exec(compile(ast.Module([node], []), str(where), "exec"), scope)
                return scope[name]
    raise ValueError(f"no class {name} in the Python blocks under {where}")


def teacher() -> Teacher:
    return Teacher(convolutional(3), {}, Preprocess(3, SIDE, SIDE, MEAN, STD))


def seed(official: Official) -> Sides:
    method = SEED(
        convolutional(), facts(), teacher=teacher(), queue_size=32, student_temperature=0.2, teacher_temperature=0.07
    ).double()
    method.queue_pointer.fill_(8)
    builder = official.load("seed", "seed.builder")
    criterion = official.load("seed", "tools.utils", absent("tools.logger")).soft_cross_entropy
    width = method.teacher.embed_dim
    model = builder.SEED(
        lambda num_classes: Encoder(convolutional(), num_classes), lambda **_: method.teacher.network,
        dim=width, K=32, t=0.2, temp=0.07, mlp=True, dist=False, stu="",
    )  # fmt: skip
    trained, parts = [method.backbone, method.projector], [model.student.backbone, model.student.fc]
    copy_weights(trained, parts)
    model.queue.copy_(method.queue.T)
    model.queue_ptr.copy_(method.queue_pointer)
    optimizer = sgd(model.student.parameters(), LR, DECAY)
    own = ours(
        method, optimizer_of(method, "sgd", lr=LR, weight_decay=DECAY, exclude=False), batch, trained,
        state=lambda: {"queue": method.queue, "pointer": method.queue_pointer.view(1)},
    )  # fmt: skip
    other = Side(
        lambda step: descend(optimizer, criterion(*model(batch(step).views["global"][0]))), parts,
        state=lambda: {"queue": model.queue.T, "pointer": model.queue_ptr},
    )  # fmt: skip
    return own, other


def compress(official: Official, variant: str) -> Sides:
    own_teacher, memory, temperature = teacher(), 24, 0.04
    method = CompRess(
        convolutional(),
        facts(),
        teacher=own_teacher,
        variant=variant,
        memory_size=memory,
        temperature=temperature,
        key_momentum=0.9,
    ).double()
    losses = official.load("compress", "nn.compress_loss")
    backbone, key = convolutional(), convolutional().requires_grad_(False)
    momentum = variant == "2q"
    loss = (
        losses.CompReSSMomentum(12, 12, memory, temperature) if momentum else losses.CompReSSA(12, memory, temperature)
    )
    loss.teacher_sample_similarities.memory.copy_(method.teacher_memory)
    if momentum:
        shake(method.key_backbone)
        copy_weights([method.key_backbone], [key])
        loss.student_sample_similarities.memory.copy_(method.student_memory)
    optimizer = sgd(backbone.parameters(), LR, DECAY)

    def step(number: int) -> Tensor:
        x = batch(number).views["global"][0]
        with torch.no_grad():
            features = [own_teacher(x), *([key(x)] if momentum else [])]
        value = descend(optimizer, loss(features[0], backbone(x), *features[1:]))
        if momentum:
            for p, q in zip(key.parameters(), backbone.parameters(), strict=True):
                p.data.mul_(0.9).add_(q.data, alpha=1 - 0.9)
        return value

    def state(of: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name: memory for name, memory in of.items() if momentum or name == "teacher"}

    own = ours(
        method, optimizer_of(method, "sgd", lr=LR, weight_decay=DECAY, exclude=False), batch, [method.backbone],
        [method.key_backbone] if momentum else [],
        lambda: state({"teacher": method.teacher_memory, "student": getattr(method, "student_memory", None)}),
    )  # fmt: skip
    other = Side(
        step, [backbone], [key] if momentum else [],
        lambda: state({"teacher": loss.teacher_sample_similarities.memory,
                       "student": loss.student_sample_similarities.memory if momentum else None}),
    )  # fmt: skip
    return own, other


DECORRELATION = [
    Comparison("VICReg", "vicreg", "`main_vicreg.VICReg`, its `LARS`", vicreg),
    Comparison("Barlow Twins", "barlowtwins", "`main.BarlowTwins`, its `LARS` with two rates", barlow_twins),
    Comparison("W-MSE", "self-supervised", "`methods.w_mse.WMSE`", wmse, remark="our draws of parts; Adam"),
    Comparison(
        "LeJEPA", "lejepa", "`SIGReg` of MINIMAL.md", lejepa, tolerance=1e-6,
        remark="loop in our words, our random directions; their window is fp32; AdamW",
    ),
    Comparison("CompRess 2q", "compress", "`CompReSSMomentum`", partial(compress, variant="2q"), remark="loop in our words; SGD"),
    Comparison("CompRess 1q", "compress", "`CompReSSA`", partial(compress, variant="1q"), remark="loop in our words; SGD"),
    Comparison(
        "SEED", "seed", "`seed.builder.SEED`, `soft_cross_entropy`", seed, 6, remark="a teacher without a head; SGD"
    ),
]  # fmt: skip
