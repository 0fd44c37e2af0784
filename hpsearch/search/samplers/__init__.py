"""Find the sampler that `study.sampler` names. Each sampler is a module of this package.

A sampler's module has a function `make(config, seed)`, which returns an Optuna sampler. If the sampler stores its
state in attributes of the study or of its trials, the module sets `IS_REPLAYED = True`. Its earlier suggestions are
then repeated to restore the state. If the sampler cannot handle categorical settings, the module sets
`IS_NUMERIC = True`. These settings are then drawn at random.
"""

import importlib
from types import ModuleType
from typing import Any

from optuna.distributions import CategoricalDistribution
from optuna.study import Study
from optuna.trial import FrozenTrial

from hpsearch.config import StudyConfig
from hpsearch.search.space import Distributions


def sample(config: StudyConfig, seed: int, study: Study, trial: FrozenTrial, space: Distributions) -> dict[str, Any]:
    """Create a sampler, and return its suggestion for `trial`, without settings for which it has no suggestion."""
    module = _module(config)
    if getattr(module, "IS_NUMERIC", False):
        space = {name: each for name, each in space.items() if not isinstance(each, CategoricalDistribution)}
    found: dict[str, Any] = module.make(config, seed).sample_relative(study, trial, dict(space))
    return found


def is_replayed(config: StudyConfig) -> bool:
    """Return whether the sampler's earlier suggestions must be repeated to restore its state."""
    return bool(getattr(_module(config), "IS_REPLAYED", False))


def _module(config: StudyConfig) -> ModuleType:
    return importlib.import_module(f"hpsearch.search.samplers.{config.study.sampler}")
