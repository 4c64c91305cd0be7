"""Features: their order, their cache, and the fixed images of the online evaluation."""

import os
import stat
import time
from dataclasses import replace

import pytest
import torch
from PIL import Image

from sslctl.data.folders import FolderKeys
from sslctl.data.sources import digits
from sslctl.data.sources import folder as folder_source
from sslctl.errors import InputError
from sslctl.evaluation.features import cached, extract, refuse_non_finite
from sslctl.evaluation.online import online_rows
from sslctl.evaluation.subjects import pixels
from sslctl.evaluation.task import Reader
from sslctl.models.preprocess import Preprocess
from tests.conftest import write_images

# --- The online evaluation's images ---


@pytest.mark.parametrize(
    ("size", "queries", "bank"), [(5, 1, 4), (100, 10, 90), (1438, 143, 1295), (60_000, 5000, 20_000)]
)
def test_online_images_are_fixed_and_disjoint(size, queries, bank):
    first, second = online_rows(size)
    assert (len(first), len(second)) == (queries, bank)
    both = torch.cat([first, second])
    assert len(both.unique()) == len(both)
    assert both.min() >= 0
    assert both.max() < size
    torch.manual_seed(1)
    assert torch.equal(online_rows(size)[0], first)
    assert torch.equal(online_rows(size)[1], second)


# --- The cache of features ---


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "sslctl" / "features"


def counted(value=1.0, rows=10):
    calls = []

    def compute():
        calls.append(1)
        return torch.full((rows, 4), value)

    return compute, calls


def test_features_are_computed_once(folder):
    compute, calls = counted()
    first, second = (cached(("weights", "train"), compute, 1.0) for _ in range(2))
    assert len(calls) == 1
    assert torch.equal(first, second)
    assert [f.name for f in folder.iterdir() if f.name.startswith(".")] == []


@pytest.mark.parametrize("key", [("weights", "test"), ("weights2", "train"), ("weightstrain",)])
def test_features_of_another_key_are_computed(key, folder):
    cached(("weights", "train"), counted(1.0)[0], 1.0)
    compute, calls = counted(2.0)
    assert cached(key, compute, 1.0)[0, 0] == 2.0
    assert len(calls) == 1


def test_no_cache_keeps_nothing(folder):
    compute, calls = counted()
    for _ in range(2):
        cached(("weights", "train"), compute, 0)
    assert len(calls) == 2
    assert not folder.exists()


