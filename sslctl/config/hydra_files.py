"""What the files of --config-dir may say of Hydra itself: nothing, unless it is code that the command line allows.

Hydra builds what its own node names (callbacks, launcher, sweeper), Python's logging builds handlers and formatters, and both
do so before a verb begins. So the node is compared, right after it is composed and before anything reads it, with the one that
sslctl's and Hydra's own files and the command line make.
"""

import pickle
from collections.abc import Iterator
from typing import Any

from hydra._internal import hydra as application
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra._internal.config_repository import ConfigRepository
from hydra.core.object_type import ObjectType
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from hydra.plugins.config_source import ConfigResult
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from sslctl.config.schema import CONFIGS
from sslctl.config.targets import allow_advice, allowed_by_user, is_below
from sslctl.errors import InputError

# Set by Hydra after it has merged the files; searchpath: of a primary file or the command line alone, both of them trusted.
_SET_BY_HYDRA = ("runtime", "overrides", "searchpath", "job.override_dirname")
_OWN_FILES = (str(CONFIGS), "hydra.conf")
_PARSED: dict[str, bytes] = {}  # path -> their ConfigResult, pickled, as what composes changes it
_MERGED: dict[str, bytes] = {}  # choices -> their configuration, before values are set on top
_NAMES_CODE = ("_target_", "()", "class")  # the latter two in a configuration of Python's logging
_PREFIXES = ("ext://", "cfg://")  # there, of values: an import, another part


class ParsedOnce(ConfigRepository):
    """Hydra's repository, which parses sslctl's and Hydra's own files once a process: `check` and a sweep compose many times."""

    def load_config(self, config_path: str) -> ConfigResult | None:
        source = self._find_object_source(config_path, ObjectType.CONFIG)
        if source is None or source.path not in _OWN_FILES:
            return super().load_config(config_path)
        if config_path not in _PARSED:
            _PARSED[config_path] = pickle.dumps(super().load_config(config_path))
        return pickle.loads(_PARSED[config_path])


class CheckedLoader(ConfigLoaderImpl):
    """Hydra's loader, which raises InputError where a file of the user's directories sets something of Hydra's.

    It is all that composes: one job, each job of a sweep (in another process too, where a launcher starts them), --cfg, --help,
    --info and completion.
    """

    def __init__(self, config_search_path: Any):
        super().__init__(config_search_path)
        self.repository = ParsedOnce(config_search_path)
        self.allowed = allowed_by_user()  # carried into the processes of a launcher

    def load_configuration(
        self,
        config_name: str | None,
        overrides: list[str],
        run_mode: RunMode,
        from_shell: bool = True,
        validate_sweep_overrides: bool = True,
    ) -> DictConfig:
        composed = super().load_configuration(config_name, overrides, run_mode, from_shell, validate_sweep_overrides)
        if all(_is_own(source) for source in composed.hydra.runtime.config_sources):
            return composed
        parsed = OverridesParser.create().parse_overrides(overrides)
        for_hydra = [o for o in parsed if o.is_hydra_override()]
        expected = self._without_user_files(config_name, for_hydra, run_mode)
        node = OmegaConf.to_container(composed.hydra, resolve=False)
        expected_overrides = {
            "hydra": [o.input_line for o in for_hydra],
            "task": [o.input_line for o in parsed if not o.is_hydra_override()],
        }
        if node["overrides"] != expected_overrides:  # each job of a sweep repeats them as the command line's
            raise InputError("a file of --config-dir sets hydra.overrides: only the command line may")
        if problems := _foreign(node, expected, self.allowed):
            raise InputError(*problems)
        return composed

    def _compose_config_from_defaults_list(self, defaults: list[Any], repo: Any) -> DictConfig:
        """Merges the files of a job; those of sslctl and Hydra alone, and of the same choices, once a process."""
        if not all(source.scheme() == "structured" or source.path in _OWN_FILES for source in repo.get_sources()):
            return super()._compose_config_from_defaults_list(defaults, repo)
        choices = repr(defaults)
        if choices not in _MERGED:
            composed = super()._compose_config_from_defaults_list(defaults, repo)
            try:
                _MERGED[choices] = pickle.dumps(composed)
            except pickle.PicklingError:  # a plugin's own class, that a launcher's process has imported twice
                return composed
        return pickle.loads(_MERGED[choices])

    def _without_user_files(self, config_name: str | None, overrides: list[Any], run_mode: RunMode) -> dict:
        """Returns Hydra's node as sslctl's and Hydra's files and the command line make it.

        A choice of a user's own file (hydra/launcher=cluster) is left out with what the command line sets in it.
        """
        loader = ConfigLoaderImpl(self.config_search_path)
        kept_out = ["hydra.searchpath"]
        for override in overrides:
            group = override.key_or_group
            if "/" in group and override.value() not in (None, *loader.get_group_options(group)):
                kept_out += [group, group.replace("/", ".")]
        lines = [o.input_line for o in overrides if not any(_is_part(o.key_or_group, path) for path in kept_out)]
        try:
            composed = loader.load_configuration(config_name, lines, run_mode)
        except HydraException:  # words that are for a user's file alone
            composed = loader.load_configuration(config_name, [], run_mode)
        return OmegaConf.to_container(composed.hydra, resolve=False)


