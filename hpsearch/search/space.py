"""Convert the search space and its trials to Optuna's types and back."""

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
"""Optuna's distribution of each setting, by name."""

SAME_FACTOR = 1.2
"""Values on a logarithmic scale, such as learning rates, count as equal if they differ by less than this factor. Such
a difference changes the score less than a new seed does."""
SAME_SHARE = math.log(SAME_FACTOR) / math.log(1000)
"""Values on a linear scale count as equal if they differ by less than this fraction of the range. On a logarithmic
range of three decades, `SAME_FACTOR` is the same fraction."""
MAX_ENUMERATED = 100_000
"""Maximum size of a search space, in configurations, for which unused configurations are enumerated."""


def distributions(space: SearchSpace) -> dict[str, Distribution]:
    """Return Optuna's distribution of each dimension, by setting name."""
    return {name: _distribution(dimension) for name, dimension in space.items()}


def default_params(config: StudyConfig) -> dict[str, Any]:
    """Return the params of the default configuration, which trial 0 uses."""
    return {name: get_setting(config, name) for name in config.search}


def encode(value: Any) -> Any:
    """Return a setting's value in a form that Optuna can store: a (height, width) pair becomes `256x192`."""
    return "x".join(map(str, value)) if isinstance(value, tuple | list) else value


def decode(value: Any) -> Any:
    """Return the setting's value that `encode` converted to `value`."""
    if isinstance(value, str) and value.count("x") == 1 and all(part.isdecimal() for part in value.split("x")):
        height, width = value.split("x")
        return int(height), int(width)
    return value


def frozen_trial(
    params: Mapping[str, Any], space: Distributions, state: TrialState, constraint: float = 0.0, **more: Any
) -> FrozenTrial:
    """Return an Optuna trial.

    Params outside the space are left out. A constraint above 0 marks the trial as infeasible. `more` contains further
    arguments of `optuna.trial.create_trial`, such as `value`.
    """
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

    If `any_float` is true, any two values of a continuous setting count as equal.
    """
    if isinstance(dimension, Choice) or dimension.is_int or dimension.step is not None:
        return bool(dimension.key(one) == dimension.key(other))
    if dimension.log:
        return any_float or abs(math.log(one / other)) < math.log(SAME_FACTOR)
    return any_float or bool(abs(one - other) < SAME_SHARE * (dimension.high - dimension.low))


def unused_params(search: SearchSpace, used: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return all params of a finite space that are not in `used`; empty if the space is infinite or very large."""
    if not 0 < (search.n_configurations or 0) <= MAX_ENUMERATED:
        return []
    taken = {search.key(params) for params in used}
    grids = list(map(grid, search.values()))
    found = (dict(zip(search, values, strict=True)) for values in itertools.product(*grids))
    return [params for params in found if search.key(params) not in taken]


def grid(dimension: Choice | Range) -> list[Any]:
    """Return all values of a dimension; empty if the dimension is continuous."""
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
