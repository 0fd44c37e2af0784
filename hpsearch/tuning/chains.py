"""What trials mean where coordinators die: a configuration and its retries are one chain, which counts once.

Pure functions of Optuna's trials, so every coordinator comes to the same conclusions without asking the others. A
retry has a new number, so numbers no longer say which suggestion a trial is: its *draw* does. That is the number it
would have had if nobody had died.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from optuna.distributions import BaseDistribution
from optuna.samplers import BaseSampler
from optuna.study import Study
from optuna.trial import FrozenTrial, TrialState

from hpsearch.search.optuna_view import STATES
from hpsearch.search.samplers import AtOneMoment

EARLIER_S = 2.0
"""How long a suggestion waits for the params of those before it, which another coordinator is just writing."""
POLL_S = 0.05

ChainState = Literal["parked", "open", "free", "counted"]


@dataclass(frozen=True)
class Chain:
    """A configuration: the trial that it began as, and its retries."""

    draw: int
    members: tuple[FrozenTrial, ...]
    """By number; the first one is no retry."""

    @property
    def state(self) -> ChainState:
        """`counted`: it uses up one of `study.trials`; `free`: it was infeasible; `parked`: it waits to be begun."""
        for member in self.members:
            if is_told(member):
                return "free" if member.user_attrs["outcome"] == "infeasible" else "counted"
        is_parked = len(self.members) == 1 and self.members[0].state == TrialState.WAITING
        return "parked" if is_parked and not is_begun(self.members[0]) else "open"

    @property
    def result(self) -> FrozenTrial:
        """The member that was told, or else the last one."""
        return next((member for member in self.members if is_told(member)), self.members[-1])


def chains(trials: Sequence[FrozenTrial]) -> list[Chain]:
    """All chains, by their draw. `trials` are all trials of the study, by number."""
    members: dict[int, list[FrozenTrial]] = {}
    for trial in trials:
        members.setdefault(next(iter(history(trial)), trial.number), []).append(trial)
    return [Chain(draw, tuple(each)) for draw, (_, each) in enumerate(sorted(members.items()))]


def history(trial: FrozenTrial) -> tuple[int, ...]:
    """Numbers that the configuration had before."""
    return tuple(trial.system_attrs.get("retry_history", ()))


def is_begun(trial: FrozenTrial) -> bool:
    """Whether a coordinator has had it."""
    return "owner" in trial.user_attrs or bool(history(trial))


def is_told(trial: FrozenTrial) -> bool:
    """Whether its coordinator told what became of it; one that was failed for its silence may have tried to."""
    outcome = trial.user_attrs.get("outcome")
    if outcome not in STATES or outcome == "lost" or not trial.state.is_finished():
        return False
    # A full trial is shown as pruned where it leads and cannot win.
    return (trial.state == TrialState.FAIL) == (STATES[outcome] == TrialState.FAIL)


def n_taken(found: Sequence[Chain], before: int | None = None) -> int:
    """Chains that are counted or may come to be, of those with a draw below `before`."""
    return sum(chain.state in ("open", "counted") for chain in found if before is None or chain.draw < before)


def chain_of(found: Sequence[Chain], number: int) -> Chain:
    """The chain that has the trial `number`."""
    return next(chain for chain in found if any(member.number == number for member in chain.members))


def is_superfluous(chain: Chain, number: int) -> bool:
    """Whether that retry is one too many: the chain has ended, or an earlier retry goes on from the same trial.

    Two coordinators that find a trial without a retry may both make one.
    """
    if any(is_told(member) for member in chain.members):
        return True
    this = next(member for member in chain.members if member.number == number)
    return any(history(each) == history(this) and each.number < number for each in chain.members)


def without_retry(trials: Sequence[FrozenTrial]) -> list[FrozenTrial]:
    """Trials that were failed for their silence and that nobody has queued again: whoever failed them died then."""
    continued = {history(trial)[-1] for trial in trials if history(trial)}
    return [
        trial
        for trial in trials
        if trial.state == TrialState.FAIL
        and not is_told(trial)
        and trial.user_attrs.get("outcome") not in ("superfluous", "unknown")
        and trial.number not in continued
    ]


class AsIfNobodyDied(BaseSampler):
    """Shows a sampler the chains instead of the trials, numbered by their draw; so it suggests what it would have.

    The trials are read once for each suggestion: a sampler looks at them again and again, and every look at a
    database costs as much as the one before.
    """

    def __init__(self, sampler: BaseSampler, names: Collection[str]) -> None:
        """`names` are those of the params that every trial gets."""
        self._sampler = sampler
        self._names = set(names)
        self._shown: tuple[Study, FrozenTrial] | None = None
        self._shown_id = -1

    def infer_relative_search_space(self, study: Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        # The first that Optuna asks for of a trial.
        self._shown = None
        return self._sampler.infer_relative_search_space(*self._show(study, trial))

    def sample_relative(
        self, study: Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        return self._sampler.sample_relative(*self._show(study, trial), search_space)

    def sample_independent(
        self, study: Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        shown, shown_trial = self._show(study, trial)
        return self._sampler.sample_independent(shown, shown_trial, param_name, param_distribution)

    def after_trial(
        self, study: Study, trial: FrozenTrial, state: TrialState, values: Sequence[float] | None
    ) -> None:
        self._sampler.after_trial(study, trial, state, values)

    def _show(self, study: Study, trial: FrozenTrial) -> tuple[Study, FrozenTrial]:
        if self._shown is None or self._shown_id != trial._trial_id:
            trials = study.get_trials(deepcopy=False)
            if set(trial.params) != self._names:
                trials = _with_earlier(study, trials, trial, self._names)
            self._shown = _as_if_nobody_died(study, trials, trial)
            self._shown_id = trial._trial_id
        return self._shown


def _as_if_nobody_died(study: Study, trials: list[FrozenTrial], trial: FrozenTrial) -> tuple[Study, FrozenTrial]:
    if not any(history(each) for each in trials):
        return AtOneMoment(study, trials), trial
    shown = []
    found = chains(trials)
    for chain in found:
        member = copy.copy(chain.result)
        member.number = chain.draw
        if member.state == TrialState.FAIL and not is_told(member):
            member.state, member.datetime_complete = TrialState.WAITING, None
        shown.append(member)
    return AtOneMoment(study, shown), shown[chain_of(found, trial.number).draw]


def _with_earlier(study: Study, trials: list[FrozenTrial], trial: FrozenTrial, names: set[str]) -> list[FrozenTrial]:
    """The trials once all earlier ones have their params, as the sampler may look at them; a dead one's may lack."""
    deadline = time.monotonic() + EARLIER_S
    while time.monotonic() < deadline and any(
        each.number < trial.number and each.state == TrialState.RUNNING and set(each.params) != names
        for each in trials
    ):
        time.sleep(POLL_S)
        trials = study.get_trials(deepcopy=False)
    return trials
