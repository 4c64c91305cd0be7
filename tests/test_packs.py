"""dataset=hf and sslctl pack: what is packed reads as it did, what is damaged or of another kind is named."""

import json
import pickle
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from sslctl.data import packed, packed_folder, packing, sources
from sslctl.data.folders import FolderKeys
from sslctl.errors import InputError
from tests.conftest import QUICK
from tests.test_pixels import write_deep_png

datasets = pytest.importorskip("datasets")
BOTH = ("train", "test")


def write(out, **splits):
    with packing.new_folder(out) as folder:
        packing.write_pack(folder, splits, lambda done: None)
    return out


def read(root, split="train", **changes):
    return packed.hf(split, str(root), **{"image_size": None, "channels": 3, "memory_gb": 2} | changes)


@pytest.fixture(scope="module")
def files_pack(labelled_images, tmp_path_factory):
    """(sources, a pack of them). To be read only."""
    own = {split: sources.imagefolder(split, FolderKeys(str(labelled_images), None, 3, 0)) for split in BOTH}
    return own, write(tmp_path_factory.mktemp("packs") / "files", **own)


@pytest.fixture
def damaged(files_pack, tmp_path):
    """A copy of the pack, to be damaged."""
    return shutil.copytree(files_pack[1], tmp_path / "pack")


def test_packed_files_read_as_the_files_do_in_every_process_and_subset(files_pack):
    for split, source in files_pack[0].items():
        own = pickle.loads(pickle.dumps(read(files_pack[1], split, verify=True)))
        assert (own.classes, own.labels.tolist(), own.image_size) == (source.classes, source.labels.tolist(), 16)
        assert all(torch.equal(own.read(row), source.read(row)) for row in range(len(source)))
        part = own.subset(torch.tensor([9, 2]))
        assert torch.equal(part.read(1), source.read(2))
        assert part.describe(1).endswith(f"{split}#2")
    one, other = (read(files_pack[1], split).content_hash for split in BOTH)
    assert one != other
    assert one != read(files_pack[1], channels=1).content_hash


def test_packed_pixels_have_the_same_bits_in_memory_and_mapped(tmp_path):
    digits = sources.digits("test", 8).subset(torch.arange(20))
    pack = write(tmp_path / "pack", train=digits)
    for memory_gb in (2, 0):
        own = read(pack, channels=1, memory_gb=memory_gb)
        assert (own.images is None) == (memory_gb == 0)
        assert torch.equal(torch.stack([own.read(row) for row in range(20)]), digits.images)
    with pytest.raises(InputError, match=r"has pixels of 1 channels: dataset\.channels=1"):
        read(pack)


