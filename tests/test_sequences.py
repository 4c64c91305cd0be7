"""Videos and texts: a sample may be several frames or token ids, under the same trainer, resume and evaluation."""

import json
import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import sslctl
from sslctl.cli import main
from sslctl.data.batch import Batch
from sslctl.data.files import ImageError
from sslctl.data.frames import count_frames, frames, read_frames
from sslctl.data.text import CLS, MASK, text
from sslctl.errors import InputError
from sslctl.factory.from_run import load_method
from sslctl.methods.base import Facts
from sslctl.methods.frame_order import ORDERS, FrameOrder
from sslctl.methods.masked_language import MaskedLanguage
from sslctl.models.preprocess import TextPreprocess
from sslctl.models.text_transformer import SmallTransformer
from sslctl.random import Key
from sslctl.runs import checkpoint
from tests.test_distributed import distance
from tests.test_pretext import backbone
from tests.training import differences, edit, in_processes, metrics, newest, signal_at, slow, tensors

sys.path.insert(0, str(Path(__file__).parents[1] / "scripts"))
from small_benchmark_data import moving_shape, write_folder, write_texts, write_videos

COMMON = (
    *("trainer.device=cpu", "trainer.threads=1", "trainer.tensorboard=false", "trainer.log_every_steps=1"),
    *("evaluation.closing=false", "evaluation.knn_every_epochs=null", "scheduler.warmup_epochs=0"),
)

# --- Data ---


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


@pytest.fixture(scope="session")
def videos(tmp_path_factory):
    """96 folders of frames, of two classes, a fifth of them for the test split."""
    return write_videos(tmp_path_factory.mktemp("videos"), 96)


@pytest.fixture(scope="session")
def texts(tmp_path_factory):
    """The licences of two packages, a class each."""
    return write_texts(tmp_path_factory.mktemp("texts"))


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


@pytest.fixture
def words(videos, texts):
    """A kind -> (method, root, overrides)."""

    def of(kind):
        method, more = KINDS[kind]
        return method, texts if kind == "language" else videos, more

    return of


def finished(kind, words, run_dir, *more, stops=()):
    method, root, own = words(kind)
    for stop in stops:
        assert run(method, root, run_dir, *own, *more, stop_after=stop) == 143
    assert run(method, root, run_dir, *own, *more) == 0
    return run_dir


# --- Frames ---


def test_a_sample_is_frames_in_order_that_depend_on_seed_epoch_and_video_only(videos):
    source = frames("train", str(videos), None, 3, 5)
    assert (source.image_size, source.frames, source.classes) == (24, 5, ("disc", "square"))
    assert len(source) + len(frames("test", str(videos), None, 3, 5)) == 96

    def places(row, seed=0, epoch=0):
        shots = source.sample(row, Key(seed, epoch, torch.tensor([row])))
        whole = read_frames(source.paths[row], list(range(10)), 3)
        return [next(t for t, other in enumerate(whole) if torch.equal(shot, other)) for shot in shots]

    seen = [places(row) for row in range(20)]
    assert all(len(set(place)) == 5 and place == sorted(place) for place in seen)
    assert seen == [places(row) for row in range(20)]
    assert seen != [places(row, epoch=1) for row in range(20)]
    assert seen != [places(row, seed=1) for row in range(20)]
    assert len({tuple(place) for place in seen}) > 5


def test_frames_of_a_window_lie_in_it_and_windows_are_everywhere(tmp_path):
    for number, count in enumerate((40, 6)):
        write_folder(tmp_path / str(number), np.zeros((count, 4, 4, 3), dtype=np.uint8))
    source = frames("train", str(tmp_path), None, 3, 5, 10)
    assert "5 frames of 10 in a row" in source.summary()
    drawn = torch.stack([source.places(0, Key(0, epoch, torch.tensor([0]))) for epoch in range(300)])  # (300, 5)
    assert (drawn.diff(dim=1) > 0).all()
    assert (drawn[:, -1] - drawn[:, 0] < 10).all()
    assert (drawn[:, 0].min(), drawn[:, -1].max()) == (0, 39)
    first, parts = drawn[:, 0] // 10, drawn[:, 0].float().histc(4, 0, 31)
    assert set(first.tolist()) == {0, 1, 2, 3}
    assert (parts > 40).all()  # 75 each, where windows begin anywhere alike
    assert torch.equal(drawn[7], source.places(0, Key(0, 7, torch.tensor([0]))))
    short = source.places(1, Key(0, 0, torch.tensor([1])))
    assert short.max() < 6  # a shorter video is taken whole
    whole = frames("train", str(tmp_path), None, 3, 5)
    same = frames("train", str(tmp_path), None, 3, 5, 40)
    key = Key(3, 1, torch.tensor([0]))
    assert torch.equal(whole.places(0, key), same.places(0, key))


