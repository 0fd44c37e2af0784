"""Values of settings: shared checks, conversion from TOML, and descriptions of valid values."""

import difflib
import functools
import math
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from hpsearch.errors import ConfigError

Size = int | tuple[int, int]
"""Height and width in pixels; a single number sets both."""
_PACKAGE = Path(__file__).parents[1]
_NAMES = {int: "an integer", float: "a number", str: "a string", bool: "true or false"}


def require(condition: bool, text: str) -> None:
    """Raise ConfigError with `text` if `condition` is false."""
    if not condition:
        raise ConfigError(text)


def as_pair(size: Size) -> tuple[int, int]:
    """Return `size` as (height, width)."""
    return size if isinstance(size, tuple) else (size, size)


def check_size(setting: str, size: Size) -> None:
    """Raise ConfigError unless `size` is one number or (height, width), each at least 8 pixels."""
    sides = as_pair(size)
    is_valid = len(sides) == 2 and min(sides) >= 8
    require(is_valid, f"{setting} must be one number or [height, width], each at least 8, got {size}")


def check_between(section: str, settings: object, low: float, **maximums: float) -> None:
    """Raise ConfigError unless every setting in `maximums` is between `low` and its maximum."""
    for name, high in maximums.items():
        value = getattr(settings, name)
        least = f"be at least {low}" if high == math.inf else f"lie between {low} and {high}"
        require(low <= value <= high, f"{section}.{name} must {least}, got {value}")


def check_at_least(section: str, settings: object, low: float, *names: str) -> None:
    """Raise ConfigError if one of the settings `names` is below `low`."""
    check_between(section, settings, low, **dict.fromkeys(names, math.inf))


def suggestion(name: str, known: Iterable[str]) -> str:
    """Return ` (did you mean NAME?)` with the most similar known name; empty if none is similar."""
    close = difflib.get_close_matches(name, list(known), n=1)
    return f" (did you mean {close[0]}?)" if close else ""


@functools.cache
def module_names(folder: str) -> tuple[str, ...]:
    """Return the names of the modules in `folder` of the package, sorted, without importing them.

    Modules whose names begin with an underscore are helpers and are left out.
    """
    return tuple(sorted(path.stem for path in (_PACKAGE / folder).glob("*.py") if not path.stem.startswith("_")))


@dataclass(frozen=True)
class ModuleName:
    """Annotation of a setting whose value is the name of a module of the package, or a sum of such names."""

    folder: str
    """Folder of the modules, relative to the package."""
    is_sum: bool = False
    """Whether the value may be several names joined by `+`."""

    def check(self, setting: str, name: str) -> None:
        """Raise ConfigError with the valid names if `name` is not a module of the folder."""
        names = module_names(self.folder)
        require(name in names, f"{setting} must be {self.describe()}, got {name!r}{suggestion(name, names)}")

    def describe(self) -> str:
        """Return a description of the valid values."""
        names = " or ".join(map(repr, module_names(self.folder)))
        return f"{names} or a sum such as 'bce+dice'" if self.is_sum else names


def convert(value: Any, annotation: Any, name: str) -> Any:
    """Return `value` as the annotated type. An int may become a float, and a list a tuple.

    Raises ConfigError, naming the setting `name`, for any other type.
    """
    try:
        return _convert(value, annotation)
    except (ValueError, OverflowError):
        raise ConfigError(f"{name} must be {describe_type(annotation)}, got {value!r}") from None


def describe_type(annotation: Any) -> str:
    """Return a description of the valid values for this type annotation."""
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
        # The section's `__post_init__` checks the name of the module.
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
    elif annotation is float and type(value) in (int, float):
        if math.isfinite(value):
            return float(value)
    elif type(value) is annotation:
        return value
    raise ValueError
