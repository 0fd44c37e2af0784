"""Conversion of values from TOML to the annotated type of a setting, and that type in words."""

from __future__ import annotations

import math
from contextlib import suppress
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from hpsearch.config.modules import ModuleName
from hpsearch.errors import ConfigError

_NAMES = {int: "a whole number", float: "a number", str: "a string", bool: "true or false"}


def convert(value: Any, annotation: Any, name: str) -> Any:
    """Return `value` as the annotated type; only int to float and list to tuple change it.

    Raises ConfigError, naming the setting `name`, for a value of another type.
    """
    try:
        return _convert(value, annotation)
    except (ValueError, OverflowError):
        raise ConfigError(f"{name} must be {describe_type(annotation)}, got {value!r}") from None


def describe_type(annotation: Any) -> str:
    """Return in words which values a setting of this annotated type can have."""
    origin, options = get_origin(annotation), get_args(annotation)
    if annotation in _NAMES:
        return _NAMES[annotation]
    if origin is Annotated:
        return next(each.describe() for each in options if isinstance(each, ModuleName))
    if origin is tuple:
        return "[height, width]"
    return " or ".join(repr(each) if origin is Literal else describe_type(each) for each in options)


def _convert(value: Any, annotation: Any) -> Any:
    origin, options = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        # The section itself checks the name of a module.
        return _convert(value, options[0])
    if origin in (Union, UnionType):
        for option in options:
            with suppress(ValueError):
                return _convert(value, option)
    elif origin is Literal:
        if value in options and not isinstance(value, bool):
            return value
    elif origin is tuple:
        if isinstance(value, list | tuple) and len(value) == len(options):
            return tuple(_convert(item, option) for item, option in zip(value, options, strict=True))
    elif isinstance(value, bool):
        if annotation is bool:
            return value
    elif annotation is float and isinstance(value, int | float):
        if math.isfinite(value):
            return float(value)
    elif isinstance(value, annotation):
        return value
    raise ValueError
