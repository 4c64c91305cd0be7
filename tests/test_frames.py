"""Videos: frames in their order, keyed draws of them, and what the prediction of their order asks."""

import numpy as np
import pytest
import torch
from small_benchmark_data import moving_shape, write_folder

from sslctl.data.batch import Batch
from sslctl.data.files import ImageError
from sslctl.data.frames import count_frames, frames, read_frames
from sslctl.methods.frame_order import ORDERS
from sslctl.random import Key
from tests.runs import metrics
from tests.sequences import FRAMES, numbered, recorded_batches, run, write_video

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


def test_a_video_file_gives_the_frames_that_were_put_in(tmp_path):
    shots = moving_shape("square", 3, count=12, side=32)
    path = str(write_video(tmp_path / "a.mp4", shots))
    assert count_frames(path) == 12
    actual = read_frames(path, [0, 5, 11], 3)
    for position, frame in zip((0, 5, 11), actual, strict=True):
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
    actual = ((middle - 15.655) * 100).round().long()
    assert set(actual.flatten().tolist()) == {100 * row + column for row in range(-2, 3) for column in range(-2, 3)}
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
