"""Prototypes beside official code: SwAV and DeepCluster-v2, by their own training loops, and MSN."""

from functools import partial
from types import ModuleType
from typing import Any
from unittest.mock import MagicMock

import torch
from parity_crops import CROPS, crops, images, their_transformer
from parity_harness import Comparison, Side, Sides, copy_weights, shake
from parity_networks import (
    EPSILON,
    MEAN,
    PATCH,
    ROWS,
    SIDE,
    STD,
    Without,
    batch,
    descend,
    facts,
    optimizer_of,
    ours,
    settings,
    sgd,
    transformer,
)
from parity_official import Official, absent, drawing
from torch import Tensor, nn

from sslctl.methods.deepcluster_v2 import DeepClusterV2
from sslctl.methods.msn import MSN
from sslctl.methods.swav import SwAV
from sslctl.models.backbones import Backbone
from sslctl.random import Key

LR, DECAY, HIDDEN, DIM, PROTOTYPES = 0.02, 1e-2, 16, 8, 10


# --- SwAV, DeepCluster-v2: theirs has torchvision's network, written anew, and its head and prototypes in one class ---


class _ResNet(nn.Module):
    """torchvision's residual network of one block a stage."""

    embed_dim = 512

    def __init__(self) -> None:
        super().__init__()
        from torchvision.models.resnet import BasicBlock, ResNet

        torch.manual_seed(0)
        self.model = ResNet(BasicBlock, [1, 1, 1, 1])
        self.model.fc = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x)


def residual() -> Backbone:
    return Backbone(_ResNet(), MEAN, STD).double()


def of_swav(
    official: Official, module: str, prototypes: int | list[int], **arguments: Any
) -> tuple[ModuleType, nn.Module]:
    """A script of the repository with the arguments it would have parsed, and its network."""
    stubs = absent("apex", "apex.parallel", "apex.parallel.LARC", "pandas")
    script = official.load("swav", module, stubs)
    network = official.load("swav", "src.resnet50")
    script.args = settings(
        rank=0, world_size=1, nmb_crops=[2, 3], crops_for_assign=[0, 1], feat_dim=DIM, temperature=0.1, **arguments
    )
    script.logger = MagicMock()
    model = network.ResNet(
        network.BasicBlock, [1, 1, 1, 1], normalize=True, hidden_mlp=HIDDEN, output_dim=DIM, nmb_prototypes=prototypes
    )
    return script, model


def descending(model: nn.Module) -> torch.optim.SGD:
    optimizer = sgd(model.parameters(), LR, DECAY)
    optimizer.optim = optimizer  # where LARC, which wraps it, keeps it for the log
    return optimizer


def swav(official: Official) -> Sides:
    method = SwAV(
        residual(), facts(steps_per_epoch=1), hidden_dim=HIDDEN, out_dim=DIM, prototypes=PROTOTYPES, temperature=0.1,
        epsilon=0.05, sinkhorn_iterations=3, queue_size=2 * ROWS, queue_epochs=1, freeze_epochs=2,
    ).double()  # fmt: skip
    script, model = of_swav(
        official,
        "main_swav",
        PROTOTYPES,
        epsilon=0.05,
        sinkhorn_iterations=3,
        freeze_prototypes_niters=2,
        use_fp16=False,
    )
    trained = [method.backbone, method.projector, method.prototypes]
    copy_weights(trained, [model])
    optimizer, queue = descending(model), [None]

    def step(number: int) -> Tensor:
        if number == 1:
            queue[0] = torch.zeros(2, 2 * ROWS, DIM)
        loader = [images(crops(number), method.backbone)]
        (_, loss), queue[0] = script.train(loader, nn.DataParallel(model), optimizer, number, [LR] * 100, queue[0])
        return torch.tensor(loss)

    own = ours(
        method, optimizer_of(method, "sgd", lr=LR, weight_decay=DECAY, exclude=False), crops, trained,
        state=lambda: {"queue": method.queue},
    )  # fmt: skip
    return own, Side(
        step, [model], state=lambda: {"queue": torch.zeros(2, 2 * ROWS, DIM) if queue[0] is None else queue[0]}
    )


