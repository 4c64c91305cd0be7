"""The note beside an exported file: what it is and how to load it."""

import hashlib
from pathlib import Path

from torch import Tensor

from sslctl.evaluation.named_networks import NamedNetwork
from sslctl.export.formats import Lines, Network
from sslctl.export.verify import Parity, _script
from sslctl.models.preprocess import TextPreprocess
from sslctl.runs.directory import TOKENIZER, now, versions


def description(one: NamedNetwork, network: Network, name: str, lines: Lines, file: Path, parity: Parity) -> str:
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
        "checked": parity.describe(),
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