def cut(content):
    return content[: len(content) // 2]


@pytest.mark.parametrize(
    "damage", [lambda content: b"", cut, lambda content: b"\x00" * len(content)], ids=["empty", "half", "zeros"]
)
def test_a_damaged_cache_file_is_made_anew(damage, folder):
    compute, calls = counted()
    expected = cached(("weights", "train"), compute, 1.0).clone()
    (file,) = folder.iterdir()
    file.write_bytes(damage(file.read_bytes()))
    assert torch.equal(cached(("weights", "train"), compute, 1.0), expected)
    assert torch.equal(cached(("weights", "train"), compute, 1.0), expected)
    assert len(calls) == 2


def test_any_bit_of_a_cache_file_that_flips_is_noticed_and_said(folder, capsys):
    compute, calls = counted()
    expected = cached(("weights", "train"), compute, 1.0).clone()
    (file,) = folder.iterdir()
    whole = file.read_bytes()
    for place in range(0, len(whole), 2):
        file.write_bytes(whole[:place] + bytes([whole[place] ^ 1 << place % 8]) + whole[place + 1 :])
        before = len(calls)
        assert torch.equal(cached(("weights", "train"), compute, 1.0), expected)
        printed = capsys.readouterr().err
        assert (len(calls) > before) == (printed.count("\n") == 1) == ("calculated again" in printed)
        # What goes unnoticed changes no feature: names of the file's own metadata that nothing reads.
        assert len(calls) > before or 8 <= place < whole.index(b"}}"), f"byte {place}"
    assert len(calls) > 0.45 * len(whole)
    cached(("weights", "train"), compute, 1.0)
    assert capsys.readouterr().err == ""


def test_the_features_of_another_key_under_this_ones_name_are_noticed(folder):
    cached(("a",), counted(1.0)[0], 1.0)
    (file,) = folder.iterdir()
    content = file.read_bytes()
    cached(("b",), counted(2.0)[0], 1.0)
    (other,) = (path for path in folder.iterdir() if path != file)
    other.write_bytes(content)
    assert cached(("b",), counted(2.0)[0], 1.0)[0, 0] == 2.0


@pytest.mark.parametrize("mode", [None, 0o755, 0o777])
def test_the_cache_is_its_users_alone(mode, folder):
    if mode is not None:
        folder.mkdir(parents=True)
        for own in (folder, folder.parent):
            own.chmod(mode)
    outside = stat.S_IMODE(folder.parent.parent.stat().st_mode)
    cached(("a",), counted()[0], 1.0)
    assert [stat.S_IMODE(own.stat().st_mode) for own in (folder, folder.parent)] == [0o700, 0o700]
    assert stat.S_IMODE(folder.parent.parent.stat().st_mode) == outside


def test_a_cache_that_is_anothers_keeps_its_mode(folder, monkeypatch):
    folder.mkdir(parents=True, mode=0o755)
    own = os.getuid()
    monkeypatch.setattr(os, "getuid", lambda: own + 1)
    cached(("a",), counted()[0], 1.0)
    assert stat.S_IMODE(folder.stat().st_mode) == 0o755


def test_room_is_made_of_the_caches_own_files_alone(folder):
    cached(("a",), counted(rows=1000)[0], 1.0)
    (folder / "mine.safetensors").write_bytes(b"kept")
    cached(("b",), counted(rows=1000)[0], 1e-9)
    assert (folder / "mine.safetensors").read_bytes() == b"kept"
    assert len(list(folder.iterdir())) == 2


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_features_that_are_not_finite_are_refused_by_the_number_of_rows(value):
    features = torch.zeros(6, 3, 4)
    assert refuse_non_finite(features, "") is features
    features[1, 2, 0] = features[4, 0, 1] = features[4, 0, 2] = value
    with pytest.raises(InputError, match="2 of 6 rows of the pixels"):
        refuse_non_finite(features, "pixels")


@pytest.mark.parametrize("kept", [0, 1.0])
def test_a_subject_whose_features_are_not_finite_is_named_and_nothing_is_kept(kept, folder):
    def function(images):
        return images.flatten(1) / (images.flatten(1).sum(1, keepdim=True) > threshold)  # 0/0 and x/0 of dark images

    source, subject = digits("test", image_size=8), pixels(Preprocess(1, 8, 8, [0.5], [0.5]))
    sums = source.images.flatten(1).float().div(255).sum(1)
    threshold = sums.sort().values[2]  # three rows are not above it
    read = Reader(torch.device("cpu"), 0, kept)
    with pytest.raises(
        InputError, match=r"3 of 359 rows of the pixels features of dark weights on .*digits's test split"
    ):
        read(replace(subject, name="dark", function=function), source)
    assert not folder.exists()
    assert len(read(subject, source).features) == 359
    assert folder.exists() == bool(kept)


def test_the_oldest_files_make_room(folder):
    for name in ("a", "b", "c"):
        cached((name,), counted(rows=1000)[0], 1.0)
        time.sleep(0.02)
    cached(("a",), counted()[0], 1.0)  # used again: now the newest
    time.sleep(0.02)
    cached(("d",), counted(rows=1000)[0], 2.5 * 16_200 / 2**30)
    assert len(list(folder.iterdir())) == 2
    for name, kept in (("d", True), ("a", True), ("c", False), ("b", False)):
        compute, calls = counted(rows=1000)
        cached((name,), compute, 1.0)
        assert (not calls) == kept, name


def test_features_larger_than_the_limit_are_returned_all_the_same(folder):
    compute, _ = counted(rows=1000)
    assert cached(("a",), compute, 1e-9).shape == (1000, 4)
    assert len(list(folder.glob("*.safetensors"))) == 1  # the newest stays


def test_an_abandoned_extraction_keeps_nothing(folder):
    def compute():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        cached(("a",), compute, 1.0)
    assert not folder.exists() or list(folder.iterdir()) == []


@pytest.mark.parametrize("batch_size", [1, 7, 512])
def test_extraction_keeps_the_order_of_the_rows(batch_size):
    source = digits("test", image_size=8)
    rows = torch.tensor([5, 3, 3, 200])
    actual = extract(lambda images: images.flatten(1), source, rows, resize=8, batch_size=batch_size)
    assert torch.equal(actual, source.images[rows].flatten(1).float() / 255)


def test_files_that_were_written_again_are_read_again(tmp_path):
    """The names and sizes of bitmaps stay when their pixels change."""
    root = write_images(tmp_path / "images", count=4, suffix=".bmp")
    before = folder_source("train", FolderKeys(str(root), 16, 3, 1.0))
    for path in root.glob("*.bmp"):
        Image.new("RGB", (16, 16)).save(path)
    after = folder_source("train", FolderKeys(str(root), 16, 3, 1.0))
    assert before.content_hash == after.content_hash
    assert before.version != after.version
    assert folder_source("train", FolderKeys(str(root), 16, 3, 1.0)).version == after.version
