"""sslctl export: the backbone as a file of another library, loaded again and compared before it is handed out."""

import contextlib
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sslctl.errors import InputError, say, shown, user_path
from sslctl.evaluation.named_networks import NamedNetwork, named_networks
from sslctl.export.description import DIGEST, description
from sslctl.export.format import Format, Network
from sslctl.export.formats import FORMATS
from sslctl.export.verify import ParityError, compared, network_of
from sslctl.runs.atomic import make_folder_of, refuse_others_file, sync
from sslctl.runs.directory import TOKENIZER


def export(config: Any) -> None:
    """Writes one file a run, with a description beside it."""
    for one in named_networks(config, "train", few=True):
        kind = FORMATS[config.format]
        network = network_of(one)
        lines = kind.lines(network)
        out = _out(config, one, kind, network)
        say(one.title)
        with _beside(out) as folder:
            file = folder / out.name
            kind.write(network, file)
            if one.source.tokenizer:
                file.with_suffix(f".{TOKENIZER}").write_text(one.source.tokenizer)
            parity = compared(one, kind, network, file, config.images)
            if not parity.difference <= config.tolerance * parity.scale:  # NaN is no agreement either
                raise ParityError(
                    f"{out} is not written: loaded by {kind.loader}, its features are not the run's: {parity.describe()}"
                    f" (tolerance={config.tolerance:g} of the largest)"
                )
            Path(f"{file}.md").write_text(description(one, network, config.format, lines, file, parity))
            for checked in sorted(folder.iterdir()):
                sync(checked)
                checked.replace(out.with_name(checked.name))
        size = out.stat().st_size / 2**20
        say(f"  {out}: {network.width} {network.features} features of {network.preprocess.summary()}, {size:,.2f} MiB")
        say(f"  loaded by {kind.loader}: {parity.describe()}")
        say(f"  load it with these lines, which {out.name}.md says as well:", "")
        say(*(f"    {line}" for line in lines.script(out)), "")


def _out(config: Any, one: NamedNetwork, kind: Format, network: Network) -> Path:
    """Returns where the file goes. Raises InputError for another suffix than the format's, or a folder that cannot be made."""
    features = "" if network.features == "backbone" else f"-{network.features}"
    taker = f"-{config.format}" if config.format in ("torchvision", "timm") else ""
    # A run's own files say how its backbone is called: that is no way out of the folder.
    name = f"{shown(one.name).replace('/', '_')}{features}{taker}{kind.suffix}"
    out = user_path(config.out) if config.out else one.folder / "export" / name
    if out.suffix != kind.suffix or out.is_dir():
        place = "a directory" if out.is_dir() else f"found {out.suffix or 'no suffix'}"
        raise InputError(f"out={out}: format={config.format} writes a {kind.suffix} file, {place}")
    make_folder_of(out)
    _refuse_other(out)
    return out


def _refuse_other(out: Path) -> None:
    """Raises InputError for a file that is no export, which its description tells; says that an export is replaced."""
    note = Path(f"{out}.md")
    for path in (out, note):
        refuse_others_file(path, "export", lambda _: note.is_file() and DIGEST in note.read_bytes())
    if out.exists():
        say(f"{out} was exported before: it is replaced")


@contextlib.contextmanager
def _beside(out: Path) -> Iterator[Path]:
    """Yields a folder for files that are not checked yet; it is gone afterwards."""
    folder = Path(tempfile.mkdtemp(prefix=".export-", dir=out.parent))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
