"""The samplers that `study.sampler` can name: one module each, found by its name.

A sampler's module has a function `make(config, seed)` that returns a sampler of Optuna. A sampler that stores its
state in attributes of the study or of its trials sets `IS_REPLAYED = True`: its earlier suggestions are then made
again, to restore the state. One that cannot handle categorical settings sets `IS_NUMERIC = True`: those are drawn at
random.
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
    """Return what a new sampler suggests for `trial`; settings that it leaves out are missing."""
    module = _module(config)
    if getattr(module, "IS_NUMERIC", False):
        space = {name: each for name, each in space.items() if not isinstance(each, CategoricalDistribution)}
    found: dict[str, Any] = module.make(config, seed).sample_relative(study, trial, dict(space))
    return found


def is_replayed(config: StudyConfig) -> bool:
    """Return whether the sampler's earlier suggestions have to be made again to restore its state."""
    return bool(getattr(_module(config), "IS_REPLAYED", False))


def _module(config: StudyConfig) -> ModuleType:
    return importlib.import_module(f"hpsearch.search.samplers.{config.study.sampler}")
