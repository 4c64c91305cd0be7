"""Steps of MAE, SimMIM and I-JEPA beside steps written from their papers."""

from functools import partial

import pytest
import torch

from sslctl.methods.ijepa import IJEPA
from sslctl.methods.mae import MAE
from sslctl.methods.simmim import SimMIM
from tests.steps.compare import ROWS, TOTAL_STEPS, batch_of, compare, disturbed, facts, spread
from tests.steps.transformers import (
    MEAN,
    PREFIX,
    STD,
    embedded,
    encoded,
    pixels,
    sines,
    transformer,
    vision_transformer,
)


def of_mean(its, x):
    """Features: the mean of the patches, of which none is hidden, and the backbone's own."""
    return {"mean": encoded(its.backbone, embedded(its.backbone, x))[:, PREFIX:].mean(1), "backbone": its.backbone(x)}


def hidden_of(key, name, count, visible):
    """(B, count) bool: all but the first places of a random order."""
    hidden = torch.ones(ROWS, count, dtype=torch.bool)
    for b, order in enumerate(key.permutation(name, count)):
        hidden[b, order[:visible]] = False
    return hidden


def positions_are_fixed(backbone, rows):
    """Sines and cosines (appendix A.1 of MAE), 0 for the class token, which nothing trains."""
    positions = backbone.network.model.pos_embed
    assert not positions.requires_grad
    torch.testing.assert_close(positions[0], torch.cat([torch.zeros(PREFIX, 8), sines(8, rows)]).float())


# --- MAE ---


def reference_mae(its, batch, step, update, normalize):
    """Section 3: of 16 patches int(16·0.3) = 4 are encoded; the decoder sees them and mask tokens, all with their places."""
    x = batch.views["global"][0]
    hidden = hidden_of(batch.key, "mae", 16, 4)
    visible = [(~image).nonzero()[:, 0].tolist() for image in hidden]
    h = encoded(its.backbone, embedded(its.backbone, x), visible)
    loss = 0
    for b, z in enumerate(its.embed(h)):
        full = its.mask_token.expand(16, -1).clone()
        for place, token in zip(visible[b], z[PREFIX:], strict=True):
            full[place] = token
        full = torch.cat([z[:PREFIX], full + sines(8, 4)])[None]
        predicted = its.head(its.decoder(full))[0, PREFIX:]
        target = pixels((x[b : b + 1] - MEAN) / STD)[0]
        if normalize:
            target = (target - target.mean(1, keepdim=True)) / (target.var(1, keepdim=True) + 1e-6).sqrt()
        loss = loss + ((predicted - target) ** 2).mean(1)[hidden[b]].mean() / ROWS
    update(loss)
    return {"feature_std": spread(h[:, PREFIX:].mean(1))}


@pytest.mark.parametrize("normalize", [True, False])
def test_mae_steps_as_its_paper(normalize):
    settings = {"mask_ratio": 0.7, "decoder_dim": 8, "decoder_depth": 2, "decoder_heads": 4}
    method = MAE(vision_transformer(8), facts(), normalize_target=normalize, **settings)
    assert method.mask_token.numel() == 8
    positions_are_fixed(method.backbone, 4)
    batches = [batch_of(step, views=1) for step in (3, 4)]
    reference = partial(reference_mae, normalize=normalize)
    networks = {"decoder": transformer}
    compare(disturbed(method), reference, batches, networks=networks, first_step=3, features=of_mean)


# --- SimMIM ---


