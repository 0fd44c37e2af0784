"""The search space in Optuna's terms, and back."""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.samplers import BaseSampler, RandomSampler, TPESampler
from optuna.study import Study
from optuna.trial import FrozenTrial, Trial, TrialState

from hpsearch.config import StudyConfig, get_setting, stable_seed
from hpsearch.config.search import Choice, Range, SearchSpace

SAME_FACTOR = 1.2
"""Two learning rates closer than this are one: what lies between them is less than what luck does to a fit."""
SAME_SHARE = math.log(SAME_FACTOR) / math.log(1000)
"""For other continuous settings, the share of the range that a factor of 1.2 has of three decades."""
ATTEMPTS = 20
"""Suggestions that are drawn before an unused configuration is looked for by enumeration."""
MAX_ENUMERATED = 100_000
"""Configurations of a search space that is enumerated."""
SEARCH_VALUE = "search_value"
"""User attribute of an ended trial: the value that the search learns from. It is the mean over the first fits of a
full trial, and the estimate of a dropped one. Optuna's own value is the one that ranks the trial."""


def distributions(space: SearchSpace) -> dict[str, BaseDistribution]:
    """Optuna's distribution of every dimension, by the setting's name."""
    return {name: _distribution(dimension) for name, dimension in space}


def suggest(trial: Trial, space: SearchSpace) -> dict[str, Any]:
    """Values for every dimension, in the order of their names; what the trial already has stays."""
    return {name: decode(_suggest(trial, name, distribution)) for name, distribution in distributions(space).items()}


def default_params(config: StudyConfig) -> dict[str, Any]:
    """The default configuration as params: trial 0."""
    return {name: get_setting(config, name) for name, _ in config.search}


def encode(value: Any) -> Any:
    """A setting's value as Optuna can store it: a (height, width) pair becomes `256x192`."""
    return "x".join(map(str, value)) if isinstance(value, tuple | list) else value


def decode(value: Any) -> Any:
    """The inverse of `encode`."""
    if isinstance(value, str) and value.count("x") == 1 and all(part.isdecimal() for part in value.split("x")):
        height, width = value.split("x")
        return int(height), int(width)
    return value


