"""Words as pictures: what a method is asked, what it says, and whether it is right."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from sslctl.cli import main
from sslctl.data.text import text
from sslctl.methods.masked_language import completed
from sslctl.ops.text_image import GREY, RIGHT, WRONG, Word, written
from sslctl.visuals.method_pictures import sheet
from tests import test_sequences
from tests.built import tell
from tests.test_sequences import finished, language, numbered
from tests.training import slow

videos, texts, words = test_sequences.videos, test_sequences.texts, test_sequences.words


def shades(picture):
    """The colours (r, g, b) of a picture (3, h, w)."""
    return set(map(tuple, (picture * 255).round().int().flatten(1).T.tolist()))


@pytest.mark.parametrize("task", ["verification", "order"])
def test_the_card_of_a_film_says_answer_and_guess(task):
    rows, answers = 12, {"verification": 2, "order": 12}[task]
    cards = []
    for shift in (0, 1):  # right, then wrong, everywhere
        method, batch = numbered(task, rows=rows)
        _, label = method.eval().question(batch)
        tell(method.classifier, torch.nn.functional.one_hot((label + shift) % answers, answers).float())
        with torch.no_grad():
            shown = method.pictures(replace(batch, views={"frames": batch.views["frames"] / 5}))
        cards.append(shown["answer"])
        assert list(shown)[-1] == "answer"
        assert all(images.ndim == 4 and len(images) == rows for images in shown.values())
        assert sheet(shown).shape[1] > rows * 96
    right, wrong = cards
    assert right.shape == (rows, 3, 96, 96)
    assert all(RIGHT in shades(card) and WRONG not in shades(card) for card in right)
    assert all(WRONG in shades(card) and RIGHT not in shades(card) for card in wrong)
    same = label == label[0]
    assert torch.equal(right[same], right[:1].expand_as(right[same]))
    assert not any(torch.equal(card, right[0]) for card in right[~same])  # another answer is another card


def test_a_text_is_shown_as_it_is_read_and_as_it_is_completed():
    method, batch = language(length=16, rows=6)
    spelt = ["[PAD]", "[UNK]", "[CLS]", "[MASK]", *(f" w{i}" for i in range(4, 300))]
    batch = replace(batch, targets={"spelt": spelt})
    ids = batch.views["tokens"][0]
    _, place = method.eval().masked(ids, batch)
    wanted = ids.gather(1, place)
    seen = []
    for guess in (wanted, torch.full_like(wanted, 7)):
        said = torch.nn.functional.one_hot(guess, 300).float()
        method.said = lambda tokens, said=said: said
        with torch.no_grad():
            seen.append(list(method.pictures(batch).values()))
    (read, right), (again, wrong) = seen
    height = min(read.shape[2], again.shape[2])  # of the longer of question and answer
    assert torch.equal(read[:, :, :height], again[:, :, :height])
    assert read.shape == right.shape[:2] + read.shape[2:]
    assert all(GREY in shades(picture) for picture in read)
    assert all(RIGHT in shades(picture) and WRONG not in shades(picture) for picture in right)
    assert all(WRONG in shades(picture) for picture in wrong)
    assert (right[:, :, :height] != wrong[:, :, :height]).flatten(1).any(1).all()


def test_what_is_written_for_a_token():
    spelt = [f" {i}" for i in range(10)]
    assert completed(spelt, 5, 7, False) == [Word(" 5")]
    assert completed(spelt, 5, 5, True) == [Word(" 5", RIGHT)]
    assert completed(spelt, 5, 7, True) == [Word(" 7", WRONG), Word("[5]")]
    one, two = written([Word("a "), Word("b")], 100), written([Word("aaaaaaaaaa ")] * 3, 100)
    assert (one.shape, two.shape) == ((3, 16, 100), (3, 48, 100))
    assert one.min() < 0.1
    assert one.max() == 1


def test_tokens_are_spelt_as_they_stand_in_the_text(texts):
    source = text("train", str(texts), 32, 400, None)
    spelt = source.spelt()
    assert spelt[:4] == ("[PAD]", "[UNK]", "[CLS]", "[MASK]")
    assert len(spelt) == source.vocabulary
    piece = "".join(spelt[i] for i in source.tokens[0, 1:])
    whole = Path(source.paths[0]).read_text().replace("\n", "\\n")
    assert piece in whole


@pytest.mark.parametrize("kind", ["verification", slow("order"), "language"])
def test_one_command_saves_a_picture_and_tensorboard_gets_it(kind, words, tmp_path, capsys):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    more = ("trainer.epochs=1", "trainer.tensorboard=true", "evaluation.knn_every_epochs=1")
    done = finished(kind, words, tmp_path / "run", *more)
    assert main(["pictures", str(done), "images=3"]) == 0
    assert (done / "pictures.png").stat().st_size > 1000
    assert f"3 {'texts' if kind == 'language' else 'images'} at step" in capsys.readouterr().out
    events = EventAccumulator(str(done), size_guidance={"images": 0}).Reload()
    assert len(events.Images("pictures")) == 2