def test_all_frames_of_a_sample_are_cropped_and_flipped_alike(videos, tmp_path):
    still = write_folder(tmp_path / "still", np.repeat(moving_shape("disc", 0)[:1], 6, axis=0)).parent
    for number in range(3):
        write_folder(still / f"more{number}", np.repeat(moving_shape("disc", number)[:1], 6, axis=0))
    with recorded_batches() as seen:
        assert run("frame_order", still, tmp_path / "run", *FRAMES, "trainer.batch_size=4", "trainer.epochs=1") == 0
    x = seen[0].views["frames"][0]  # (B, T, C, H, W)
    assert x.shape[:3] == (4, 5, 3)
    assert torch.equal(x, x[:, :1].expand_as(x))
    assert not torch.equal(x[0], x[1])


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


def test_a_video_file_gives_the_frames_that_were_put_in(tmp_path):
    shots = moving_shape("square", 3, count=12, side=32)
    path = str(write_video(tmp_path / "a.mp4", shots))
    assert count_frames(path) == 12
    found = read_frames(path, [0, 5, 11], 3)
    for position, frame in zip((0, 5, 11), found, strict=True):
        assert (frame.permute(1, 2, 0).float() - torch.tensor(shots[position]).float()).abs().mean() < 8
    assert read_frames(path, [3], 1)[0].shape == (1, 32, 32)
    with pytest.raises(ImageError, match="ends before frame 12"):
        read_frames(path, [12], 3)


def test_video_files_train(tmp_path):
    for number in range(8):
        write_video(tmp_path / "videos" / f"{number}.mp4", moving_shape("disc", number, side=32))
    assert run("frame_order", tmp_path / "videos", tmp_path / "run", *FRAMES, "trainer.batch_size=4") == 0
    assert len(metrics(tmp_path / "run")) == 4


# --- What is asked of frames ---


def numbered(task, count=5, rows=400, channels=1, **changes):
    """A method, and a batch in which frame t of every video is the number t."""
    facts = Facts(channels, 32, 1000, 0, rows, 1, 1)
    arguments = {"hidden_dim": 8, "channel_splitting": True, "jitter": 0.0625, "dropout": 0.5} | changes
    method = FrameOrder(backbone(channels), facts, task=task, frames=count, **arguments)
    index = torch.arange(rows)
    x = torch.arange(count).float().view(1, 1, count, 1, 1, 1).expand(1, rows, count, channels, 32, 32)
    return method, Batch({"frames": x}, torch.full((rows,), -1), index, Key(0, 0, index))


@pytest.mark.parametrize("changes", [{"jitter": 0.25}, {"jitter": -0.1}, {"dropout": 1.0}])
def test_a_share_out_of_its_range_is_refused(changes):
    with pytest.raises(ValueError, match=next(iter(changes))):
        numbered("order", **changes)
    method, batch = numbered("order", jitter=0.2499)
    assert method.question(batch)[0].shape[-1] == 32


def test_triples_in_and_out_of_order():
    method, batch = numbered("verification")
    shown, label = method.question(batch)
    seen = {
        (tuple(frames), answer)
        for frames, answer in zip(shown[:, :, 0, 0, 0].int().tolist(), label.tolist(), strict=True)
    }
    right = {((1, 2, 3), 1), ((3, 2, 1), 1)}  # b c d, and backwards
    wrong = {((1, 0, 3), 0), ((3, 0, 1), 0), ((1, 4, 3), 0), ((3, 4, 1), 0)}
    assert seen == right | wrong
    assert label.float().mean().item() == pytest.approx(0.25, abs=0.06)


