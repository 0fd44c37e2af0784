"""Settings as frozen dataclasses, read from TOML and `--set`."""

from hpsearch.config.sections import NOT_SEARCHABLE, SECTIONS, apply_overrides, setting_names
from hpsearch.config.study import StudyConfig, from_dict, get_setting
from hpsearch.config.study import load_config as load
from hpsearch.config.values import describe_type, module_names
from hpsearch.paths import digest, stable_seed

__all__ = (
    "NOT_SEARCHABLE", "SECTIONS", "StudyConfig", "apply_overrides", "describe_type", "digest", "from_dict",
    "get_setting", "load", "module_names", "setting_names", "stable_seed",
)  # fmt: skip
