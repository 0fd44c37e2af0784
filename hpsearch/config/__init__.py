"""Settings as frozen dataclasses, read from TOML and `--set`."""

from hpsearch.config.study import NOT_SEARCHABLE, SECTIONS, StudyConfig, from_dict, get_setting, setting_names
from hpsearch.config.study import load_config as load
from hpsearch.config.values import describe_type, module_names
from hpsearch.paths import digest, stable_seed

__all__ = (
    "NOT_SEARCHABLE", "SECTIONS", "StudyConfig", "describe_type", "digest", "from_dict", "get_setting", "load",
    "module_names", "setting_names", "stable_seed",
)  # fmt: skip
