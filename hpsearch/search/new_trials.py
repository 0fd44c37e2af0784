"""Make the next trial of a study, and say when the search space has no further one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from hpsearch.config import StudyConfig
from hpsearch.errors import ConfigError, StudyError
from hpsearch.search import enqueue
from hpsearch.search.suggest import suggest
from hpsearch.store.record import StudyRecord
from hpsearch.store.trials import TrialRecord, count_trials
from hpsearch.store.versions import code_version, now
from hpsearch.workers.plan import ExecutionPlan, Infeasible, why_infeasible

INFEASIBLE_PER_TRIAL = 10
"""Infeasible suggestions that are free, for each trial wanted."""


class NewTrial(NamedTuple):
    """A trial that is about to begin."""

    trial: TrialRecord
    config: StudyConfig
    infeasible: Infeasible | None
    """Why it cannot be trained; None if it can."""


def next_trial(record: StudyRecord, trials: Mapping[int, TrialRecord], plan: ExecutionPlan) -> NewTrial:
    """Return the next enqueued or suggested trial. Raises StudyError if too many suggestions were infeasible."""
    history = [trials[number] for number in sorted(trials)]
    _check_feasibility(record, history)
    number = history[-1].number + 1 if history else 0
    wanted = enqueue.next_params(record, history)
    params = suggest(record.config, history, number, wanted)
    try:
        config = record.config.with_params(params)
        infeasible = why_infeasible(config, plan)
    except ConfigError as error:
        config, infeasible = record.config.with_params({}), Infeasible(str(error), 1.0)
    trial = TrialRecord(
        number=number,
        params=params,
        config=config.to_dict(),
        began_at=now(),
        source="default" if number == 0 else "enqueued" if enqueue.is_same(params, wanted) else "sampler",
        code=code_version(),
    )
    return NewTrial(trial, config, infeasible)


def used_up(record: StudyRecord, trials: Mapping[int, TrialRecord]) -> str:
    """Return why the search ends before its trials are there; "" if it does not.

    Raises StudyError if no configuration of the search space is feasible.
    """
    n_counted, config = count_trials(trials.values()), record.config
    if n_counted >= config.study.trials or record.n_unused(trials.values()) != 0:
        return ""
    n_configurations = config.search.n_configurations
    if all(trial.outcome == "infeasible" for trial in trials.values()):
        reason = trials[max(trials)].reason
        if not len(config.search):
            raise StudyError(f"the configuration is infeasible, and there is no search for another: {reason}")
        raise StudyError(
            f"all {n_configurations} configurations of the search are infeasible, the last because {reason}: "
            "widen it or change data.size"
        )
    have = "its only configuration has" if n_configurations == 1 else f"all {n_configurations} configurations have"
    return (
        f"the search space is used up: {have} been tried, so the search ends with {n_counted} of "
        f"{config.study.trials} trials"
    )


def _check_feasibility(record: StudyRecord, history: list[TrialRecord]) -> None:
    infeasible = [trial for trial in history if trial.outcome == "infeasible"]
    if len(infeasible) >= INFEASIBLE_PER_TRIAL * record.config.study.trials:
        raise StudyError(
            f"{len(infeasible)} suggested configurations were infeasible, the last one because "
            f"{infeasible[-1].reason}; make the search space smaller or data.size other"
        )
