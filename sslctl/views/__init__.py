"""Views: what the augmentation makes of a batch of images."""

from sslctl.views.maker import ViewMaker, dropped_operations
from sslctl.views.random import Key

__all__ = ["Key", "ViewMaker", "dropped_operations"]
