"""Settings from the command line: `--set section.key=value` and `--set search.section.key=values`."""

from __future__ import annotations

import tomllib
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from hpsearch.config.search import parse_dimension
from hpsearch.config.sections import SECTIONS, annotation_of, setting_names
from hpsearch.errors import ConfigError

Table = dict[str, Any]
OnNote = Callable[[str], None]
"""Called with one sentence."""


def apply_overrides(table: Mapping[str, Any], overrides: Iterable[str], *, on_note: OnNote | None = None) -> Table:
    """Return `table` with each `section.key=value` set.

    Values are TOML (`0.01`, `true`, `[256, 192]`); anything else is a string (`rgb`). An override of a searched
    setting pins it. `search.unet.depth=[2,3]` sets a dimension of the search space. If the default of that setting
    lies outside and no other override gives it, it moves to the nearest value inside. `on_note` is called in both
    cases.
    """
    note = on_note or (lambda text: None)
    given: set[str] = set()
    narrowed: dict[str, str] = {}
    result = {name: dict(value) if isinstance(value, Mapping) else value for name, value in table.items()}
    for override in overrides:
        section, key, text = _split(override)
        value = _parse_value(text)
        if section == "search":
            annotation_of(key)
            result["search"] = {**flatten_search(result.get("search", {})), key: value}
            narrowed[key] = text
        else:
            name = f"{section}.{key}"
            annotation_of(name)
            result.setdefault(section, {})[key] = value
            given.add(name)
            _pin(result, name, value, note)
    for name, text in narrowed.items():
        if name in result["search"] and name not in given:
            _move_default(result, name, text, note)
    return result


def flatten_search(search: Mapping[str, Any]) -> Table:
    """Return the search space by full names, whether given as `"unet.depth" = [...]` or as `[search.unet]`."""
    flat: Table = {}
    for name, value in search.items():
        if name in SECTIONS and isinstance(value, Mapping):
            flat |= {f"{name}.{key}": item for key, item in value.items()}
        else:
            flat[name] = value
    return flat


def _split(override: str) -> tuple[str, str, str]:
    """Return section, key and value of `section.key=value`."""
    name, equals, text = (part.strip() for part in override.partition("="))
    section, _, key = name.partition(".")
    if equals and key:
        return section, key, text
    meant = next((each for each in setting_names() if each.endswith(f".{name}")), None)
    example = f"{meant}={text or '0.01'}" if meant else "train.lr=0.01"
    raise ConfigError(f"--set {override!r}: write section.key=value, such as {example}")


def _parse_value(text: str) -> Any:
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except (tomllib.TOMLDecodeError, RecursionError):
        return text


def _pin(table: Table, name: str, value: Any, note: OnNote) -> None:
    """Remove the setting `name` from the search space."""
    search = flatten_search(table.get("search", {}))
    if (was := search.pop(name, None)) is not None:
        values = f"{was['low']} to {was['high']}" if isinstance(was, Mapping) else was
        note(f"{name} = {value!r} is pinned and no longer searched (the range was {values})")
        table["search"] = search


def _move_default(table: Table, name: str, shown: str, note: OnNote) -> None:
    """Move the default of a searched setting into its dimension if it lies outside."""
    section, _, key = name.partition(".")
    dimension = parse_dimension(name, table["search"][name])
    default = table.get(section, {}).get(key, getattr(SECTIONS[section](), key))
    default = tuple(default) if isinstance(default, list) else default
    if not dimension.contains(default):
        moved = dimension.nearest(default)
        table[section] = {**table.get(section, {}), key: moved}
        note(f"search.{name} = {shown} excludes the default {default!r}: trial 0 takes {moved!r} instead")
