"""The search space in Optuna's terms, and back."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.samplers import BaseSampler, RandomSampler, TPESampler
from optuna.study import Study
from optuna.trial import FrozenTrial, Trial, TrialState

from hpsearch.config import StudyConfig, get_setting, stable_seed
from hpsearch.tuning.config import Choice, Range, SearchSpace


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
    """Suggests from the history in the database and the trial's number alone.

    An ordinary sampler carries a random state from ask to ask, which is lost with the process: reopened with the
    same seed it repeats its suggestions, without one it cannot be repeated. Here each suggestion is made by a sampler
    of its own, seeded from (study seed, trial number, parameter).
    """

    def __init__(
        self, make: Callable[[int], BaseSampler], *, seed: int, fixed: Mapping[int, Mapping[str, Any]] | None = None
    ) -> None:
        self._make = make
        self._seed = seed
        self._fixed = dict(fixed or {})

    def infer_relative_search_space(self, study: Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        if trial.number in self._fixed:
            return {}
        return self._sampler(trial, "").infer_relative_search_space(study, trial)

    def sample_relative(
        self, study: Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        if trial.number in self._fixed or not search_space:
            return {}
        return self._sampler(trial, "").sample_relative(study, trial, search_space)

    def sample_independent(
        self, study: Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        if param_name in self._fixed.get(trial.number, {}):
            return encode(self._fixed[trial.number][param_name])
        return self._sampler(trial, param_name).sample_independent(study, trial, param_name, param_distribution)

    def after_trial(
        self, study: Study, trial: FrozenTrial, state: TrialState, values: Sequence[float] | None
    ) -> None:
        self._sampler(trial, "").after_trial(study, trial, state, values)

    def _sampler(self, trial: FrozenTrial, param_name: str) -> BaseSampler:
        return self._make(stable_seed(self._seed, trial.number, param_name))


def make_sampler(config: StudyConfig, fixed: Mapping[int, Mapping[str, Any]]) -> ReplayableSampler:
    """The sampler that `study.sampler` names; the trials in `fixed` get the params given there."""
    settings = config.study

    def tpe(seed: int) -> BaseSampler:
        return TPESampler(seed=seed, n_startup_trials=settings.startup_trials, multivariate=True, constant_liar=True)

    def random(seed: int) -> BaseSampler:
        return RandomSampler(seed=seed)

    return ReplayableSampler(tpe if settings.sampler == "tpe" else random, seed=settings.seed, fixed=fixed)


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
