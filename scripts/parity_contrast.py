"""Contrast and a teacher's targets beside official code: MoCo v1 to v3, SimSiam, BYOL, SupCon, DCL."""

from functools import partial
from types import SimpleNamespace
from typing import Any

import numpy
import torch
import torch.nn.functional as F
from parity_harness import Comparison, Side, Sides, copy_weights, shake
from parity_networks import (
    EPSILON,
    ROWS,
    SIDE,
    Encoder,
    Without,
    batch,
    convolutional,
    descend,
    facts,
    global_views,
    leave_out,
    of_loss,
    optimizer_of,
    ours,
    settings,
    sgd,
    trainable,
    transformer,
)
from parity_official import Official, absent
from parity_self_supervised import of_self_supervised
from torch import Tensor, nn

from sslctl.losses import dcl
from sslctl.methods.byol import BYOL
from sslctl.methods.moco import MoCo
from sslctl.methods.moco_v3 import MoCoV3
from sslctl.methods.simsiam import SimSiam
from sslctl.methods.supcon import SupCon

LR, DECAY, HIDDEN, DIM = 0.05, 1e-3, 16, 8


# --- A queue, a teacher ---


def moco(official: Official, mlp: bool) -> Sides:
    method = MoCo(
        convolutional(), facts(), projector_layers=2 if mlp else 1, hidden_dim=None, out_dim=DIM, queue_size=32, temperature=0.2,
        teacher_momentum=0.99, teacher_momentum_end=0.99, symmetric=False, batchnorm_groups=1,
    )  # fmt: skip
    shake(method.teacher_backbone, method.teacher_projector)
    method.queue_pointer.fill_(8)
    builder = official.load("moco", "moco.builder")
    model = builder.MoCo(
        lambda num_classes: Encoder(convolutional(), num_classes), dim=DIM, K=32, m=0.99, T=0.2, mlp=mlp
    )
    query, key = model.encoder_q, model.encoder_k
    copy_weights([method.backbone, method.projector], [query.backbone, query.fc])
    copy_weights([method.teacher_backbone, method.teacher_projector], [key.backbone, key.fc])
    model.queue.copy_(method.queue.T)
    model.queue_ptr.copy_(method.queue_pointer)
    optimizer = sgd(model.encoder_q.parameters(), LR, DECAY)
    own = ours(
        method, optimizer_of(method, "sgd", lr=LR, weight_decay=DECAY, exclude=False), batch,
        [method.backbone, method.projector], [method.teacher_backbone, method.teacher_projector],
        lambda: {"queue": method.queue, "pointer": method.queue_pointer.view(1)},
    )  # fmt: skip
    other = Side(
        lambda step: descend(optimizer, F.cross_entropy(*model(*global_views(step)))),
        [query.backbone, query.fc], [key.backbone, key.fc], lambda: {"queue": model.queue.T, "pointer": model.queue_ptr},
    )  # fmt: skip
    return own, other


def moco_v3(official: Official, vit: bool) -> Sides:
    method = MoCoV3(
        transformer() if vit else convolutional(), facts(), projector_layers=3 if vit else 2, hidden_dim=HIDDEN, out_dim=DIM,
        predictor_norm=vit, freeze_patches=vit, temperature=0.2, teacher_momentum=0.9, teacher_momentum_end=1.0,
    ).double()  # fmt: skip
    shake(method.teacher_projector)
    builder = official.load("moco-v3", "moco.builder")
    script = official.load("moco-v3", "main_moco", absent("vits", "torch.utils.tensorboard"))
    if vit:
        network = partial(transformer_of_moco_v3(official), stop_grad_conv1=True)
        model = builder.MoCo_ViT(network, dim=DIM, mlp_dim=HIDDEN, T=0.2).double()
        student, slow = [model.base_encoder, model.predictor], [model.momentum_encoder]
        optimizer = torch.optim.AdamW(model.parameters(), lr=LR / 10, weight_decay=DECAY, eps=EPSILON)
        kind, lr = "adamw", LR / 10
    else:
        model = builder.MoCo_ResNet(
            lambda num_classes: Encoder(convolutional(), num_classes), dim=DIM, mlp_dim=HIDDEN, T=0.2
        )
        student, slow = [model.base_encoder, model.predictor], [model.momentum_encoder]
        optimizer, kind, lr = (
            script.moco.optimizer.LARS(model.parameters(), LR, weight_decay=DECAY, momentum=0.9),
            "lars",
            LR,
        )
    trained, teacher = (
        [method.backbone, method.projector, method.predictor],
        [method.teacher_backbone, method.teacher_projector],
    )
    copy_weights(trained, student)
    copy_weights(teacher, slow)
    arguments = settings(epochs=10, moco_m=0.9)

    def step(number: int) -> Tensor:
        momentum = script.adjust_moco_momentum(number / 10, arguments)
        images = [method.backbone.normalize(x) if vit else x for x in global_views(number)]
        return descend(optimizer, model(*images, momentum))

    own = optimizer_of(method, kind, lr=lr, weight_decay=DECAY, exclude=not vit)
    return ours(method, own, batch, trained, teacher), Side(step, student, slow)


