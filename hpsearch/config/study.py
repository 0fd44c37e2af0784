"""Configuration of a study: read from TOML and overrides, validated, and written as TOML."""

import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Self

from hpsearch.config import sections
from hpsearch.config.data import AugmentConfig, DataConfig
from hpsearch.config.model import UNetConfig
from hpsearch.config.search import SearchSpace, StudySettings, parse_dimension
from hpsearch.config.sections import ALIASES, NOT_SEARCHABLE, SECTIONS, OnNote, annotation_of
from hpsearch.config.train import TrainConfig
from hpsearch.config.values import as_pair, convert, require
from hpsearch.errors import ConfigError
from hpsearch.paths import sha256_text
from hpsearch.typed_json import to_json
from hpsearch.user_files import read_text

_SEAL = "# written by hpsearch, sha256 "


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
            require(
                dimension.contains(default),
                f"{name} = {default} lies outside search.{name} = {dimension.to_toml()}: trial 0 is the default "
                "configuration, so set a default inside the range or widen the range",
            )
        data, size = self.data, as_pair(self.data.size)
        require(
            "data.size" not in self.search or bool(self.study.eval_size),
            "data.size is searched: set study.eval_size, the one size at which all trials are scored, such as "
            f"--set study.eval_size={data.height}",
        )
        require(
            (data.match == "resize" and not data.cache_size) or self.eval_size == size,
            "study.eval_size needs data.match = resize and no data.cache_size: crops of two sizes are not comparable",
        )
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
            raise sections.unknown_name(unknown[0], known, "section")
        parts = {name: _section(name, part, table.get(name, {})) for name, part in SECTIONS.items()}
        search = table.get("search", {})
        require(isinstance(search, Mapping), f"search must be a table, got {search!r}")
        space = SearchSpace()
        for name, value in sorted(sections.flatten_search(search).items()):
            require(
                name not in NOT_SEARCHABLE and not name.startswith("study."),
                f"{name} cannot be searched: trials must share data, folds, seed and metric to be comparable",
            )
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
        return from_dict(sections.apply_overrides(table, overrides, on_note=on_note))
    except ConfigError as error:
        # With overrides, the file may not be the cause, so do not name it.
        raise ConfigError(str(error) if path is None or overrides else f"{path}: {error}") from error


from_dict = StudyConfig.from_dict


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
    kept = {name: value for name, value in table.items() if name not in sections.REMOVED}
    values = {name: convert(value, annotation_of(name), name) for name, value in kept.items()}
    return cls(**{name.partition(".")[2]: value for name, value in values.items()})


def _check_sealed(text: str, path: Path) -> None:
    """Raise ConfigError if a file was changed after hpsearch wrote it, or if it is empty."""
    first, _, rest = text.partition("\n")
    require(
        not first.startswith(_SEAL) or first.removeprefix(_SEAL) == sha256_text(rest),
        f"{path} was changed since hpsearch wrote it: restore it from a copy, or, if the change is intended, remove "
        "its first line",
    )
    require(bool(text.strip()), f"{path} is empty")
