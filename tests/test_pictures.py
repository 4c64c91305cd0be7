"""Pictures of a method: what it is asked, what it says, whether it is right, and the command that saves them."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from sslctl.cli import main
from sslctl.data.batch import Batch
from sslctl.data.text import text
from sslctl.methods.masked_language import completed
from sslctl.ops.text_image import GREY, RIGHT, WRONG, Word, written
from sslctl.random import Key
from sslctl.visuals.method_pictures import sheet
from tests.methods import SINGLE_VIEW, built, noise, tell, words_of
from tests.runs import differences, finish, slow, tensors
from tests.sequences import finished, language, numbered

ASKED = [
    name for name in SINGLE_VIEW if name != "diet"
]  # which of its images a view is of, DIET asks without a picture


def pictures(its, rows, seed=0):
    """A method's pictures of some rows of a batch, in eval mode; seed: of its views and of what is asked of them."""
    batch, rows = noise(its.config, its.method, 8, seed), torch.tensor(rows)
    views = {group: view[:, rows] for group, view in batch.views.items()}
    index = batch.index[rows]
    with torch.no_grad():
        return its.method.eval().pictures(Batch(views, batch.label[rows], index, Key(seed, 0, index)))


@pytest.mark.parametrize("name", ASKED)
def test_the_pictures_of_an_image_depend_on_seed_epoch_and_image_only(name):
    its = built(name)
    rows = [7, 3, 2, 4, 5, 1]  # one hole, one size of block for a batch: the first image's
    whole, part = pictures(its, rows), pictures(its, [7, 4, 5])
    assert whole.keys() == part.keys()
    for title, images in whole.items():
        torch.testing.assert_close(images[[0, 3, 4]], part[title], atol=1e-5, rtol=1e-4)
    other = pictures(its, rows, seed=1)
    assert any(not torch.equal(other[title], whole[title]) for title in list(whole)[1:])


@pytest.mark.parametrize("name", ASKED)
def test_pictures_are_images_beside_each_other(name):
    shown = pictures(built(name), [1, 2, 3])
    assert len(shown) >= 2
    for title, images in shown.items():
        assert len(images) == 3, title
        assert images.ndim == 4, title
        assert 0 <= images.min() <= images.max() <= 1, title


@pytest.mark.parametrize("name", ["mae", slow("inpainting"), slow("vae")])
def test_one_command_saves_the_pictures(name, run_of_method, tmp_path, capsys):
    out = tmp_path / "shown.png"
    assert main(["pictures", str(run_of_method(name)), "images=3", f"out={out}"]) == 0
    assert out.stat().st_size > 1000
    assert "3 images at step 10" in capsys.readouterr().out


def test_a_method_without_pictures_says_so(tmp_path, capsys):
    run = finish(tmp_path / "run", "method=simclr", "scheduler.warmup_epochs=0", "trainer.epochs=1")
    assert main(["pictures", str(run)]) == 2
    assert "method=simclr has no pictures to show" in capsys.readouterr().err
    assert main(["pictures"]) == 2
    assert "no run to show" in capsys.readouterr().err


def test_tensorboard_gets_pictures_and_changes_nothing(run_of_method, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    words = (*words_of("mae"), "trainer.tensorboard=true", "evaluation.knn_every_epochs=1")
    run = finish(tmp_path / "run", *words)
    events = EventAccumulator(str(run), size_guidance={"images": 0}).Reload()
    assert [event.step for event in events.Images("pictures")] == [0, 5, 10]
    assert differences(tensors(run), tensors(run_of_method("mae"))) == []


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
        logits = torch.nn.functional.one_hot(guess, 300).float()
        method.token_logits = lambda tokens, logits=logits: logits
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


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["verification", slow("order"), "language"])
def test_one_command_saves_a_picture_of_a_sequence_and_tensorboard_gets_it(kind, sequences, tmp_path, capsys):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    more = ("trainer.epochs=1", "trainer.tensorboard=true", "evaluation.knn_every_epochs=1")
    done = finished(kind, sequences, tmp_path / "run", *more)
    assert main(["pictures", str(done), "images=3"]) == 0
    assert (done / "pictures.png").stat().st_size > 1000
    assert f"3 {'texts' if kind == 'language' else 'images'} at step" in capsys.readouterr().out
    events = EventAccumulator(str(done), size_guidance={"images": 0}).Reload()
    assert len(events.Images("pictures")) == 2
