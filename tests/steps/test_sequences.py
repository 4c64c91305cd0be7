"""Steps of the frames' order and of masked language modelling beside steps written from their papers."""

import itertools
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from sslctl.data.batch import Batch
from sslctl.methods.frame_order import FrameOrder
from sslctl.methods.masked_language import MaskedLanguage
from sslctl.models.backbones import Backbone
from sslctl.models.text_transformer import SmallTransformer
from sslctl.random import Key
from tests.steps.compare import ROWS, backbone, compare, disturbed, facts, spread

FRAMES, SIZE = 6, 20


def cross_entropy(logits, label):
    """Its mean over rows, and how often the largest logit is the right one."""
    hits = (logits.max(1).indices == label).double().mean()
    return -logits.log_softmax(1)[torch.arange(len(label)), label].mean(), hits


# --- Frames ---


def videos(step):
    """Six frames of each video, all different."""
    generator = torch.Generator().manual_seed(step)
    frames = torch.rand(1, ROWS, FRAMES, 3, SIZE, SIZE, generator=generator)
    index = torch.randperm(60, generator=generator)[:ROWS]
    return Batch({"frames": frames}, index % 4, index, Key(0, 1, index))


def reference_verification(its, batch, step, update):
    """Misra et al., section 3: (b, c, d) or (d, c, b) of frames a < b < c < d < e; three of four tuples have a or e for c."""
    key, shown, label = batch.key, [], []
    wrong, early, backwards = (key.uniform(f"frame_order/{name}") for name in ("wrong", "early", "backwards"))
    for b, video in enumerate(batch.views["frames"][0]):
        order = [2, (0 if early[b] < 0.5 else 5) if wrong[b] < 0.75 else 3, 4]
        shown += [video[order[::-1] if backwards[b] < 0.5 else order]]
        label += [0 if wrong[b] < 0.75 else 1]
    h = its.backbone(torch.cat(shown)).view(ROWS, 3, -1)
    loss, hits = cross_entropy(its.classifier(h.reshape(ROWS, -1)), torch.tensor(label))
    update(loss)
    assert 0 < sum(label) < ROWS
    return {"accuracy": hits, "feature_std": spread(h[:, 0])}


def order_settings(**changes):
    settings = {"frames": FRAMES, "hidden_dim": 9, "channel_splitting": True, "jitter": 0.1, "dropout": 0.3}
    return settings | changes


def test_frame_order_verification_steps_as_its_paper():
    method = disturbed(FrameOrder(backbone(), facts(), task="verification", **order_settings()))
    head = nn.Sequential(nn.Linear(21, 9, bias=False), nn.BatchNorm1d(9), nn.ReLU(), nn.Linear(9, 2))
    batches = [videos(step) for step in (3, 4)]
    compare(method, reference_verification, batches, networks={"classifier": lambda: head}, first_step=3)


def reference_order(its, batch, step, update, splitting, dropout):
    """Lee et al., section 3: four frames in one of 12 orders, each at most 2 of 20 pixels off its middle, one channel each."""
    key, orders = batch.key, [order for order in itertools.permutations(range(4)) if order[0] < order[3]]
    label, backwards = (12 * key.uniform("frame_order/order")).long(), key.uniform("frame_order/backwards")
    corner, channel = key.uniform("frame_order/jitter", 4, 2), key.uniform("frame_order/channel", 4)
    shown = []
    for b, video in enumerate(batch.views["frames"][0]):
        taken = sorted(key.permutation("frame_order/taken", FRAMES)[b, :4].tolist())
        places = [taken[place] for place in orders[label[b]]]
        for t, place in enumerate(reversed(places) if backwards[b] < 0.5 else places):
            top, left = (int(5 * u) for u in corner[b, t])
            frame = F.interpolate(
                video[place, None, :, top : top + 16, left : left + 16], (SIZE, SIZE), mode="bilinear"
            )
            one = int(3 * channel[b, t])
            shown.append(frame[:, one : one + 1].expand(-1, 3, -1, -1) if splitting else frame)
    h = its.backbone(torch.cat(shown)).view(ROWS, 4, -1)
    pairs = torch.stack([torch.cat([h[:, i], h[:, j]], 1) for i in range(4) for j in range(i + 1, 4)], 1)
    z = F.dropout(its.pair_head(pairs.flatten(0, 1)).relu().view(ROWS, 6, -1), dropout)
    loss, hits = cross_entropy(z.flatten(1) @ its.classifier.weight.T + its.classifier.bias, label)
    update(loss)
    return {"accuracy": hits, "feature_std": spread(h[:, 0])}


