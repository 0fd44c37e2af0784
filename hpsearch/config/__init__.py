"""Settings as frozen dataclasses, read from TOML and `--set`."""

from hpsearch.config.sections import NOT_SEARCHABLE as NOT_SEARCHABLE
from hpsearch.config.sections import SECTIONS as SECTIONS
from hpsearch.config.sections import apply_overrides as apply_overrides
from hpsearch.config.sections import setting_names as setting_names
from hpsearch.config.study import StudyConfig as StudyConfig
from hpsearch.config.study import from_dict as from_dict
from hpsearch.config.study import get_setting as get_setting
from hpsearch.config.study import load as load
from hpsearch.config.values import describe_type as describe_type
from hpsearch.config.values import module_names as module_names
from hpsearch.paths import digest as digest
from hpsearch.paths import stable_seed as stable_seed
