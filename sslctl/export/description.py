"""The description beside an exported file: what it holds, what it expects, how it is loaded, how it was checked."""

import hashlib
import html
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from sslctl.data.modality import TEXTS
from sslctl.errors import shown
from sslctl.evaluation.named_networks import NamedNetwork
from sslctl.export.format import Lines, Network, literal
from sslctl.export.verify import Parity
from sslctl.models.preprocess import Preprocess
from sslctl.ops.image_size import height_width, in_words
from sslctl.runs.directory import TOKENIZER, now, versions

DIGEST = b"\n- weights_sha256: "  # in every description


@dataclass(frozen=True)
class Input:
    """What a network expects. shape: of the tensor, after its name. facts: for people. lines: Python to one row of it."""

    shape: str
    facts: dict[str, str]
    lines: list[str]


def description(one: NamedNetwork, network: Network, name: str, lines: Lines, file: Path, parity: Parity) -> str:
    """Returns Markdown. name: of the format. lines: those that load the file and use it."""
    subject, used = one.subject, versions()
    modality = network.preprocess.modality
    expected = _text_input(network, file) if modality == TEXTS else _image_input(network, outside="mean" in lines.use)
    facts = {
        "format": name,
        "features": f"{network.width} for each {modality.name}, `{network.features}`",
        "weights": _as_text(one.title),
        "weights_sha256": subject.weights_sha256,
        "file_sha256": hashlib.sha256(file.read_bytes()).hexdigest(),
        **expected.facts,
        "checked": parity.describe(),
        "made": f"{now()} with " + ", ".join(f"{package} {version}" for package, version in used.items()),
    }
    comment = f"  # {expected.shape.format(' array' if lines.arrays else '')}"
    own = [] if name == "safetensors" else [*expected.lines, ""]  # sslctl.load brings its own
    code = [*own, *lines.script(Path(file.name))]
    bullets = "\n".join(f"- {key}: {value}" for key, value in facts.items())
    return f"# {_as_text(file.name)}\n\n{bullets}\n\n```python\n" + "\n".join(code) + f"{comment}\n```\n"


def _as_text(name: str) -> str:
    """Returns a name for Markdown, where it is neither markup nor several lines."""
    return html.escape(shown(name), quote=False)


def _text_input(network: Network, file: Path) -> Input:
    length, name = literal(network.preprocess.length), file.with_suffix(f".{TOKENIZER}").name
    return Input(
        f"tokens: (B, {length}) int64{{}}",
        {"input": f"{length} tokens, [CLS] (2) first, filled up with [PAD] (0)"},
        [
            "import tokenizers",
            "",
            f"tokenizer = tokenizers.Tokenizer.from_file({name!r})",
            "def preprocess(text):",
            f"    ids = [2, *tokenizer.encode(text).ids][:{length}]",
            f"    return ids + [0] * ({length} - len(ids))",
        ],
    )


def _image_input(network: Network, outside: bool) -> Input:
    """outside: whether the normalisation is not in the file."""
    settings = network.preprocess
    height, width = map(literal, height_width(settings.image_size))
    resize, mode, colour = literal(settings.resize), "RGB", "RGB"
    if settings.channels == 1:
        mode, colour = "L", "greyscale"
    of_arrays = settings.channels not in (1, 3) or settings.value_range is not None
    low, high = settings.value_range or (0, 255)
    if of_arrays:
        colour = f"{settings.channels}-band"
    shape = f"(B, {literal(settings.channels)}, {height}, {width}) float32"
    buffers = network.backbone or settings
    mean, std = (
        [float(f"{v:.7g}") for v in (t.flatten().tolist() if isinstance(t, Tensor) else t)]
        for t in (buffers.mean, buffers.std)
    )
    inside = "not in the file: apply it first" if outside else "inside: give it images in [0, 1]"
    return Input(
        f"images: {shape}{{}} in [0, 1]",
        {
            "input": f"{colour} images, {shape} in [0, 1]"
            + (f", from values of {low:g} to {high:g}" if of_arrays else ""),
            "resize": f"{_resized(settings)}, bilinear with antialiasing, then the central {height}×{width}",
            "normalisation": f"{inside}; mean {mean}, std {std}",
            **(
                {"colours": "inside: only their lightness is seen"} if getattr(buffers, "sees_lightness", False) else {}
            ),
        },
        _of_arrays(settings, low, high)
        if of_arrays
        else _of_other_shapes(settings, mode)
        if isinstance(settings.image_size, tuple)
        else [
            "import torch",
            "from torchvision.transforms import v2",
            "",
            "preprocess = v2.Compose([",
            f'    v2.Lambda(lambda image: image.convert("{mode}")), v2.ToImage(),  # a PIL image',
            f"    v2.Resize({resize}), v2.CenterCrop({height}), v2.ToDtype(torch.float32, scale=True),",
            "])",
        ],
    )


def _covered(settings: Preprocess) -> tuple[int, int]:
    """Returns the height and width that an image is made to cover, where these are no squares."""
    sides = height_width(settings.image_size)
    return tuple(settings.resize * side // min(sides) for side in sides)


def _resized(settings: Preprocess) -> str:
    """Returns how an image is resized before its central part is cut out."""
    if isinstance(settings.image_size, tuple):
        return f"as small as covers {in_words(_covered(settings))} pixels"
    return f"shorter side to {literal(settings.resize)} pixels"


def _resizing_lines(settings: Preprocess) -> list[str]:
    """Returns the lines from a tensor called image, (C, H, W), to its central part."""
    size = ", ".join(map(literal, height_width(settings.image_size)))
    if not isinstance(settings.image_size, tuple):
        resize, side = literal(settings.resize), literal(settings.image_size)
        return [f"    return F.center_crop(F.resize(image, [{resize}], antialias=True), [{side}])"]
    rows, columns = map(literal, _covered(settings))
    return [
        "    height, width = image.shape[-2:]",
        f"    size = [max({rows}, height * {columns} // width), max({columns}, width * {rows} // height)]",
        f"    return F.center_crop(F.resize(image, size, antialias=True), [{size}])",
    ]


def _of_arrays(settings: Preprocess, low: float, high: float) -> list[str]:
    """Returns the lines that make an input of an array, of bands or depths that pictures have not got."""
    return [
        "import torch",
        "from torchvision.transforms.v2 import functional as F",
        "",
        "def preprocess(array):  # (H, W, bands)",
        f"    image = torch.from_numpy(((array.astype('float32') - {low!r}) / {high - low!r}).clip(0, 1)).permute(2, 0, 1)",
        *_resizing_lines(settings),
    ]


def _of_other_shapes(settings: Preprocess, mode: str) -> list[str]:
    """Returns the lines that make an input of a picture, of a backbone whose images are no squares."""
    *lines, last = _resizing_lines(settings)
    return [
        "import torch",
        "from torchvision.transforms.v2 import functional as F",
        "",
        "def preprocess(image):  # a PIL image",
        f'    image = F.to_image(image.convert("{mode}"))',
        *lines,
        f"    return F.to_dtype({last.removeprefix('    return ')}, torch.float32, scale=True)",
    ]
