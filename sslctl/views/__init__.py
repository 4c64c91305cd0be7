"""Views: what the augmentation makes of a batch of images."""

from sslctl.random import Key
from sslctl.views.maker import ViewMaker, dropped_operations

__all__ = ["Key", "ViewMaker", "dropped_operations"]
