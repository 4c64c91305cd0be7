"""Texts: pieces and vocabularies, masked tokens, runs and their evaluation with their own tokenizer."""

import json

import pytest
import torch

import sslctl
from sslctl.cli import main
from sslctl.data.text import CLS, MASK, text
from sslctl.errors import InputError
from sslctl.factory.from_run import load_method
from sslctl.models.text_transformer import SmallTransformer
from sslctl.runs import checkpoint
from tests.runs import newest
from tests.sequences import finished, language, run

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


def test_padding_changes_nothing():
    network = SmallTransformer(16, 2, 2, 0.0, 50, 12).eval()
    ids = torch.randint(4, 50, (3, 8))
    padded = torch.cat([ids, torch.zeros(3, 4, dtype=torch.int64)], 1)
    torch.testing.assert_close(network(ids), network(padded), atol=1e-5, rtol=1e-4)


# --- Resume, processes ---


def test_features_of_a_run_are_those_of_its_checkpoint(texts, sequences, tmp_path):
    done = finished("language", sequences, tmp_path / "run")
    method = load_method(done)
    checkpoint.load(newest(done), method)
    loaded, _ = sslctl.load(done)
    ids = text("train", str(texts), 32, 400, None).tokens[:4]
    with torch.no_grad():
        assert torch.equal(loaded(ids), next(iter(method.eval().features(ids).values())))
    saved = json.loads((done / "tokenizer.json").read_text())
    assert saved["model"]["type"] == "BPE"


# --- Bad input ---

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
    printed = capsys.readouterr().out
    assert "no labels, since 1 of 4 files lie outside class folders" in printed
    assert "1 of 4 files" in printed.splitlines()[-1]
    (tmp_path / "test" / "c").mkdir()
    (tmp_path / "test" / "c" / "x.txt").write_text("another class " * 20)
    (tmp_path / "train" / "README.txt").unlink()
    with pytest.raises(InputError, match="class folder c does not exist"):
        text("test", str(tmp_path), 8, 300, None)
