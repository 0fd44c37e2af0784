"""The whole configuration of a study: from TOML and flags, checked, to dict and TOML and back."""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
import json
import tomllib
import types
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

from hpsearch.config.data import AugmentConfig, DataConfig
from hpsearch.config.model import UNetConfig
from hpsearch.config.search import SearchSpace, StudySettings, parse_dimension
from hpsearch.config.train import TrainConfig
from hpsearch.errors import ConfigError
from hpsearch.paths import sha256_text
from hpsearch.user_files import read_text

SECTIONS: dict[str, type] = {
    "data": DataConfig,
    "unet": UNetConfig,
    "train": TrainConfig,
    "augment": AugmentConfig,
    "study": StudySettings,
}
_SEAL = "# written by hpsearch, sha256 "
NOT_SEARCHABLE = {f"data.{f.name}" for f in fields(DataConfig)} - {"data.size", "data.color"}
"""Settings of the data that every trial must share, so that its scores can be compared: images that are resized are
scored as a whole, cropped ones on their middle."""


@dataclass(frozen=True, kw_only=True)
class StudyConfig:
    """Everything that decides what a study does: five sections and the search space."""

    data: DataConfig = field(default_factory=DataConfig)
    """Which images, at which size, and how they are kept."""
    unet: UNetConfig = field(default_factory=UNetConfig)
    """The network."""
    train: TrainConfig = field(default_factory=TrainConfig)
    """How it is trained."""
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    """Random changes of training batches."""
    study: StudySettings = field(default_factory=StudySettings)
    """The protocol and the budget."""
    search: SearchSpace = field(default_factory=SearchSpace)
    """Which settings are searched, and over which values."""

    def __post_init__(self) -> None:
        for name, dimension in self.search:
            default = get_setting(self, name)
            if not dimension.contains(default):
                raise ConfigError(
                    f"{name} = {default} lies outside search.{name} = {dimension.to_toml()}: trial 0 is the default "
                    "configuration, so set a default inside the range or widen the range"
                )
        if "data.size" in self.search and not self.study.eval_size:
            raise ConfigError(
                "data.size is searched: set study.eval_size, the one size at which all trials are scored, such as "
                f"--set study.eval_size={self.data.height}"
            )
        size = self.data.height, self.data.width
        is_cropped = self.data.match == "crop" or bool(self.data.cache_size)
        if is_cropped and self.eval_size != size:
            raise ConfigError(
                "study.eval_size needs data.match = resize and no data.cache_size: crops of two sizes show different "
                "parts of an image, so that scores of one cannot be taken at the other"
            )
        if self.augment.crop and not self.data.cache_size:
            raise ConfigError("augment.crop needs data.cache_size, the size of the cached images to crop from")
        if self.data.cached_size != size and not self.augment.crop:
            raise ConfigError(
                f"data.cache_size = {self.data.cache_size} is for augment.crop, which is off: without it the network "
                f"sees whole images, of data.size = {self.data.size}"
            )
        if self.augment.crop and (
            self.data.cached_size[0] < self.data.height or self.data.cached_size[1] < self.data.width
        ):
            raise ConfigError(
                f"data.cache_size = {self.data.cache_size} is smaller than data.size = {self.data.size}"
            )

    @property
    def eval_size(self) -> tuple[int, int]:
        """Height and width at which scores are computed."""
        size = self.study.eval_size
        if not size:
            return self.data.height, self.data.width
        return size if isinstance(size, tuple) else (size, size)

    @property
    def sees_windows(self) -> bool:
        """Whether the network is trained on windows of images, not on whole frames."""
        return self.data.match == "crop" or self.augment.crop

    @property
    def scored_data(self) -> DataConfig:
        """The data at the size at which they are scored; where that is not set, as the network sees them."""
        return dataclasses.replace(self.data, size=self.eval_size) if self.study.eval_size else self.data

    def with_params(self, params: Mapping[str, Any]) -> StudyConfig:
        """The configuration of one trial: `params` set, nothing left to search."""
        return _replace(dataclasses.replace(self, search=SearchSpace()), params)

    def absolute(self) -> StudyConfig:
        """Return the same configuration with absolute paths, so that its data are found from any folder."""
        return dataclasses.replace(self, data=self.data.absolute())

    def to_dict(self) -> dict[str, Any]:
        """Plain types only; `from_dict` gives an equal configuration."""
        sections = {name: _plain(getattr(self, name)) for name in SECTIONS}
        return {**sections, "search": self.search.to_toml()}

    @classmethod
    def from_dict(cls, table: Mapping[str, Any]) -> StudyConfig:
        """Return the configuration in a nested mapping of sections; ConfigError names the key that is wrong."""
        return from_dict(table)

    def to_toml(self) -> str:
        """TOML that `load` reads back as an equal configuration."""
        # Here, not above: a fit needs no TOML.
        import tomli_w

        table = self.to_dict()
        if not table["search"]:
            del table["search"]
        return tomli_w.dumps(table)

    def to_sealed_toml(self) -> str:
        """`to_toml` below a line with its checksum, by which `load` knows a file that was torn or edited."""
        text = self.to_toml()
        return f"{_SEAL}{sha256_text(text)}\n{text}"

    def flat(self) -> dict[str, Any]:
        """Every setting by its full name (`unet.depth`), without the search space."""
        return {
            f"{section}.{key}": value
            for section, table in self.to_dict().items()
            if section != "search"
            for key, value in table.items()
        }


