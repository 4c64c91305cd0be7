"""sslctl export: a backbone as a file for other programs, loaded again by its own loader and compared on real images."""

import contextlib
import hashlib
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sslctl.config import InputError, user_path
from sslctl.data.loader import clean_batches
from sslctl.evaluation.chosen import Chosen, chosen
from sslctl.formats import FILE, FORMATS, Format, Lines, Network
from sslctl.methods.base import Method
from sslctl.preprocess import TextPreprocess
from sslctl.representation import alone
from sslctl.run_directory import TOKENIZER, now, versions
from sslctl.views.maker import clean


class ParityError(RuntimeError):
    """A file whose features are not the run's. It is not kept."""


@dataclass(frozen=True)
class Parity:
    """How far a file's features are from the run's. scale: the largest feature; where: the images that were compared.

    tensors: how many weights are the same to the bit, of formats that keep their names.
    """

    difference: float
    scale: float
    where: str
    tensors: int | None

    def words(self) -> str:
        same = "" if self.tensors is None else f"; all {self.tensors} tensors equal"
        return f"largest difference {self.difference:.2g} of features up to {self.scale:.3g}, on {self.where}{same}"


def export(config: Any) -> None:
    """Writes one file a run, with a description beside it."""
    for one in chosen(config, "train", few=True):
        kind = FORMATS[config.format]
        network = network_of(one)
        lines = kind.lines(network)
        out = _out(config, one, kind, network)
        print(one.title, flush=True)
        with _beside(out) as folder:
            file = folder / out.name
            kind.write(network, file)
            if isinstance(network.preprocess, TextPreprocess):
                file.with_suffix(f".{TOKENIZER}").write_text(one.source.tokenizer)
            parity = compared(one, kind, network, lines, file, config.images)
            if not parity.difference <= config.tolerance * parity.scale:  # NaN is no agreement either
                raise ParityError(
                    f"{out} is not written: loaded by {kind.loader}, its features are not the run's: {parity.words()}"
                    f" (tolerance={config.tolerance:g} of the largest)"
                )
            Path(f"{file}.md").write_text(description(one, network, config.format, lines, file, parity))
            for made in sorted(folder.iterdir()):
                made.replace(out.with_name(made.name))
        size = out.stat().st_size / 2**20
        print(f"  {out}: {network.width} {network.features} features of {network.preprocess.words()}, {size:,.2f} MiB")
        print(f"  loaded by {kind.loader}: {parity.words()}")
        print(f"  load it with these lines, which {out.name}.md says as well:\n")
        print("\n".join(f"    {line}" for line in _script(lines, out)), end="\n\n")


def _out(config: Any, one: Chosen, kind: Format, network: Network) -> Path:
    """Where the file goes. Raises InputError for another suffix than the format's, and for folders that cannot be made."""
    features = "" if network.features == "backbone" else f"-{network.features}"
    taker = f"-{config.format}" if config.format in ("torchvision", "timm") else ""
    name = f"{one.name}{features}{taker}{kind.suffix}"
    out = user_path(config.out) if config.out else one.folder / "export" / name
    if out.suffix != kind.suffix or out.is_dir():
        found = "a directory" if out.is_dir() else f"found {out.suffix or 'no suffix'}"
        raise InputError(f"out={out}: format={config.format} writes a {kind.suffix} file, {found}")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"out={out} cannot be written: {error.strerror}") from error
    return out


@contextlib.contextmanager
def _beside(out: Path) -> Iterator[Path]:
    """A folder for files that are not checked yet; gone afterwards."""
    try:
        folder = Path(tempfile.mkdtemp(prefix=".export-", dir=out.parent))
    except OSError as error:
        raise InputError(f"out={out} cannot be written: {error.strerror}") from error
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


# --- What is exported ---


class _Computed(nn.Module):
    """One of a method's features."""

    def __init__(self, method: Method, features: str):
        super().__init__()
        self.method, self.chosen = method, features

    def forward(self, images: Tensor) -> Tensor:
        return self.method.features(images)[self.chosen]


def network_of(one: Chosen) -> Network:
    """The network behind a subject's features: a backbone alone where that gives the same, else all that the method does."""
    subject, preprocess = one.subject, one.subject.preprocess
    with torch.no_grad():
        width = subject.function(preprocess.example(torch.device("cpu"))).shape[1]
    found = alone(one.method or subject.backbone, subject.function, preprocess)
    if found:
        return Network(found[0], *found, one.node, preprocess, subject.features, width)
    computed = _Computed(one.method, subject.features).eval()
    return Network(computed, None, {}, one.node, preprocess, subject.features, width)


# --- The check ---