def test_twelve_orders_and_a_film_backwards_is_the_film():
    assert len(ORDERS) == len({min(order, order[::-1]) for order in ORDERS}) == 12
    method, batch = numbered("order", count=6)
    shown, label = method.question(batch)
    places = shown[:, :, 0, 0, 0].int()
    ranks = places.argsort(1).argsort(1)
    for order, answer in zip(ranks.tolist(), label.tolist(), strict=True):
        assert tuple(order) in (ORDERS[answer], ORDERS[answer][::-1])
    assert set(label.tolist()) == set(range(12))
    assert len({tuple(p.sort().values.tolist()) for p in places}) > 5  # any four of six


@pytest.mark.parametrize(("task", "blind"), [("verification", math.log(2)), ("order", math.log(12))])
def test_a_classifier_that_knows_nothing(task, blind):
    method, batch = numbered(task, rows=16)
    last = method.classifier[-1] if task == "verification" else method.classifier
    with torch.no_grad():
        last.weight.zero_()
        last.bias.zero_()
    assert method(batch, {})["loss"].item() == pytest.approx(blind, rel=1e-5)


def test_each_frame_keeps_one_channel():
    method, batch = numbered("order", rows=64, channels=3)
    x = batch.views["frames"] + torch.tensor([0.1, 0.2, 0.3]).view(3, 1, 1)
    shown, _ = method.question(Batch({"frames": x}, batch.label, batch.index, batch.key))
    assert torch.equal(shown[:, :, :1].expand_as(shown), shown)
    kept = ((shown[:, :, 0, 0, 0] * 10).round() % 10).int()
    assert set(kept.flatten().tolist()) == {1, 2, 3}
    assert (kept != kept[:, :1]).any()  # not the same one for a whole film


def ramps(rows=300):
    """A batch in which every pixel of every frame says where it is: its row, and its column divided by 100."""
    place = torch.arange(32.0)
    image = place[:, None] + place[None, :] / 100
    index = torch.arange(rows)
    return Batch({"frames": image.expand(1, rows, 5, 1, 32, 32)}, index, index, Key(0, 0, index))


def test_each_frame_is_moved_by_itself_up_to_5_of_80_pixels():
    method, batch = numbered("order")[0], ramps()
    shown, _ = method.question(batch)  # (B, 4, 1, 32, 32)
    assert shown.shape == (300, 4, 1, 32, 32)
    middle = shown[:, :, 0].mean((2, 3))  # of a window: its row, and its column / 100
    found = ((middle - 15.655) * 100).round().long()
    assert set(found.flatten().tolist()) == {100 * row + column for row in range(-2, 3) for column in range(-2, 3)}
    assert (middle != middle[:, :1]).any(1).float().mean() > 0.9
    other, _ = numbered("order", jitter=0.0)[0].question(batch)
    assert torch.equal(other, ramps().views["frames"][0][:, :4])
    triple, _ = numbered("verification")[0].question(batch)  # Shuffle and Learn cuts all frames alike
    assert torch.equal(triple, ramps().views["frames"][0][:, :3])


def test_a_frames_move_depends_on_seed_epoch_and_video_only():
    method, batch = numbered("order")[0], ramps(20)

    def shown(rows, epoch=0):
        index = torch.tensor(rows)
        views = {"frames": batch.views["frames"][:, : len(rows)]}
        return method.question(Batch(views, index, index, Key(0, epoch, index)))[0]

    whole = shown(range(20))
    assert torch.equal(shown([7, 3]), whole[[7, 3]])
    assert not torch.equal(shown(range(20), epoch=1), whole)


