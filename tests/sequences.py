"""Videos and texts for tests: small runs of the methods that take them, and batches of known frames and tokens."""

import pytest
import torch

import sslctl
from sslctl.cli import main
from sslctl.data.batch import Batch
from sslctl.data.text import CLS
from sslctl.methods.base import Facts
from sslctl.methods.frame_order import FrameOrder
from sslctl.methods.masked_language import MaskedLanguage
from sslctl.models.preprocess import TextPreprocess
from sslctl.models.text_transformer import SmallTransformer
from sslctl.random import Key
from tests.one_view import backbone
from tests.runs import signal_at

COMMON = (
    *("trainer.device=cpu", "trainer.threads=1", "trainer.tensorboard=false", "trainer.log_every_steps=1"),
    *("evaluation.closing=false", "evaluation.knn_every_epochs=null", "scheduler.warmup_epochs=0"),
)


def write_video(path, shots, codec="mpeg4"):
    import av

    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(path, "w") as container:
        stream = container.add_stream(codec, rate=10)
        stream.height, stream.width = shots.shape[1:3]
        stream.pix_fmt, stream.bit_rate = "yuv420p", 2_000_000
        for shot in shots:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(shot, format="rgb24")))
        container.mux(stream.encode())
    return path


def run(method, root, run_dir, *more, stop_after=None):
    with signal_at(stop_after):
        return main(["pretrain", f"method={method}", f"dataset.root={root}", *COMMON, f"run_dir={run_dir}", *more])


FRAMES = ("backbone.widths=[4,8]", "method.hidden_dim=8", "trainer.batch_size=14", "trainer.epochs=2")
TOKENS = (
    "backbone.embed_dim=16",
    "backbone.depth=1",
    "backbone.heads=2",
    "dataset.vocabulary=400",
    "dataset.length=32",
)
TOKENS += ("trainer.batch_size=128", "trainer.epochs=2")
KINDS = {
    "verification": ("frame_order", FRAMES),
    "order": ("frame_order", (*FRAMES, "method.task=order")),
    "language": ("masked_language", TOKENS),
}


def finished(kind, sequences, run_dir, *more, stops=()):
    method, root, own = sequences(kind)
    for stop in stops:
        assert run(method, root, run_dir, *own, *more, stop_after=stop) == 143
    assert run(method, root, run_dir, *own, *more) == 0
    return run_dir


class recorded_batches:
    """The batches of a run."""

    def __enter__(self):
        self.patch, seen = pytest.MonkeyPatch(), []
        real = sslctl.training.train.train_step
        self.patch.setattr(
            sslctl.training.train,
            "train_step",
            lambda setup, step, batch: seen.append(batch) or real(setup, step, batch),
        )
        return seen

    def __exit__(self, *_):
        self.patch.undo()


def numbered(task, count=5, rows=400, channels=1, **changes):
    """A method, and a batch in which frame t of every video is the number t."""
    facts = Facts(channels, 32, 1000, 0, rows, 1, 1)
    arguments = {"hidden_dim": 8, "channel_splitting": True, "jitter": 0.0625, "dropout": 0.5} | changes
    method = FrameOrder(backbone(channels), facts, task=task, frames=count, **arguments)
    index = torch.arange(rows)
    x = torch.arange(count).float().view(1, 1, count, 1, 1, 1).expand(1, rows, count, channels, 32, 32)
    return method, Batch({"frames": x}, torch.full((rows,), -1), index, Key(0, 0, index))


def language(length=64, vocabulary=300, mask_ratio=0.15, rows=500):
    torch.manual_seed(0)
    network = TextPreprocess(vocabulary, length, "").to_backbone(SmallTransformer(16, 1, 2, 0.0, vocabulary, length))
    method = MaskedLanguage(network, Facts(1, length, 1000, 0, rows, 1, 1), mask_ratio=mask_ratio)
    index = torch.arange(rows)
    ids = torch.randint(4, vocabulary, (1, rows, length), generator=torch.Generator().manual_seed(1))
    ids[..., 0] = CLS
    return method, Batch({"tokens": ids}, torch.full((rows,), -1), index, Key(0, 0, index))
