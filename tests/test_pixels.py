"""Images of any depth and of up to 16 bands: read as they are, whatever holds them, and made into views without a loss."""

import json
import os
import re
import sys

import numpy as np
import pytest
import torch
from PIL import Image, TiffImagePlugin

from sslctl.data import arrays, files, sources
from sslctl.data.files import ImageError
from sslctl.data.folders import FolderKeys
from sslctl.data.loader import one_batch
from sslctl.data.pixels import BandsError, Reading
from sslctl.errors import InputError
from sslctl.models.preprocess import Preprocess, Transform
from sslctl.ops.color_space import visible
from sslctl.ops.special_files import SpecialFile
from sslctl.views import ViewMaker, dropped_operations
from sslctl.views.colour import luma
from tests.by_hand import view_settings
from tests.conftest import QUICK, write_images
from tests.test_tiles import write_page_by_page

tifffile = pytest.importorskip("tifffile")


def folder(root, channels, **changes):
    return sources.folder(
        "train", FolderKeys(str(root), **{"image_size": None, "memory_gb": 1.0} | changes, channels=channels)
    )


def scene(bands, seed=0, dtype=np.uint16, side=(10, 12)):
    top = {"u": 60_000, "i": 20_000, "f": 1}[np.dtype(dtype).kind]
    return (np.random.default_rng(seed).random((*side, bands)) * top - (top / 2 if dtype == np.int16 else 0)).astype(
        dtype
    )


WRITERS = {
    "interleaved.tif": lambda path, array: tifffile.imwrite(
        path, array, planarconfig="contig", photometric="minisblack"
    ),
    "planes.tif": lambda path, array: tifffile.imwrite(path, np.moveaxis(array, 2, 0), photometric="minisblack"),
    "last.npy": lambda path, array: np.save(path, array),
    "first.npy": lambda path, array: np.save(path, np.ascontiguousarray(np.moveaxis(array, 2, 0))),
    "packed.npz": lambda path, array: np.savez_compressed(path, image=array, mask=array[..., 0]),
}


