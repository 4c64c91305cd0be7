"""Steps of SwAV, DeepCluster-v2 and MSN beside steps written from their papers."""

import copy
from functools import partial

import pytest
import torch
from torch import nn

from sslctl.methods.deepcluster_v2 import DeepClusterV2
from sslctl.methods.msn import MSN
from sslctl.methods.swav import SwAV
from sslctl.random import Key
from tests.steps.compare import (
    IMAGES,
    ROWS,
    TOTAL_STEPS,
    backbone,
    batch_of,
    compare,
    disturbed,
    facts,
    float64,
    of_projector,
    spread,
    unit,
    units,
)
from tests.steps.transformers import embedded, encoded, of_tokens, vision_transformer


def projector():
    """SwAV, section 3.3 and official code: Linear, BatchNorm, ReLU, Linear."""
    return nn.Sequential(nn.Linear(7, 9), nn.BatchNorm1d(9), nn.ReLU(), nn.Linear(9, 5))


def projected(its, batch):
    """Features of each crop, one forward for each size, and their projections, one for all: (B, D) each, global views first."""
    h = torch.cat([its.backbone(torch.cat([*views])) for views in batch.views.values()])
    return h.split(ROWS), its.projector(h).split(ROWS)


def balanced(q, iterations):
    """Sinkhorn's iterations as the official codes write them. q: (B, K), not negative."""
    q = q.T / q.sum()
    for _ in range(iterations):
        q = q / q.sum(1, keepdim=True) / len(q)
        q = q / q.sum(0, keepdim=True) / q.shape[1]
    return (q * q.shape[1]).T


def used(*assignments):
    """Which share of the prototypes is the first choice of some row; (B, K) each."""
    return len({int(row.argmax()) for q in assignments for row in q}) / assignments[0].shape[1]


# --- SwAV ---


def reference_swav(its, batch, step, update):
    """Algorithm 1, with a queue from step 12 on, used once it is full, and prototypes that stay before step 13."""
    size = its.queue.shape[1]
    queued = size > 0 and step >= 12
    prototypes = its.prototypes.weight
    with torch.no_grad():
        prototypes.copy_(unit(prototypes))
    h, z = projected(its, batch)
    z = [unit(crop) for crop in z]
    codes = []
    with torch.no_grad():
        for view in range(2):
            rows = torch.cat([z[view], its.queue[view]]) if queued and its.queue_filled >= size else z[view]
            codes.append(balanced((rows @ prototypes.T / 0.08).exp(), 2)[:ROWS])
    loss = 0
    for view, q in enumerate(codes):
        others = [crop for crop in range(len(z)) if crop != view]
        for crop in others:
            loss = loss - (q * (z[crop] @ prototypes.T / 0.2).log_softmax(1)).sum(1).mean() / len(others) / 2

    def frozen():
        if step < 13:
            prototypes.grad = None

    update(loss, after_backward=frozen)
    if queued:
        keys = torch.stack([z[0], z[1]]).detach()
        its.queue = torch.cat([keys, its.queue], 1)[:, :size]
        its.queue_filled = its.queue_filled + ROWS
    return {"prototypes_used": used(*codes), "feature_std": spread(h[0])}


@pytest.mark.parametrize(("size", "crops"), [(9, 3), (4, 1), (0, 0)])
def test_swav_steps_as_its_paper(size, crops):
    """Of the steps the queue of 9 takes no part in the first, is filled in the second, and used in the others."""
    settings = {"hidden_dim": 9, "out_dim": 5, "prototypes": 8, "temperature": 0.2, "epsilon": 0.08}
    settings |= {"sinkhorn_iterations": 2, "queue_size": size, "queue_epochs": 1.17, "freeze_epochs": 1.26}
    state = {"queue": units(2 * size, 5).view(2, size, 5), "queue_filled": torch.tensor(3)}
    method = disturbed(SwAV(backbone(), facts(), **settings), **state)
    networks = {"projector": projector, "prototypes": lambda: nn.Linear(5, 8, bias=False)}
    batches = [batch_of(step, crops=crops) for step in range(11, 15)]
    compare(method, reference_swav, batches, networks=networks, first_step=11, features=of_projector)


# --- DeepCluster-v2 ---

CLUSTERS = {"hidden_dim": 9, "out_dim": 5, "prototypes": 4, "heads": 3, "temperature": 0.2, "kmeans_iterations": 2}


def clustered():
    """The method in the middle of an epoch; nobody is in the last cluster of the last head."""
    assignments = torch.randint(3, (3, IMAGES), generator=torch.Generator().manual_seed(0))
    assignments[:2, ::7] = 3
    state = {"memory": units(2 * IMAGES, 5).view(2, IMAGES, 5), "centroids": units(12, 5, seed=1).view(3, 4, 5)}
    return disturbed(DeepClusterV2(backbone(), facts(), **CLUSTERS), assignments=assignments, **state)


