"""Convert frozen dataclasses to JSON-compatible dictionaries and back, based on their type annotations."""

import dataclasses
import types
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any, TypeVar, Union, cast, get_args, get_origin, get_type_hints

T = TypeVar("T")


def to_json(value: Any) -> Any:
    """Return `value` converted to plain types.

    Dataclasses become dictionaries, tuples become lists, and paths become absolute strings. Objects with a `to_dict`
    method are converted by that method.
    """
    if hasattr(value, "to_dict"):
        return value.to_dict()
    if dataclasses.is_dataclass(value):
        return {field.name: to_json(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, Path):
        return str(value.absolute())
    if isinstance(value, Mapping):
        return {key: to_json(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [to_json(item) for item in value]
    return value


def from_json(cls: type[T], table: Mapping[str, Any]) -> T:
    """Return the dataclass instance that `to_json` converted to `table`.

    Unknown keys are ignored, because a later version may have written them. Missing fields get their defaults. Raises
    KeyError, TypeError or ValueError if a field without a default is missing or a value has the wrong type.
    """
    hints = _hints(cast("Any", cls))
    return cls(**{name: _decode(hint, table[name]) for name, hint in hints.items() if name in table})


@cache
def _hints(cls: Any) -> dict[str, Any]:
    hints = get_type_hints(cls)
    return {field.name: hints[field.name] for field in dataclasses.fields(cls) if field.init}


def _decode(annotation: Any, value: Any) -> Any:
    if value is None:
        return None
    origin = get_origin(annotation)
    if origin in (Union, types.UnionType):
        options = [option for option in get_args(annotation) if option is not type(None)]
        return _decode(options[0], value) if len(options) == 1 else value
    if origin is tuple:
        if isinstance(value, str):
            raise TypeError(f"a list was expected, not {value!r}")
        items = get_args(annotation)
        if items[1:] == (Ellipsis,):
            items = items[:1] * len(value)
        return tuple(_decode(item, part) for item, part in zip(items, value, strict=True))
    if origin is dict:
        return {key: _decode(get_args(annotation)[1], item) for key, item in value.items()}
    if annotation is Path:
        return Path(value)
    if hasattr(annotation, "from_dict"):
        return annotation.from_dict(value)
    if dataclasses.is_dataclass(annotation):
        return from_json(cast("type[Any]", annotation), value)
    return value
