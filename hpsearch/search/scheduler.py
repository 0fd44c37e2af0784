"""What to train next: a pure function of the state of a study.

`next_action` covers trials, folds, replicates and the end. It knows no files, no workers and no clock, so recorded
studies can be simulated with it.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class OpenFits:
    """The fits of one trial, or of one replicate of it, that are not all finished."""

    trial: int
    replicate: int = 0
    """0: the trial itself; 1: its replicate."""
    finished: frozenset[int] = frozenset()
    """Folds whose fit is finished."""
    running: frozenset[int] = frozenset()
    """Folds that a worker fits now."""
    is_pruned: bool = False
    """Whether the trial was pruned, so that it ends when its fits have stopped."""
    resumable: int | None = None
    """In a pruned trial, the fold that was pruned after its last epoch: it is still to be finished."""

    def next_fold(self, n_folds: int) -> int | None:
        """Return the first fold that is neither finished nor running; None if there is none."""
        for fold in range(n_folds):
            is_open = fold not in self.finished and fold not in self.running
            if is_open and (not self.is_pruned or fold == self.resumable):
                return fold
        return None


@dataclass(frozen=True, kw_only=True)
class StudyState:
    """What the next action depends on."""

    n_folds: int
    n_trials: int
    """Trials that are wanted."""
    n_counted: int
    """Ended trials that count toward `n_trials`."""
    n_suggested: int
    """Trials on record, open ones and those that do not count included."""
    n_unused: int | None
    """Configurations of the search space that no trial has had; None if there is no end of them."""
    has_complete: bool
    """Whether a trial is complete, so that others can be compared with it."""
    open: tuple[OpenFits, ...] = ()
    """Open trials by number."""
    replicates: tuple[OpenFits, ...] | None = None
    """Open replicates in the order of the shortlist; None while no shortlist has been made."""
    lookahead: int = 0
    """Above 0: a suggestion waits for all trials up to this many before it."""
    folds_in_turn: bool = True
    """Whether the pruner wants the folds of a trial one after another, as long as other trials can be run."""
    judges_any_fold: bool = True
    """Whether the pruner can judge a trial by whichever folds are finished."""

    @property
    def wants_trials(self) -> bool:
        """Whether another trial may begin."""
        return self.n_counted + len(self.open) < self.n_trials and self.n_unused != 0

    @property
    def may_suggest(self) -> bool:
        """Whether every trial that the next suggestion learns from has ended."""
        last = self.n_suggested - self.lookahead
        return self.lookahead == 0 or all(fits.trial > last for fits in self.open)


@dataclass(frozen=True)
class Fit:
    """Fit this fold."""

    trial: int
    fold: int
    replicate: int = 0


@dataclass(frozen=True)
class Suggest:
    """Begin the next trial."""


@dataclass(frozen=True)
class MakeShortlist:
    """The search is over: choose the trials that are replicated."""


@dataclass(frozen=True)
class Wait:
    """Nothing can begin before something that runs has ended."""


@dataclass(frozen=True)
class Done:
    """Nothing is left to do."""


Action = Fit | Suggest | MakeShortlist | Wait | Done


def next_action(state: StudyState) -> Action:
    """Return what an idle worker should do next.

    1. Continue an open trial that no worker is fitting.
    2. While no trial is complete, fit further folds of the first one: nothing can be pruned before.
    3. Begin a trial.
    4. Fit further folds of open trials; if folds are fitted in turn, only of those that have a finished fold.
    5. When the search is over, choose the shortlist and fit its replicates.
    """
    idle = (fits for fits in state.open if not fits.running)
    if (fit := _first_fit(idle, state)) is not None:
        return fit
    if state.folds_in_turn and not state.has_complete and (fit := _extra_fit(state.open[:1], state)) is not None:
        return fit
    if state.wants_trials and state.may_suggest:
        return Suggest()
    extra = [fits for fits in state.open if fits.finished] if state.folds_in_turn else state.open
    if (fit := _extra_fit(extra, state)) is not None:
        return fit
    if state.open or state.wants_trials:
        return Wait()
    if state.replicates is None:
        return MakeShortlist()
    if (fit := _first_fit(state.replicates, state)) is not None:
        return fit
    return Wait() if state.replicates else Done()


def _first_fit(candidates: Iterable[OpenFits], state: StudyState) -> Fit | None:
    for fits in candidates:
        if (fold := fits.next_fold(state.n_folds)) is not None:
            return Fit(fits.trial, fold, fits.replicate)
    return None


def _extra_fit(candidates: Iterable[OpenFits], state: StudyState) -> Fit | None:
    """Return a fold to fit beside those that are running, if the result does not depend on who is faster."""
    if not state.judges_any_fold or (state.folds_in_turn and state.lookahead):
        return None
    return _first_fit((fits for fits in candidates if not fits.is_pruned), state)
