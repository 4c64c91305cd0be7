"""What a dataset's samples are: images, videos or texts. What differs between them outside their own files is said here."""

from dataclasses import dataclass

from torch import Tensor

from sslctl.views import Key, ViewMaker


@dataclass(frozen=True)
class Modality:
    """One kind of data, here images. A Source has it and a Method takes it, and the two must agree.

    name, plural: the words of messages. dataset: what a user writes to get such data. group: the group of a Batch's views that
    these data become. network_arguments: what a network's constructor is told of the data; network_example: what a user writes
    to get such a network. visible: whether a person can look at a sample. augmentation: the plan's words for the views, {} of
    these sizes.
    """

    name: str
    plural: str
    dataset: str
    group: str
    network_arguments: tuple[str, ...] = ("channels", "image_size")
    network_example: str = "backbone=small_resnet, or dataset=text"
    visible: bool = True
    augmentation: str = "views: {}"

    def views_of(self, samples: Tensor, views: ViewMaker, key: Key) -> dict[str, Tensor]:
        """Samples in memory (B, C, H, W) uint8 -> each group's views (V, B, C, h, w) in [0, 1]."""
        return views(samples, key)

    def finish(self, crops: dict[str, Tensor], views: ViewMaker, key: Key) -> dict[str, Tensor]:
        """The workers' crops (V, B, C, h, w) uint8 of each group -> the same shapes in [0, 1]."""
        return views.finish(crops, key)


class _Videos(Modality):
    def finish(self, crops: dict[str, Tensor], views: ViewMaker, key: Key) -> dict[str, Tensor]:
        """(1, B · T, C, h, w) uint8 -> (1, B, T, C, h, w) in [0, 1], all T frames of a sample treated alike."""
        frames = crops["global"].shape[1] // len(key.index)
        finished = views.finish(crops, key.of(key.index.repeat_interleave(frames)))
        return {self.group: finished["global"].unflatten(1, (-1, frames))}


class _Texts(Modality):
    def views_of(self, samples: Tensor, views: ViewMaker, key: Key) -> dict[str, Tensor]:
        """(B, L) int64 -> (1, B, L): a text's one view is the text itself."""
        return {self.group: samples[None]}


IMAGES = Modality("image", "images", "images", group="global")
VIDEOS = _Videos("video", "videos", "videos: dataset=frames", group="frames", augmentation="of each frame {}")
TEXTS = _Texts(
    *("text", "texts", "texts: dataset=text"),
    group="tokens",
    network_arguments=("vocabulary", "length"),
    network_example="backbone=small_transformer",
    visible=False,
    augmentation="no augmentation",
)