def reference_deepcluster_v2(its, batch, step, update):
    """Appendix A: the mean over heads of each crop's cross entropy with its image's cluster; both global views are kept."""
    h, z = projected(its, batch)
    losses = []
    for head in range(3):
        for crop in z:
            log_p = (unit(crop) @ its.centroids[head].T / 0.2).log_softmax(1)
            losses += [-log_p[b, its.assignments[head, image]] for b, image in enumerate(batch.index)]
    update(sum(losses) / len(losses))
    for b, image in enumerate(batch.index):
        its.memory[:, image] = torch.stack([unit(z[0][b]), unit(z[1][b])]).detach()
    shares = [len(set(chosen.tolist())) / 4 for chosen in its.assignments]
    return {"prototypes_used": sum(shares) / 3, "feature_std": spread(h[0])}


def test_deepcluster_v2_steps_as_its_paper():
    batches = [batch_of(step, crops=2) for step in (13, 14)]
    compare(
        clustered(),
        reference_deepcluster_v2,
        batches,
        networks={"projector": projector},
        first_step=13,
        features=of_projector,
    )


@pytest.mark.parametrize("epoch", [0, 2])
def test_deepcluster_v2_begins_an_epoch_as_its_paper(epoch):
    """Spherical k-means of each head on one view's memory, which before the first epoch is the clean images' embeddings."""
    method = clustered()
    images, memory = torch.rand(IMAGES, 3, 8, 8).double(), method.memory.clone()
    asked = []

    def embed(function, *, calibrate=False):
        asked.append(calibrate)
        return function(images)

    with float64(), torch.no_grad():
        method.start_epoch(epoch, embed)
        if epoch == 0:
            memory = unit(method.projector(method.backbone(images))).expand(2, -1, -1)
    assert asked == [True] * (epoch == 0)
    torch.testing.assert_close(method.memory, memory)
    for head in range(3):
        rows = memory[head % 2]
        order = Key(0, epoch, torch.arange(IMAGES)).bits(f"deepcluster/{head}").argsort()
        centroids = rows[order[:4]]
        for _ in range(2):
            nearest = (rows @ centroids.T).max(1).indices
            centroids = torch.stack([unit(rows[nearest == k].sum(0)) for k in range(4)])
        torch.testing.assert_close(method.centroids[head], centroids)
        assert torch.equal(method.assignments[head], (rows @ centroids.T).max(1).indices)


# --- MSN ---


def reference_msn(its, batch, step, update, iterations, kept):
    """Section 3 and official code: an anchor that lacks patches, focal views that lack none, the target of a whole view."""
    prototypes = unit(its.prototypes.weight)
    order = batch.key.of(batch.index[:1]).permutation("msn/kept", 16)[0].tolist()
    h = encoded(its.backbone, embedded(its.backbone, batch.views["global"][1]), [order[:kept]] * ROWS)[:, 0]
    anchors = [its.projector(h)]
    if "local" in batch.views:
        anchors += its.projector(its.backbone(torch.cat([*batch.views["local"]]))).split(ROWS)
    p = [(unit(z) @ prototypes.T / 0.2).softmax(1) for z in anchors]
    with torch.no_grad():
        target = unit(its.teacher_projector(its.teacher_backbone(batch.views["global"][0])))
        sharp = (target @ prototypes.T / 0.2).softmax(1) ** (1 / 0.4)
        sharp = sharp / sharp.sum(1, keepdim=True)
        sharp = balanced(sharp, iterations) if iterations else sharp
    cross = sum(-(sharp * q.log()).sum(1).mean() for q in p) / len(p)
    mean = sum(q.mean(0) for q in p) / len(p)
    entropy = -(mean * mean.log()).sum()
    update(cross + 0.7 * (torch.tensor(8.0).log() - entropy), decays={"prototypes": 0.0})
    momentum = 0.6 + 0.4 * step / (1.5 * TOTAL_STEPS)
    with torch.no_grad():
        for slow, fast in ((its.teacher_backbone, its.backbone), (its.teacher_projector, its.projector)):
            for theta_t, theta_s in zip(slow.parameters(), fast.parameters(), strict=True):
                theta_t.copy_(momentum * theta_t + (1 - momentum) * theta_s)
    figures = {"teacher_entropy": -(sharp * sharp.log()).sum(1).mean(), "prototypes_used": used(sharp)}
    return figures | {"feature_std": spread(h)}


@pytest.mark.parametrize(("iterations", "drop_ratio", "kept", "crops"), [(3, 0.3, 11, 3), (0, 0.95, 1, 0)])
def test_msn_steps_as_its_paper(iterations, drop_ratio, kept, crops):
    settings = {"hidden_dim": 9, "out_dim": 5, "prototypes": 8, "drop_ratio": drop_ratio, "temperature": 0.2}
    settings |= {"target_temperature": 0.4, "entropy_weight": 0.7, "teacher_momentum": 0.6, "momentum_stretch": 1.5}
    method = disturbed(MSN(vision_transformer(8), facts(), sinkhorn_iterations=iterations, **settings))
    hidden = [nn.Linear(8, 9), nn.BatchNorm1d(9), nn.GELU(), nn.Linear(9, 9), nn.BatchNorm1d(9), nn.GELU()]
    networks = {"projector": lambda: nn.Sequential(*copy.deepcopy(hidden), nn.Linear(9, 5))}
    networks |= {"prototypes": lambda: nn.Linear(5, 8, bias=False)}
    batches = [batch_of(step, crops=crops) for step in (13, 14)]
    reference = partial(reference_msn, iterations=iterations, kept=kept)
    compare(method, reference, batches, networks=networks, first_step=13, features=of_tokens)
