"""Huge images as tiles: windows of every format equal those of the whole image, and each tile keeps its place to the end."""

import hashlib
import json
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sslctl.data import sources, windows
from sslctl.data.files import ImageError
from sslctl.data.folders import FolderKeys
from sslctl.data.pixels import Reading
from sslctl.data.tiles import read_tile
from sslctl.errors import InputError
from tests.conftest import QUICK

tifffile = pytest.importorskip("tifffile")


def pixels(height=100, width=130, bands=3, seed=0):
    array = np.random.default_rng(seed).integers(0, 255, (height, width, bands), np.uint8)
    array[:32, :64] = 7  # nothing there
    return array


def write_page_by_page(path, array, **options):
    """Three bands a page, each written by a call of its own."""
    with tifffile.TiffWriter(path) as writer:
        for start in range(0, array.shape[2], 3):
            writer.write(np.ascontiguousarray(array[..., start : start + 3]), photometric="rgb", **options)


WRITERS = {
    "tiles.tif": lambda p, a: tifffile.imwrite(p, a, tile=(48, 32), photometric="rgb", compression="zlib"),
    "strips.tif": lambda p, a: tifffile.imwrite(p, a, rowsperstrip=7, photometric="rgb"),
    "planes.tif": lambda p, a: tifffile.imwrite(
        p, np.moveaxis(a, 2, 0), tile=(32, 32), planarconfig="separate", photometric="rgb"
    ),
    "pages.tif": lambda p, a: tifffile.imwrite(p, np.moveaxis(a, 2, 0), tile=(32, 32), photometric="minisblack"),
    "colours.tif": lambda p, a: write_page_by_page(p, a, tile=(32, 32)),
    "array.npy": np.save,
    "image.png": lambda p, a: Image.fromarray(a).save(p),
}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("SSLCTL_DATA", str(tmp_path / "cache"))


def tiled(root, make=sources.folder, split="train", memory_gb=0.0, channels=3, image_size=None, **keys):
    tiles = {"size": 32, "stride": 16} | keys
    return make(split, FolderKeys(str(root), image_size, channels, memory_gb, tiles=tiles))


@pytest.mark.parametrize("name", WRITERS)
def test_windows_equal_the_whole_image(tmp_path, name):
    bands = 6 if name == "colours.tif" else 3
    array = pixels(bands=bands)
    (tmp_path / "images").mkdir()
    WRITERS[name](tmp_path / "images" / name, array)
    source, held = (tiled(tmp_path / "images", memory_gb=memory, channels=bands) for memory in (0.0, 1.0))
    assert (source.images is None, len(source), held.images.shape) == (True, 35, (35, bands, 32, 32))
    assert source.places[:2] == ((0, 0), (0, 16))
    assert source.places[-1] == (64, 96)
    for row, (top, left) in enumerate(source.places):
        expected = np.moveaxis(array[top : top + 32, left : left + 32], 2, 0)
        np.testing.assert_array_equal(source.read(row), expected)
        np.testing.assert_array_equal(held.images[row], expected)
    assert source.describe(8) == f"{tmp_path}/images/{name}#16,16"
    assert source.content_hash == held.content_hash
    assert tiled(tmp_path / "images", stride=32, channels=bands).content_hash != source.content_hash


@pytest.mark.parametrize("kind", ["palette", "cmyk", "white is zero"])
def test_tiles_have_the_colours_that_the_whole_image_has(tmp_path, kind):
    array = pixels(64, 64)
    if kind == "white is zero":
        tifffile.imwrite(tmp_path / "0.tif", array[..., 0], photometric="miniswhite")
    else:
        Image.fromarray(array).convert("P" if kind == "palette" else "CMYK").save(tmp_path / "0.tif")
    whole = sources.folder("train", FolderKeys(str(tmp_path), 64, 3, 1.0)).images[0]
    source = tiled(tmp_path, stride=32)
    assert len(source) == 4
    for row, (top, left) in enumerate(source.places):
        np.testing.assert_array_equal(source.read(row), whole[:, top : top + 32, left : left + 32])


def test_only_what_a_window_touches_is_read_of_a_tiled_tiff(tmp_path, monkeypatch):
    tifffile.imwrite(tmp_path / "0.tif", pixels(640, 640), tile=(64, 64), photometric="rgb")
    bytes_read = []
    pread = os.pread

    def counted(descriptor, count, offset):
        bytes_read.append(count)
        return pread(descriptor, count, offset)

    monkeypatch.setattr(windows.os, "pread", counted)
    windows.read(str(tmp_path / "0.tif"), 100, 100, 40)
    assert bytes_read == [64 * 64 * 3] * 4  # of 100
    bytes_read.clear()
    windows.read(str(tmp_path / "0.tif"), 128, 64, 64)
    assert bytes_read == [64 * 64 * 3]