def transformer_of_moco_v3(official: Official) -> Any:
    """Their network for small images, which wants timm's names of 2021."""
    from timm import layers
    from timm.models import vision_transformer as timm

    class Older(timm.VisionTransformer):
        num_tokens = 1

    older = SimpleNamespace(VisionTransformer=Older, _cfg=timm._cfg)
    stubs = {
        "timm.models.vision_transformer": older,
        "timm.models.layers": layers,
        "timm.models.layers.helpers": layers.helpers,
    }
    vits = official.load("moco-v3", "vits", stubs)
    norm = partial(nn.LayerNorm, eps=1e-6)
    return partial(
        vits.VisionTransformerMoCo, img_size=SIDE, patch_size=4, embed_dim=16, depth=2, num_heads=2, norm_layer=norm
    )


# --- No queue ---


def simsiam(official: Official) -> Sides:
    method = SimSiam(
        convolutional(),
        facts(),
        projector_layers=3,
        hidden_dim=None,
        out_dim=DIM,
        predictor_dim=4,
        constant_predictor_lr=True,
    ).double()
    builder = official.load("simsiam", "simsiam.builder")
    model = builder.SimSiam(
        lambda num_classes, zero_init_residual: Encoder(convolutional(), num_classes), dim=DIM, pred_dim=4
    )
    leave_out(model.encoder.fc[6].bias)
    trained, parts = (
        [method.backbone, method.projector, method.predictor],
        [model.encoder.backbone, model.encoder.fc, model.predictor],
    )
    copy_weights(trained, trainable(*parts))
    optimizer, cosine = sgd(model.parameters(), LR, DECAY), nn.CosineSimilarity(dim=1)

    def step(number: int) -> Tensor:
        p1, p2, z1, z2 = model(*global_views(number))
        return descend(optimizer, -(cosine(p1, z2).mean() + cosine(p2, z1).mean()) / 2)

    own = optimizer_of(method, "sgd", lr=LR, weight_decay=DECAY, exclude=False)
    return ours(method, own, batch, trained), Side(step, parts)


def byol_method() -> BYOL:
    torch.manual_seed(1)
    method = BYOL(
        convolutional(), facts(), hidden_dim=HIDDEN, out_dim=DIM, teacher_momentum=0.9, teacher_momentum_end=1.0
    )
    shake(method.teacher_backbone, method.teacher_projector)
    return method.double()


def byol(official: Official) -> Sides:
    method = byol_method()
    configuration = settings(
        arch="", dataset="", knn=5, num_samples=2, eval_head=False, emb=DIM, head_layers=2, head_size=HIDDEN
    )
    vars(configuration).update(add_bn=True, byol_tau=0.9, norm=True)
    model = of_self_supervised(official, "byol", "BYOL")(configuration)
    leave_out(model.head[-1].bias, model.head_t[-1].bias, model.pred[-1].bias)
    trained, parts = [method.backbone, method.projector, method.predictor], [model.model, model.head, model.pred]
    teacher, slow = (
        [method.teacher_backbone, method.teacher_projector],
        [model.model_t, Without(model.head_t, "3.bias")],
    )
    copy_weights(trained, trainable(*parts))
    copy_weights(teacher, slow)
    optimizer = sgd(trainable(model), LR, DECAY)

    def step(number: int) -> Tensor:
        loss = descend(optimizer, model(list(global_views(number))))
        model.step(number / 100)
        return loss

    own = optimizer_of(method, "sgd", lr=LR, weight_decay=DECAY, exclude=False)
    return ours(method, own, batch, trained, teacher), Side(step, parts, slow)