def check_user_files() -> None:
    """Makes Hydra compose by a CheckedLoader from here on."""
    application.ConfigLoaderImpl = CheckedLoader


def _is_own(source: Any) -> bool:
    return source.schema == "structured" or source.path in _OWN_FILES


def _is_part(path: str, whole: str) -> bool:
    return path == whole or path.startswith((f"{whole}.", f"{whole}/"))


def _foreign(node: dict, expected: dict, allowed: list[str]) -> list[str]:
    """Returns a message for each part of Hydra's node that files of the user's directories set and nobody allows.

    A part is allowed where all the code that it names is. Only what is written there counts: a name, or a part, that another
    place gives (${…}) could be another one when it is read.
    """
    own = dict(_leaves(expected))
    other = {path: value for path, value in _leaves(node) if path not in own or own[path] != value}
    parts: dict[str, dict[str, Any]] = {}
    for path, value in other.items():
        if not any(_is_part(path, prefix) for prefix in _SET_BY_HYDRA):
            depth = 2 if path.startswith("callbacks.") else 1
            parts.setdefault(".".join(path.split(".")[:depth]), {})[path] = value
    messages = []
    for leaves in parts.values():
        code = {path: value for path, value in leaves.items() if _names_code(path, value)}
        refused = {path: v for path, v in code.items() if not (isinstance(v, str) and _is_allowed(v, allowed))}
        refused |= {path: v for path, v in leaves.items() if path not in code and (not code or _is_elsewhere(v))}
        if refused:
            path, value = next(iter(refused.items()))
            literal = path in code and isinstance(value, str) and "${" not in value
            advice = allow_advice(_bare(value)) if literal else "only the command line may set it"
            messages.append(f"a file of --config-dir sets hydra.{path}={value}: {advice}")
    return messages


def _leaves(node: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Yields (path, value) of all that is neither a dictionary nor a list, and of empty ones."""
    entries = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    inner = [leaf for key, value in entries for leaf in _leaves(value, f"{path}.{key}".lstrip("."))]
    yield from inner or [(path, node)]


def _names_code(path: str, value: Any) -> bool:
    return path.rpartition(".")[2] in _NAMES_CODE or (isinstance(value, str) and value.startswith(_PREFIXES))


def _bare(name: str) -> str:
    return name.removeprefix("ext://")


def _is_allowed(name: str, allowed: list[str]) -> bool:
    return "${" not in name and is_below(_bare(name), allowed)


def _is_elsewhere(value: Any) -> bool:
    """Tells whether another place gives a value, which may then be a whole part. Inside a longer text it is text."""
    return isinstance(value, str) and value.startswith("${") and value.endswith("}")