def test_a_pack_is_a_dataset_of_hugging_face_and_theirs_are_read(files_pack, tmp_path):
    theirs = datasets.load_from_disk(str(files_pack[1]))
    assert {split: len(rows) for split, rows in theirs.items()} == {"train": 32, "test": 32}
    assert np.array_equal(
        np.asarray(theirs["train"][3]["image"]), files_pack[0]["train"].read(3).permute(1, 2, 0).numpy()
    )
    # Shuffled, so that rows are found by indices; a label of words, several labels, a group.
    shuffled = theirs["test"].shuffle(seed=1)
    shuffled = shuffled.add_column("class", [f"kind {n % 3}" for n in range(32)]).add_column(
        "patient", [n // 4 for n in range(32)]
    )
    shuffled = shuffled.add_column("tags", [["x", "y"][: n % 3] for n in range(32)]).rename_column("label", "other")
    shuffled.save_to_disk(str(tmp_path / "one"))
    own = read(tmp_path / "one")
    rows = [np.asarray(row["image"]) for row in shuffled]
    assert all(np.array_equal(own.read(n).permute(1, 2, 0).numpy(), rows[n]) for n in range(32))
    assert [own.classes[n] for n in own.labels] == shuffled["class"][:]
    assert own.groups.tolist() == [n // 4 for n in range(32)] or len(own.groups.unique()) == 8
    several = read(tmp_path / "one", columns={"label": "tags"})
    assert several.targets.sum(0).tolist() == [sum(n % 3 > place for n in range(32)) for place in (0, 1)]
    with pytest.raises(InputError, match="is one split alone"):
        read(tmp_path / "one", "test")


@pytest.mark.parametrize(("bands", "suffix"), [(1, ".png"), (3, ".png"), (5, ".tif"), (5, ".npy")])
def test_deep_pixels_and_bands_are_packed_whole(tmp_path, bands, suffix):
    (tmp_path / "images").mkdir()
    for number in range(8):
        values = np.random.default_rng(number).integers(0, 4096, (8, 8, bands), dtype=np.uint16)
        file = tmp_path / "images" / f"{number}{suffix}"
        if suffix == ".npy":
            np.save(file, values)
        elif suffix == ".tif":
            pytest.importorskip("tifffile").imwrite(file, values.transpose(2, 0, 1), photometric="minisblack")
        elif bands == 3:
            write_deep_png(file, values)
        else:
            Image.fromarray(values[..., 0]).save(file)
    source = sources.folder("train", FolderKeys(str(tmp_path / "images"), None, bands, 0))
    pack = write(tmp_path / "pack", train=source)
    own = read(pack, channels=bands)
    assert own.reading == source.reading
    assert own.reading.value_range is not None
    assert all(torch.equal(own.read(row), source.read(row)) for row in range(8))
    if bands == 5:
        part = read(pack, bands=[4, 0, 1], range=12)
        assert torch.equal(part.read(3), read(pack, channels=5, range=12).read(3)[[4, 0, 1]])
    if suffix == ".npy":
        with pytest.raises(InputError, match=r"images have 5 bands: dataset\.channels=5 takes all"):
            read(pack)


DAMAGES = {
    "cut": (
        lambda pack: next(pack.glob("train/data-*.arrow")).write_bytes(b"x"),
        r"train/data-\S+ has 1 bytes, [\d,]+ were written",
    ),
    "lost": (lambda pack: next(pack.glob("test/data-*.arrow")).unlink(), r"test/data-\S+ is missing"),
    "notes": (lambda pack: (pack / packed_folder.PACK).write_text("{"), r"sslctl-pack\.json cannot be read"),
    "list": (lambda pack: (pack / "dataset_dict.json").unlink(), r"dataset_dict\.json is missing"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_pack_is_named(damaged, damage):
    DAMAGES[damage][0](damaged)
    with pytest.raises(InputError, match=rf"{damaged} is a damaged pack: {DAMAGES[damage][1]}"):
        read(damaged)


def test_a_changed_byte_is_noticed_where_it_is_looked_for(damaged):
    path = next(damaged.glob("train/data-*.arrow"))
    content = bytearray(path.read_bytes())
    content[-1000] ^= 1
    path.write_bytes(content)
    assert len(read(damaged)) == 32  # not looked for
    with pytest.raises(InputError, match="does not hold what was written"):
        read(damaged, verify=True)


def test_an_interrupted_packing_leaves_nothing_and_what_a_kill_left_goes(labelled_images, tmp_path):
    source = sources.imagefolder("train", FolderKeys(str(labelled_images), None, 3, 0))
    (tmp_path / ".pack.4000000.packing" / "train").mkdir(parents=True)  # no process has this number

    def stop(done):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), packing.new_folder(tmp_path / "pack") as folder:
        packing.write_pack(folder, {"train": source}, stop)
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "pack").mkdir()
    with pytest.raises(InputError, match="there is something already"):
        write(tmp_path / "pack", train=source)


def test_other_folders_are_told_what_they_are(tmp_path):
    with pytest.raises(InputError, match="was not written by save_to_disk"):
        read(tmp_path)
    (tmp_path / "shard-000.tar").touch()
    with pytest.raises(InputError, match=r"holds 1 tar files \(shard-000\.tar, …\).*sslctl pack dataset=folder"):
        read(tmp_path)


def test_mistakes_get_the_nearest_word(files_pack):
    with pytest.raises(InputError, match=r"dataset\.columns\.lable: expected image, label, group \(nearest: label\)"):
        read(files_pack[1], columns={"lable": "label"})
    with pytest.raises(InputError, match=r"dataset\.columns\.label=lable: .* has image, label \(nearest: label\)"):
        read(files_pack[1], columns={"label": "lable"})
    with pytest.raises(InputError, match=r"has no tset; there are train, test \(nearest: test\)"):
        read(files_pack[1], splits={"train": "train", "test": "tset"})


def test_a_folder_is_packed_and_pretrained_on_from_commands(labelled_images, cli, workdir):
    done = cli("pack", "dataset=imagefolder", f"dataset.root={labelled_images}", "out=packs/own")
    assert done.status == 0, done.err
    assert "packs/own: 32 train, 32 test images" in done.out
    words = (
        "dataset=hf",
        "dataset.root=packs/own",
        "dataset.verify=true",
        "run_dir=run",
        "evaluation.knn_every_epochs=1",
    )
    trained = cli("pretrain", *QUICK, *words)
    assert trained.status == 0, trained.err
    assert "split train of " in trained.out
    # The same images, the same order and views: the same training as from the files.
    cli(
        "pretrain",
        *QUICK,
        "dataset=imagefolder",
        f"dataset.root={labelled_images}",
        "dataset.memory_gb=0",
        "run_dir=other",
    )
    first, second = (
        [values["loss"] for line in lines if "loss" in (values := json.loads(line))]
        for run in ("run", "other")
        for lines in [(workdir / run / "metrics.jsonl").read_text().splitlines()]
    )
    assert first == second != []
    assert cli("pack", "dataset=digits", "out=packs/own").status == 2