def byol_loss(official: Official) -> Sides:
    """DeepMind's loss and momentum, which need nothing of JAX but numpy's functions."""
    method = byol_method()
    jax = SimpleNamespace(numpy=numpy, lax=SimpleNamespace(rsqrt=lambda x: 1 / numpy.sqrt(x)))
    stubs = {"jax": jax, "jax.numpy": numpy, **absent("absl", "absl.logging")}
    helpers = official.load("deepmind", "byol.utils.helpers", stubs)
    schedules = official.load("deepmind", "byol.utils.schedules", stubs)

    def own(number: int) -> Tensor:
        return method.training_step(batch(number), {})["loss"]

    def other(number: int) -> Tensor:
        with torch.no_grad():
            online = [method.projector(method.backbone(x)) for x in global_views(number)]
            p1, p2 = (method.predictor(z).numpy() for z in online)
            t1, t2 = (method.teacher_projector(method.teacher_backbone(x)).numpy() for x in global_views(number))
        return torch.tensor((helpers.regression_loss(p1, t2) + helpers.regression_loss(p2, t1)).mean())

    momenta = [method.schedules(step)["teacher_momentum"] for step in range(0, 101, 20)]
    theirs = [float(schedules.target_ema(numpy.float64(step), 0.9, 100)) for step in range(0, 101, 20)]
    return (
        Side(own, [], state=lambda: {"momenta": torch.tensor(momenta)}),
        Side(other, [], state=lambda: {"momenta": torch.tensor(theirs)}),
    )


# --- Labels, losses ---


def supcon(official: Official) -> Sides:
    method = SupCon(convolutional(), facts(), hidden_dim=None, out_dim=DIM, temperature=0.1).double()
    networks = official.load("supcontrast", "networks.resnet_big")
    networks.model_dict["tiny"] = [convolutional, 12]
    model = networks.SupConResNet(name="tiny", feat_dim=DIM)
    criterion = official.load("supcontrast", "losses").SupConLoss(temperature=0.1)
    trained, parts = [method.backbone, method.projector], [model.encoder, model.head]
    copy_weights(trained, parts)
    optimizer = sgd(model.parameters(), LR, DECAY)

    def step(number: int) -> Tensor:
        data = batch(number)
        z = model(data.views["global"].flatten(0, 1)).unflatten(0, (2, ROWS))
        return descend(optimizer, criterion(z.transpose(0, 1), data.label))

    own = optimizer_of(method, "sgd", lr=LR, weight_decay=DECAY, exclude=False)
    return ours(method, own, batch, trained), Side(step, parts)


def dcl_loss(official: Official, sigma: float | None) -> Sides:
    loss = official.load("dcl", "loss.dcl")
    way = loss.DCL(temperature=0.1) if sigma is None else loss.DCLW(sigma=sigma, temperature=0.1)
    generator = torch.Generator().manual_seed(3)
    z = [torch.randn(ROWS, DIM, generator=generator, dtype=torch.float64) for _ in range(2)]

    def both(z1: Tensor, z2: Tensor) -> Tensor:
        z1, z2 = F.normalize(z1, dim=1), F.normalize(z2, dim=1)
        return (way(z1, z2) + way(z2, z1)) / 2

    return of_loss(lambda z1, z2: dcl(z1, z2, 0.1, sigma), *z), of_loss(both, *z)


CONTRAST = [
    *(
        Comparison(
            name, "moco", "`moco.builder.MoCo`", partial(moco, mlp=mlp), 6, remark="one group of BatchNorm; SGD"
        )
        for name, mlp in (("MoCo v1", False), ("MoCo v2", True))
    ),
    Comparison(
        "MoCo v3, ResNet", "moco-v3", "`MoCo_ResNet`, its `LARS`, `adjust_moco_momentum`", partial(moco_v3, vit=False)
    ),
    Comparison(
        "MoCo v3, ViT", "moco-v3", "`vits.VisionTransformerMoCo`, `MoCo_ViT`, `adjust_moco_momentum`", partial(moco_v3, vit=True),
        remark="AdamW on biases and norms too, as theirs; initial weights copied, positions with them: theirs tell rows first",
    ),
    Comparison(
        "SimSiam", "simsiam", "`simsiam.builder.SimSiam`", simsiam,
        remark="SGD; their unused bias before the last BatchNorm left out",
    ),
    Comparison(
        "BYOL", "self-supervised", "`methods.byol.BYOL`", byol,
        remark="DeepMind's code is JAX, this is htdt's; last biases, which DeepMind's lacks, frozen at 0; SGD",
    ),
    Comparison(
        "BYOL, loss and momentum", "deepmind", "`helpers.regression_loss`, `schedules.target_ema`", byol_loss, 3,
        remark="numpy in JAX's place, so without gradients",
    ),
    Comparison("SupCon", "supcontrast", "`SupConResNet`, `SupConLoss`", supcon, remark="SGD"),
    Comparison("DCL, loss", "dcl", "`loss.dcl.DCL`", partial(dcl_loss, sigma=None), 0),
    Comparison(
        "DCLW, loss", "dcl", "`loss.dcl.DCLW`", partial(dcl_loss, sigma=0.5), 0,
        reason="that code lets the gradient through the weights of the positives; ours, and lightly's, does not",
    ),
]  # fmt: skip