def test_empty_tiles_are_left_out_once_for_these_files(tmp_path, monkeypatch):
    (tmp_path / "images").mkdir()
    np.save(tmp_path / "images" / "0.npy", pixels())
    source = tiled(tmp_path / "images", skip_empty=True)
    assert {(0, 0), (0, 16), (0, 32)}.isdisjoint(source.places)
    assert len(source) == 32
    assert (
        "32 tiles of 32×32, 16 apart, of 1 image; 3 left out as empty (std up to 0.02)" in source.description.lines()[2]
    )
    monkeypatch.setattr("sslctl.data.tiles.Grid.read_all", None)
    assert tiled(tmp_path / "images", skip_empty=True).places == source.places
    np.save(tmp_path / "images" / "0.npy", np.full((64, 64, 3), 9, np.uint8))
    monkeypatch.undo()
    with pytest.raises(InputError, match="all 9 tiles are empty"):
        tiled(tmp_path / "images", skip_empty=True)


def test_tiles_of_one_image_lie_in_one_split_with_its_label(tmp_path):
    for number in range(12):
        (tmp_path / f"c{number % 2}").mkdir(exist_ok=True)
        tifffile.imwrite(
            tmp_path / f"c{number % 2}" / f"{number}.tif", pixels(seed=number), tile=(32, 32), photometric="rgb"
        )
    train, test = (tiled(tmp_path, sources.imagefolder, split) for split in ("train", "test"))
    assert not set(train.paths) & set(test.paths)
    assert len(train) + len(test) == 12 * 35
    for row in range(len(test)):
        assert f"/c{test.labels[row]}/" in test.paths[row]
    some = train.subset(train.labels.nonzero()[:3, 0])
    np.testing.assert_array_equal(some.read(2), train.read(int(train.labels.nonzero()[2, 0])))


