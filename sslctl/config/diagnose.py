"""Explains what is wrong with the overrides of a command, in sslctl's words and all at once."""

import copy
import difflib
from collections.abc import Iterator
from typing import Any

from sslctl.config.command_line import PLACED, Prepared, as_typed
from sslctl.config.keys import NOTHING_KNOWN, UNTYPED
from sslctl.config.kinds import is_number, kind_of
from sslctl.config.schema import CONFIGS, SCHEMAS, register_schema
from sslctl.config.validation import located, mistakes
from sslctl.errors import InputError, first_line, nearest

# Words of everyday that stand in several places: the key that is meant by them alone.
_MEANT = {"lr": "optimizer.base_lr", "learning_rate": "optimizer.base_lr", "momentum": "optimizer.momentum"}
_MEANT |= {name: f"trainer.{name}" for name in ("epochs", "batch_size", "precision", "workers", "device")}
_MEANT |= {"warmup_epochs": "scheduler.warmup_epochs", "weight_decay": "optimizer.weight_decay"}
_LONGEST_LIST = 240  # characters, of choices in a message
_FOLDERS_OF_HYDRA = ("hydra.run.dir", "hydra.sweep.dir", "hydra.sweep.subdir", "hydra.output_subdir")
_FREE = tuple(f"{path}." for path, facts in UNTYPED.items() if facts.free)


def refuse_new_keys(verb: str, prepared: Prepared) -> None:
    """Raises InputError for `+`, `++` and `~` outside free dictionaries and hydra itself: they would make a key of a typo."""
    marked = [o for o in prepared.overrides if o.startswith(("+", "~"))]
    wrong = [o for o in marked if not o.lstrip("+~").startswith((*_FREE, "hydra."))]
    if not wrong:
        return
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException

    try:
        keys = list(_keys(compose_choices(verb, prepared, [])))
    except (HydraException, OmegaConfBaseException):  # whatever else is wrong will be said once these are gone
        keys = []
    messages = []
    for override in wrong:
        key = override.lstrip("+~").partition("=")[0]
        if key in keys:
            messages.append(f"{override}: {key} is a key already; write {key}=… without the mark")
        else:
            group, _, leaf = key.rpartition(".")
            near = _nearest_key(group, leaf, keys)
            messages.append(f"{override}: {key} is not a key of {verb}, and none can be added{near}")
    raise InputError(*messages)


def refuse_lists_of_choices(prepared: Prepared) -> None:
    """Raises InputError for a list of files of a group that takes one: Hydra takes it, and forgets what was chosen."""
    for override in prepared.overrides:
        group, _, value = override.partition("=")
        several = UNTYPED.get(group, NOTHING_KNOWN).several
        if value.startswith("[") and not several and (options := _options(prepared, group.lstrip("+"))):
            raise InputError(_no_such_choice(as_typed(override), group.lstrip("+"), [], options))


def refuse_folders_of_hydra(prepared: Prepared) -> None:
    """Raises InputError for words that place Hydra's own folders: it would make them before a job is known to be sound."""
    for override in prepared.overrides:
        if override.lstrip("+~").partition("=")[0] in _FOLDERS_OF_HYDRA:
            raise InputError(f"{override}: nothing lies in Hydra's folders; a run's own is run_dir=FOLDER")


def refuse_unknown_package(verb: str, prepared: Prepared) -> None:
    """Raises InputError where --package names no node of the configuration that --cfg shows, or nothing is shown."""
    from omegaconf import OmegaConf

    package = prepared.option("--package", "-p")
    if package in (None, "_global_"):
        return
    if prepared.option("--cfg", "-c") is None:
        raise InputError(f"--package {package}: goes with --cfg, which shows this part of the configuration")
    try:
        config = compose_choices(verb, prepared, prepared.overrides, with_hydra=True)
    except Exception as error:
        raise explain(verb, prepared, error) from error
    if OmegaConf.select(config, package, throw_on_missing=False) is None:
        raise InputError(
            f"--package {package}: no such part of {verb}'s configuration{nearest(package, _keys(config))}"
        )