def test_dropout_is_of_what_pairs_say_and_not_in_evaluation():
    method, batch = numbered("order", rows=16, hidden_dim=64)
    seen = []
    method.classifier.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    method(batch, {})
    method.eval()(batch, {})
    method.dropout.p = 0.0
    method.train()(batch, {})
    dropped, calm, none = ((x == 0).float().mean().item() for x in seen)
    assert dropped == pytest.approx(0.5 + 0.5 * none, abs=0.05)
    assert calm < 0.95
    assert not hasattr(numbered("verification")[0], "dropout")


# --- Texts ---


def test_samples_are_pieces_of_the_text_by_a_vocabulary_that_is_always_the_same(texts):
    one, two = (text("train", str(texts), 32, 400, None) for _ in range(2))
    assert one.tokenizer == two.tokenizer
    assert torch.equal(one.tokens, two.tokens)
    assert one.content_hash == two.content_hash
    assert one.tokens.shape == (len(one), 32)
    assert (one.tokens[:, 0] == CLS).all()
    assert not torch.isin(one.tokens[:, 1:], torch.arange(4)).any()  # every byte has a token
    assert one.tokens.max() < one.vocabulary <= 400
    test = text("test", str(texts), 32, 400, None)
    share = len(test) / (len(one) + len(test))
    assert share == pytest.approx(0.2, abs=0.06)
    assert one.classes == ("numpy", "torch")


def language(length=64, vocabulary=300, mask_ratio=0.15, rows=500):
    torch.manual_seed(0)
    network = TextPreprocess(vocabulary, length).to_backbone(SmallTransformer(16, 1, 2, 0.0, vocabulary, length))
    method = MaskedLanguage(network, Facts(1, length, 1000, 0, rows, 1, 1), mask_ratio=mask_ratio)
    index = torch.arange(rows)
    ids = torch.randint(4, vocabulary, (1, rows, length), generator=torch.Generator().manual_seed(1))
    ids[..., 0] = CLS
    return method, Batch({"tokens": ids}, torch.full((rows,), -1), index, Key(0, 0, index))


def test_masking_hides_80_percent_leaves_10_and_changes_10():
    method, batch = language()
    ids = batch.views["tokens"][0]
    shown, place = method.masked(ids, batch)
    assert place.shape == (500, 9)  # round(.15 · 63)
    assert (place > 0).all()  # never [CLS]
    assert all(len(set(row)) == 9 for row in place.tolist())
    untouched = torch.ones_like(ids, dtype=torch.bool).scatter_(1, place, False)
    assert torch.equal(shown[untouched], ids[untouched])
    there, was = shown.gather(1, place), ids.gather(1, place)
    assert (there == MASK).float().mean().item() == pytest.approx(0.8, abs=0.02)
    assert (there == was).float().mean().item() == pytest.approx(0.1, abs=0.02)
    other = there[(there != MASK) & (there != was)]
    assert other.min() >= 4
    assert len(other.unique()) > 100


def test_the_loss_ignores_positions_that_were_not_hidden():
    method, batch = language(rows=8)
    method.eval()
    seen = []
    method.transform.register_forward_pre_hook(lambda module, args: seen.append(args[0].shape))
    method(batch, {})
    assert seen == [(8, 9, 16)]
    with torch.no_grad():
        method.backbone.network.embedding.weight.zero_()
    assert method(batch, {})["loss"].item() == pytest.approx(math.log(300), rel=1e-5)  # nothing is known
    assert math.log(30522) == pytest.approx(10.326, abs=1e-3)


def test_the_output_layer_is_the_embeddings_own_table():
    method, _ = language(rows=8)
    assert [tuple(p.shape) for p in method.parameters()].count((300, 16)) == 1
    tokens = torch.randn(2, 3, 16)
    before = method.said(tokens)
    with torch.no_grad():
        method.backbone.network.embedding.weight[7] += 1.0
    assert (method.said(tokens) != before).any((0, 1)).nonzero().flatten().tolist() == [7]


def test_padding_changes_nothing():
    network = SmallTransformer(16, 2, 2, 0.0, 50, 12).eval()
    ids = torch.randint(4, 50, (3, 8))
    padded = torch.cat([ids, torch.zeros(3, 4, dtype=torch.int64)], 1)
    torch.testing.assert_close(network(ids), network(padded), atol=1e-5, rtol=1e-4)


