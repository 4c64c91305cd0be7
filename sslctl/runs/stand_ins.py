"""Classes that training codes save beside their weights, and what stands in for them: nothing of theirs is imported or run."""

from typing import Any

# Settings, counters and histories. Their values are read and forgotten.
_OBJECTS = (
    "argparse.Namespace",
    "types.SimpleNamespace",
    "typing.Any",
    "datetime.datetime",
    "datetime.timedelta",
    *(f"pathlib.{kind}" for kind in ("Path", "PosixPath", "PurePosixPath", "WindowsPath", "PureWindowsPath")),
    *(f"pathlib._local.{kind}" for kind in ("Path", "PosixPath", "WindowsPath")),
    *(
        f"{module}.{name}"
        for module in ("builtins", "__builtin__")
        for name in ("int", "float", "str", "bool", "bytes")
    ),
    *(f"{module}.{name}" for module in ("builtins", "__builtin__") for name in ("dict", "list", "tuple", "slice")),
    "numpy.dtype",
    "numpy.ndarray",
    *(f"numpy.{core}.multiarray.{name}" for core in ("core", "_core") for name in ("scalar", "_reconstruct")),
    *(f"numpy.dtypes.{kind}{bits}DType" for kind in ("Int", "UInt", "Float") for bits in (8, 16, 32, 64)),
    *(f"numpy.dtypes.{kind}DType" for kind in ("Bool", "Str", "Bytes", "Long", "ULong", "LongLong", "DateTime64")),
    *(f"omegaconf.{name}" for name in ("dictconfig.DictConfig", "listconfig.ListConfig", "base.SCMode")),
    *(f"omegaconf.base.{name}" for name in ("Metadata", "ContainerMetadata")),
    *(
        f"omegaconf.nodes.{kind}Node"
        for kind in ("Any", "String", "Integer", "Float", "Boolean", "Bytes", "Path", "Enum")
    ),
    "mmengine.logging.history_buffer.HistoryBuffer",
    *(
        f"{package}.callbacks.{module}"
        for package in ("pytorch_lightning", "lightning.pytorch")
        for module in ("model_checkpoint.ModelCheckpoint", "early_stopping.EarlyStopping")
    ),
)
# Dictionaries of their own: called, or made and then filled.
_DICTIONARIES = (
    "collections.defaultdict",
    "easydict.EasyDict",
    "addict.addict.Dict",
    "yacs.config.CfgNode",
    "fvcore.common.config.CfgNode",
    "detectron2.config.config.CfgNode",
    "mmcv.utils.config.ConfigDict",
    "mmengine.config.config.ConfigDict",
    *(f"{package}.utilities.parsing.AttributeDict" for package in ("pytorch_lightning", "lightning.pytorch")),
    *(f"{package}.utilities.data.AttributeDict" for package in ("lightning_fabric", "lightning.fabric")),
)


class StandIn:
    """Takes whatever a pickle says of an object, and forgets it."""

    def __new__(cls, *_: Any) -> "StandIn":
        return super().__new__(cls)

    def __init__(self, *_: Any):
        pass

    def __setstate__(self, state: Any) -> None:
        pass


class StandInDictionary:
    """Whose objects are plain dictionaries, the only ones that torch's reader fills."""

    def __new__(cls, *_: Any) -> dict:
        return {}


STAND_INS = [(StandIn, name) for name in _OBJECTS] + [(StandInDictionary, name) for name in _DICTIONARIES]
