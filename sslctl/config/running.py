"""One job: the configuration of a verb, composed and made the one that runs, for as long as it does."""

import contextlib
from collections.abc import Iterator
from typing import Any

from sslctl.config import diagnose
from sslctl.config.command_line import Prepared
from sslctl.errors import InputError


@contextlib.contextmanager
def running_job(verb: str, prepared: Prepared) -> Iterator[Any]:
    """Composes a verb's configuration; while the context lasts, `command_line` and the words of the job are its own.

    Raises InputError with all that is wrong with the words. A job may run inside another.
    """
    from hydra.core.global_hydra import GlobalHydra
    from hydra.core.hydra_config import HydraConfig
    from omegaconf import open_dict

    outer, outer_hydra = HydraConfig.instance().cfg, GlobalHydra.instance().hydra
    try:
        config = diagnose.compose_choices(verb, prepared, prepared.overrides, with_hydra=True)
    except InputError:
        raise
    except Exception as error:
        raise diagnose.explain(verb, prepared, error) from error
    finally:
        GlobalHydra.instance().hydra = outer_hydra
    HydraConfig.instance().set_config(config)
    with open_dict(config):
        del config["hydra"]
    try:
        yield config
    finally:
        HydraConfig.instance().cfg = outer
