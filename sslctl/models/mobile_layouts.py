"""How torchvision names the tensors of EfficientNets and MobileNets: it numbers the layers of a block, timm names them.

Renames for `sslctl.models.layouts`, (pattern, replacement) in order.
"""

_SEPARABLE = (("conv_dw", "bn1"), ("conv_pw", "bn2"))  # a block that does not expand
_INVERTED = (("conv_pw", "bn1"), ("conv_dw", "bn2"), ("conv_pwl", "bn3"))
_FUSED = (("conv_exp", "bn1"), ("conv_pwl", "bn2"))
_STEM = ((r"^features\.0\.0\.", "conv_stem."), (r"^features\.0\.1\.", "bn1."))


def _block(
    theirs: str, ours: str, layers: tuple[tuple[str, str], ...], squeezes: bool = False
) -> tuple[tuple[str, str], ...]:
    """Returns the renames of a block of convolutions with BatchNorm, and of its squeeze and excitation before the last."""
    renames = []
    for place, (convolution, norm) in enumerate(layers):
        number = place + (squeezes and place == len(layers) - 1)
        renames += [(rf"^{theirs}\.{number}\.0\.", rf"{ours}.{convolution}.")]
        renames += [(rf"^{theirs}\.{number}\.1\.", rf"{ours}.{norm}.")]
    between = rf"^{theirs}\.{len(layers) - 1}"
    squeeze = ((rf"{between}\.fc1\.", rf"{ours}.se.conv_reduce."), (rf"{between}\.fc2\.", rf"{ours}.se.conv_expand."))
    return (*renames, *(squeeze if squeezes else ()))


def _blocks_of(stages: tuple[int, ...]) -> list[tuple[int, str]]:
    """Returns the number in `features` and timm's name of each block of stages with so many."""
    names = [f"blocks.{stage}.{block}" for stage, count in enumerate(stages) for block in range(count)]
    return list(enumerate(names, 1))


_EFFICIENTNET_HEAD = ((r"^features\.[78]\.0\.weight$", "conv_head.weight"), (r"^features\.[78]\.1\.(?!block)", "bn2."))
EFFICIENTNET = (
    *_STEM,
    *_EFFICIENTNET_HEAD,
    *_block(r"features\.1\.(\d+)\.block", r"blocks.0.\1", _SEPARABLE, squeezes=True),
    *(
        rename
        for stage in range(2, 8)
        for rename in _block(rf"features\.{stage}\.(\d+)\.block", rf"blocks.{stage - 1}.\1", _INVERTED, squeezes=True)
    ),
)
EFFICIENTNET_V2 = (
    *_STEM,
    *_EFFICIENTNET_HEAD,
    *_block(r"features\.1\.(\d+)\.block", r"blocks.0.\1", (("conv", "bn1"),)),
    *(
        rename
        for stage in range(2, 8)
        for rename in _block(
            rf"features\.{stage}\.(\d+)\.block",
            rf"blocks.{stage - 1}.\1",
            _INVERTED if stage > 3 else _FUSED,
            squeezes=stage > 3,
        )
    ),
)
MOBILENET_V2 = (
    *_STEM,
    (r"^features\.18\.0\.", "conv_head."),
    (r"^features\.18\.1\.", "bn2."),
    (r"^(features\.1\.conv)\.1\.", r"\1.1.0."),  # the last convolution is not put together with its norm
    (r"^(features\.1\.conv)\.2\.", r"\1.1.1."),
    (r"^(features\.\d+\.conv)\.2\.", r"\1.2.0."),
    (r"^(features\.\d+\.conv)\.3\.", r"\1.2.1."),
    *(
        rename
        for number, block in _blocks_of((1, 2, 3, 4, 3, 3, 1))
        for rename in _block(rf"features\.{number}\.conv", block, _INVERTED if number > 1 else _SEPARABLE)
    ),
)


def _mobilenet_v3(stages: tuple[int, ...], squeezing: tuple[int, ...]) -> tuple[tuple[str, str], ...]:
    """Returns the renames of a MobileNetV3 with so many blocks a stage, of which these squeeze and excite, counted from 1."""
    last, ours = sum(stages) + 1, f"blocks.{len(stages)}.0"
    return (
        *_STEM,
        (rf"^features\.{last}\.0\.", f"{ours}.conv."),
        (rf"^features\.{last}\.1\.", f"{ours}.bn1."),
        (r"^classifier\.0\.", "conv_head."),  # the layer before the classifier, which timm's features have
        *(
            rename
            for number, block in _blocks_of(stages)
            for rename in _block(
                rf"features\.{number}\.block", block, _INVERTED if number > 1 else _SEPARABLE, number in squeezing
            )
        ),
    )


MOBILENET_V3_LARGE = _mobilenet_v3((1, 2, 3, 4, 2, 3), (4, 5, 6, 11, 12, 13, 14, 15))
MOBILENET_V3_SMALL = _mobilenet_v3((1, 2, 3, 2, 3), (1, 4, 5, 6, 7, 8, 9, 10, 11))