def load(
    path: Path | None, overrides: Iterable[str] = (), *, on_note: Callable[[str], None] | None = None
) -> StudyConfig:
    """The configuration in the TOML file at `path` (None: all defaults) with `section.key=value` overrides.

    `on_note` is called with a sentence for each override that does more than it says (`apply_overrides`). Raises
    ConfigError, naming the file and the key, for whatever is unknown or cannot be.
    """
    table: dict[str, Any] = {}
    if path is not None:
        text = read_text(path, "", ConfigError)
        _check_sealed(text, path)
        try:
            table = tomllib.loads(text)
        except (tomllib.TOMLDecodeError, RecursionError) as error:
            raise ConfigError(f"{path} cannot be read as TOML: {error}") from error
    overrides = list(overrides)
    try:
        return from_dict(apply_overrides(table, overrides, on_note=on_note))
    except ConfigError as error:
        if path is None or (overrides and _is_valid(table)):
            # The file is good: what is wrong was given on the command line.
            raise
        raise ConfigError(f"{path}: {error}") from error


def _check_sealed(text: str, path: Path) -> None:
    first, _, rest = text.partition("\n")
    is_sealed = first.startswith(_SEAL)
    if is_sealed and first.removeprefix(_SEAL) != sha256_text(rest):
        raise ConfigError(
            f"{path} was changed since hpsearch wrote it: put it back from a copy, or, if the change is meant, "
            "remove its first line"
        )
    if not is_sealed and not text.strip():
        raise ConfigError(f"{path} is empty")


def _is_valid(table: Mapping[str, Any]) -> bool:
    try:
        from_dict(table)
    except ConfigError:
        return False
    return True


def from_dict(table: Mapping[str, Any]) -> StudyConfig:
    """The configuration in a nested mapping of sections; ConfigError names the key that is wrong."""
    if unknown := [name for name in table if name not in (*SECTIONS, "search")]:
        raise ConfigError(_unknown(unknown[0], [*SECTIONS, "search"], "section"))
    parts: dict[str, Any] = {}
    for name, cls in SECTIONS.items():
        parts[name] = _build(cls, table.get(name, {}), name)
    search = table.get("search", {})
    if not isinstance(search, Mapping):
        raise ConfigError(f"search must be a table, got {search!r}")
    dimensions = {}
    for name, value in sorted(_flatten_search(search).items()):
        if name in NOT_SEARCHABLE or name.startswith("study."):
            raise ConfigError(
                f"{name} cannot be searched: trials must share data, folds, seed and metric to be comparable"
            )
        annotation = _annotation(name)
        dimension = parse_dimension(name, value)
        values = dimension.values if hasattr(dimension, "values") else (dimension.low, dimension.high)
        for item in values:
            _convert(item, annotation, f"search.{name}")
        dimensions[name] = dimension
    config = StudyConfig(**parts, search=SearchSpace(dimensions))
    for name, dimension in config.search:
        for item in dimension.values if hasattr(dimension, "values") else (dimension.low, dimension.high):
            _replace(dataclasses.replace(config, search=SearchSpace()), {name: item})
    return config