class ReplayableSampler(BaseSampler):
    """Suggests from the history in the database and the trial's number alone, and nothing twice.

    An ordinary sampler carries a random state from ask to ask, which is lost with the process: reopened with the
    same seed it repeats its suggestions, without one it cannot be repeated. Here each suggestion is made by a sampler
    of its own, seeded from (study seed, trial number, parameter, attempt). What an earlier trial has had already
    (`is_repeated`) is drawn again. A finite space is repeated only once all its configurations are used up.

    Trials are shown to it with their `SEARCH_VALUE`, so replicates change no suggestion.

    With `lookahead` L above 0 trial n is suggested from what became of the trials up to n - L. The later ones are
    shown as running, whether they are or not, so that the number of workers makes no difference.
    """

    def __init__(
        self,
        make: Callable[[int], BaseSampler],
        *,
        seed: int,
        space: SearchSpace,
        fixed: Mapping[int, Mapping[str, Any]] | None = None,
        lookahead: int = 0,
    ) -> None:
        self._make = make
        self._seed = seed
        self._space = distributions(space)
        self._fixed = dict(fixed or {})
        self._lookahead = lookahead
        self._enqueued: Mapping[str, Any] = {}

    @contextmanager
    def giving(self, params: Mapping[str, Any] | None) -> Iterator[None]:
        """For the block, any trial but the fixed ones gets these params."""
        self._enqueued = params or {}
        try:
            yield
        finally:
            self._enqueued = {}

    def infer_relative_search_space(self, study: Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        if self._given(trial):
            return {}
        return {name: each for name, each in self._space.items() if not each.single()}

    def sample_relative(
        self, study: Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        if not search_space:
            return {}
        trials = [_as_searched(each) for each in study.get_trials(deepcopy=False)]
        if self._lookahead:
            trials = [_as_of(each, trial.number - self._lookahead) for each in trials[: trial.number + 1]]
        study, earlier = AtOneMoment(study, trials), trials[: trial.number]
        for attempt in range(ATTEMPTS):
            params = self._draw(study, trial, search_space, attempt)
            if not is_repeated({**trial.params, **params}, earlier, self._space):
                return params
        return self._unused(trial, search_space, earlier) or self._draw(study, trial, search_space, 0)

    def sample_independent(
        self, study: Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        if param_name in (given := self._given(trial)):
            return encode(given[param_name])
        return RandomSampler(seed=self._seed_of(trial, param_name)).sample_independent(
            study, trial, param_name, param_distribution
        )

    def after_trial(
        self, study: Study, trial: FrozenTrial, state: TrialState, values: Sequence[float] | None
    ) -> None:
        self._make(self._seed_of(trial, "")).after_trial(study, trial, state, values)

    def _given(self, trial: FrozenTrial) -> Mapping[str, Any]:
        return self._fixed.get(trial.number) or self._enqueued

    def _draw(
        self, study: Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution], attempt: int
    ) -> dict[str, Any]:
        salt = (attempt,) if attempt else ()
        # What has been repeated half of the times is hard to get away from: the rest is drawn blindly.
        if attempt < ATTEMPTS // 2 and (
            params := self._make(self._seed_of(trial, "", *salt)).sample_relative(study, trial, search_space)
        ):
            return params
        return {
            name: RandomSampler(seed=self._seed_of(trial, name, *salt)).sample_independent(study, trial, name, each)
            for name, each in search_space.items()
        }

    def _unused(
        self, trial: FrozenTrial, search_space: Mapping[str, BaseDistribution], earlier: Sequence[FrozenTrial]
    ) -> dict[str, Any]:
        """Return a configuration of a finite space that no earlier trial has had; empty if there is none."""
        grids = [_grid(each) for each in search_space.values()]
        if any(grid is None for grid in grids) or math.prod(len(grid or ()) for grid in grids) > MAX_ENUMERATED:
            return {}

        def key(params: Mapping[str, Any]) -> tuple[Any, ...]:
            return tuple(_place(params.get(name), each) for name, each in search_space.items())

        had = {key(each.params) for each in earlier}
        found = [
            dict(zip(search_space, values, strict=True)) for values in itertools.product(*(g or () for g in grids))
        ]
        unused = [params for params in found if key({**params, **trial.params}) not in had]
        if not unused:
            return {}
        return unused[int(np.random.default_rng(self._seed_of(trial, "unused")).integers(len(unused)))]

    def _seed_of(self, trial: FrozenTrial, *salt: Any) -> int:
        return stable_seed(self._seed, trial.number, *salt)


def is_repeated(
    params: Mapping[str, Any], earlier: Sequence[FrozenTrial], space: Mapping[str, BaseDistribution]
) -> bool:
    """Whether an earlier trial had these params: all that is discrete equal, all that is continuous close.

    `params` are as Optuna stores them. What was infeasible is so at any value of the continuous ones.
    """
    for trial in earlier:
        if space.keys() <= trial.params.keys() and all(
            _is_same(params[name], trial.params[name], each, trial.user_attrs.get("outcome") == "infeasible")
            for name, each in space.items()
            if name in params
        ):
            return True
    return False


def make_sampler(config: StudyConfig, fixed: Mapping[int, Mapping[str, Any]]) -> ReplayableSampler:
    """The sampler that `study.sampler` names; the trials in `fixed` get the params given there."""
    settings = config.study

    def tpe(seed: int) -> BaseSampler:
        return TPESampler(seed=seed, n_startup_trials=settings.startup_trials, multivariate=True, constant_liar=True)

    def random(seed: int) -> BaseSampler:
        return RandomSampler(seed=seed)

    return ReplayableSampler(
        tpe if settings.sampler == "tpe" else random,
        seed=settings.seed,
        space=config.search,
        fixed=fixed,
        lookahead=settings.lookahead,
    )


def _is_same(one: Any, other: Any, distribution: BaseDistribution, infeasible: bool) -> bool:
    if not isinstance(distribution, FloatDistribution) or distribution.step is not None:
        return bool(_place(one, distribution) == _place(other, distribution))
    if infeasible:
        return True
    if distribution.log:
        return abs(math.log(one / other)) < math.log(SAME_FACTOR)
    return bool(abs(one - other) < SAME_SHARE * (distribution.high - distribution.low))


def _grid(distribution: BaseDistribution) -> list[Any] | None:
    """Return all values of a distribution; None for a continuous one."""
    if isinstance(distribution, CategoricalDistribution):
        return list(distribution.choices)
    if isinstance(distribution, IntDistribution):
        return list(range(distribution.low, distribution.high + 1, distribution.step))
    assert isinstance(distribution, FloatDistribution)
    if distribution.step is None:
        return [distribution.low] if distribution.single() else None
    n_steps = round((distribution.high - distribution.low) / distribution.step)
    return [distribution.low + step * distribution.step for step in range(n_steps + 1)]


def _place(value: Any, distribution: BaseDistribution) -> Any:
    """Return what equal values share: of a float with a step its place, since `low + 2 * step` may round."""
    if isinstance(distribution, FloatDistribution) and distribution.step is not None and value is not None:
        return round((value - distribution.low) / distribution.step)
    return value


class AtOneMoment(Study):
    """A study with the trials that it had at one moment, or is to look as if it had had."""

    def __init__(self, study: Study, trials: list[FrozenTrial]) -> None:
        # Not by its own constructor, which asks the database for what is known.
        self.__dict__.update(study.__dict__)
        self._trials = trials

    def _get_trials(
        self, deepcopy: bool = True, states: Container[TrialState] | None = None, use_cache: bool = False
    ) -> list[FrozenTrial]:
        found = [trial for trial in self._trials if states is None or trial.state in states]
        return copy.deepcopy(found) if deepcopy else found


def _as_searched(trial: FrozenTrial) -> FrozenTrial:
    """Return the trial with the value that the search learns from, whatever it is ranked by."""
    value = trial.user_attrs.get(SEARCH_VALUE)
    if value is None or trial.state not in (TrialState.COMPLETE, TrialState.PRUNED):
        return trial
    shown = copy.copy(trial)
    shown.state, shown.values = TrialState.COMPLETE, [value]
    return shown


def _as_of(trial: FrozenTrial, last: int) -> FrozenTrial:
    """Return the trial as it looks before its end is known, if it comes after trial `last`."""
    if trial.number <= last:
        return trial
    shown = copy.copy(trial)
    shown.state, shown.values, shown.datetime_complete = TrialState.RUNNING, None, None
    shown.user_attrs = {}
    shown.system_attrs = {}
    return shown


def _suggest(trial: Trial, name: str, distribution: BaseDistribution) -> Any:
    if isinstance(distribution, CategoricalDistribution):
        return trial.suggest_categorical(name, distribution.choices)
    if isinstance(distribution, IntDistribution):
        return trial.suggest_int(
            name, distribution.low, distribution.high, step=distribution.step, log=distribution.log
        )
    assert isinstance(distribution, FloatDistribution)
    return trial.suggest_float(
        name, distribution.low, distribution.high, step=distribution.step, log=distribution.log
    )


def _distribution(dimension: Choice | Range) -> BaseDistribution:
    if isinstance(dimension, Choice):
        return CategoricalDistribution([encode(value) for value in dimension.values])
    if dimension.is_int:
        step = 1 if dimension.step is None else int(dimension.step)
        return IntDistribution(int(dimension.low), int(dimension.high), log=dimension.log, step=step)
    return FloatDistribution(dimension.low, dimension.high, log=dimension.log, step=dimension.step)