# --- Resume, processes ---


@pytest.mark.parametrize("kind", ["verification", slow("order"), "language"])
def test_resume_at_five_points_equals_the_straight_run(kind, words, tmp_path):
    straight = finished(kind, words, tmp_path / "straight")
    assert metrics(straight)[-1]["step"] >= 10
    stopped = finished(kind, words, tmp_path / "stopped", stops=(1, 3, 5, 6, 9))
    assert differences(tensors(stopped), tensors(straight)) == []
    assert metrics(stopped) == metrics(straight)
    if kind != "language":
        worked = finished(kind, words, tmp_path / "workers", "trainer.workers=1", stops=(4,))
        assert differences(tensors(worked), tensors(straight)) == []


@pytest.mark.parametrize(
    ("kind", "part"),
    [
        ("verification", "classifier.0.weight"),
        slow("order", "pair_head.0.weight"),
        slow("order", "classifier.weight"),
        ("language", "bias"),
    ],
)
def test_resume_without_a_part_of_the_state_differs(kind, part, words, tmp_path):
    straight = finished(kind, words, tmp_path / "straight")
    method, root, own = words(kind)
    stopped = tmp_path / "stopped"
    assert run(method, root, stopped, *own, stop_after=6) == 143
    edit(newest(stopped), weights=lambda stored: stored.update({part: stored[part].roll(1, 0)}))
    finished(kind, words, stopped)
    assert differences(tensors(stopped), tensors(straight)) != []


def first_step(run_dir, kind, method, root, own):
    with recorded_batches() as seen, recorded_steps_of_sequences() as steps:
        assert run(method, root, run_dir, *own, stop_after=1) == 143
    return {"rows": seen[0].index, "steps": steps}


class recorded_steps_of_sequences:
    """Loss and gradients of every step."""

    def __enter__(self):
        self.patch, steps = pytest.MonkeyPatch(), []
        real = sslctl.training.train.train_step

        def train_step(setup, step, batch):
            gradients = {}
            named = [(name, p) for name, p in setup.method.named_parameters() if p.requires_grad]
            setup.method.after_backward = lambda s: gradients.update((name, p.grad.clone()) for name, p in named)
            result = real(setup, step, batch)
            steps.append({"loss": result[2]["loss"], "gradients": gradients})
            return result

        self.patch.setattr(sslctl.training.train, "train_step", train_step)
        self.patch.setattr(torch.nn.functional, "relu", lambda x, inplace=False: torch.nn.functional.softplus(x))
        return steps

    def __exit__(self, *_):
        self.patch.undo()


WITHOUT_DROPOUT = {"language": ("optimizer=sgd", "backbone.dropout=0.0"), "order": ("method.dropout=0",)}


@pytest.mark.parametrize("kind", [slow("verification"), slow("order"), slow("language")])
def test_two_processes_equal_one(kind, words, tmp_path):
    arguments = (kind, *words(kind))
    arguments = (
        *arguments[:3],
        (*arguments[3], *WITHOUT_DROPOUT.get(kind, ())),
    )
    (one,) = in_processes(first_step, tmp_path / "one", *arguments, count=1)
    two = in_processes(first_step, tmp_path / "two", *arguments)
    assert torch.equal(torch.cat([its["rows"] for its in two]), one["rows"])
    for its in two:
        left, right = its["steps"][0], one["steps"][0]
        assert left["loss"].item() == pytest.approx(right["loss"].item(), rel=1e-4)
        flat = [
            torch.cat([side["gradients"][name].flatten() for name in sorted(side["gradients"])])
            for side in (left, right)
        ]
        assert distance({"all": flat[0]}, {"all": flat[1]}) < 1e-3


def test_features_of_a_run_are_those_of_its_checkpoint(texts, words, tmp_path):
    done = finished("language", words, tmp_path / "run")
    method = load_method(done)
    checkpoint.load(newest(done), method)
    loaded, _ = sslctl.load(done)
    ids = text("train", str(texts), 32, 400, None).tokens[:4]
    with torch.no_grad():
        assert torch.equal(loaded(ids), next(iter(method.eval().features(ids).values())))
    saved = json.loads((done / "tokenizer.json").read_text())
    assert saved["model"]["type"] == "BPE"


