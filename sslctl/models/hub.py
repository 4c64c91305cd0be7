"""Weights of timm's models from the Hugging Face Hub, where there is a network or they have been downloaded before."""

import socket
from contextlib import contextmanager
from urllib.parse import urlsplit

from torch import nn

from sslctl.errors import InputError
from sslctl.models.backbones import Backbone, Timm
from sslctl.models.weights import copy_weights

_SECONDS = 5  # for a first answer


def load_pretrained(backbone: Backbone, *, partial: bool, key: str, resample_patches: bool) -> str:
    """Copies timm's weights of a backbone's model into it and returns a report, as `load_weights` does of a file.

    Raises InputError for other networks, for models without weights, and where these are neither here nor reachable.
    """
    if not isinstance(backbone.network, Timm):
        raise InputError(f"{key}.pretrained=true: timm's models alone have weights by name, others {key}.weights=FILE")
    model = _download(backbone.network.model_name, key)
    name = f"of timm's {backbone.network.model_name}"
    tensors = model.state_dict()
    return copy_weights(backbone, tensors, name, partial=partial, key=key, resample_patches=resample_patches)


def _download(name: str, key: str) -> nn.Module:
    """Returns a timm model with its weights, as timm makes it without a further argument."""
    import timm

    settings = timm.get_pretrained_cfg(name)
    if settings is None or not (settings.has_weights or settings.file):
        options = ", ".join(timm.list_pretrained(f"{name.partition('.')[0]}.*")[:6])
        raise InputError(f"{key}.pretrained=true: timm has no weights of {name}" + f" (of {options})" * bool(options))
    try:
        with _without_waiting():
            return timm.create_model(name, pretrained=True)
    except (OSError, RuntimeError, ValueError) as error:
        where = settings.hf_hub_id or settings.url
        raise InputError(
            f"{key}.pretrained=true: {where} is neither reachable nor in the Hub's cache here: download it where there is a"
            f" network, and give {key}.weights=FILE"
        ) from error


@contextmanager
def _without_waiting():
    """Looks into the cache alone while the Hub cannot be reached, which its library tries for a minute."""
    from huggingface_hub import constants

    host = urlsplit(constants.ENDPOINT)
    try:
        socket.create_connection((host.hostname, host.port or 443), timeout=_SECONDS).close()
        reachable = True
    except OSError:
        reachable = False
    before = constants.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = before or not reachable
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before
