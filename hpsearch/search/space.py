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


def is_same(one: Any, other: Any, distribution: Distribution, *, any_float: bool = False) -> bool:
    """Return whether two values count as equal: discrete ones if they are, continuous ones if they are close.

    With `any_float`, all values of a continuous setting count as equal.
    """
    if not isinstance(distribution, FloatDistribution) or distribution.step is not None:
        return bool(_place(one, distribution) == _place(other, distribution))
    if distribution.log:
        return any_float or abs(math.log(one / other)) < math.log(SAME_FACTOR)
    return any_float or bool(abs(one - other) < SAME_SHARE * (distribution.high - distribution.low))


def unused_params(space: Distributions, used: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return all params of a finite space that are not in `used`; empty for one that is infinite or very large."""
    grids = [grid(each) for each in space.values()]
    if not 0 < math.prod(map(len, grids)) <= MAX_ENUMERATED:
        return []

    def key(params: Mapping[str, Any]) -> tuple[Any, ...]:
        return tuple(_place(params.get(name), each) for name, each in space.items())

    taken = {key(params) for params in used}
    found = (dict(zip(space, values, strict=True)) for values in itertools.product(*grids))
    return [params for params in found if key(params) not in taken]


def grid(distribution: Distribution) -> list[Any]:
    """Return all values of a distribution; empty for a continuous one."""
    if isinstance(distribution, CategoricalDistribution):
        return list(distribution.choices)
    low, high, step = distribution.low, distribution.high, distribution.step
    if step is None:
        return [low] if low == high else []
    return [low + number * step for number in range(round((high - low) / step) + 1)]


def _place(value: Any, distribution: Distribution) -> Any:
    """Return what equal values share: the step number of a float with a step, because `low + 2 * step` may round."""
    if isinstance(distribution, FloatDistribution) and distribution.step is not None and value is not None:
        return round((value - distribution.low) / distribution.step)
    return value


def _distribution(dimension: Choice | Range) -> Distribution:
    if isinstance(dimension, Choice):
        return CategoricalDistribution([encode(value) for value in dimension.values])
    if dimension.is_int:
        step = 1 if dimension.step is None else int(dimension.step)
        return IntDistribution(int(dimension.low), int(dimension.high), log=dimension.log, step=step)
    return FloatDistribution(dimension.low, dimension.high, log=dimension.log, step=dimension.step)