@torch.no_grad()
def compared(one: Chosen, kind: Format, network: Network, lines: Lines, file: Path, count: int) -> Parity:
    """The features of real images by the run and by a file, which the lines for the user load.

    Raises ParityError for features of another shape, and for weights that are not the network's.
    """
    source, scope = one.source, {}
    exec("\n".join(_quoted(lines.load, file)), scope)
    tensors = kind.tensors and kind.tensors(network)
    if tensors is not None:
        loaded = scope["model"].state_dict()
        other = [name for name in loaded.keys() | tensors.keys() if not _same(loaded.get(name), tensors.get(name))]
        if other:
            raise ParityError(
                f"{file.name} is not written: loaded by {kind.loader}, {len(other)} of its {len(tensors)} tensors are not the"
                f" run's (first: {min(other)})"
            )
    rows = torch.arange(0, len(source), max(1, len(source) // count))[:count]
    difference, scale = 0.0, 0.0
    for taken in (rows[:1], rows[1:3], *rows[3:].split(32)):  # any number of images goes in
        settings = {"resize": network.preprocess.resize, "batch_size": 32, "workers": 0}
        for images in clean_batches(source, taken, **settings):
            images = clean(images) if images.dtype == torch.uint8 else images
            ours, theirs = one.subject.function(images).float(), _applied(lines, scope, images)
            if theirs.shape != ours.shape:
                raise ParityError(f"{file.name} gives features {tuple(theirs.shape)}, the run {tuple(ours.shape)}")
            worst = float((theirs - ours).abs().max())
            difference = worst if worst != worst else max(difference, worst)
            scale = max(scale, float(ours.abs().max()))
    words = f"{len(rows)} {'texts' if source.gives == 'tokens' else 'images'} of {source.name} ({source.split})"
    return Parity(difference, scale, words, None if tensors is None else len(tensors))


def _same(found: Tensor | None, wanted: Tensor | None) -> bool:
    return found is not None and wanted is not None and torch.equal(found, wanted)


def _applied(lines: Lines, scope: dict[str, Any], images: Tensor) -> Tensor:
    """(B, D) by the line that a user is given."""
    scope["images"] = scope["tokens"] = images.numpy() if lines.arrays else images
    exec(lines.use, scope)
    return torch.as_tensor(scope["features"]).float()


def _quoted(lines: list[str], file: Path) -> list[str]:
    return [line.replace(FILE, repr(str(file))) for line in lines]


def _script(lines: Lines, file: Path) -> list[str]:
    return [*_quoted(lines.load, file), lines.use]


# --- The description beside the file ---


def description(one: Chosen, network: Network, name: str, lines: Lines, file: Path, parity: Parity) -> str:
    """Markdown: what the file holds, what it expects, how it is loaded, how it was checked."""
    subject, used = one.subject, versions()
    texts = isinstance(network.preprocess, TextPreprocess)
    facts = {
        "format": name,
        "features": f"{network.width} for each {'text' if texts else 'image'}, `{network.features}`",
        "weights": one.title,
        "weights_sha256": subject.weights_sha256,
        "file_sha256": hashlib.sha256(file.read_bytes()).hexdigest(),
        **_input_facts(network, outside="mean" in lines.use),
        "checked": parity.words(),
        "made": f"{now()} with " + ", ".join(f"{package} {version}" for package, version in used.items()),
    }
    comment = f"  # {_input_words(network, lines.arrays)}"
    own = [] if name == "safetensors" else [*_preprocess_lines(network, file), ""]  # sslctl.load brings its own
    code = [*own, *_script(lines, Path(file.name))]
    listed = "\n".join(f"- {key}: {value}" for key, value in facts.items())
    return f"# {file.name}\n\n{listed}\n\n```python\n" + "\n".join(code) + f"{comment}\n```\n"


def _input_words(network: Network, arrays: bool) -> str:
    settings = network.preprocess
    if isinstance(settings, TextPreprocess):
        return f"tokens: (B, {settings.length}) int64{' array' if arrays else ''}"
    size = f"(B, {settings.channels}, {settings.image_size}, {settings.image_size})"
    return f"images: {size} float32{' array' if arrays else ''} in [0, 1]"


def _input_facts(network: Network, outside: bool) -> dict[str, str]:
    settings = network.preprocess
    if isinstance(settings, TextPreprocess):
        return {"input": f"{settings.length} tokens, [CLS] (2) first, filled up with [PAD] (0)"}
    colour = "RGB" if settings.channels == 3 else "greyscale"
    size, resize = settings.image_size, settings.resize
    buffers = network.backbone or settings
    mean, std = (
        [float(f"{v:.7g}") for v in (t.flatten().tolist() if isinstance(t, Tensor) else t)]
        for t in (buffers.mean, buffers.std)
    )
    inside = "not in the file: apply it first" if outside else "inside: give it images in [0, 1]"
    return {
        "input": f"{colour} images, (B, {settings.channels}, {size}, {size}) float32 in [0, 1]",
        "resize": f"shorter side to {resize} pixels, bilinear with antialiasing, then the central {size}×{size}",
        "normalisation": f"{inside}; mean {mean}, std {std}",
        **({"colours": "inside: only their lightness is seen"} if getattr(buffers, "sees_lightness", False) else {}),
    }


def _preprocess_lines(network: Network, file: Path) -> list[str]:
    """From a PIL image, or a string, to one row of the input."""
    settings = network.preprocess
    if isinstance(settings, TextPreprocess):
        length, name = settings.length, file.with_suffix(f".{TOKENIZER}").name
        return [
            "import tokenizers",
            "",
            f"tokenizer = tokenizers.Tokenizer.from_file({name!r})",
            "def preprocess(text):",
            f"    ids = [2, *tokenizer.encode(text).ids][:{length}]",
            f"    return ids + [0] * ({length} - len(ids))",
        ]
    mode = "L" if settings.channels == 1 else "RGB"
    return [
        "import torch",
        "from torchvision.transforms import v2",
        "",
        "preprocess = v2.Compose([",
        f'    v2.Lambda(lambda image: image.convert("{mode}")), v2.ToImage(),  # a PIL image',
        f"    v2.Resize({settings.resize}), v2.CenterCrop({settings.image_size}), v2.ToDtype(torch.float32, scale=True),",
        "])",
    ]