def deepcluster_v2(official: Official) -> Sides:
    """A step here is an epoch of two: clustering, then the batches in the order of the data."""
    count, heads = 2 * ROWS, 3
    method = DeepClusterV2(
        residual(), facts(num_images=count, steps_per_epoch=2), hidden_dim=HIDDEN, out_dim=DIM, prototypes=4, heads=heads,
        temperature=0.1, kmeans_iterations=10,
    ).double()  # fmt: skip
    memory = torch.nn.functional.normalize(
        torch.randn(2, count, DIM, generator=torch.Generator().manual_seed(5)), dim=2
    )
    method.memory.copy_(memory)
    script, model = of_swav(
        official, "main_deepclusterv2", [4] * heads, nmb_prototypes=[4] * heads, freeze_prototypes_niters=1000
    )
    trained = [method.backbone, method.projector]
    parts = [Without(model, "prototypes0.weight", "prototypes1.weight", "prototypes2.weight")]
    copy_weights(trained, parts)
    optimizer, bank = descending(model), [torch.arange(count), memory.clone()]
    batches = partial(batch, sizes=CROPS, images=count)
    own = ours(method, optimizer_of(method, "sgd", lr=LR, weight_decay=DECAY, exclude=False), batches, trained)

    class Loader(list):
        dataset = range(count)

    def mine(epoch: int) -> Tensor:
        method.start_epoch(epoch + 1, MagicMock())  # the first epoch's memory is given
        return torch.stack([own.step(2 * epoch + part).detach() for part in range(2)]).mean()

    def theirs(epoch: int) -> Tensor:
        data = [batches(2 * epoch + part) for part in range(2)]
        loader = Loader((d.index, images(d, method.backbone)) for d in data)
        orders = [Key(0, epoch + 1, torch.arange(count)).bits(f"deepcluster/{head}").argsort() for head in range(heads)]
        with drawing("randperm", *orders):
            (_, loss), *bank[:] = script.train(loader, nn.DataParallel(model), optimizer, epoch, [LR] * 100, *bank)
        return torch.tensor(loss)

    weights = [getattr(model.prototypes, f"prototypes{head}").weight for head in range(heads)]
    return (
        Side(mine, trained, state=lambda: {"memory": method.memory, "centroids": method.centroids}),
        Side(theirs, [Without(model, "prototypes0.weight", "prototypes1.weight", "prototypes2.weight")],
             state=lambda: {"memory": bank[1], "centroids": torch.stack([*weights])}),
    )  # fmt: skip


# --- MSN ---


def msn(official: Official) -> Sides:
    method = MSN(
        transformer(), facts(), hidden_dim=HIDDEN, out_dim=DIM, prototypes=PROTOTYPES, drop_ratio=0.25, temperature=0.1,
        target_temperature=0.25, sinkhorn_iterations=3, entropy_weight=2.0, teacher_momentum=0.9, momentum_stretch=1.25,
    ).double()  # fmt: skip
    shake(method.teacher_backbone, method.teacher_projector)
    script = official.load("msn", "src.msn_train", absent("src.data_manager"))
    linear, norm = nn.Linear, nn.BatchNorm1d
    networks = [their_transformer(script.deit) for _ in range(2)]
    for network in networks:
        network.fc = nn.Sequential(
            linear(16, HIDDEN),
            norm(HIDDEN),
            nn.GELU(),
            linear(HIDDEN, HIDDEN),
            norm(HIDDEN),
            nn.GELU(),
            linear(HIDDEN, DIM),
        )
    network, target = networks
    target.requires_grad_(False)
    table = nn.Parameter(torch.empty(PROTOTYPES, DIM))
    trained, teachers = (
        [method.backbone, method.projector, method.prototypes],
        [method.teacher_backbone, method.teacher_projector],
    )
    copy_weights(trained, [network, table])
    copy_weights(teachers, [target])
    loss = script.init_msn_loss(num_views=4, tau=0.1, me_max=True, return_preds=True)
    _, optimizer, *_ = script.init_opt(network, 10, LR / 10, LR / 10, 1, 10, prototypes=table)
    for group in optimizer.param_groups:
        group["lr"], group["eps"] = LR / 10, EPSILON
        group["weight_decay"] = 0.0 if group.get("WD_exclude") else DECAY
    momenta = [0.9 + (1 - 0.9) / (100 * 1.25) * step for step in range(100)]

    def step(number: int) -> Tensor:
        data = crops(number)
        goal, *seen = images(data, method.backbone)
        kept = method.kept(data)
        rest = torch.tensor(sorted(set(range((SIDE // PATCH) ** 2)) - set(kept.tolist())))
        with drawing("randperm", torch.cat([kept, rest])):
            _, z = network(seen, return_before_head=True, patch_drop=0.25)
        with torch.no_grad():
            h, _ = target(goal, return_before_head=True)
        cross, entropy, *_ = loss(z, h, table, torch.eye(PROTOTYPES), T=0.25, use_sinkhorn=True)
        value = descend(optimizer, cross + 2.0 * entropy)
        with torch.no_grad():
            for p, q in zip(target.parameters(), network.parameters(), strict=True):
                p.mul_(momenta[number]).add_(q, alpha=1 - momenta[number])
        return value

    own = optimizer_of(method, "adamw", lr=LR / 10, weight_decay=DECAY)
    return ours(method, own, crops, trained, teachers), Side(step, [network, table], [target])


CLUSTERS = [
    Comparison(
        "SwAV", "swav", "`src.resnet50.ResNet`, `main_swav.train`, `distributed_sinkhorn`", swav, 7,
        remark="frozen prototypes, then a queue that fills, then one in use; SGD in place of apex's LARC",
    ),
    Comparison(
        "DeepCluster-v2", "swav", "`src.resnet50.ResNet`, `main_deepclusterv2.train`, `cluster_memory`", deepcluster_v2, 3,
        remark="epochs of two steps, each after a clustering; the memory before the first given; SGD in place of apex's LARC",
    ),
    Comparison(
        "MSN", "msn", "`deit.VisionTransformer`, `init_msn_loss`, `init_opt`", msn, 6,
        remark="loop in our words, without clipping; our dropped patches; positions of focal views as timm has them; AdamW",
    ),
]  # fmt: skip