# --- Bad input ---


def bad_frames(folder, kind):
    if kind == "one frame":
        write_folder(folder / "a", moving_shape("disc", 0)[:1])
    elif kind == "no videos":
        folder.mkdir()
    elif kind == "broken video":
        folder.mkdir()
        (folder / "a.mp4").write_bytes(b"no video")
    elif kind == "uneven":
        write_folder(folder / "a", moving_shape("disc", 0))
        write_folder(folder / "b" / "c", moving_shape("disc", 0))
    elif kind == "three frames":
        for number in range(4):
            write_folder(folder / str(number), moving_shape("disc", number))
    elif kind == "empty text":
        folder.mkdir()
        (folder / "a.txt").write_text(" \n")
    elif kind == "short text":
        folder.mkdir()
        (folder / "a.txt").write_text("too short")
    elif kind == "no text":
        folder.mkdir()
        (folder / "a.md").write_text("words")
    elif kind == "no utf-8":
        folder.mkdir()
        (folder / "a.txt").write_bytes(b"\xff\xfe\xfa")
    return folder


@pytest.mark.parametrize(
    ("kind", "method", "more", "said"),
    [
        ("one frame", "frame_order", (), "has 1 frame, a sample takes 5"),
        ("no videos", "frame_order", (), "no videos in"),
        ("broken video", "frame_order", (), "cannot read"),
        ("uneven", "frame_order", (), "expected <video>/ or <class>/<video>/ throughout"),
        ("three frames", "frame_order", ("dataset.frames=3",), "takes 5 frames, dataset.frames=3"),
        ("three frames", "frame_order", ("dataset.window_frames=4",), "dataset.window_frames=4: a sample takes"),
        ("three frames", "frame_order", ("dataset.channels=2",), "dataset.channels=2: expected 1 or 3"),
        ("short text", "masked_language", ("dataset.length=1",), "dataset.length=1: a sample is [CLS] and"),
        ("nowhere", "frame_order", (), "no such folder"),
        ("empty text", "masked_language", (), "is empty"),
        ("short text", "masked_language", (), "too few for samples of 64"),
        ("no text", "masked_language", (), "no .txt files"),
        ("no utf-8", "masked_language", (), "cannot read"),
        ("short text", "masked_language", ("dataset.vocabulary=10",), "bytes and special tokens at least"),
        ("three frames", "simclr", ("dataset=frames", "dataset.frames=3"), "method=simclr takes images"),
        ("short text", "simclr", ("dataset=text", "dataset.length=2"), "takes images, the dataset has texts"),
        (
            "short text",
            "frame_order",
            ("dataset=text", "dataset.length=2", "backbone=small_transformer"),
            "method=frame_order",
        ),
    ],
)
def test_bad_input_ends_in_a_line_before_anything_is_written(kind, method, more, said, tmp_path, capsys):
    root = bad_frames(tmp_path / "data", kind)
    batch = ("trainer.batch_size=2",)
    words = [
        "pretrain",
        f"method={method}",
        *more,
        f"dataset.root={root}",
        *COMMON,
        *batch,
        f"run_dir={tmp_path / 'run'}",
    ]
    assert main(words) == 2
    err = capsys.readouterr().err
    assert said in err
    assert err.count("\n") == 1
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("method", "data"), [("frame_order", "frames"), ("masked_language", "text")])
def test_a_missing_root_is_asked_for_with_an_example(method, data, tmp_path, capsys):
    assert main(["pretrain", f"method={method}", *COMMON, f"run_dir={tmp_path / 'run'}"]) == 2
    assert "dataset.root is not set: dataset.root=/path/to/" in capsys.readouterr().err


