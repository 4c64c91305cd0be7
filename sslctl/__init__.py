"""sslctl: pretrains vision backbones without labels. The command line is sslctl.cli; `load` gives Python a run's backbone."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sslctl.factory.backbone_file import load

__all__ = ["load"]


def __getattr__(name: str):
    """Imports torch only when something that needs it is asked for."""
    if name == "load":
        from sslctl.factory.backbone_file import load

        return load
    raise AttributeError(f"module 'sslctl' has no attribute {name!r}")
