"""The words of a command line, made ready for Hydra: paths are quoted, bare words are runs, options stand apart."""

import os
import re
import shlex
from collections.abc import Iterable
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from sslctl.config.keys import UNTYPED, facts_in
from sslctl.config.literal import escaped
from sslctl.config.schema import CONFIGS, SCHEMAS
from sslctl.errors import InputError, nearest, user_path

_PATHS = {path for path, facts in UNTYPED.items() if facts.path} | {
    typed.name for schema in SCHEMAS.values() for typed in fields(schema) if facts_in(typed).path
}
# Choices that stand at another place of the configuration than their group's name says.
PLACED = {"eval_dataset": "dataset@eval_dataset", "scale": "scale@dataset.scale"}
CHOSEN_PATCH = (
    "+dataset.scale.patch_size="  # what sslctl adds where a vision transformer's patches follow the images' size
)
_OF_FOLDERS = ("data", "pack")  # verbs whose bare word is a folder of images
_WITH_VALUE = ("--config-dir", "-cd", "--cfg", "-c", "--package", "-p", "--info", "-i")
_CFG, _INFO = ("job", "hydra", "all"), ("all", "config", "defaults", "defaults-tree", "plugins", "searchpath")
_VALUES = {"--cfg": _CFG, "-c": _CFG, "--info": _INFO, "-i": _INFO}
# Hydra has more, and takes any beginning of a name: those would read other files than a verb's, or a pickle.
_OPTIONS = (*_WITH_VALUE, "--multirun", "-m", "--run", "-r", "--help", "-h", "--hydra-help", "--resolve", "--version")


@dataclass
class Prepared:
    """A command line made ready for Hydra."""

    overrides: list[str] = field(default_factory=list)
    options: list[str] = field(default_factory=list)  # with their values, but --config-dir
    allow: list[str] = field(default_factory=list)
    config_dirs: list[Path] = field(default_factory=list)
    runs: list[str] = field(default_factory=list)  # words without "=", taken for ckpt

    @property
    def sweeps(self) -> bool:
        return any(o in ("-m", "--multirun") for o in self.options)

    def option(self, *names: str) -> str | None:
        """Returns the value of an option by one of its names, None where it is not given."""
        return next((value for name, value in zip(self.options, self.options[1:], strict=False) if name in names), None)

    @property
    def search_path(self) -> list[str]:
        """Returns the override that makes Hydra look into the user's own directories too."""
        directories = ",".join(quote(f"file://{directory}") for directory in self.config_dirs)
        return [f"hydra.searchpath=[{directories}]"] if directories else []

    @property
    def is_plain(self) -> bool:
        """Tells whether the command is one job, without a setting of Hydra's own."""
        return not self.options and not any(o.lstrip("+~").startswith("hydra") for o in self.overrides)


def prepare(arguments: list[str], verb: str | None = None) -> Prepared:
    """Quotes paths, expands ~, turns bare words into ckpt=[…], takes allow=[…] out for sslctl, and sets options apart.

    verb: whose keys decide whether a word with = that exists as a path (runs/lr=0.1) is that path.
    """
    prepared = Prepared(allow=[p for p in os.environ.get("SSLCTL_ALLOW", "").split(",") if p])
    sweeps = any(a in ("-m", "--multirun") for a in arguments)
    queue = list(arguments)
    while queue:
        argument = queue.pop(0)
        if argument.startswith("-"):
            name, given, value = argument.partition("=")
            if name not in _OPTIONS:
                raise InputError(f"{name}: no such option{nearest(name, _OPTIONS)}; there are {', '.join(_OPTIONS)}")
            if given and name not in _WITH_VALUE:
                raise InputError(f"{argument}: {name} takes no value")
            if name in _WITH_VALUE and not given:
                value = queue.pop(0) if queue else ""
            if name in _VALUES and value not in _VALUES[name]:
                raise InputError(f"{name} {value}: expected one of {', '.join(_VALUES[name])}")
            if name in ("--config-dir", "-cd"):
                prepared.config_dirs.append(user_path(value).resolve())
            else:
                prepared.options += [name, value] if name in _WITH_VALUE else [argument]
        elif argument.startswith("allow="):
            prepared.allow += [p.strip() for p in argument.removeprefix("allow=").strip("[]").split(",") if p.strip()]
        elif ("=" in argument or argument.startswith(("~", "+"))) and not (verb and _is_path(argument, verb)):
            prepared.overrides.append(_for_hydra(argument, sweeps))
        else:
            prepared.runs.append(argument)
    if prepared.runs and verb in _OF_FOLDERS and len(prepared.runs) == 1:
        prepared.overrides.append(f"dataset.root={quote(os.path.expanduser(prepared.runs.pop()))}")
    if prepared.runs:
        prepared.overrides.append(f"ckpt=[{','.join(quote(os.path.expanduser(run)) for run in prepared.runs)}]")
    for directory in prepared.config_dirs:
        if not directory.is_dir():
            raise InputError(f"--config-dir {directory}: no such directory")
    return prepared