@pytest.mark.parametrize(("package", "kind"), [("av", "broken video"), ("tokenizers", "short text")])
def test_a_missing_package_is_named_with_what_installs_it(package, kind, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(__import__("sys").modules, package, None)
    method = "frame_order" if package == "av" else "masked_language"
    root = bad_frames(tmp_path / "data", kind)
    assert main(["pretrain", f"method={method}", f"dataset.root={root}", *COMMON, f"run_dir={tmp_path / 'run'}"]) == 2
    assert "pip install 'sslctl[" in capsys.readouterr().err


WORDS = {
    "a": "the quick brown fox jumps over the lazy dog ",
    "b": "permission is hereby granted free of charge to any ",
}


def write_classes(root, swapped=False):
    for name, words in WORDS.items():
        (root / name).mkdir(parents=True)
        (root / name / "x.txt").write_text(("".join(reversed(words)) if swapped else words) * 60)
    return root


def test_texts_are_evaluated_with_the_runs_own_tokenizer(tmp_path, capsys):
    """Two folders give vocabularies of one size, in which an id means other words."""
    data, other = write_classes(tmp_path / "data"), write_classes(tmp_path / "other", swapped=True)
    more = ("dataset.vocabulary=300", "dataset.length=8", "backbone.embed_dim=16", "trainer.epochs=1")
    assert run("masked_language", data, tmp_path / "run", *more) == 0
    own, foreign = (text("train", str(root), 8, 300, None) for root in (data, other))
    assert own.vocabulary == foreign.vocabulary
    assert own.tokenizer_hash != foreign.tokenizer_hash
    words = ["dataset=text", f"dataset.root={other}", "dataset.vocabulary=300", "dataset.length=8", "cache_gb=0"]
    assert main(["knn-eval", str(tmp_path / "run"), *words]) == 0  # with the run's, which is there
    (tmp_path / "foreign.json").write_text(foreign.tokenizer)
    capsys.readouterr()
    assert main(["knn-eval", str(tmp_path / "run"), *words, f"dataset.tokenizer={tmp_path}/foreign.json"]) == 2
    assert "knows the ids of another tokenizer" in capsys.readouterr().err
    evaluated = (f"eval_dataset.root={other}", "eval_dataset.vocabulary=300", "eval_dataset.length=8")
    assert run("masked_language", data, tmp_path / "second", *more, "eval_dataset=text", *evaluated) == 0


def test_texts_may_come_in_train_and_test_folders(tmp_path, capsys):
    write_classes(tmp_path / "train")
    write_classes(tmp_path / "test", swapped=True)
    train, test = (text(split, str(tmp_path), 8, 300, None) for split in ("train", "test"))
    assert train.classes == test.classes == ("a", "b")
    assert train.tokenizer == test.tokenizer
    assert all("/train/" in path for path in train.paths)
    assert all("/test/" in path for path in test.paths)
    (tmp_path / "train" / "README.txt").write_text("about these texts, " * 20)
    (tmp_path / "train" / "a" / "short.txt").write_text("brief")
    assert not text("train", str(tmp_path), 8, 300, None).labelled
    said = capsys.readouterr().out
    assert "no labels, since 1 of 4 files lie outside class folders" in said
    assert "1 of 4 files" in said.splitlines()[-1]
    (tmp_path / "test" / "c").mkdir()
    (tmp_path / "test" / "c" / "x.txt").write_text("another class " * 20)
    (tmp_path / "train" / "README.txt").unlink()
    with pytest.raises(InputError, match="class folder c does not exist"):
        text("test", str(tmp_path), 8, 300, None)


def test_images_and_texts_do_not_mix(texts, tmp_path, capsys):
    words = ["pretrain", "method=masked_language", "dataset=digits", "backbone=small_resnet", *COMMON]
    assert main([*words, f"run_dir={tmp_path / 'run'}"]) == 2
    assert "masked_language takes texts" in capsys.readouterr().err
    words = ["pretrain", "method=simclr", "backbone=small_transformer", *COMMON]
    assert main([*words, f"run_dir={tmp_path / 'run'}"]) == 2
    assert "SmallTransformer takes texts, the dataset has images" in capsys.readouterr().err
    assert main(["views", "dataset=text", f"dataset.root={texts}", f"out={tmp_path / 'a.png'}"]) == 2
    assert "nothing to see" in capsys.readouterr().err
