"""The order of a video's frames: is it right, or which is it?

Shuffle and Learn (Misra et al. 2016, arXiv:1603.08561); OPN (Lee et al. 2017, arXiv:1708.01246).
"""

import itertools
import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sslctl.data.modality import VIDEOS
from sslctl.methods.base import Batch, Facts, Method, feature_std, gather
from sslctl.models.backbones import Backbone
from sslctl.models.heads import mlp
from sslctl.ops.text_image import card
from sslctl.ops.tiles import cut_tiles
from sslctl.transfer import to_device

NEGATIVES = 0.75  # share of tuples in the wrong order (Shuffle and Learn, section 4.1)
ORDERS = tuple(
    order for order in itertools.permutations(range(4)) if order[0] < order[-1]
)  # 12, one of each mirrored pair


class FrameOrder(Method):
    """task "verification": of frames a < b < c < d < e, is a triple (b, c, d), or is its middle one a or e? Section 3 of Misra.

    "order": which of the 4!/2 orders, a film backwards counts as the film, have four shuffled frames? Section 3 of Lee, with
    pairs of frames through one shared layer and dropout, each frame moved a little by itself (spatial jittering), and as one of
    its channels where there is colour (channel splitting). A moved frame is a smaller window, enlarged to the frame's size:
    the papers cut it from a larger crop. Crop and flip are the same for all frames of a sample.
    Not done: choosing moments and regions of high motion, the least distance of 15 frames between a, e and the triple (frames
    come from equal parts of the window), dropout and BatchNorm inside the backbone as the papers' AlexNets have them.
    """

    batch_coupling = None
    squares_only = True
    modality = VIDEOS

    def __init__(
        self,
        backbone: Backbone,
        facts: Facts,
        *,
        task: str,
        frames: int,
        hidden_dim: int,
        channel_splitting: bool,
        jitter: float,
        dropout: float,
    ):
        super().__init__(backbone, facts)
        if task not in ("verification", "order"):
            raise ValueError(f"method.task={task}: expected verification or order")
        needed = 5 if task == "verification" else 4
        if frames < needed:
            raise ValueError(f"method.task={task} takes {needed} frames, dataset.frames={frames}")
        if not 0 <= jitter < 0.25:
            raise ValueError(f"method.jitter={jitter:g}: expected a share of a frame's side, from 0 to below a quarter")
        if not 0 <= dropout < 1:
            raise ValueError(f"method.dropout={dropout:g}: expected 0 or more and less than 1")
        self.task, self.channel_splitting, self.jitter = task, channel_splitting, jitter
        if task == "verification":
            self.classifier = mlp(3 * backbone.embed_dim, hidden_dim, 2, 2, norm=True)
        else:
            self.pairs = list(itertools.combinations(range(4), 2))  # 6
            self.pair_head = mlp(2 * backbone.embed_dim, hidden_dim, hidden_dim, 1, norm=True, last_norm="affine")
            self.dropout = nn.Dropout(dropout)
            self.classifier = nn.Linear(len(self.pairs) * hidden_dim, len(ORDERS))

    def training_step(self, batch: Batch, schedules: dict) -> dict:
        x, label = self.question(batch)  # (B, T, C, H, W), (B,)
        h = self.backbone(x.flatten(0, 1)).unflatten(0, x.shape[:2])  # (B, T, D), one tower for all frames
        logits, label = gather(self.answer(h).float()), gather(label)
        hits = (logits.argmax(1) == label).float().mean()
        return {"loss": F.cross_entropy(logits, label), "accuracy": hits, "feature_std": feature_std(h[:, 0])}

    def question(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Frames as they are shown (B, 3 or 4, C, H, W), and the right answers (B,) int64."""
        frames = batch.views["frames"][0]  # (B, T, C, H, W), in the order of time
        order, label = (self.triples if self.task == "verification" else self.shuffles)(batch, frames.shape[1])
        shown = frames.take_along_dim(order[:, :, None, None, None], 1)
        if self.task == "order":
            shown = self.moved(shown, batch)
            if self.channel_splitting and shown.shape[2] > 1:
                chosen = (batch.key.uniform("frame_order/channel", shown.shape[1]) * shown.shape[2]).long()
                shown = shown.take_along_dim(chosen[:, :, None, None, None], 2).expand_as(shown)
        return shown, label

    def moved(self, shown: Tensor, batch: Batch) -> Tensor:
        """(B, T, C, S, S) -> the same shape: a window of each frame, somewhere about its middle, as large as the frame."""
        side = shown.shape[-1]
        most = round(self.jitter * side)  # pixels
        if not most:
            return shown
        corner = (batch.key.uniform("frame_order/jitter", shown.shape[1], 2) * (2 * most + 1)).long().flatten(0, 1)
        windows = cut_tiles(shown.flatten(0, 1), corner[:, :1], corner[:, 1:], side - 2 * most)[:, 0]
        windows = F.interpolate(windows, (side, side), mode="bilinear", align_corners=False)
        return windows.unflatten(0, shown.shape[:2])

    def triples(self, batch: Batch, count: int) -> tuple[Tensor, Tensor]:
        """Which three of the five frames (B, 3), forwards or backwards, and whether they are in order (B,)."""
        key = batch.key
        wrong = key.chance("frame_order/wrong", NEGATIVES)
        middle = torch.where(key.chance("frame_order/early", 0.5), 0, count - 1)
        middle = torch.where(wrong, middle, count // 2)
        first, last = torch.full_like(middle, count // 2 - 1), torch.full_like(middle, count // 2 + 1)
        order = torch.stack([first, middle, last], 1)  # the ends are the same in both kinds
        backwards = key.chance("frame_order/backwards", 0.5)
        return torch.where(backwards[:, None], order.flip(1), order), (~wrong).long()

    def shuffles(self, batch: Batch, count: int) -> tuple[Tensor, Tensor]:
        """Which four of the frames stand where (B, 4), and the number of their order (B,)."""
        key = batch.key
        positions = key.permutation("frame_order/taken", count)[:, :4].sort(1).values  # (B, 4), in the order of time
        label = (key.uniform("frame_order/order") * len(ORDERS)).long()
        order = to_device(torch.tensor(ORDERS), label.device)[label]  # (B, 4)
        backwards = key.chance("frame_order/backwards", 0.5)
        return positions.gather(1, torch.where(backwards[:, None], order.flip(1), order)), label

    def answer(self, h: Tensor) -> Tensor:
        """(B, T, D) -> (B, answers)."""
        if self.task == "verification":
            return self.classifier(h.flatten(1))
        pairs = torch.stack([h[:, pair].flatten(1) for pair in self.pairs], 1)  # (B, 6, 2D)
        z = F.relu(self.pair_head(pairs.flatten(0, 1))).unflatten(0, pairs.shape[:2])  # (B, 6, hidden_dim)
        return self.classifier(self.dropout(z).flatten(1))

    def pictures(self, batch: Batch) -> dict[str, Tensor]:
        """The video's frames, those that are shown in their order, and a card with the right answer and the network's."""
        frames = batch.views["frames"][0]
        shown, label = self.question(batch)
        h = self.backbone(shown.flatten(0, 1)).unflatten(0, shown.shape[:2])
        guessed = self.answer(h).argmax(1)
        if self.task == "verification":
            question, names = "in order?", ("no", "yes")
        else:
            question, names = "order:", [" ".join(str(1 + t) for t in order) for order in ORDERS]
        cards = [
            card(question, names[right], names[guess]) for right, guess in torch.stack([label, guessed], 1).tolist()
        ]
        return {
            **{f"frame {t + 1}": frames[:, t] for t in range(frames.shape[1])},
            **{f"shown {t + 1}": shown[:, t] for t in range(shown.shape[1])},
            "answer": torch.stack(cards),
        }

    def uninformative_loss(self) -> float:
        if self.task == "order":
            return math.log(len(ORDERS))
        return -NEGATIVES * math.log(NEGATIVES) - (1 - NEGATIVES) * math.log(1 - NEGATIVES)

    def notes(self) -> list[str]:
        if self.task == "verification":
            share = NEGATIVES
            blind = -share * math.log(share) - (1 - share) * math.log(1 - share)
            return [f"three quarters of the triples are in the wrong order: chance is 75 %, a loss of {blind:.3f}"]
        return [f"twelve orders: chance is {1 / len(ORDERS):.1%}, a loss of {math.log(len(ORDERS)):.3f}"]
