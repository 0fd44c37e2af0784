"""Configuration of a study: read from TOML and `--set` overrides, validated, and written as TOML."""

import difflib
import functools
import tomllib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Self, get_type_hints

from hpsearch.config.data import AugmentConfig, DataConfig
from hpsearch.config.model import UNetConfig
from hpsearch.config.search import SearchSpace, StudySettings, parse_dimension
from hpsearch.config.train import TrainConfig
from hpsearch.config.values import as_pair, convert, require
from hpsearch.errors import ConfigError
from hpsearch.paths import sha256_text
from hpsearch.typed_json import to_json
from hpsearch.user_files import read_text

ALIASES = {"data.resize_mode": "data.match"}
"""Maps the alias of a setting to the full name of the setting."""
REMOVED = {"study.allow_microbatch"}
"""Settings of version 0.1 that no longer have an effect. They are accepted, because old files contain them."""
NOT_SEARCHABLE = {f"data.{f.name}" for f in fields(DataConfig)} - {"data.size", "data.color"}
"""Data settings that cannot be searched, because scores are comparable only between trials that share them. For
example, resized images are scored as a whole, but cropped images only in their centre."""
Table = dict[str, Any]
_type_hints = functools.cache(functools.partial(get_type_hints, include_extras=True))
_SEAL = "# written by hpsearch, sha256 "
"""Beginning of the first line of a file that hpsearch wrote; the checksum of the other lines follows."""
OnNote = Callable[[str], None]
"""Callback, called with a one-sentence note for the user."""


@dataclass(frozen=True, kw_only=True)
class StudyConfig:
    """All settings of a study: five sections and the search space."""

    data: DataConfig = field(default_factory=DataConfig)
    """Settings of the images: where they are, their size, and how they are cached."""
    unet: UNetConfig = field(default_factory=UNetConfig)
    """Settings of the network."""
    train: TrainConfig = field(default_factory=TrainConfig)
    """Settings of training."""
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    """Settings of the random augmentation of training batches."""
    study: StudySettings = field(default_factory=StudySettings)
    """Settings of the evaluation protocol and the search budget."""
    search: SearchSpace = field(default_factory=SearchSpace)
    """Searched settings and their values."""

    def __post_init__(self) -> None:
        for name, dimension in self.search.items():
            default = get_setting(self, name)
            fault = f"{name} = {default} lies outside search.{name} = {dimension.to_toml()}"
            advice = "trial 0 is the default configuration, so set a default inside the range or widen the range"
            require(dimension.contains(default), f"{fault}: {advice}")
        data, size = self.data, as_pair(self.data.size)
        has_one_size = "data.size" not in self.search or bool(self.study.eval_size)
        advice = "set study.eval_size, the one size at which all trials are scored"
        require(has_one_size, f"data.size is searched: {advice}, such as --set study.eval_size={data.height}")
        is_comparable = self.eval_size == size or (data.match == "resize" and not data.cache_size)
        fault = "study.eval_size needs data.match = resize and no data.cache_size"
        require(is_comparable, f"{fault}: crops of two sizes are not comparable")
        has_margin = bool(data.cache_size) or not self.augment.crop
        require(has_margin, "augment.crop needs data.cache_size, the size of the cached images to crop from")
        cached = f"data.cache_size = {data.cache_size}"
        is_whole = data.cached_size == size or self.augment.crop
        require(is_whole, f"{cached} needs augment.crop = true, because it differs from data.size = {data.size}")
        is_inside = data.cached_size[0] >= data.height and data.cached_size[1] >= data.width
        require(is_inside, f"{cached} is smaller than data.size = {data.size}")

    @property
    def eval_size(self) -> tuple[int, int]:
        """Height and width at which scores are computed."""
        return as_pair(self.study.eval_size or self.data.size)

    @property
    def sees_windows(self) -> bool:
        """Whether the network is trained on crops instead of whole images."""
        return self.data.match == "crop" or self.augment.crop

    @property
    def scored_data(self) -> DataConfig:
        """Data settings with `study.eval_size` as their size; unchanged if `study.eval_size` is 0."""
        return replace(self.data, size=self.eval_size) if self.study.eval_size else self.data

    def with_params(self, params: Mapping[str, Any]) -> Self:
        """Return the configuration of one trial, with `params` set and an empty search space."""
        changes: dict[str, dict[str, Any]] = {}
        for name, value in params.items():
            section, _, key = name.partition(".")
            changes.setdefault(section, {})[key] = convert(value, annotation_of(name), name)
        parts = {name: replace(getattr(self, name), **values) for name, values in changes.items()}
        return replace(self, search=SearchSpace(), **parts)

    def absolute(self) -> Self:
        """Return the same configuration with all paths made absolute."""
        return replace(self, data=self.data.absolute())

    @classmethod
    def from_dict(cls, table: Mapping[str, Any]) -> Self:
        """Return the configuration in nested tables. Raises ConfigError, naming the key, if one is invalid."""
        known = [*SECTIONS, "search"]
        if unknown := [name for name in table if name not in known]:
            raise unknown_name(unknown[0], known, "section")
        parts = {name: _section(name, part, table.get(name, {})) for name, part in SECTIONS.items()}
        space = SearchSpace()
        for name, value in sorted(flatten_search(table).items()):
            text = f"{name} cannot be searched: trials must share data, folds, seed and metric to be comparable"
            require(name not in NOT_SEARCHABLE and not name.startswith("study."), text)
            space[name] = parse_dimension(name, value)
        config = cls(**parts, search=space)
        for name, dimension in config.search.items():
            for value in dimension.extremes:
                config.with_params({name: value})
        return config

    def to_dict(self) -> dict[str, Any]:
        """Return the configuration as nested tables of plain types, which `from_dict` can read."""
        tables = {name: asdict(getattr(self, name)) for name in SECTIONS}
        return {**to_json(tables), "search": self.search.to_toml()}

    def to_toml(self) -> str:
        """Return the configuration as TOML, which `load` can read."""
        # Imported here, because processes that only run fits do not need it.
        import tomli_w

        table = {**self.to_dict(), "unet": self.unet.to_dict()}
        if not table["search"]:
            del table["search"]
        return tomli_w.dumps(table)

    def to_sealed_toml(self) -> str:
        """Return the TOML after a line with its checksum, so that `load` can detect a truncated or edited file."""
        text = self.to_toml()
        return f"{_SEAL}{sha256_text(text)}\n{text}"

    def flat(self) -> dict[str, Any]:
        """Return the values of all settings by full name (`unet.depth`), without the search space."""
        tables = [(section, table) for section, table in self.to_dict().items() if section != "search"]
        return {f"{section}.{key}": value for section, table in tables for key, value in table.items()}


