"""Masked language modelling: the words that are not there (BERT, Devlin et al. 2019, arXiv:1810.04805)."""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sslctl.data.modality import TEXTS
from sslctl.data.text import MASK, SPECIAL
from sslctl.methods.base import Batch, Facts, Method, feature_std, gather
from sslctl.models.backbones import Backbone
from sslctl.ops.text_image import GREY, RIGHT, WRONG, Word, equally_high, written

AS_MASK, AS_IT_IS = 0.8, 0.1  # the rest becomes a random token (section 3.1)
WIDTH = 420  # pixels of a text that is shown


class MaskedLanguage(Method):
    """Section 3.1, task 1. Positions are drawn anew in every epoch; the output layer is the embedding's table, and a bias."""

    batch_coupling = None
    modality = TEXTS

    def __init__(self, backbone: Backbone, facts: Facts, *, mask_ratio: float):
        super().__init__(backbone, facts)
        network = backbone.network
        if not hasattr(network, "embedding"):
            raise ValueError("masked_language takes texts: dataset=text and backbone=small_transformer")
        self.hidden = min(max(1, round(mask_ratio * (facts.image_size - 1))), facts.image_size - 1)
        if not 0 < mask_ratio < 1:
            raise ValueError(f"method.mask_ratio={mask_ratio}: expected more than 0 and less than 1")
        dim = backbone.embed_dim
        self.transform = nn.Sequential(nn.Linear(dim, dim), nn.GELU(), nn.LayerNorm(dim))
        self.bias = nn.Parameter(torch.zeros(network.vocabulary))

    def training_step(self, batch: Batch, schedules: dict) -> dict:
        ids = batch.views["tokens"][0]  # (B, L)
        shown, place = self.masked(ids, batch)  # (B, L), (B, n)
        tokens = self.backbone.network.tokens(shown)  # (B, L, D)
        logits = self.token_logits(
            tokens.take_along_dim(place[..., None], 1)
        ).float()  # (B, n, V), hidden positions only
        wanted = ids.gather(1, place)  # (B, n)
        loss = F.cross_entropy(logits.flatten(0, 1), wanted.flatten())
        hits = (logits.argmax(2) == wanted).float().mean()
        return {
            "loss": gather(loss[None]).mean(),
            "accuracy": gather(hits[None]).mean(),
            "feature_std": feature_std(tokens.mean(1)),
        }

    def masked(self, ids: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        """What the network reads (B, L), and the positions it is asked for (B, n), never [CLS]."""
        key, count, length = batch.key, self.hidden, ids.shape[1]
        place = 1 + key.permutation("masked_language/place", length - 1)[:, :count]
        what = key.uniform("masked_language/what", count)
        ordinary = self.backbone.network.vocabulary - len(SPECIAL)
        other = len(SPECIAL) + (key.uniform("masked_language/token", count) * ordinary).long()
        shown = torch.where(what < AS_MASK, torch.full_like(other, MASK), ids.gather(1, place))
        shown = torch.where(what >= AS_MASK + AS_IT_IS, other, shown)
        return ids.scatter(1, place, shown), place

    def token_logits(self, tokens: Tensor) -> Tensor:
        """(…, D) -> (…, V)."""
        return F.linear(self.transform(tokens), self.backbone.network.embedding.weight, self.bias)

    def pictures(self, batch: Batch) -> dict[str, Tensor]:
        """Each text as it is read, what is asked for on grey, and as the network completes it."""
        ids = batch.views["tokens"][0]
        read, place = self.masked(ids, batch)
        tokens = self.backbone.network.tokens(read).take_along_dim(place[..., None], 1)
        filled = ids.scatter(1, place, self.token_logits(tokens).argmax(2))  # (B, L)
        is_masked = torch.zeros_like(ids, dtype=torch.bool).scatter(1, place, True)
        spelt = batch.targets.get("spelt") or [f"{i} " for i in range(self.backbone.network.vocabulary)]
        question, answer = [], []
        for one in zip(ids.tolist(), read.tolist(), filled.tolist(), is_masked.tolist(), strict=True):
            rows = list(zip(*one, strict=True))[1:]  # without [CLS]
            question.append([Word(spelt[seen], GREY if hidden else None) for _, seen, _, hidden in rows])
            answer.append([word for true, _, guess, hidden in rows for word in completed(spelt, true, guess, hidden)])
        pictures = equally_high([written(words, WIDTH) for words in question + answer])
        return {
            "as it is read, the words that are asked for on grey": torch.stack(pictures[: len(ids)]),
            "as the network completes it: right on blue, wrong on orange, and the true word after it in brackets": (
                torch.stack(pictures[len(ids) :])
            ),
        }

    def uninformative_loss(self) -> float:
        return math.log(self.backbone.network.vocabulary)

    def notes(self) -> list[str]:
        blind = math.log(self.backbone.network.vocabulary)
        return [f"{self.hidden} of {self.facts.image_size} tokens are asked for; chance is a loss of {blind:.3f}"]


def completed(spelt: Sequence[str], true: int, guess: int, hidden: bool) -> list[Word]:
    """A token as it is shown: as it was where it was not asked for, else the guess, and the truth beside it if that is other."""
    if not hidden:
        return [Word(spelt[true])]
    if guess == true:
        return [Word(spelt[guess], RIGHT)]
    return [Word(spelt[guess], WRONG), Word(f"[{spelt[true].strip()}]")]
