"""Checks that the sections of the settings share."""

from __future__ import annotations

from hpsearch.errors import ConfigError

Size = int | tuple[int, int]
"""Height and width in pixels; one number stands for both."""


def as_pair(size: Size) -> tuple[int, int]:
    """Return height and width."""
    return size if isinstance(size, tuple) else (size, size)


def check_size(setting: str, size: Size) -> None:
    """Raise ConfigError unless `size` is one or two sides of at least 8 pixels."""
    sides = as_pair(size)
    if len(sides) != 2 or min(sides) < 8:
        raise ConfigError(f"{setting} must be one number or [height, width], each at least 8, got {size}")


def check_at_least(section: str, settings: object, **minimums: float) -> None:
    """Raise ConfigError, naming the setting, if one of the named settings is below its minimum."""
    for name, minimum in minimums.items():
        value = getattr(settings, name)
        if not value >= minimum:
            raise ConfigError(f"{section}.{name} must be at least {minimum}, got {value}")


def check_between(section: str, settings: object, low: float, **maximums: float) -> None:
    """Raise ConfigError, naming the setting, if one of the named settings is not between `low` and its maximum."""
    for name, high in maximums.items():
        value = getattr(settings, name)
        if not low <= value <= high:
            raise ConfigError(f"{section}.{name} must lie between {low} and {high}, got {value}")
