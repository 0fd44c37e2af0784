"""Suggest the params of a trial, as a pure function of the earlier trials.

An ordinary Optuna sampler carries its random state from trial to trial, and that state is lost when the process ends.
Here every suggestion comes from a new sampler, which is seeded from the study's seed and the trial number. The
sampler works on an in-memory Optuna study that contains the recorded trials. A study that was stopped and continued
therefore makes the same suggestions as an uninterrupted one.
"""

import dataclasses
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

import numpy as np
import optuna
from optuna.exceptions import ExperimentalWarning
from optuna.samplers import RandomSampler
from optuna.study import Study
from optuna.trial import FrozenTrial, TrialState

from hpsearch.config import StudyConfig, stable_seed
from hpsearch.config.search import SearchSpace
from hpsearch.search import samplers, space
from hpsearch.search.space import Distribution, Distributions, default_params, distributions
from hpsearch.store.trials import TrialRecord

ATTEMPTS = 20
"""Maximum number of suggestions to draw before unused configurations are enumerated."""
Params = dict[str, Any]


def suggest(
    config: StudyConfig, history: Sequence[TrialRecord], number: int, enqueued: Mapping[str, Any] | None = None
) -> Params:
    """Return the params of trial `number`: the default for trial 0, then enqueued params or a suggestion.

    `history` contains the earlier trials, by number. Configurations are not suggested twice, and continuous settings
    count as equal if they are close. Configurations of a finite space are repeated only after all of them were used.

    The sampler receives the values of complete trials, from their first fits only, and the estimates of pruned
    trials. With `study.lookahead` L > 0, it receives only the results of trials up to number - L. It sees later
    trials as running, even if they have ended, so that the suggestion does not depend on the number of workers.
    """
    if number == 0 or enqueued:
        return {**default_params(config), **(enqueued or {})} if number else default_params(config)
    dimensions = config.search
    fixed = {name: space.grid(each)[0] for name, each in dimensions.items() if each.n_values == 1}
    last = number - config.study.lookahead if config.study.lookahead else number
    hidden: dict[str, Any] = {"outcome": None, "value": None, "constraint": 0.0}
    known = [dataclasses.replace(trial, **hidden) if trial.number > last else trial for trial in history]
    drawn = _draw_new(config, known, number, fixed) if len(fixed) < len(dimensions) else {}
    return {name: {**fixed, **drawn}[name] for name in dimensions}


STATES = {
    None: TrialState.RUNNING,
    "complete": TrialState.COMPLETE,
    "pruned": TrialState.PRUNED,
    "infeasible": TrialState.PRUNED,
    "diverged": TrialState.PRUNED,
    "failed": TrialState.FAIL,
    "orphaned": TrialState.FAIL,
}
"""Optuna's trial state for each outcome."""


def _draw_new(config: StudyConfig, known: Sequence[TrialRecord], number: int, fixed: Params) -> Params:
    """Draw params until they differ from those of all earlier trials.

    After `ATTEMPTS` repeats, an unused configuration is returned if there is one, else the first draw.
    """
    spaces = distributions(config.search)
    searched = {name: each for name, each in spaces.items() if name not in fixed}
    with quiet():
        study = _study_in_memory(config, known, spaces)
        study.ask()
        trial = study.get_trials(deepcopy=False)[-1]
        first: Params = {}
        for attempt in range(ATTEMPTS):
            drawn = _draw(config, study, trial, searched, attempt)
            if not any(_is_repeat({**fixed, **drawn}, each, config.search) for each in known):
                return drawn
            first = first or drawn
    unused = space.unused_params(config.search, [each.params for each in known])
    if not unused:
        return first
    return unused[int(np.random.default_rng(_seed(config, number, "unused")).integers(len(unused)))]


def _draw(config: StudyConfig, study: Study, trial: FrozenTrial, searched: Distributions, attempt: int) -> Params:
    """Return one suggestion of the sampler, with random values for settings that it does not suggest.

    `attempt` counts from 0 and changes the seed. After half of the attempts, all settings are drawn at random,
    because the sampler would probably continue to repeat itself.
    """
    salt = (attempt,) if attempt else ()
    drawn: Params = {}
    if attempt < ATTEMPTS // 2:
        drawn = samplers.sample(config, _seed(config, trial.number, "", *salt), study, trial, searched)
    for name, each in searched.items():
        if name not in drawn:
            sampler = RandomSampler(seed=_seed(config, trial.number, name, *salt))
            drawn[name] = sampler.sample_independent(study, trial, name, each)
    return {name: space.decode(value) for name, value in drawn.items()}


def _is_repeat(params: Params, earlier: TrialRecord, search: SearchSpace) -> bool:
    """Return whether an earlier trial had these params.

    If the earlier trial was infeasible, continuous settings are ignored, because they do not affect feasibility.
    """
    any_float = earlier.outcome == "infeasible"
    return search.keys() <= earlier.params.keys() and all(
        space.is_same(params[name], earlier.params[name], each, any_float=any_float) for name, each in search.items()
    )


def _study_in_memory(config: StudyConfig, known: Sequence[TrialRecord], dimensions: Distributions) -> Study:
    """Return an in-memory study with these trials.

    Complete and pruned trials with a value are COMPLETE. All other trials have the state that `STATES` assigns to
    their outcome.
    """
    study = optuna.create_study(direction="maximize", sampler=RandomSampler(seed=0))
    made = _frozen_trials(tuple(dimensions.items()))
    for each in known:
        has_value = each.outcome in ("complete", "pruned") and each.value is not None
        state = TrialState.COMPLETE if has_value else STATES[each.outcome]
        value = each.value if has_value else None
        key = each.params, state, each.constraint, value
        if each.number not in made or made[each.number][0] != key:
            made[each.number] = key, space.frozen_trial(each.params, dimensions, state, each.constraint, value=value)
        frozen = made[each.number][1]
        # Optuna copies each trial that is added. For thousands of trials, copies take most of a suggestion's time.
        vars(frozen)["__deepcopy__"] = lambda _, same=frozen: same
        if samplers.is_replayed(config):
            _replay(config, study, frozen, each.number)
        else:
            study.add_trial(frozen)
    return study


@lru_cache(maxsize=4)
def _frozen_trials(dimensions: tuple[tuple[str, Distribution], ...]) -> dict[int, tuple[Any, FrozenTrial]]:
    """Return a cache of Optuna's trials in this space, by trial number, with the values that they were made from."""
    return {}


def _replay(config: StudyConfig, study: Study, frozen: FrozenTrial, number: int) -> None:
    """Replay a trial: let the sampler suggest it again, and add it to the study.

    The sampler thereby stores its state in the attributes of the trial again.
    """
    study.enqueue_trial(frozen.params)
    trial = study.ask(frozen.distributions)
    searched: Any = {name: each for name, each in frozen.distributions.items() if not each.single()}
    samplers.sample(config, _seed(config, number, ""), study, study.get_trials(deepcopy=False)[-1], searched)
    if frozen.state.is_finished():
        study.tell(trial, frozen.value, state=frozen.state)


def _seed(config: StudyConfig, number: int, *salt: Any) -> int:
    return stable_seed(config.study.seed, number, *salt)


@contextmanager
def quiet() -> Iterator[None]:
    """Silence Optuna's messages about new studies and experimental features.

    These features are safe to use, because Optuna's version is pinned and tested.
    """
    verbosity = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ExperimentalWarning)
            yield
    finally:
        optuna.logging.set_verbosity(verbosity)