def _is_path(word: str, verb: str) -> bool:
    """Tells whether a word with = names no key of a verb, and a file or folder that is there."""
    first = re.split(r"[.@=]", word.lstrip("+~"), maxsplit=1)[0]
    keys = {f.name for f in fields(SCHEMAS[verb.replace("-", "_")])} | set(PLACED) | {"experiment"}
    return first not in keys and not first.startswith("hydra") and os.path.exists(os.path.expanduser(word))


def _for_hydra(argument: str, sweeps: bool) -> str:
    """Writes one override as Hydra's grammar wants it."""
    key, _, value = argument.partition("=")
    if key.lstrip("+") in _PATHS:
        return f"{key}={_path_value(key, value, sweeps)}"
    return f"{PLACED[key]}={value}" if key in PLACED else argument


def as_typed(override: str) -> str:
    """Writes an override as the user does: scale=tiny for scale@dataset.scale=tiny."""
    place, _, value = override.partition("=")
    return f"{next((name for name, placed in PLACED.items() if placed == place), place)}={value}"


def quote(value: str, *, interpolated: bool = False) -> str:
    """Quotes a string so that Hydra's grammar reads it back as it is. interpolated: ${seed} in it is replaced by what it names,
    else that is no interpolation either."""
    quoted = re.sub(r"(\\*)'", lambda m: m.group(1) * 2 + r"\'", value)
    quoted = re.sub(r"(\\+)$", lambda m: m.group(1) * 2, quoted)
    return "'" + (quoted if interpolated else escaped(quoted)) + "'"


def _path_value(key: str, value: str, sweeps: bool) -> str:
    """Writes a path as Hydra's grammar wants it. One that exists is taken as it is; in any other ${…} is an interpolation."""
    if value in ("", "null") or (len(value) > 1 and value[0] == value[-1] and value[0] in "'\""):
        return value
    expanded = os.path.expanduser(value)
    if not os.path.exists(expanded):  # unlike Path.exists() for a name that is too long as well
        if key in ("ckpt", "out") and value.startswith("[") and value.endswith("]"):
            return value
        if sweeps and "," in value:  # a sweep over several paths
            return ",".join(_path_value(key, part, False) for part in value.split(","))
    return quote(expanded, interpolated=not (key.endswith(".label") or _is_name(expanded)))


def _is_name(path: str) -> bool:
    """Tells whether a ${…} in a path is part of a name: it, or a folder of this name in it, is there."""
    return any("${" in part and os.path.exists(part) for part in (path, *map(str, Path(path).parents)))


def task_overrides() -> list[str]:
    """Returns the overrides of the running job, as they were written."""
    from hydra.core.hydra_config import HydraConfig
    from omegaconf import OmegaConf

    return OmegaConf.to_container(HydraConfig.get().overrides.task, resolve=False)


def task_words() -> list[str]:
    """Returns the overrides of the running job; none where Hydra runs no job, as in one of several processes of a run."""
    from hydra.core.hydra_config import HydraConfig

    return task_overrides() if HydraConfig.initialized() else []


