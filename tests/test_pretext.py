"""Rotations, neighbouring patches, puzzles: exact moves of pixels, labels that are right, permutations far apart."""

import pytest
import torch

from sslctl.methods.jigsaw import Jigsaw, far_permutations
from sslctl.methods.relative_patch import RelativePatch
from sslctl.methods.rotation import four_turns
from sslctl.ops.tiles import cut_tiles, mosaic, refuse_small_tiles
from tests.methods import built
from tests.one_view import a_batch, backbone, facts

# --- Rotation ---


def test_rotations_move_pixels_exactly():
    x = torch.rand(2, 3, 8, 8)
    turned = four_turns(x)
    assert torch.equal(turned[0], x)
    assert torch.equal(turned[1], x.flip(3).transpose(2, 3))  # anticlockwise
    assert torch.equal(turned[2], x.flip(2, 3))
    assert torch.equal(four_turns(four_turns(x)[1])[3], x)
    assert torch.equal(four_turns(four_turns(turned[2])[1])[1], x)


# --- Tiles ---


def test_tiles_are_pieces_and_a_mosaic_of_them_is_the_image():
    x = torch.rand(2, 3, 6, 6)
    corners = torch.tensor([0, 0, 3, 3]).expand(2, -1), torch.tensor([0, 3, 0, 3]).expand(2, -1)
    tiles = cut_tiles(x, *corners, 3)
    assert torch.equal(tiles[:, 1], x[..., :3, 3:])
    assert torch.equal(mosaic(tiles, 2), x)


def test_a_mosaic_may_be_wider_than_high():
    x = torch.rand(2, 3, 4, 6)
    corners = torch.tensor([0, 0, 0, 2, 2, 2]).expand(2, -1), torch.tensor([0, 2, 4, 0, 2, 4]).expand(2, -1)
    tiles = cut_tiles(x, *corners, 2)
    assert torch.equal(tiles[:, 2], x[..., :2, 4:])
    assert torch.equal(mosaic(tiles, 3), x)


def test_tiles_of_fewer_than_8_pixels_and_networks_of_one_size_are_refused():
    refuse_small_tiles(torch.nn.Identity(), 8, 24)
    with pytest.raises(ValueError, match="tiles of 7 pixels, from views of 21"):
        refuse_small_tiles(torch.nn.Identity(), 7, 21)
    whole = torch.nn.Identity()
    whole.fixed_size = True
    with pytest.raises(ValueError, match="whole images only"):
        refuse_small_tiles(whole, 16, 48)


# --- Relative patches ---


def relative(**changes):
    arguments = {"hidden_dim": 16, "view_size": 2.0, "gap": 0.5, "jitter": 0.1, "colour_drop": 1.0} | changes
    return RelativePatch(backbone(), facts(), **arguments)


def test_patches_never_touch_and_stay_in_the_view():
    method = relative(gap=0.3, jitter=0.14)
    places = torch.zeros(64, 1, 64, 64)
    places[:] = torch.arange(64 * 64).view(64, 64).float()  # every pixel says where it is
    patches = method.patches(a_batch(size=64, count=64, images=places))  # (64, 9, 1, p, p)
    row, column = patches[:, :, 0].long() // 64, patches[:, :, 0].long() % 64
    for axis, one, other in ((row, 0, 3), (row, 3, 6), (column, 0, 1), (column, 1, 2)):
        assert (axis[:, one].amax((1, 2)) + 1 < axis[:, other].amin((1, 2))).all()
    assert len({tuple(p) for p in row[:, :, 0, 0].tolist()}) > 8  # they do move


def test_dropped_colours_leave_one_channel_and_faint_noise():
    method = RelativePatch(backbone(3), facts(3), hidden_dim=4, view_size=2.0, gap=0.5, jitter=0.1, colour_drop=1.0)
    batch = a_batch(3, 64)
    x, out = batch.views["global"][0], method.colour_dropped(batch.views["global"][0], batch)
    kept = (x == out).flatten(2).all(2)
    assert (kept.sum(1) == 1).all()
    assert len(set(kept.float().argmax(1).tolist())) > 1
    assert (out - 0.5).abs()[~kept].max() < 0.05
    assert torch.equal(relative().colour_dropped(x[:, :1], batch), x[:, :1])  # grey


# --- Jigsaw ---


def test_permutations_are_different_far_apart_and_always_the_same():
    table = far_permutations(40)
    assert len({tuple(row) for row in table.tolist()}) == 40
    assert torch.equal(table.sort(1).values, torch.arange(9).expand(40, -1))
    distance = (table[:, None] != table).sum(2) + 9 * torch.eye(40, dtype=torch.int64)
    assert distance.min() >= 7
    assert torch.equal(far_permutations(12), table[:12])
    shuffled = torch.stack([torch.randperm(9, generator=torch.Generator().manual_seed(n)) for n in range(40)])
    assert ((shuffled[:, None] != shuffled).sum(2) + 9 * torch.eye(40, dtype=torch.int64)).min() < 7


def jigsaw(size=32):
    return Jigsaw(backbone(size=size), facts(size=size), permutations=12, tile_dim=4, view_size=1.5)


@pytest.mark.parametrize(("gap", "jitter"), [(0.02, 0.0), (0.5, 0.073), (0.3, 0.14), (0.0001, 0.0)])
def test_relative_patches_lie_within_the_view_and_never_touch(gap, jitter):
    result = built("relative_patch", f"method.gap={gap}", f"method.jitter={jitter}")
    method, side = result.method, result.batch.views["global"].shape[-1]
    result.loss()  # no tile is cut outside the view
    assert 2 * method.pitch + method.size + 2 * method.jitter <= side
    assert method.pitch > method.size + 2 * method.jitter