def apply_overrides(
    table: Mapping[str, Any], overrides: Iterable[str], *, on_note: Callable[[str], None] | None = None
) -> dict[str, Any]:
    """`table` with each `section.key=value` set; setting a searched key pins it.

    Values are TOML (`0.01`, `true`, `[256, 192]`); what is not TOML is a string (`rgb`).
    `search.unet.depth=[2,3]` sets a dimension of the space; a default that lies outside it, and was not given by an
    override too, moves to the nearest value inside. Both are told to `on_note`.
    """
    note = on_note or (lambda text: None)
    given: set[str] = set()
    narrowed: dict[str, str] = {}
    result = {name: dict(value) if isinstance(value, Mapping) else value for name, value in table.items()}
    for override in overrides:
        name, equals, text = override.partition("=")
        section, dot, key = name.strip().partition(".")
        if not equals or not dot or not key:
            meant = [each for each in setting_names() if each.endswith(f".{name.strip()}")]
            raise ConfigError(
                f"--set {override!r}: write section.key=value, such as {meant[0] if meant else 'train.lr'}="
                f"{text.strip() if meant and equals else '0.01'}"
            )
        value = _parse_value(text.strip())
        if section == "search":
            search = _flatten_search(result.get("search", {}))
            result["search"] = {**search, key: value}
            _annotation(key)
            narrowed[key] = text.strip()
            continue
        _annotation(name.strip())
        result.setdefault(section, {})
        result[section][key] = value
        given.add(name.strip())
        if "search" in result:
            search = _flatten_search(result["search"])
            if (was := search.pop(name.strip(), None)) is not None:
                values = f"{was['low']} to {was['high']}" if isinstance(was, Mapping) else was
                note(f"{name.strip()} = {value!r} is pinned and no longer searched (the range was {values})")
            result["search"] = search
    for name in [each for each in narrowed if each in result["search"] and each not in given]:
        _move_default(result, name, narrowed[name], note)
    return result


def _move_default(table: dict[str, Any], name: str, shown: str, note: Callable[[str], None]) -> None:
    """Move the default of a searched setting into its dimension if it lies outside."""
    section, _, key = name.partition(".")
    dimension = parse_dimension(name, table["search"][name])
    default = table.get(section, {}).get(key, getattr(SECTIONS[section](), key))
    default = tuple(default) if isinstance(default, list) else default
    if not dimension.contains(default):
        moved = dimension.nearest(default)
        table[section] = {**table.get(section, {}), key: moved}
        note(f"search.{name} = {shown} leaves out the default {default!r}: trial 0 takes {moved!r} instead")


def get_setting(config: StudyConfig, name: str) -> Any:
    """The value of the setting `name` (`unet.depth`); ConfigError if there is none of that name."""
    _annotation(name)
    section, _, key = name.partition(".")
    return getattr(getattr(config, section), key)


