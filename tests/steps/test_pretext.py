"""Steps of rotation, relative patches and jigsaw puzzles beside steps written from their papers."""

from functools import partial

import pytest
import torch
from torch import nn

from sslctl.methods.jigsaw import Jigsaw
from sslctl.methods.relative_patch import RelativePatch
from sslctl.methods.rotation import Rotation
from tests.steps.compare import ROWS, backbone, batch_of, compare, disturbed, facts, spread
from tests.steps.transformers import vision_transformer


def images(side, steps=2):
    """Batches of which only the first view counts."""
    return [batch_of(step, side=side) for step in range(3, 3 + steps)]


def cross_entropy(logits, label):
    """Its mean over rows, and how often the largest logit is the right one."""
    log_p = logits - logits.exp().sum(1, keepdim=True).log()
    hits = (logits.max(1).indices == label).double().mean()
    return -log_p[torch.arange(len(label)), label].mean(), hits


def crop(image, top, left, side):
    return image[:, top : top + side, left : left + side]


# --- Rotation ---


def reference_rotation(its, batch, step, update):
    """Section 3.1: K = 4 turns of each image; by 90 degrees is a transpose and a flip (footnote)."""
    x = batch.views["global"][0]
    turned = [x, x.transpose(2, 3).flip(2), x.flip(2).flip(3), x.transpose(2, 3).flip(3)]
    h = its.backbone(torch.cat(turned))
    label = torch.tensor([k for k in range(4) for _ in range(ROWS)])
    loss, hits = cross_entropy(h @ its.classifier.weight.T + its.classifier.bias, label)
    update(loss)
    return {"accuracy": hits, "feature_std": spread(h[:ROWS])}


def test_rotation_steps_as_its_paper():
    compare(disturbed(Rotation(backbone(), facts())), reference_rotation, images(8), first_step=3)


# --- Relative patches ---


def reference_relative_patch(its, batch, step, update, size, pitch, start):
    """Section 3 and 3.1. Patches of `size` pixels, `pitch` from one to the next, each up to one pixel off."""
    key, x = batch.key, batch.views["global"][0]
    channel, dropped = (key.uniform("relative_patch/channel") * 3).long(), key.uniform("relative_patch/drop") < 0.6
    noise = key.normal("relative_patch/noise", 3, 64, 64)
    top, left = ((key.uniform(f"relative_patch/{side}", 9) * 3).long() for side in ("top", "left"))
    patches = []
    for b, image in enumerate(x):
        alone = 0.5 + image[channel[b]].std() / 100 * noise[b]  # colour dropping
        alone[channel[b]] = image[channel[b]]
        for place in range(9):
            at = start + pitch * (place // 3) + top[b, place], start + pitch * (place % 3) + left[b, place]
            patches.append(crop(alone if dropped[b] else image, *at, size))
    h = its.backbone(torch.stack(patches)).view(ROWS, 9, -1)
    neighbours = [0, 1, 2, 3, 5, 6, 7, 8]  # label: which of them is the second patch as the first one sees it
    pairs = [torch.cat([h[:, 4], h[:, place]], 1) for place in neighbours]
    pairs += [torch.cat([h[:, place], h[:, 4]], 1) for place in neighbours]  # … which sees the other way
    label = torch.tensor([*range(8), *reversed(range(8))]).repeat_interleave(ROWS)
    loss, hits = cross_entropy(its.classifier(torch.cat(pairs)), label)
    update(loss)
    assert 0 < dropped.sum() < ROWS
    return {"accuracy": hits, "feature_std": spread(h[:, 4])}


@pytest.mark.parametrize(
    ("network", "size", "pitch", "start"),
    [
        (backbone, 15, 22, 1),  # 2·22 + 15 + 2·1 = 61 of 64 pixels; of 16 they would take 2·24 + 16 + 2·1 = 66
        (partial(vision_transformer, 16), 14, 21, 3),  # whose patches have 2 pixels
    ],
    ids=["convolutions", "transformer"],
)
def test_relative_patch_steps_as_its_paper(network, size, pitch, start):
    settings = {"hidden_dim": 9, "view_size": 2.0, "gap": 0.5, "jitter": 0.1, "colour_drop": 0.6}
    network = network()
    method = disturbed(RelativePatch(network, facts(image_size=32), **settings))
    layers = [nn.Linear(2 * network.embed_dim, 9, bias=False), nn.BatchNorm1d(9), nn.ReLU(), nn.Linear(9, 8)]
    reference = partial(reference_relative_patch, size=size, pitch=pitch, start=start)
    networks = {"classifier": lambda: nn.Sequential(*layers)}
    compare(method, reference, images(64), networks=networks, first_step=3)


# --- Jigsaw ---


def reference_jigsaw(its, batch, step, update, cell, size):
    """Section 3 at the official code's proportions: tiles of 64/85 of a cell. Tile order[j] stands at place j."""
    key, x = batch.key, batch.views["global"][0]
    label = (key.uniform("jigsaw/permutation") * 8).long()
    top, left = ((key.uniform(f"jigsaw/{side}", 9) * (cell - size + 1)).long() for side in ("top", "left"))
    tiles = []
    for b, image in enumerate(x):
        for place in its.table[label[b]].tolist():
            tile = crop(image, cell * (place // 3) + top[b, place], cell * (place % 3) + left[b, place], size)
            tiles.append((tile - tile.mean()) / (tile.std() + 1e-3))
    h = its.backbone.network(torch.stack(tiles))  # normalised as they are
    z = its.tile_head(h).view(ROWS, -1)
    loss, hits = cross_entropy(z @ its.classifier.weight.T + its.classifier.bias, label)
    update(loss)
    return {"accuracy": hits, "feature_std": spread(h.view(ROWS, 9, -1).mean(1))}


@pytest.mark.parametrize(
    ("network", "view", "cell", "size"),
    [(backbone, 48, 16, 12), (partial(vision_transformer, 16), 46, 15, 10)],
    ids=["convolutions", "transformer"],
)
def test_jigsaw_steps_as_its_paper(network, view, cell, size):
    network = network()
    method = disturbed(Jigsaw(network, facts(image_size=32), permutations=8, tile_dim=5, view_size=view / 32))
    layers = [nn.Linear(network.embed_dim, 5, bias=False), nn.BatchNorm1d(5), nn.ReLU()]
    reference = partial(reference_jigsaw, cell=cell, size=size)
    compare(method, reference, images(view), networks={"tile_head": lambda: nn.Sequential(*layers)}, first_step=3)
