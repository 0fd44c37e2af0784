"""The sections of the settings, and every setting by its full name, such as `unet.depth`."""

from __future__ import annotations

import difflib
import functools
from collections.abc import Sequence
from dataclasses import fields
from typing import Any, get_type_hints

from hpsearch.config.data import AugmentConfig, DataConfig
from hpsearch.config.model import UNetConfig
from hpsearch.config.search import StudySettings
from hpsearch.config.train import TrainConfig
from hpsearch.errors import ConfigError

SECTIONS: dict[str, type] = {
    "data": DataConfig,
    "unet": UNetConfig,
    "train": TrainConfig,
    "augment": AugmentConfig,
    "study": StudySettings,
}
NOT_SEARCHABLE = {f"data.{f.name}" for f in fields(DataConfig)} - {"data.size", "data.color"}
"""Settings of the data that all trials must share, so that their scores can be compared: resized images are scored as
a whole, cropped images in their centre."""


def setting_names() -> list[str]:
    """Return the full names of all settings."""
    return [f"{section}.{f.name}" for section, cls in SECTIONS.items() for f in fields(cls)]


def annotation_of(name: str) -> Any:
    """Return the type annotation of the setting `name`; ConfigError if there is no such setting."""
    section, _, key = name.partition(".")
    if section not in SECTIONS:
        raise unknown_name(name, [*SECTIONS, "search"], "section of")
    hints = type_hints(SECTIONS[section])
    if key not in hints:
        raise unknown_name(name, [f"{section}.{each}" for each in hints], "key")
    return hints[key]


@functools.cache
def type_hints(cls: type) -> dict[str, Any]:
    """Return the annotated type of every field of a section."""
    return get_type_hints(cls, include_extras=True)


def unknown_name(name: str, known: Sequence[str], kind: str) -> ConfigError:
    """Return an error that suggests the name that was probably meant, or else lists the known ones."""
    # The same or a similar key, also in another section.
    by_key = {each.rpartition(".")[2]: each for each in [*setting_names(), *known]}
    close = difflib.get_close_matches(name.rpartition(".")[2], by_key, n=1)
    hint = f"did you mean {by_key[close[0]]}?" if close else f"choose one of {', '.join(known)}."
    return ConfigError(f"unknown {kind} {name!r}: {hint} docs/reference.md lists all settings")
