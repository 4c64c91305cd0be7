"""Files with the CRC-32 of what they hold: a JSON object as its last key, YAML in its first line, tensors in their metadata.

One without is from before there were any, or edited by somebody who took it out: it is taken as it is.
"""

import hashlib
import json
import re
import struct
import zlib
from pathlib import Path

from sslctl.ops.special_files import refuse_special

KEY = "crc32"
_JSON = re.compile(rf'(.*), "{KEY}": "([0-9a-f]{{8}})"(\s*\}}\s*)', re.DOTALL)
_BELOW = " of the lines below"


class WrongChecksum(ValueError):
    """A text that is not as it was written."""

    def __init__(self, where: str):
        super().__init__(f"not as it was written: its checksum differs (who changed it on purpose takes out {where})")


def sign_json(text: str) -> str:
    """Returns the JSON of an object with its checksum; one without keys as it is."""
    body = text.rstrip().removesuffix("}").rstrip()
    return text if body == "{" else f'{body}, "{KEY}": "{_crc32(text)}"{text[len(body) :]}'


def check_json(text: str) -> str:
    """Returns the JSON of an object without its checksum. Raises WrongChecksum where it differs."""
    match = _JSON.fullmatch(text)
    if not match:
        return text
    unsigned = match[1] + match[3]
    if _crc32(unsigned) != match[2]:
        raise WrongChecksum(f'"{KEY}"')
    return unsigned


def sign_yaml(text: str) -> str:
    """Returns YAML with its checksum. In its first line: what is cut off still has it."""
    return f"# {KEY}: {_crc32(text)}{_BELOW}\n{text}"


def check_yaml(text: str) -> None:
    """Raises WrongChecksum where the checksum of some YAML differs, or its line is damaged itself."""
    first, _, rest = text.partition("\n")
    signed = first.startswith("#") or KEY in first or first.endswith(_BELOW)
    if signed and first != f"# {KEY}: {_crc32(rest)}{_BELOW}":
        raise WrongChecksum("its first line")


def sign_tensors(content: bytes) -> bytes:
    """Returns a safetensors file with its checksum: of its tensors, their names and all that it says of itself."""
    size, header = _header_of(content)
    about = {name: text for name, text in header.get("__metadata__", {}).items() if name != KEY}
    header["__metadata__"] = dict(sorted(about.items()))  # the library's order is drawn
    header["__metadata__"][KEY] = _crc32_of_tensors(header, memoryview(content)[8 + size :])
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # tensors begin at a multiple of 8
    return b"".join((struct.pack("<Q", len(text)), text, memoryview(content)[8 + size :]))


def check_tensors(path: Path) -> None:
    """Raises WrongChecksum where the checksum of a safetensors file differs."""
    content = path.read_bytes()
    size, header = _header_of(content)
    expected = header.get("__metadata__", {}).pop(KEY, None)
    if expected is not None and _crc32_of_tensors(header, memoryview(content)[8 + size :]) != expected:
        raise WrongChecksum(f"{KEY!r} of its metadata")


def _header_of(content: bytes) -> tuple[int, dict]:
    """Returns the bytes of a safetensors file's header, and what it holds: a JSON object behind its length, of 8 bytes."""
    (size,) = struct.unpack_from("<Q", content)
    return size, json.loads(content[8 : 8 + size])


def _crc32_of_tensors(header: dict, tensors: memoryview | bytes) -> str:
    return f"{zlib.crc32(tensors, zlib.crc32(json.dumps(header, sort_keys=True).encode())):08x}"


def _crc32(text: str) -> str:
    return f"{zlib.crc32(text.encode()):08x}"


def digest_of_file(path: Path | str) -> str:
    """Returns the SHA-256 of a file's bytes."""
    refuse_special(path)
    with open(path, "rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()