def explain(verb: str, prepared: Prepared, error: Exception) -> InputError:
    """Lists all that is wrong with the overrides of a command that Hydra refused, in one error."""
    # Choices of files first: without them there are no keys to compare the other words with.
    messages, choices, values = _read_overrides(prepared)
    try:
        config = compose_choices(verb, prepared, choices)
    except Exception as again:
        if not messages and PLACED["scale"] in str(again):
            messages = [
                "scale=…: this dataset has no scale; one of your own gets it by `- /scale@scale: imagenet` in its defaults"
            ]
        return InputError(*(messages or [_with_cause(again)]))
    # Then each value on its own, against the configuration that the sound choices make.
    keys = list(_keys(config))
    for text, override in values:
        if override.key_or_group not in keys:
            messages.append(_unknown_key(verb, override.key_or_group, keys, config))
        elif override.is_sweep_override():
            messages += [m for one in _each(override) for m in _wrong_value(one.input_line, one, copy.deepcopy(config))]
        else:
            messages += _wrong_value(text, override, config)
    # Ranges and contradictions last: words that cannot be read would only be named twice.
    if not messages:
        messages = mistakes(SCHEMAS[verb.replace("-", "_")], config)
    return InputError(*(messages or _of_hydra(verb, prepared, error)))


def _of_hydra(verb: str, prepared: Prepared, error: Exception) -> list[str]:
    """Lists what is wrong with each word for Hydra itself that it takes of no command; of none, what the error says."""
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException

    def cause_of(problem: Exception) -> str:
        told = isinstance(problem, HydraException | OmegaConfBaseException)  # else it went wrong in Hydra's own code
        return _with_cause(problem) if told else "nothing that Hydra can use there"

    words = [text for text in prepared.overrides if text.lstrip("+~").startswith("hydra")]
    messages = []
    for text in words:
        try:
            compose_choices(verb, prepared, [text], with_hydra=True)
        except Exception as problem:
            cause = cause_of(problem)
            messages.append(cause if text in cause else f"{text}: {cause}")
    return messages or [f"{' '.join(words)}: {cause_of(error)}" if words else _with_cause(error)]


def _with_cause(error: Exception) -> str:
    """Returns what Hydra says, which rarely says why, with what OmegaConf has told it."""
    texts = [first_line(e).rstrip(".") for e in (error, error.__cause__) if e is not None and str(e)]
    return ": ".join(texts) or first_line(error)


def _read_overrides(prepared: Prepared) -> tuple[list[str], list[str], list[tuple[str, Any]]]:
    """Returns what is wrong with choices of files, the sound choices, and the other overrides as (text, parsed)."""
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    messages, choices, values, parser = [], [], [], OverridesParser.create()
    for text in prepared.overrides:
        try:
            override = parser.parse_override(text)
        except HydraException:
            messages.append(f"{text}: cannot be read; quote what is not a plain word: {text.partition('=')[0]}='…'")
            continue
        if not override.key_or_group:
            messages.append(f"{text}: no key before the =")
            continue
        group, options = override.key_or_group, _options(prepared, override.key_or_group)
        place = text.partition("=")[0]  # group, or group@package
        sweep = override.is_sweep_override()
        if sweep and not prepared.sweeps:
            messages.append(f"{text}: several values are a sweep, which -m starts; a list is written [a,b]")
        elif options:
            facts = UNTYPED.get(place, NOTHING_KNOWN)
            value = _swept(override) if sweep else override.value()
            several = sweep or (facts.several and isinstance(value, list))
            names = value if several else [value]
            allowed = [*options, None] if facts.optional else options
            wrong = [n for n in names if n not in allowed]
            messages += [_no_such_choice(as_typed(text), group, n, options) for n in wrong]
            choices += [] if wrong or sweep else [text]
        elif not override.is_hydra_override() and not text.startswith(("+", "~")):
            values.append((text, override))
    return messages, choices, values


def _each(override: Any) -> list[Any]:
    """Returns the overrides that a sweep's jobs get of one."""
    from hydra.core.override_parser.overrides_parser import OverridesParser

    key = override.input_line.partition("=")[0]
    return OverridesParser.create().parse_overrides([f"{key}={value}" for value in _swept(override)])


def _swept(override: Any) -> list[str]:
    """Returns the values of a sweep; none of glob(*), whose files Hydra alone can list."""
    from hydra.errors import HydraException

    try:
        return list(override.sweep_string_iterator())
    except HydraException:
        return []