def digest(value: Any) -> str:
    """A short stable hash of plain types: 16 hexadecimal digits of SHA-256 over canonical JSON."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return sha256_text(text)[:16]


def stable_seed(*parts: int | str) -> int:
    """The same 31-bit seed for the same parts, in every process and on every machine."""
    text = "\x1f".join(map(str, parts))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4]) >> 1


def setting_names() -> list[str]:
    """Every setting that a TOML or `--set` can give."""
    return [f"{section}.{f.name}" for section, cls in SECTIONS.items() for f in fields(cls)]


def _replace(config: StudyConfig, params: Mapping[str, Any]) -> StudyConfig:
    by_section: dict[str, dict[str, Any]] = {}
    for name, value in params.items():
        section, _, key = name.partition(".")
        by_section.setdefault(section, {})[key] = _convert(value, _annotation(name), name)
    parts = {
        section: dataclasses.replace(getattr(config, section), **changes) for section, changes in by_section.items()
    }
    return dataclasses.replace(config, **parts)


def _build(cls: type, table: Any, section: str) -> Any:
    if not isinstance(table, Mapping):
        raise ConfigError(f"{section} must be a table, got {table!r}")
    hints = get_type_hints(cls)
    for key in table:
        if key not in hints:
            raise ConfigError(_unknown(f"{section}.{key}", [f"{section}.{f.name}" for f in fields(cls)], "key"))
    return cls(**{key: _convert(value, hints[key], f"{section}.{key}") for key, value in table.items()})


def _annotation(name: str) -> Any:
    section, _, key = name.partition(".")
    if section not in SECTIONS:
        raise ConfigError(_unknown(name, [*SECTIONS, "search"], "section of"))
    hints = get_type_hints(SECTIONS[section])
    if key not in hints:
        raise ConfigError(_unknown(name, [f"{section}.{f.name}" for f in fields(SECTIONS[section])], "key"))
    return hints[key]


def _convert(value: Any, annotation: Any, name: str) -> Any:
    """`value` as the annotated type; only int -> float and list -> tuple change anything."""
    options = (
        get_args(annotation) if isinstance(annotation, types.UnionType) or get_origin(annotation) is not None else ()
    )
    if get_origin(annotation) is Literal:
        if name.endswith((".metric", ".loss")) and value == "iou":
            value = "jaccard"
        if value not in options or isinstance(value, bool):
            raise ConfigError(f"{name} must be one of {', '.join(map(str, options))}, got {value!r}")
        return value
    if isinstance(annotation, types.UnionType) or str(get_origin(annotation)) == "typing.Union":
        for option in options:
            try:
                return _convert(value, option, name)
            except ConfigError:
                continue
        raise ConfigError(f"{name} must be {describe_type(annotation)}, got {value!r}")
    if get_origin(annotation) is tuple:
        if isinstance(value, list | tuple) and len(value) == len(options):
            return tuple(_convert(item, option, name) for item, option in zip(value, options, strict=True))
    elif annotation is float and isinstance(value, int | float) and not isinstance(value, bool):
        if value == value and abs(value) != float("inf"):
            return float(value)
    elif isinstance(value, annotation) and (annotation is bool or not isinstance(value, bool)):
        return value
    raise ConfigError(f"{name} must be {describe_type(annotation)}, got {value!r}")


def describe_type(annotation: Any) -> str:
    """What a setting of this annotated type can be, in words."""
    names = {int: "a whole number", float: "a number", str: "a string", bool: "true or false"}
    if annotation in names:
        return names[annotation]
    if get_origin(annotation) is tuple:
        return "[height, width]"
    if get_origin(annotation) is Literal:
        return " or ".join(repr(option) for option in get_args(annotation))
    return " or ".join(describe_type(option) for option in get_args(annotation))


def _flatten_search(search: Mapping[str, Any]) -> dict[str, Any]:
    """Both `"unet.depth" = [...]` and `[search.unet] depth = [...]` as full names."""
    flat: dict[str, Any] = {}
    for name, value in search.items():
        if name in SECTIONS and isinstance(value, Mapping):
            flat |= {f"{name}.{key}": item for key, item in value.items()}
        else:
            flat[name] = value
    return flat


def _plain(section: Any) -> dict[str, Any]:
    values = {f.name: getattr(section, f.name) for f in fields(section)}
    return {key: list(value) if isinstance(value, tuple) else value for key, value in values.items()}


def _parse_value(text: str) -> Any:
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except (tomllib.TOMLDecodeError, RecursionError):
        return text


def _unknown(name: str, known: Iterable[str], kind: str) -> str:
    known = list(known)
    # The same or a similar key, also in another section.
    by_key = {each.rpartition(".")[2]: each for each in [*setting_names(), *known]}
    close = difflib.get_close_matches(name.rpartition(".")[2], by_key, n=1)
    hint = f"did you mean {by_key[close[0]]}?" if close else f"choose one of {', '.join(known)}."
    return f"unknown {kind} {name!r}: {hint} docs/reference.md lists all settings"
