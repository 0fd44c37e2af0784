"""Settings as frozen dataclasses, read from TOML and `--set`."""

from hpsearch.config.convert import describe_type
from hpsearch.config.hashing import digest, stable_seed
from hpsearch.config.overrides import apply_overrides
from hpsearch.config.sections import NOT_SEARCHABLE, SECTIONS, setting_names
from hpsearch.config.study import StudyConfig, from_dict, get_setting, load

__all__ = [
    "NOT_SEARCHABLE",
    "SECTIONS",
    "StudyConfig",
    "apply_overrides",
    "describe_type",
    "digest",
    "from_dict",
    "get_setting",
    "load",
    "setting_names",
    "stable_seed",
]