@pytest.mark.parametrize(("splitting", "dropout", "ranks"), [(True, 0.3, 1), (False, 0.0, 2)])
def test_frame_order_of_four_steps_as_its_paper(splitting, dropout, ranks):
    settings = order_settings(channel_splitting=splitting, dropout=dropout)
    method = disturbed(FrameOrder(backbone(), facts(), task="order", **settings))
    networks = {"pair_head": lambda: nn.Sequential(nn.Linear(14, 9, bias=False), nn.BatchNorm1d(9))}
    reference, batches = (
        partial(reference_order, splitting=splitting, dropout=dropout),
        [videos(step) for step in (3, 4)],
    )
    compare(method, reference, batches, networks=networks, first_step=3, ranks=ranks)


# --- Words ---

VOCABULARY, LENGTH, CLS, MASK, FIRST = 20, 12, 2, 3, 4
TEXTS = 12


def texts(step):
    generator = torch.Generator().manual_seed(step)
    ids = torch.randint(FIRST, VOCABULARY, (1, TEXTS, LENGTH), generator=generator)
    ids[..., 0] = CLS
    index = torch.randperm(60, generator=generator)[:TEXTS]
    return Batch({"tokens": ids}, index % 4, index, Key(0, 1, index))


def reference_masked_language(its, batch, step, update):
    """Section 3.1: of the 11 tokens after [CLS] round(0.3·11) = 3 are asked for, 80 % of them hidden, 10 % changed."""
    key, ids, network = batch.key, batch.views["tokens"][0], its.backbone.network
    what, other = key.uniform("masked_language/what", 3), key.uniform("masked_language/token", 3)
    shown, asked, kinds = ids.clone(), [], []
    for b, order in enumerate(key.permutation("masked_language/place", LENGTH - 1)):
        for n, place in enumerate(order[:3] + 1):
            kinds.append("hidden" if what[b, n] < 0.8 else "as it is" if what[b, n] < 0.9 else "changed")
            if kinds[-1] != "as it is":
                shown[b, place] = MASK if kinds[-1] == "hidden" else FIRST + int(other[b, n] * (VOCABULARY - FIRST))
            asked.append((b, int(place)))
    rows, places = torch.tensor(asked).T
    tokens = network.encoder(network.embedding.weight[shown] + network.positions)
    logits = its.transform(tokens[rows, places]) @ network.embedding.weight.T + its.bias
    loss, hits = cross_entropy(logits, ids[rows, places])
    update(loss)
    assert set(kinds) == {"hidden", "as it is", "changed"}
    return {"accuracy": hits, "feature_std": spread(tokens.mean(1))}


def test_masked_language_steps_as_its_paper():
    torch.manual_seed(0)
    network = Backbone(SmallTransformer(8, 2, 2, 0.0, VOCABULARY, LENGTH))
    method = disturbed(MaskedLanguage(network, facts(channels=1, image_size=LENGTH), mask_ratio=0.3))
    assert method.bias.shape == (VOCABULARY,)
    networks = {"transform": lambda: nn.Sequential(nn.Linear(8, 8), nn.GELU(), nn.LayerNorm(8))}
    compare(method, reference_masked_language, [texts(step) for step in (3, 4)], networks=networks, first_step=3)
