"""The search space and its trials in Optuna's terms, and back."""

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.trial import FrozenTrial, TrialState, create_trial

from hpsearch.config import StudyConfig, get_setting
from hpsearch.config.search import Choice, Range, SearchSpace

Distribution = CategoricalDistribution | FloatDistribution | IntDistribution
Distributions = Mapping[str, Distribution]
"""Setting to Optuna's distribution of it."""

SAME_FACTOR = 1.2
"""Two learning rates closer than this count as equal: they differ by less than two runs of one configuration do."""
SAME_SHARE = math.log(SAME_FACTOR) / math.log(1000)
"""For other continuous settings, the share of the range that a factor of 1.2 has of three decades."""
MAX_ENUMERATED = 100_000
"""Largest number of configurations that is enumerated."""


def distributions(space: SearchSpace) -> dict[str, Distribution]:
    """Return Optuna's distribution of every dimension, by the setting's name."""
    return {name: _distribution(dimension) for name, dimension in space.items()}


def default_params(config: StudyConfig) -> dict[str, Any]:
    """Return the default configuration as params: those of trial 0."""
    return {name: get_setting(config, name) for name in config.search}


def encode(value: Any) -> Any:
    """Return a setting's value as Optuna can store it: a (height, width) pair becomes `256x192`."""
    return "x".join(map(str, value)) if isinstance(value, tuple | list) else value


def decode(value: Any) -> Any:
    """Return the setting's value that `encode` was given."""
    if isinstance(value, str) and value.count("x") == 1 and all(part.isdecimal() for part in value.split("x")):
        height, width = value.split("x")
        return int(height), int(width)
    return value


def frozen_trial(
    params: Mapping[str, Any], space: Distributions, state: TrialState, constraint: float = 0.0, **more: Any
) -> FrozenTrial:
    """Return a trial of Optuna. Params outside the space are left out, a constraint above 0 marks it infeasible."""
    searched = {name: each for name, each in space.items() if name in params}
    return create_trial(
        state=state,
        params={name: encode(params[name]) for name in searched},
        distributions=dict(searched),
        constraints={"feasible": constraint} if constraint > 0 else None,
        **more,
    )


def is_same(one: Any, other: Any, dimension: Choice | Range, *, any_float: bool = False) -> bool:
    """Return whether two values of a setting count as equal. Discrete values must be equal, continuous ones close.

    With `any_float`, any two values of a continuous setting count as equal.
    """
    if isinstance(dimension, Choice) or dimension.is_int or dimension.step is not None:
        return bool(dimension.key(one) == dimension.key(other))
    if dimension.log:
        return any_float or abs(math.log(one / other)) < math.log(SAME_FACTOR)
    return any_float or bool(abs(one - other) < SAME_SHARE * (dimension.high - dimension.low))


def unused_params(search: SearchSpace, used: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return all params of a finite space that are not in `used`; empty for one that is infinite or very large."""
    if not 0 < (search.n_configurations or 0) <= MAX_ENUMERATED:
        return []
    taken = {search.key(params) for params in used}
    grids = list(map(grid, search.values()))
    found = (dict(zip(search, values, strict=True)) for values in itertools.product(*grids))
    return [params for params in found if search.key(params) not in taken]


def grid(dimension: Choice | Range) -> list[Any]:
    """Return all values of a dimension; empty for a continuous one."""
    if isinstance(dimension, Choice):
        return [decode(value) for value in dimension.values]
    step = dimension.step or 1
    return [dimension.nearest(dimension.low + number * step) for number in range(dimension.n_values or 0)]


def _distribution(dimension: Choice | Range) -> Distribution:
    if isinstance(dimension, Choice):
        return CategoricalDistribution([encode(value) for value in dimension.values])
    if dimension.is_int:
        step = 1 if dimension.step is None else int(dimension.step)
        return IntDistribution(int(dimension.low), int(dimension.high), log=dimension.log, step=step)
    return FloatDistribution(dimension.low, dimension.high, log=dimension.log, step=dimension.step)
