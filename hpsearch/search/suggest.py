"""Suggest the params of a trial: a pure function of the trials before it.

An ordinary Optuna sampler carries a random state from trial to trial, which is lost with the process. Here every
suggestion is made by a sampler of its own, seeded from study seed and trial number, in an Optuna study in memory
that holds the trials on record. A study that was stopped therefore suggests what it would have suggested.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import optuna
from optuna.exceptions import ExperimentalWarning
from optuna.samplers import RandomSampler
from optuna.study import Study
from optuna.trial import FrozenTrial, TrialState, create_trial

from hpsearch.config import StudyConfig, stable_seed
from hpsearch.search import samplers
from hpsearch.search.space import (
    Distributions,
    decode,
    default_params,
    distributions,
    encode,
    is_same,
    single_value,
    unused_params,
)
from hpsearch.store.trials import TrialRecord

ATTEMPTS = 20
"""Suggestions that are drawn before an unused configuration is looked for by enumeration."""
Params = dict[str, Any]


def suggest(
    config: StudyConfig, history: Sequence[TrialRecord], number: int, enqueued: Mapping[str, Any] | None = None
) -> Params:
    """Return the params of trial `number`: the default for trial 0, those enqueued, or what the sampler suggests.

    `history` are the trials before it, by number. No configuration is suggested twice; continuous settings count as
    equal if they are close. A finite space is repeated only when all its configurations are used up.

    The sampler learns the value of a complete trial, of its first fits only, and the estimate of a pruned one. With
    `study.lookahead` L > 0 it learns the results of the trials up to number - L, and sees the later ones as running
    even if they have ended, so that the number of workers makes no difference.
    """
    space = distributions(config.search)
    if number == 0 or enqueued:
        return {**default_params(config), **(enqueued or {})} if number else default_params(config)
    fixed = {name: single_value(each) for name, each in space.items() if each.single()}
    searched = {name: each for name, each in space.items() if not each.single()}
    last = number - config.study.lookahead if config.study.lookahead else number
    known = [_Known(trial, is_ended=trial.outcome is not None and trial.number <= last) for trial in history]
    drawn = _draw_new(config, known, number, fixed, searched) if searched else {}
    return {name: decode({**fixed, **drawn}[name]) for name in space}


class _Known:
    """A trial before the suggested one, as the sampler sees it."""

    def __init__(self, trial: TrialRecord, *, is_ended: bool) -> None:
        self.number = trial.number
        self.params = {name: encode(value) for name, value in trial.params.items()}
        self.outcome = trial.outcome if is_ended else None
        self.value = trial.value if is_ended else None
        self.constraint = trial.constraint if is_ended else 0.0

    def frozen(self, space: Distributions) -> FrozenTrial:
        """Return it as a trial of Optuna: COMPLETE with its value or estimate, or in the state of its outcome."""
        has_value = self.outcome in ("complete", "pruned") and self.value is not None
        state = TrialState.COMPLETE if has_value else STATES[self.outcome]
        return create_trial(
            state=state,
            value=self.value if has_value else None,
            params={name: self.params[name] for name in space if name in self.params},
            distributions={name: each for name, each in space.items() if name in self.params},
            constraints={"feasible": self.constraint} if self.constraint > 0 else None,
        )


STATES = {
    None: TrialState.RUNNING,
    "complete": TrialState.COMPLETE,
    "pruned": TrialState.PRUNED,
    "infeasible": TrialState.PRUNED,
    "diverged": TrialState.PRUNED,
    "failed": TrialState.FAIL,
    "orphaned": TrialState.FAIL,
}
"""Outcome of a trial to the state of its counterpart in Optuna."""


def _draw_new(
    config: StudyConfig, known: Sequence[_Known], number: int, fixed: Params, searched: Distributions
) -> Params:
    """Draw until the params are not those of an earlier trial; then take an unused configuration if there is one."""
    space = distributions(config.search)
    with quiet():
        study = _study_in_memory(config, known, space)
        trial = _next_trial(study)
        first: Params = {}
        for attempt in range(ATTEMPTS):
            drawn = _draw(config, study, trial, searched, attempt)
            if not any(_is_repeat({**fixed, **drawn}, each, space) for each in known):
                return drawn
            first = first or drawn
    unused = unused_params(searched, [each.params for each in known])
    if not unused:
        return first
    return unused[int(np.random.default_rng(_seed(config, number, "unused")).integers(len(unused)))]


def _draw(config: StudyConfig, study: Study, trial: FrozenTrial, searched: Distributions, attempt: int) -> Params:
    """Return one suggestion of the sampler, or random params where it has none.

    What was repeated in half of the attempts is hard to get away from, so the rest is drawn at random.
    """
    salt = (attempt,) if attempt else ()
    if attempt < ATTEMPTS // 2:
        sampler = samplers.make_sampler(config, _seed(config, trial.number, "", *salt))
        drawn = samplers.sample(config, sampler, study, trial, searched)
    else:
        drawn = {}
    random = {
        name: RandomSampler(seed=_seed(config, trial.number, name, *salt)).sample_independent(
            study, trial, name, each
        )
        for name, each in searched.items()
        if name not in drawn
    }
    return {name: {**drawn, **random}[name] for name in searched}


def _is_repeat(params: Mapping[str, Any], earlier: _Known, space: Distributions) -> bool:
    """Return whether an earlier trial had these params. What was infeasible is so at any continuous value."""
    any_float = earlier.outcome == "infeasible"
    return space.keys() <= earlier.params.keys() and all(
        is_same(params[name], earlier.params[name], each, any_float=any_float) for name, each in space.items()
    )


def _study_in_memory(config: StudyConfig, known: Sequence[_Known], space: Distributions) -> Study:
    study = optuna.create_study(direction="maximize", sampler=RandomSampler(seed=0))
    for each in known:
        if samplers.is_replayed(config):
            _replay(config, study, each.frozen(space), each.number)
        else:
            study.add_trial(each.frozen(space))
    return study


def _replay(config: StudyConfig, study: Study, frozen: FrozenTrial, number: int) -> None:
    """Add a trial after the sampler has suggested it again, which leaves the sampler's state in its attributes."""
    study.enqueue_trial(frozen.params)
    trial = study.ask(frozen.distributions)
    sampler = samplers.make_sampler(config, _seed(config, number, ""))
    searched = {name: each for name, each in frozen.distributions.items() if not each.single()}
    samplers.sample(config, sampler, study, study.get_trials(deepcopy=False)[-1], searched)
    if frozen.state.is_finished():
        study.tell(trial, frozen.value, state=frozen.state)


def _next_trial(study: Study) -> FrozenTrial:
    study.ask()
    return study.get_trials(deepcopy=False)[-1]


def _seed(config: StudyConfig, number: int, *salt: Any) -> int:
    return stable_seed(config.study.seed, number, *salt)


@contextmanager
def quiet() -> Iterator[None]:
    """Silence Optuna's messages about new studies and experimental features: versions are pinned and tested."""
    verbosity = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ExperimentalWarning)
            yield
    finally:
        optuna.logging.set_verbosity(verbosity)
