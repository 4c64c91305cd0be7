"""Words as pictures, for methods whose questions and answers are no images.

In the font that Pillow brings with it, which has ASCII and little more: other letters are boxes.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from torch import Tensor

Colour = tuple[int, int, int]
BLACK, GREY, WHITE = (0, 0, 0), (215, 215, 215), (255, 255, 255)
RIGHT, WRONG = (86, 180, 233), (230, 159, 0)  # blue and orange, told apart by the colour-blind too (Okabe & Ito 2008)
LINE, _MARGIN, _CARD = 16, 4, 96  # pixels: of a line of words, around them, and of a card's side


@dataclass(frozen=True)
class Word:
    """ground: what it is marked with. It is written as it is, spaces and all, and not divided between lines."""

    text: str
    ground: Colour | None = None


def written(words: Iterable[Word], width: int) -> Tensor:
    """(3, h, width) in [0, 1]: words one after the other, black on white, in as many lines as it takes."""
    probe = ImageDraw.Draw(Image.new("L", (1, 1)))
    places, x, line = [], _MARGIN, 0
    for word in words:
        space = probe.textlength(word.text)
        if x > _MARGIN and x + space > width - _MARGIN:
            x, line = _MARGIN, line + 1
        places.append((word, x, line, space))
        x += space
    image = Image.new("RGB", (width, LINE * (line + 1)), WHITE)
    draw = ImageDraw.Draw(image)
    for word, left, row, space in places:
        if word.ground:
            draw.rectangle((left, LINE * row + 1, left + space, LINE * row + LINE - 2), fill=word.ground)
        draw.text((left, LINE * row + 2), word.text, fill=BLACK)
    pixels = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).view(image.height, image.width, 3)
    return pixels.permute(2, 0, 1).float() / 255


def card(question: str, answer: str, guess: str) -> Tensor:
    """(3, 96, 96): the right answer, and the network's on blue where it is right, on orange where it is wrong."""
    right = guess == answer
    lines = [
        [Word(f"{question} {answer}")],
        [Word("said: "), Word(guess, RIGHT if right else WRONG)],
        [Word("right" if right else "wrong")],
    ]
    return equally_high([torch.cat([written(line, _CARD) for line in lines], 1)], _CARD)[0]


def plain(text: str) -> list[Word]:
    """The words of a sentence, unmarked."""
    return [Word(f"{word} ") for word in text.split()]


def equally_high(pictures: Sequence[Tensor], least: int = 0) -> list[Tensor]:
    """(3, h, w) each -> (3, H, w) each, at least `least` high: white below the shorter ones."""
    height = max(least, *(picture.shape[1] for picture in pictures))
    return [F.pad(picture, (0, 0, 0, height - picture.shape[1]), value=1.0) for picture in pictures]
