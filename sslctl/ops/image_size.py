"""How large images are: a number for squares of so many pixels a side, (height, width) for others."""

from collections.abc import Sequence

from sslctl.errors import InputError

ImageSize = int | tuple[int, int]


def image_size_of(value: int | Sequence[int], key: str = "image_size") -> ImageSize:
    """Returns a size from what a key or a file says: a number, or [height, width], equal ones as the number.

    Raises InputError, which names the key, for anything else.
    """
    sides = [value] if isinstance(value, int) else list(value)
    if len(sides) > 2 or not sides or not all(type(side) is int and side > 0 for side in sides):
        raise InputError(f"{key}={value}: expected a number of pixels, or [height,width]")
    return sides[0] if sides[0] == sides[-1] else (sides[0], sides[1])


def height_width(size: ImageSize) -> tuple[int, int]:
    """Returns both sides in pixels."""
    return size if isinstance(size, tuple) else (size, size)


def shorter_side(size: ImageSize) -> int:
    """Returns the smaller side in pixels, which says how far an image can be shrunk."""
    return min(height_width(size))


def in_words(size: ImageSize) -> str:
    """Returns a size for people: 224, or 96×128, the height first."""
    return "×".join(map(str, size)) if isinstance(size, tuple) else str(size)


def as_key(size: ImageSize) -> str:
    """Returns a size as a key takes it: 224, or [96,128]."""
    return f"[{size[0]},{size[1]}]" if isinstance(size, tuple) else str(size)


def shape_in_words(channels: int, size: ImageSize) -> str:
    """Returns the shape of an image: 3×224×224."""
    return "×".join(map(str, (channels, *height_width(size))))
