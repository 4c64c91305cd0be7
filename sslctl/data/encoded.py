"""An image file whose bytes lie inside another file, as in a pack; whatever reads image files takes it for a path."""

import io
from dataclasses import dataclass

from sslctl.ops.special_files import refuse_special


@dataclass(frozen=True)
class Encoded:
    """The bytes of an image file, and the name that it had, whose suffix tells its format."""

    name: str
    content: bytes

    def __str__(self) -> str:
        return self.name

    def lower(self) -> str:
        """Returns the name in small letters."""
        return self.name.lower()


ImageFile = str | Encoded  # a path, or the file itself


def stream(file: ImageFile) -> str | io.BytesIO:
    """Returns what Pillow, NumPy and others open: the path, or the bytes from their beginning. Raises OSError where none is."""
    if isinstance(file, Encoded):
        return io.BytesIO(file.content)
    refuse_special(file)
    return file
