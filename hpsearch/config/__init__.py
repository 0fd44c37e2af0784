"""Settings as frozen dataclasses, read from TOML and `--set`."""

from hpsearch.config.study import (
    NOT_SEARCHABLE,
    SECTIONS,
    StudyConfig,
    apply_overrides,
    describe_type,
    digest,
    from_dict,
    get_setting,
    load,
    setting_names,
    stable_seed,
)

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
