"""Texts that carry the CRC-32 of what they hold: a JSON object as its last key, YAML in its first line.

One without is from before there were any, or edited by somebody who took it out: it is taken as it is.
"""

import re
import zlib

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


def _crc32(text: str) -> str:
    return f"{zlib.crc32(text.encode()):08x}"
