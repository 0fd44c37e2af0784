"""Sections of the configuration, full names of settings (`unet.depth`), and `--set` overrides."""

import difflib
import functools
import tomllib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import fields
from typing import Any, get_type_hints

from hpsearch.config.data import AugmentConfig, DataConfig
from hpsearch.config.model import UNetConfig
from hpsearch.config.search import StudySettings, parse_dimension
from hpsearch.config.train import TrainConfig
from hpsearch.errors import ConfigError

SECTIONS: dict[str, type] = {
    "data": DataConfig,
    "unet": UNetConfig,
    "train": TrainConfig,
    "augment": AugmentConfig,
    "study": StudySettings,
}
ALIASES = {"data.resize_mode": "data.match"}
"""Maps the alias of a setting to the full name of the setting."""
REMOVED = {"study.allow_microbatch"}
"""Settings of version 0.1 that no longer have an effect. They are accepted, because old files contain them."""
NOT_SEARCHABLE = {f"data.{f.name}" for f in fields(DataConfig)} - {"data.size", "data.color"}
"""Data settings that cannot be searched, because scores are comparable only between trials that share them. For
example, resized images are scored as a whole, but cropped images only in their centre."""
Table = dict[str, Any]
_type_hints = functools.cache(functools.partial(get_type_hints, include_extras=True))
OnNote = Callable[[str], None]
"""Callback, called with a one-sentence note for the user."""


def setting_names() -> list[str]:
    """Return the full names of all settings."""
    return [f"{section}.{f.name}" for section, cls in SECTIONS.items() for f in fields(cls)]


def annotation_of(name: str) -> Any:
    """Return the type annotation of the setting `name`. Raises ConfigError if there is no such setting."""
    section, _, key = name.partition(".")
    if section not in SECTIONS:
        full, kind = (name, "section in") if key else (f"search.{name}", "setting")
        raise unknown_name(full, [*SECTIONS, "search"], kind)
    hints = _type_hints(SECTIONS[section])
    if key not in hints:
        raise unknown_name(name, [f"{section}.{each}" for each in hints], "setting")
    return hints[key]


def unknown_name(name: str, known: Sequence[str], kind: str) -> ConfigError:
    """Return the error for an unknown name. It suggests the most similar name, or lists `known` if none is similar.

    `kind` says what the name should be, such as `setting`.
    """
    # Look for the same or a similar key in all sections.
    by_key = {each.rpartition(".")[2]: each for each in [*setting_names(), *known]}
    close = difflib.get_close_matches(name.rpartition(".")[2], by_key, n=1)
    hint = f"did you mean {by_key[close[0]]}?" if close else f"choose one of {', '.join(known)}."
    return ConfigError(f"unknown {kind} {name!r}: {hint} docs/reference.md lists all settings")


def apply_overrides(table: Mapping[str, Any], overrides: Iterable[str], *, on_note: OnNote | None = None) -> Table:
    """Return `table` with the overrides `section.key=value` applied.

    Values are parsed as TOML (`0.01`, `true`, `[256, 192]`); anything else is a string (`rgb`). An override of a
    searched setting fixes its value, so that it is no longer searched. An override `search.unet.depth=[2,3]` sets a
    dimension of the search space. If the dimension excludes the setting's default and no other override sets the
    setting, the default moves to the nearest value of the dimension. `on_note` is called when a setting is fixed or a
    default moves.
    """
    note = on_note or (lambda text: None)
    given: set[str] = set()
    narrowed: dict[str, str] = {}
    result = {name: dict(value) if isinstance(value, Mapping) else value for name, value in table.items()}
    for override in overrides:
        name, text = _split(override)
        if name in REMOVED:
            continue
        try:
            value = tomllib.loads(f"value = {text}")["value"]
        except (tomllib.TOMLDecodeError, RecursionError):
            value = text
        section, _, key = name.partition(".")
        annotation_of(key if section == "search" else name)
        search = flatten_search(result.get("search", {}))
        if section == "search":
            result["search"] = {**search, key: value}
            narrowed[key] = text
            continue
        result.setdefault(section, {})[key] = value
        given.add(name)
        if (was := search.pop(name, None)) is not None:
            values = f"{was['low']} to {was['high']}" if isinstance(was, Mapping) else was
            note(f"{name} = {value!r} is fixed and no longer searched (the range was {values})")
            result["search"] = search
    for name, text in narrowed.items():
        if name in result["search"] and name not in given:
            _move_default(result, name, text, note)
    return result


def flatten_search(search: Mapping[str, Any]) -> Table:
    """Return the dimensions by full name. TOML writes them as `"unet.depth" = [...]` or in `[search.unet]`."""
    flat: Table = {}
    for name, value in search.items():
        is_section = name in SECTIONS and isinstance(value, Mapping)
        flat |= {f"{name}.{key}": item for key, item in value.items()} if is_section else {name: value}
    return flat


def _split(override: str) -> tuple[str, str]:
    """Split `section.key=value` into name and value."""
    name, equals, text = (part.strip() for part in override.partition("="))
    if equals and name.partition(".")[2]:
        return ALIASES.get(name, name), text
    meant = next((each for each in setting_names() if each.endswith(f".{name}")), None)
    example = f"{meant}={text or '0.01'}" if meant else "train.lr=0.01"
    raise ConfigError(f"--set {override!r}: write section.key=value, such as {example}")


def _move_default(table: Table, name: str, shown: str, note: OnNote) -> None:
    """Move the default of a searched setting to the nearest value of its dimension if it lies outside.

    `shown` is the dimension as text, for the note.
    """
    section, _, key = name.partition(".")
    dimension = parse_dimension(name, table["search"][name])
    default = table.get(section, {}).get(key, getattr(SECTIONS[section](), key))
    default = tuple(default) if isinstance(default, list) else default
    if not dimension.contains(default):
        moved = dimension.nearest(default)
        table[section] = {**table.get(section, {}), key: moved}
        note(f"search.{name} = {shown} excludes the default {default!r}: trial 0 takes {moved!r} instead")