@pytest.mark.parametrize("name", WRITERS)
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.int16, np.float32])
def test_every_band_of_every_type_is_read(tmp_path, name, dtype):
    array = (scene(5) // 256).astype(np.uint8) if dtype == np.uint8 else scene(5, dtype=dtype)
    WRITERS[name](tmp_path / name, array)
    source = folder(tmp_path, 5)
    read, low, high = source.read(0), float(array.min()), float(array.max())
    assert read.shape == (5, 10, 12)
    if dtype == np.uint8:
        np.testing.assert_array_equal(read, np.moveaxis(array, 2, 0))
    else:
        assert source.reading.value_range == (low, high)
        expected = (np.moveaxis(array, 2, 0).astype(np.float64) - low) / (high - low)
        np.testing.assert_allclose(read, expected, atol=1e-6)
    assert f"5 bands of {np.dtype(dtype)}" in source.description.lines()[1]
    some = folder(tmp_path, 2, bands=[4, 1], range=[low, high])
    torch.testing.assert_close(some.read(0), read[[4, 1]])
    assert some.content_hash != source.content_hash
    assert "bands 4, 1, counted from 0" in some.description.lines()[2]


def test_other_bands_than_the_keys_say_are_refused_with_both_ways_on(tmp_path):
    np.save(tmp_path / "0.npy", scene(5))
    with pytest.raises(InputError, match=r"images have 5 bands: dataset\.channels=5 takes all, dataset\.bands="):
        folder(tmp_path, 3)
    with pytest.raises(InputError, match=r"dataset\.bands=\[5, 0\]: images have 5 bands, counted from 0"):
        folder(tmp_path, 2, bands=[5, 0])
    with pytest.raises(InputError, match=r"dataset\.bands=\[0\]: expected dataset\.channels=2 numbers"):
        folder(tmp_path, 2, bands=[0])


def test_arrays_with_code_inside_are_not_opened(tmp_path):
    class Canary:
        def __reduce__(self):
            return (exec, ("raise SystemExit('it ran')",))

    np.save(tmp_path / "0.npy", np.array([Canary()], object), allow_pickle=True)
    with pytest.raises(InputError, match=r"cannot read .*0\.npy"):
        folder(tmp_path, 1)


@pytest.mark.parametrize("suffix", ["npy", "npz", "dcm", "tif"])
def test_a_pipe_in_the_place_of_an_array_is_named_and_not_waited_for(suffix, tmp_path):
    path = tmp_path / f"0.{suffix}"
    os.mkfifo(path)
    for read in (arrays.read, arrays.header):
        with pytest.raises(SpecialFile, match=re.escape(str(path))):
            read(str(path))


def test_arrays_beside_images_are_none_of_them(tmp_path):
    write_images(tmp_path, count=2)
    np.save(tmp_path / "000.npy", scene(1))
    assert folder(tmp_path, 3).description.left_out == {".npy": 1}


def test_16_bits_a_colour_and_a_fourth_band_are_not_cut_by_pillow(tmp_path):
    array = scene(3)
    for name in ("tif", "png"):
        (tmp_path / name).mkdir()
    tifffile.imwrite(tmp_path / "tif" / "0.tif", array, photometric="rgb")
    write_deep_png(tmp_path / "png" / "0.png", array)
    for name in ("tif", "png"):
        source = folder(tmp_path / name, 3, range=16)
        np.testing.assert_allclose(source.read(0), np.moveaxis(array, 2, 0) / 65535, atol=1e-6)
        grey = folder(tmp_path / name, 1, range=16).read(0)
        np.testing.assert_allclose(grey[0], array @ [0.299, 0.587, 0.114] / 65535, atol=1e-6)
    four = (scene(4) // 256).astype(np.uint8)
    tifffile.imwrite(tmp_path / "four.tif", four, photometric="rgb", extrasamples=["unspecified"])
    (tmp_path / "four").mkdir()
    (tmp_path / "four.tif").rename(tmp_path / "four" / "0.tif")
    np.testing.assert_array_equal(folder(tmp_path / "four", 4).read(0), np.moveaxis(four, 2, 0))
    assert "a fourth band, which is dropped: dataset.channels=4" in folder(tmp_path / "four", 3).description.warnings[0]
    (tmp_path / "two").mkdir()
    np.save(tmp_path / "two" / "0.npy", scene(2))
    assert "a second band, which is dropped: dataset.channels=2" in folder(tmp_path / "two", 1).description.warnings[0]
    assert folder(tmp_path / "two", 2).description.warnings == ()


def write_deep_png(path, array):
    """PNG specification 1.2: signature, IHDR, one IDAT of unfiltered big-endian rows, IEND."""
    import zlib

    def chunk(name, data):
        return len(data).to_bytes(4, "big") + name + data + zlib.crc32(name + data).to_bytes(4, "big")

    height, width, _ = array.shape
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in array)
    head = width.to_bytes(4, "big") + height.to_bytes(4, "big") + bytes([16, 2, 0, 0, 0])
    path.write_bytes(
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    )


def test_grey_pages_are_bands_also_where_colours_are_asked_for(tmp_path):
    """Pillow opens the first page alone, and says nothing of the others."""
    stack = scene(5, dtype=np.uint8, side=(20, 24))
    for name, pages in (
        ("five", range(5)),
        ("three", range(3)),
        ("two", range(2)),
        ("four", range(4)),
        ("one", range(1)),
        ("many", [0] * 40),
    ):
        (tmp_path / name).mkdir()
        planes = [Image.fromarray(stack[..., page]) for page in pages]
        planes[0].save(tmp_path / name / "0.tif", save_all=True, append_images=planes[1:])
    with pytest.raises(InputError, match=r"images have 5 bands: dataset\.channels=5 takes all, dataset\.bands=\[…\]"):
        folder(tmp_path / "five", 3)
    with pytest.raises(InputError, match=r"images have 40 bands: dataset\.bands=\[…\] with as many"):
        folder(tmp_path / "many", 1)
    whole = folder(tmp_path / "five", 5).read(0)
    assert torch.equal(whole, torch.from_numpy(stack).permute(2, 0, 1))
    assert torch.equal(folder(tmp_path / "five", 1, bands=[3]).read(0), whole[3:4])
    assert torch.equal(folder(tmp_path / "three", 3).read(0), whole[:3])
    # Neither the second page nor the fourth is an alpha channel, and three are no colours to be made grey.
    for name, count, channels in (("two", 2, 1), ("two", 2, 3), ("four", 4, 3), ("three", 3, 1)):
        with pytest.raises(InputError, match=rf"images have {count} bands: dataset\.channels={count} takes all"):
            folder(tmp_path / name, channels)
        with pytest.raises(ImageError, match=f"{count} bands: dataset.channels={count}"):
            files.read(str(tmp_path / name / "0.tif"), Reading(channels))
        assert torch.equal(folder(tmp_path / name, count).read(0), whole[:count])
    assert torch.equal(folder(tmp_path / "one", 3).read(0), whole[:1].expand(3, -1, -1))  # the negative control


def test_pages_of_colours_and_a_fourth_band_are_four_bands_each(tmp_path):
    """It is no alpha channel, which is refused."""
    pages = np.moveaxis(scene(8, dtype=np.uint8).reshape(10, 12, 2, 4), 2, 0)
    tifffile.imwrite(tmp_path / "0.tif", pages, photometric="rgb", extrasamples=["unspecified"])
    whole = torch.from_numpy(pages).permute(0, 3, 1, 2).flatten(0, 1)
    assert torch.equal(folder(tmp_path, 8).read(0), whole)


def test_pages_of_colours_are_three_bands_each(tmp_path):
    stack = scene(6, dtype=np.uint8, side=(20, 24))
    first, second = (Image.fromarray(np.ascontiguousarray(stack[..., part])) for part in (np.s_[:3], np.s_[3:]))
    for name in ("two", "one", "mixed", "separate", "written apart"):
        (tmp_path / name).mkdir()
    first.save(tmp_path / "two" / "0.tif", save_all=True, append_images=[second])
    tifffile.imwrite(
        tmp_path / "separate" / "0.tif",
        np.moveaxis(stack, 2, 0).reshape(2, 3, 20, 24),
        planarconfig="separate",
        photometric="rgb",
    )
    write_page_by_page(tmp_path / "written apart" / "0.tif", stack)
    with pytest.raises(InputError, match=r"images have 6 bands: dataset\.channels=6 takes all, dataset\.bands=\[…\]"):
        folder(tmp_path / "two", 3)
    whole = torch.from_numpy(stack).permute(2, 0, 1)
    for name in ("two", "separate", "written apart"):
        assert torch.equal(folder(tmp_path / name, 6).read(0), whole)
        assert torch.equal(folder(tmp_path / name, 3, bands=[3, 4, 5]).read(0), whole[3:])
    # One such file among others cannot be read; one page alone is a picture as any other.
    for row in range(3):
        first.save(tmp_path / "mixed" / f"{row}.tif", save_all=True, append_images=[second] * (row == 2))
    with pytest.raises(
        InputError, match=r"cannot read .*2\.tif: 6 bands: dataset\.channels=6, or dataset\.bands names 3"
    ):
        folder(tmp_path / "mixed", 3)
    first.save(tmp_path / "one" / "0.tif")
    assert torch.equal(folder(tmp_path / "one", 3).read(0), whole[:3])


def two_pages(mode):
    return [Image.fromarray(scene(3, dtype=np.uint8)[::step]).convert(mode) for step in (1, -1)]


@pytest.mark.parametrize(
    ("mode", "values"),
    [
        ("P", "PALETTE values"),
        ("CMYK", "SEPARATED values"),
        ("1", "1-bit values"),
        ("LA", "values with an alpha channel"),
        ("RGBA", "values with an alpha channel"),
    ],
)
def test_pages_whose_values_are_no_bands_are_refused(tmp_path, mode, values):
    first, second = two_pages(mode)
    first.save(tmp_path / "0.tif", save_all=True, append_images=[second])
    with pytest.raises(InputError, match=f"2 pages of {values} are no bands; expected each page in a file of its own"):
        folder(tmp_path, 3)


@pytest.mark.parametrize(
    ("photometric", "bands", "kind"), [("miniswhite", 1, "MINISWHITE"), ("ycbcr", 3, "YCBCR"), (40_000, 1, "40000")]
)
def test_pages_of_values_that_are_not_colours_are_refused(tmp_path, photometric, bands, kind):
    """Pillow inverts white is zero and converts YCbCr; tifffile gives both as they are stored, and knows no kind 40000."""
    array = np.moveaxis(scene(2 * bands, dtype=np.uint8).reshape(10, 12, 2, bands), 2, 0)
    known = photometric if isinstance(photometric, str) else "minisblack"
    tifffile.imwrite(tmp_path / "0.tif", array if bands == 3 else array[..., 0], photometric=known)
    if known != photometric:
        with tifffile.TiffFile(tmp_path / "0.tif", mode="r+b") as opened:
            opened.pages[0].tags["PhotometricInterpretation"].overwrite(photometric)
    with pytest.raises(BandsError, match=f"2 pages of {kind} values are no bands"):
        arrays.read(str(tmp_path / "0.tif"))


def test_pages_that_are_not_upright_are_refused(tmp_path):
    first, second = two_pages("L")
    for orientation in (1, 6):
        first.save(tmp_path / "0.tif", save_all=True, append_images=[second], tiffinfo={274: orientation})
        if orientation == 1:  # the negative control
            assert folder(tmp_path, 2).read(0).shape == (2, 10, 12)
            continue
        for channels in (2, 3):
            with pytest.raises(
                InputError, match="2 pages of orientation 6; several pages are read if they are upright"
            ):
                folder(tmp_path, channels)


@pytest.mark.parametrize("mode", ["P", "CMYK", "white is zero"])
def test_pages_that_are_stored_in_two_ways_are_two_pictures(tmp_path, mode):
    """Pillow takes them for alike, tifffile gives the first alone, whose samples are no colours yet."""
    page = two_pages("L" if mode == "white is zero" else mode)[0]
    white = {"tiffinfo": {262: 0}} if mode == "white is zero" else {}
    page.save(tmp_path / "one.tif", compression="tiff_lzw", **white)
    expected = files.read(str(tmp_path / "one.tif"), Reading(3))
    with TiffImagePlugin.AppendingTiffWriter(str(tmp_path / "two.tif"), True) as opened:
        page.save(opened, format="TIFF", compression="tiff_lzw", **white)
        opened.newFrame()
        page.save(opened, format="TIFF", **white)
    with Image.open(tmp_path / "two.tif") as by_pillow, tifffile.TiffFile(tmp_path / "two.tif") as opened:
        assert (by_pillow.n_frames, len(opened.series)) == (2, 2)
    assert torch.equal(files.read(str(tmp_path / "two.tif"), Reading(3)), expected)


def test_dicom_is_read_in_the_units_of_its_modality(tmp_path):
    pydicom = pytest.importorskip("pydicom")
    stored = np.arange(-24, 40, dtype=np.int16).reshape(8, 8) * 30
    for name, photometric in (("ct.dcm", "MONOCHROME2"), ("white.dcm", "MONOCHROME1")):
        data = pydicom.Dataset()
        data.file_meta = pydicom.dataset.FileMetaDataset()
        data.file_meta.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian
        data.file_meta.MediaStorageSOPClassUID = data.SOPClassUID = pydicom.uid.CTImageStorage
        data.file_meta.MediaStorageSOPInstanceUID = data.SOPInstanceUID = pydicom.uid.generate_uid()
        data.Rows = data.Columns = 8
        data.SamplesPerPixel, data.PhotometricInterpretation, data.PixelRepresentation = 1, photometric, 1
        data.BitsAllocated = data.BitsStored = 16
        data.HighBit, data.RescaleSlope, data.RescaleIntercept = 15, 2, -100
        data.PixelData = stored.tobytes()
        (tmp_path / name[:-4]).mkdir()
        data.save_as(tmp_path / name[:-4] / name, enforce_file_format=True)
    source = folder(tmp_path / "ct", 1, range=[-1000, 2000])
    assert source.description.pixels == {"float64": 1}
    np.testing.assert_allclose(source.read(0)[0], ((2.0 * stored - 100 + 1000) / 3000).clip(0, 1), atol=1e-6)
    assert folder(tmp_path / "ct", 1).reading.value_range == (2 * -24 * 30 - 100, 2 * 39 * 30 - 100)
    # Where the least value is white, bright is large all the same.
    white = folder(tmp_path / "white", 1).read(0)
    torch.testing.assert_close(white, 1 - folder(tmp_path / "ct", 1).read(0))


@pytest.mark.parametrize(("name", "package", "extra"), [("0.tif", "tifffile", "tiff"), ("0.dcm", "pydicom", "dicom")])
def test_a_missing_package_is_named_with_its_install_line(tmp_path, monkeypatch, name, package, extra):
    monkeypatch.setitem(sys.modules, package, None)
    (tmp_path / name).write_bytes(b"II*\0")
    with pytest.raises(InputError, match=rf"0\.\w+ needs {package}: pip install 'sslctl\[{extra}\]'"):
        folder(tmp_path, 5)


# --- Views ---


def test_colour_operations_are_left_out_where_there_are_no_colours():
    settings = view_settings("byol")
    of = {channels: dropped_operations(settings, [], channels) for channels in (1, 2, 3, 5)}
    assert of == {
        1: ["saturation", "hue", "grayscale"],
        2: ["saturation", "hue", "grayscale", "solarize"],
        3: [],
        5: ["saturation", "hue", "grayscale", "solarize"],
    }


def views_of(source, channels, count=8):
    settings = view_settings("simclr")
    maker = ViewMaker(settings, 12, tuple(dropped_operations(settings, [], channels)))
    return one_batch(source, maker, torch.arange(count), 0, torch.device("cpu")).views["global"]


@pytest.mark.parametrize("memory_gb", [1.0, 0.0])
def test_views_of_five_bands_are_those_of_each_band(tmp_path, memory_gb):
    """Crop, flip and blur treat bands alone, and brightness and contrast know the others by their mean only."""
    for number in range(8):
        np.save(tmp_path / f"{number}.npy", np.repeat(scene(1, number, side=(12, 12)), 5, 2))
    views = views_of(folder(tmp_path, 5, memory_gb=memory_gb), 5)
    grey = views_of(folder(tmp_path, 1, bands=[3], memory_gb=memory_gb), 1)
    assert views.shape == (2, 8, 5, 12, 12)
    torch.testing.assert_close(views, grey.expand_as(views), atol=1e-5, rtol=0)


@pytest.mark.parametrize("memory_gb", [1.0, 0.0])
def test_what_lies_below_a_256th_of_the_range_reaches_the_views(tmp_path, memory_gb):
    """Values from 0 to 200 of 65,535 are one level of 8 bits: all views would be black."""
    for number in range(8):
        pixels = (scene(1, number, side=(12, 12))[..., 0] // 300).astype(np.uint16)
        Image.fromarray(pixels).save(tmp_path / f"{number}.png")
    views = views_of(folder(tmp_path, 1, range=16, memory_gb=memory_gb), 1) * (65535 / 200)
    assert views.flatten(2).std(2).mean() > 0.05
    assert 0.2 < views.mean() < 0.8


def test_a_deep_image_is_cut_as_its_8_bit_twin(tmp_path):
    """The same picture in 8 and in 16 bits gives the same views, to the rounding of 8 bits."""
    for number in range(8):
        pixels = (scene(3, number, side=(14, 12)) // 256).astype(np.uint8)
        for name, array in (("8", pixels), ("16", pixels.astype(np.uint16) * 257)):
            (tmp_path / name).mkdir(exist_ok=True)
            tifffile.imwrite(tmp_path / name / f"{number}.tif", array, photometric="rgb")
    for memory_gb in (1.0, 0.0):
        eight, sixteen = (
            views_of(folder(tmp_path / name, 3, memory_gb=memory_gb, range=16), 3) for name in ("8", "16")
        )
        torch.testing.assert_close(sixteen, eight, atol=1e-6 if memory_gb else 0.1, rtol=0)


def test_the_luma_of_other_bands_is_their_mean_and_three_of_them_are_shown():
    images = torch.rand(2, 5, 3, 3)
    torch.testing.assert_close(luma(images), images.mean(1, keepdim=True))
    assert visible(images).shape == (2, 3, 3, 3)
    assert visible(images[:, :2]).shape == (2, 1, 3, 3)
    assert visible(images[0, :3]) is not None


# --- Mean and std ---


class Node(dict):
    __getattr__ = dict.__getitem__


IMAGENET = {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}


def test_mean_and_std_are_measured_where_imagenets_are_of_other_pixels(tmp_path):
    arrays = [scene(4, seed, np.float32) for seed in range(6)]
    for number, array in enumerate(arrays):
        array[..., 3] = 0.25
        np.save(tmp_path / f"{number}.npy", array)
    source = folder(tmp_path, 4, range=[0, 1])
    measured = Preprocess.of(Node(IMAGENET), source)
    pixels = np.concatenate([array.reshape(-1, 4) for array in arrays]).astype(np.float64)
    np.testing.assert_allclose(measured.mean, pixels.mean(0), atol=2e-6)
    np.testing.assert_allclose(measured.std, [*pixels.std(0)[:3], 1], atol=2e-6)
    assert Preprocess.of(Node(mean=[0.1] * 4, std=[1.0] * 4), source).mean == [0.1] * 4
    with pytest.raises(InputError, match=r"dataset\.mean=2 values for 4 channels"):
        Preprocess.of(Node(mean=[0.1] * 2, std=[1.0] * 4), source)
    write_images(tmp_path / "colours", count=3)
    assert Preprocess.of(Node(IMAGENET), folder(tmp_path / "colours", 3)).mean == IMAGENET["mean"]
    assert Preprocess.of(Node(mean=None, std=None), folder(tmp_path / "colours", 3)).mean != IMAGENET["mean"]


def test_arrays_become_the_input_that_their_file_would_be(tmp_path):
    array = scene(4, side=(12, 12))
    np.save(tmp_path / "0.npy", array)
    source = folder(tmp_path, 4)
    transform = Transform(Preprocess.of(Node(IMAGENET), source))
    torch.testing.assert_close(transform(array), source.read(0))
    torch.testing.assert_close(transform(torch.from_numpy(array).permute(2, 0, 1)), source.read(0))
    with pytest.raises(InputError, match=r"expected \(4, H, W\) numbers"):
        transform(array[..., :2])


# --- A run ---


def test_a_run_of_six_bands_from_plan_to_evaluation(cli, workdir):
    for number in range(32):
        name = workdir / "images" / f"c{number % 2}"
        name.mkdir(parents=True, exist_ok=True)
        array = scene(6, number, np.int16, (12, 12))
        array[..., number % 2] //= 4
        tifffile.imwrite(name / f"{number}.tif", array, photometric="minisblack", planarconfig="contig")
    words = ("dataset=imagefolder", "dataset.root=images", "dataset.channels=6")
    result = cli("pretrain", *QUICK, *words, "trainer.batch_size=8", "run_dir=run", "trainer.tensorboard=true")
    assert result.status == 0, result.err
    assert "6 bands of int16" in result.out
    assert "dropped    saturation, hue, grayscale" in result.out
    assert "measured on training images: dataset.mean=[…]" in result.out
    preprocess = json.loads((workdir / "run" / "preprocess.json").read_text())
    assert (preprocess["channels"], len(preprocess["mean"])) == (6, 6)
    assert cli("report", "run", "out=report.html").status == 0
    assert cli("views", *words, "out=views.png").status == 0
    result = cli("knn-eval", "run")
    assert result.status == 0, result.err