def _no_such_choice(text: str, group: str, value: Any, options: list[str]) -> str:
    shown = ", ".join(options)
    if len(shown) > _LONGEST_LIST:
        shown = f"{shown[:_LONGEST_LIST].rpartition(', ')[0]} … (--help lists all {len(options)})"
    if not isinstance(value, str):
        return f"{text}: expected the name of one {group}, found {kind_of(value)}; there are {shown}"
    return f"{text}: no such {group}{nearest(value, options)}; there are {shown}"


def _wrong_value(text: str, override: Any, config: Any) -> list[str]:
    """Applies one override to the configuration, or says why it cannot be."""
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    try:
        before = OmegaConf.select(config, override.key_or_group, throw_on_missing=False)
        if _other_kind(before, override.value()):
            return [f"{text}: expected {kind_of(before)}, found {kind_of(override.value())}"]
        OmegaConf.update(config, override.key_or_group, override.value())
    except OmegaConfBaseException as problem:
        return [f"{text}: {located(problem).partition(': ')[2] or first_line(problem)}"]
    return []


def prepare_hydra(verb: str) -> None:
    """Lets Hydra know a verb's schema, and keeps files of the user's directories from setting what Hydra builds."""
    from sslctl.config.hydra_files import check_user_files

    register_schema(verb)
    check_user_files()


def compose_choices(verb: str, prepared: Prepared, choices: list[str], with_hydra: bool = False):
    """Composes a verb's configuration with choices of files, or any overrides. with_hydra: Hydra's own node is part of it."""
    from hydra import compose, initialize_config_dir
    from hydra.core.global_hydra import GlobalHydra

    prepare_hydra(verb)
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        return compose(verb.replace("-", "_"), choices + prepared.search_path, return_hydra_config=with_hydra)


def _options(prepared: Prepared, group: str) -> list[str]:
    """Lists the files one may choose from for a group, in sslctl's configs and the user's own."""
    group = group.partition("@")[0]
    files = [f for d in (CONFIGS, *prepared.config_dirs) for f in sorted((d / group).glob("*.yaml"))]
    return list(dict.fromkeys(f.stem for f in files))


def _keys(config: Any, prefix: str = "") -> Iterator[str]:
    """Yields every path of a composed configuration, inner ones too, without resolving anything."""
    from omegaconf import DictConfig

    for key in config:
        yield f"{prefix}{key}"
        node = config._get_node(key)
        if isinstance(node, DictConfig) and not node._is_none() and not node._is_missing():
            yield from _keys(node, f"{prefix}{key}.")


def _unknown_key(verb: str, key: str, keys: list[str], config: Any) -> str:
    from omegaconf import OmegaConf

    group, _, leaf = key.rpartition(".")
    if group == "dataset" and leaf == "root":
        return (
            "this dataset has no dataset.root: for a folder of your own images say dataset=folder (no labels) or"
            " dataset=imagefolder (one folder a class) as well"
        )
    near = _nearest_key(group, leaf, keys) or nearest(key, keys)
    if group in keys:
        target = OmegaConf.select(config, f"{group}._target_") if group else None
        if target:
            return f"{key} is not an argument of {target.rpartition('.')[2]}{near}"
    return f"{key} is not a key of {verb}{near}"


def _nearest_key(group: str, leaf: str, keys: list[str]) -> str:
    """Returns ' (nearest: …)' for a key whose last part is half right (lrr for base_lr) or in the wrong place, else ''."""
    here = [k for k in keys if k.rpartition(".")[0] == group]
    elsewhere = [k for k in keys if k.rpartition(".")[2] == leaf]

    def likeness(key: str) -> float:
        own = key.rpartition(".")[2]
        return max(difflib.SequenceMatcher(None, leaf, part).ratio() for part in (own, *own.split("_")))

    meant = [key for key in [_MEANT.get(leaf)] if key in keys]
    near = sorted((k for k in here if likeness(k) >= 0.6), key=likeness, reverse=True)[:2]
    near = (meant or near or elsewhere[:1]) if not group else (near or meant or elsewhere[:1])
    return f" (nearest: {', '.join(near)})" if near else ""


def _other_kind(before: Any, value: Any) -> bool:
    """Tells whether a value is of another kind than the one it replaces; null goes with every kind."""
    if before is None or value is None:
        return False
    if isinstance(before, float | str) and is_number(value):  # a word may look like a number
        return False
    return kind_of(before) != kind_of(value)