def test_a_png_beyond_pillows_limit_is_decoded_once_and_a_larger_one_refused(tmp_path, monkeypatch):
    (tmp_path / "images").mkdir()
    Image.fromarray(pixels()).save(tmp_path / "images" / "0.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1_000)
    with pytest.raises(InputError, match=r"cannot read .*0\.png: .*exceeds limit.* dataset\.tiles="):
        sources.folder("train", FolderKeys(str(tmp_path / "images"), None, 3, 1.0))
    monkeypatch.setattr(windows, "_DECODED", 1_000)
    with pytest.raises(InputError, match=r"130×100 pixels take .* a tiled TIFF or a \.npy file is read by window"):
        tiled(tmp_path / "images")
    monkeypatch.setattr(windows, "_DECODED", 2**20)
    assert len(tiled(tmp_path / "images")) == 35
    assert Image.MAX_IMAGE_PIXELS == 1_000
    with monkeypatch.context() as patch:
        patch.setattr(windows, "_decoded", None)
        assert len(tiled(tmp_path / "images")) == 35


def test_what_was_decoded_is_said_replaced_with_its_image_and_named_by_it_where_it_is_damaged(tmp_path):
    (tmp_path / "images").mkdir()
    for number in range(2):
        Image.fromarray(pixels(seed=number)).save(tmp_path / "images" / f"{number}.png")
    source, decoded = tiled(tmp_path / "images"), tmp_path / "cache" / "decoded"
    assert f"of 2 images; 2 of them decoded into {decoded}, " in source.description.lines()[2]
    first = {path.name for path in decoded.iterdir()}
    Image.fromarray(pixels(seed=7, height=90)).save(tmp_path / "images" / "1.png")
    source = tiled(tmp_path / "images")
    assert len({path.name for path in decoded.iterdir()} & first) == 1 == len(first) - 1
    # The image is what a user knows; what lies in the cache is its copy.
    last = len(source) - 1
    store = decoded / os.path.basename(source.stores[last])
    os.truncate(store, store.stat().st_size // 2)
    top, left = source.places[last]
    with pytest.raises(
        ImageError, match=rf"cannot read .*images/1\.png#{top},{left}: it ends .*decoded into {store}, which"
    ):
        source.read(last)
    store.unlink()
    assert tiled(tmp_path / "images").read(last).shape == (3, 32, 32)


def test_pages_are_no_alpha_channel_and_are_decoded_anew_where_one_alone_was(tmp_path, monkeypatch):
    array, path = pixels(bands=2), tmp_path / "images" / "0.tif"
    path.parent.mkdir()
    tifffile.imwrite(path, np.moveaxis(array, 2, 0), photometric="minisblack")
    for segment in (windows._SEGMENT, 0):  # read by window, and decoded as its strips are too large
        monkeypatch.setattr(windows, "_SEGMENT", segment)
        with pytest.raises(InputError, match=r"images have 2 bands: dataset\.channels=2 takes all"):
            tiled(path.parent, channels=1)
        assert np.array_equal(tiled(path.parent, channels=2).read(0), np.moveaxis(array[:32, :32], 2, 0))
    decoded, stat = Path(windows.store_of(str(path), tmp_path / "stores")), path.stat()
    place, state = decoded.stem.split("-")
    without_pages = hashlib.blake2b(f"{stat.st_size}\t{stat.st_mtime_ns}".encode(), digest_size=12).hexdigest()
    assert state != without_pages
    earlier = decoded.rename(decoded.with_name(f"{place}-{without_pages}.npy"))
    np.save(earlier, array[..., :1])
    assert windows.header(windows.store_of(str(path), tmp_path / "stores"))[1] == "uint8×2"
    with pytest.raises(ImageError, match=r"2 bands: dataset\.channels=2"):
        read_tile(str(path), str(decoded), (0, 0), 32, Reading(1))


def test_16_bits_are_scaled_by_the_range_of_all_tiles_and_a_damaged_tile_is_named(tmp_path):
    array = pixels(bands=1).astype(np.uint16) * 200
    tifffile.imwrite(tmp_path / "0.tif", array[..., 0], tile=(32, 32), photometric="minisblack", compression="zlib")
    source = tiled(tmp_path, channels=1)
    assert source.reading.value_range == (0, float(array.max()))
    top, left = source.places[20]
    expected = array[top : top + 32, left : left + 32, 0] / array.max()
    np.testing.assert_allclose(source.read(20)[0], expected, atol=1e-6)
    page = tifffile.TiffFile(tmp_path / "0.tif").pages[0]
    with (tmp_path / "0.tif").open("r+b") as opened:
        opened.seek(page.dataoffsets[-8])
        opened.write(bytes(50))
    damaged = []
    for row in range(len(source)):
        try:
            source.read(row)
        except ImageError as error:
            damaged.append((row, str(error)))
    assert 0 < len(damaged) < 10
    assert all(f"#{row // 7 * 16},{row % 7 * 16}: " in message for row, message in damaged)


@pytest.mark.parametrize(
    "keys", [{"size": 0}, {"size": "8"}, {"stride": -1}, {"skip_empty": 2}, {"sise": 8}, {"skip_empty": "yes"}]
)
def test_wrong_tiles_are_refused(tmp_path, keys):
    np.save(tmp_path / "0.npy", pixels())
    with pytest.raises(InputError, match=r"dataset\.tiles=.*: expected \{size: PIXELS, stride: PIXELS, skip_empty"):
        tiled(tmp_path, **keys)


def test_an_image_smaller_than_a_tile_is_refused_where_all_are(tmp_path):
    np.save(tmp_path / "0.npy", pixels())
    with pytest.raises(InputError, match=r"dataset\.tiles\.size=101: no image is as large, most have 130×100 pixels"):
        tiled(tmp_path, size=101)


def test_features_of_tiles_carry_their_places(cli, workdir):
    (workdir / "slides").mkdir()
    for number in range(2):
        tifffile.imwrite(workdir / "slides" / f"{number}.tif", pixels(seed=number), tile=(32, 32), photometric="rgb")
    words = ("dataset=folder", "dataset.root=slides", "dataset.tiles={size: 16, stride: 16}", "dataset.memory_gb=0")
    result = cli("pretrain", *QUICK, *words, "trainer.batch_size=16", "run_dir=run")
    assert result.status == 0, result.err
    assert "96 tiles of 16×16, 16 apart, of 2 images" in result.out
    assert json.loads((workdir / "run" / "data.json").read_text())["train"]["samples"] == 96
    for name in ("x.npz", "x.csv"):
        assert cli("embed", "run", f"out={name}").status == 0
    held = np.load("x.npz")
    lines = (workdir / "x.csv").read_text().splitlines()
    assert lines[0].startswith("name,split,index,label,class,top,left,f0")
    for row in (0, 50, 95):
        top, left = row % 48 // 8 * 16, row % 8 * 16
        assert (held["top"][row], held["left"][row]) == (top, left)
        assert held["names"][row].endswith(f"slides/{row // 48}.tif#{top},{left}")
        assert lines[row + 1].split(",")[-2 - held["features"].shape[1] :][:2] == [str(top), str(left)]