def command_line() -> str:
    """Returns the command that does the running job again, also when it is one of a sweep."""
    from hydra.core.hydra_config import HydraConfig

    from sslctl.config.targets import allowed_by_user

    hydra = HydraConfig.get()
    sources = [Path(s.path) for s in hydra.runtime.config_sources if s.schema == "file"]
    options = [f"--config-dir={s}" for s in sources if s != CONFIGS]
    allow = allowed_by_user()
    options += [f"allow=[{','.join(allow)}]"] if allow else []
    words = [word for word in task_overrides() if not word.startswith(CHOSEN_PATCH)]  # which is chosen again
    return shlex.join(["sslctl", hydra.job.config_name.replace("_", "-"), *options, *words])


def recorded_words(command: str) -> list[str]:
    """Reads a command that a run's environment.json holds; raises InputError where it is none of sslctl's."""
    try:
        words = shlex.split(command) if isinstance(command, str) else []
    except ValueError:  # quotes that do not close
        words = []
    if len(words) < 2 or words[0] != "sslctl" or words[1].replace("-", "_") not in SCHEMAS:
        raise InputError(f"recorded command {command!r}: expected sslctl VERB …")
    return words


def unquoted_path(override: str) -> str | None:
    """Returns the path of an override that `prepare` has put into quotes; None of any other."""
    key, _, value = override.partition("=")
    return value[1:-1] if key in _PATHS and _path_value(key, value[1:-1], False) == value else None


def path_of(override: str, key: str) -> str | None:
    """Returns the path that an override gives one key, None for another override and for null."""
    name, _, value = override.partition("=")
    if name != key or value in ("", "null"):
        return None
    return value[1:-1] if value[0] == value[-1] and value[0] in "'\"" else value


def with_plain_paths(override: str) -> str:
    """Returns an override without the quotes that `prepare` puts around a path."""
    path = unquoted_path(override)
    return override if path is None else f"{override.partition('=')[0]}={path}"


def shell_words(words: Iterable[Any]) -> str:
    """Joins words into a line for a shell, that reads them back as they are and does nothing else.

    A word with control characters is written $'…', as bash, zsh and ksh read it.
    """
    return " ".join(_shell_word(str(word)) for word in words)


def _shell_word(word: str) -> str:
    if word.isprintable():
        return shlex.quote(word)
    escapes = {"\\": "\\\\", "'": "\\'"}
    return "$'" + "".join(escapes.get(c) or (c if c.isprintable() else _octal(c)) for c in word) + "'"


def _octal(character: str) -> str:
    return "".join(f"\\{byte:03o}" for byte in character.encode("utf-8", "surrogateescape"))


def refuse_other_choices(config: Any) -> None:
    """Raises InputError where an experiment sets values of one method, augmentation or backbone and another is chosen."""
    from hydra._internal.config_loader_impl import ConfigLoaderImpl
    from hydra._internal.utils import create_config_search_path
    from hydra.core.hydra_config import HydraConfig
    from omegaconf import OmegaConf

    choices = HydraConfig.get().runtime.choices
    experiment = choices.get("experiment")
    if experiment in (None, "null"):
        return
    sources = [s.path for s in HydraConfig.get().runtime.config_sources if s.schema == "file"]
    for directory in sources:
        search = create_config_search_path(directory)
        loaded = ConfigLoaderImpl(search).repository.load_config(f"experiment/{experiment}")
        if loaded is None:
            continue
        raw = OmegaConf.to_container(loaded.config)
        pinned = {
            getattr(d, "group", "").strip("/"): d.value for d in loaded.defaults_list or [] if hasattr(d, "value")
        }
        for group in ("method", "augmentation", "backbone"):
            if raw.get(group) and group in pinned and choices.get(group) != pinned[group]:
                raise InputError(
                    f"experiment={experiment} sets values of {group}={pinned[group]}:"
                    f" {group}={choices.get(group)} cannot go with it"
                )
        return
