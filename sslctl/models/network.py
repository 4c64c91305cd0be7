"""What a network must be to become a backbone, and what else it may be: read this to add one of your own."""

from typing import Protocol, runtime_checkable

from torch import Tensor

from sslctl.data.modality import Modality


@runtime_checkable
class Network(Protocol):
    """A torch.nn.Module that turns a batch into features.

    To add one, write its class in a module of your own, name it in my_configs/backbone/mine.yaml (`_target_: my_net.MyNet` and
    its arguments) and say `sslctl pretrain --config-dir my_configs allow=[my_net] backbone=mine`. The constructor is given the
    YAML's arguments and, by these names, what the data are: channels and image_size (pixels of a side, or (height, width) of
    images that are no squares); of texts, vocabulary and length (tokens). It raises ValueError for settings that cannot be.
    Normalisation is not its business, see `Backbone`.
    """

    embed_dim: int  # D, the width of the features

    def forward(self, x: Tensor) -> Tensor:
        """Normalised images (B, C, H, W), or token ids (B, L) int64, -> (B, D)."""


class NetworkOptions(Protocol):
    """What a network may have besides. Where it has not, the default holds, or what needs it is refused by name.

    layer_names returns the modules and parameters of each layer, from the input on; see `sslctl.models.layer_decay`.
    Methods that hide patches need timm's VisionTransformer or Eva as `model`; masked language modelling needs `tokens`,
    `embedding` and `vocabulary`, as `SmallTransformer` has them.
    """

    modality: Modality  # what it takes; default: IMAGES
    fixed_size: bool  # whether it takes images of image_size pixels only; default: False
    stem: str  # the plan's words for its first layers; default: "as the model defines it"

    def feature_map(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, D, h, w), the features before pooling, for methods that ask what is where."""

    def with_map(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(B, C, H, W) -> (B, D) as forward gives it, and (B, d, h, w), of places or patches: one forward for both."""

    def layer_names(self) -> list[tuple[str, ...]]:
        """Returns the layers, which optimizer.layer_decay counts."""