SECTIONS: dict[str, type] = {name: cls for name, cls in get_type_hints(StudyConfig).items() if name != "search"}
"""Maps the name of each section of the configuration to the class of its settings."""


def load_config(path: Path | None, overrides: Iterable[str] = (), *, on_note: OnNote | None = None) -> StudyConfig:
    """Load a configuration from the TOML file at `path` and apply `section.key=value` overrides.

    All settings have their defaults if `path` is None. `on_note` is called with a sentence for each override that has
    a side effect (see `apply_overrides`). Raises ConfigError, naming the file and the key, for unknown names and
    invalid values.
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
        # With overrides, the file may not be the cause, so do not name it.
        raise ConfigError(str(error) if path is None or overrides else f"{path}: {error}") from error


from_dict = StudyConfig.from_dict


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
    search = result["search"] = flatten_search(table)
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
        if section == "search":
            search[key] = value
            narrowed[key] = text
            continue
        result.setdefault(section, {})[key] = value
        given.add(name)
        if (was := search.pop(name, None)) is not None:
            values = f"{was['low']} to {was['high']}" if isinstance(was, Mapping) else was
            note(f"{name} = {value!r} is fixed and no longer searched (the range was {values})")
    for name, text in narrowed.items():
        if name in search and name not in given:
            _move_default(result, name, text, note)
    return result


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


def get_setting(config: StudyConfig, name: str) -> Any:
    """Return the value of the setting `name` (`unet.depth`). Raises ConfigError if there is no such setting."""
    annotation_of(name)
    section, _, key = name.partition(".")
    return getattr(getattr(config, section), key)


def _section(section: str, cls: type, table: Any) -> Any:
    require(isinstance(table, Mapping), f"{section} must be a table, got {table!r}")
    table = {ALIASES.get(f"{section}.{key}", f"{section}.{key}"): value for key, value in table.items()}
    if table.get("study.metric") == "iou":
        table["study.metric"] = "jaccard"
    kept = {name: value for name, value in table.items() if name not in REMOVED}
    return cls(**{name.partition(".")[2]: convert(value, annotation_of(name), name) for name, value in kept.items()})


def _check_sealed(text: str, path: Path) -> None:
    """Raise ConfigError if a file was changed after hpsearch wrote it, or if it is empty."""
    first, _, rest = text.partition("\n")
    is_unchanged = not first.startswith(_SEAL) or first.removeprefix(_SEAL) == sha256_text(rest)
    advice = "restore it from a copy, or, if the change is intended, remove its first line"
    require(is_unchanged, f"{path} was changed since hpsearch wrote it: {advice}")
    require(bool(text.strip()), f"{path} is empty")


def flatten_search(table: Mapping[str, Any]) -> Table:
    """Return the searched dimensions by full name.

    TOML writes them as `"unet.depth" = [...]` in the table `[search]`, or in `[search.unet]`.
    """
    search = table.get("search", {})
    require(isinstance(search, Mapping), f"search must be a table, got {search!r}")
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