def reference_simmim(its, batch, step, update):
    """Section 3: of 16 squares of 2×2 patches ceil(16·0.52) = 9 are the mask token to all layers, and drawn by the last."""
    x = batch.views["global"][0]
    squares = hidden_of(batch.key, "simmim", 16, 7)
    hidden = torch.stack([squares[:, row // 2 * 4 + column // 2] for row in range(8) for column in range(8)], 1)
    h = encoded(its.backbone, torch.where(hidden[..., None], its.mask_token, embedded(its.backbone, x)))[:, PREFIX:]
    error = (h @ its.head.weight.T + its.head.bias - pixels((x - MEAN) / STD)).abs()
    plain = ("backbone.network.model.cls_token", "backbone.network.model.pos_embed")  # no weight decay: official code
    update(error[hidden].sum() / hidden.sum() / 12, decays=dict.fromkeys(plain, 0.0))
    return {"feature_std": spread(h.mean(1))}


def test_simmim_steps_as_its_paper():
    method = disturbed(SimMIM(vision_transformer(16), facts(image_size=16), mask_ratio=0.52, mask_size=4))
    assert method.mask_token.numel() == 8
    batches = [batch_of(step, views=1, side=16) for step in (3, 4)]
    compare(method, reference_simmim, batches, first_step=3, features=of_mean)


# --- I-JEPA ---


def blocks(key, name, count, rows, height, width):
    """Blocks drawn in a grid of rows × rows: for each image the places that each block has, row by row."""
    top = (key.uniform(f"ijepa/{name}/top", count) * (rows - height + 1)).long()
    left = (key.uniform(f"ijepa/{name}/left", count) * (rows - width + 1)).long()
    inside = [rows * row + column for row in range(height) for column in range(width)]
    return [[[first + place for place in inside] for first in image] for image in (rows * top + left).tolist()]


def blocks_of(batch, rows):
    """Section 3 and official code: the places of each image's four targets, and of its context, as many in each image."""
    first = batch.key.of(batch.index[:1])
    scale, aspect, whole = (float(first.uniform(f"ijepa/{name}")) for name in ("scale", "aspect", "context"))
    area, ratio = rows**2 * (0.15 + 0.05 * scale), 0.75 * 2**aspect
    targets = blocks(batch.key, "target", 4, rows, round((area * ratio) ** 0.5), round((area / ratio) ** 0.5))
    side = round((rows**2 * (0.85 + 0.15 * whole)) ** 0.5)
    contexts = [
        [place for place in block if not any(place in target for target in image)]
        for (block,), image in zip(blocks(batch.key, "block", 1, rows, side, side), targets, strict=True)
    ]
    fewest = min(len(context) for context in contexts)
    return targets, [context[:fewest] for context in contexts]


def reference_ijepa(its, batch, step, update):
    """Section 3, with the smooth L1 distance to normalised tokens of the official code; each target is predicted alone."""
    x, (targets, contexts) = batch.views["global"][0], blocks_of(batch, 8)
    h = encoded(its.backbone, embedded(its.backbone, x), contexts)[:, PREFIX:]
    with torch.no_grad():
        tokens = encoded(its.teacher_backbone, embedded(its.teacher_backbone, x))[:, PREFIX:]
        variance, mean = torch.var_mean(tokens, 2, unbiased=False, keepdim=True)
        normalized = (tokens - mean) / (variance + 1e-5).sqrt()
    losses, position = [], sines(8, 8)
    for b, image in enumerate(targets):
        context = its.embed(h[b]) + position[contexts[b]]
        for target in image:
            z = its.predictor(torch.cat([context, its.mask_token + position[target]])[None])[0, len(context) :]
            distance = (its.head(z) - normalized[b, target]).abs()
            losses.append(torch.where(distance < 1, distance**2 / 2, distance - 0.5).mean())
    update(sum(losses) / len(losses))
    momentum = 0.6 + (0.9 - 0.6) * step / TOTAL_STEPS
    with torch.no_grad():
        for theta_t, theta_s in zip(its.teacher_backbone.parameters(), its.backbone.parameters(), strict=True):
            theta_t.copy_(momentum * theta_t + (1 - momentum) * theta_s)
    return {"target_std": tokens.mean(1).std(0).mean(), "feature_std": spread(h.mean(1))}


def means_of_patches(its, x):
    networks = {"teacher": its.teacher_backbone, "mean": its.backbone}
    return {name: encoded(network, embedded(network, x))[:, PREFIX:].mean(1) for name, network in networks.items()}


def test_ijepa_steps_as_its_paper():
    settings = {"targets": 4, "predictor_dim": 8, "predictor_depth": 2, "predictor_heads": 4}
    settings |= {"initial_std": 0.02, "teacher_momentum": 0.6, "teacher_momentum_end": 0.9}
    method = IJEPA(vision_transformer(16), facts(image_size=16), **settings)
    assert method.mask_token.numel() == 8
    positions_are_fixed(method.backbone, 8)
    positions_are_fixed(method.teacher_backbone, 8)
    batches = [batch_of(step, views=1, side=16) for step in (13, 14, 15)]
    networks = {"predictor": transformer}
    compare(disturbed(method), reference_ijepa, batches, networks=networks, first_step=13, features=means_of_patches)


def test_ijepa_draws_blocks_as_its_paper():
    """In a finer grid, where roundings hide less."""
    sizes = {"targets": 4, "predictor_dim": 8, "predictor_depth": 2, "predictor_heads": 4}
    sizes |= {"initial_std": None}
    method = IJEPA(
        vision_transformer(32), facts(image_size=32), teacher_momentum=1.0, teacher_momentum_end=1.0, **sizes
    )
    for step in range(20):
        batch = batch_of(step, views=1, side=32)
        context, targets = method.patches(batch, batch.views["global"][0])
        assert (targets.tolist(), context.tolist()) == blocks_of(batch, 16)
