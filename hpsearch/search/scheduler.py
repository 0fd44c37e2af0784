"""Decide what to train next, as a pure function of the state of a study.

`next_action` handles trials, folds, replicates and the end of a study. It uses no files, workers or clock, so it can
also be used to simulate studies.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from hpsearch.search.racing import FoldOrder

REFINE_EVERY = 10
"""Number of trials after which a further fold is fitted, which is that of the leader if it is open."""


@dataclass(frozen=True)
class OpenFits:
    """State of the fits of one open trial or replicate."""

    trial: int
    replicate: int
    """0 for the trial itself, 1 for its replicate."""
    wanted: frozenset[int]
    """Folds that must be fitted before the trial ends. A pruned trial needs none, unless it was pruned after the last
    epoch of a fold: the fit of that fold must still be finished."""
    finished: frozenset[int] = frozenset()
    """Folds whose fit is finished."""
    running: frozenset[int] = frozenset()
    """Folds that workers are fitting now."""
    fits_worker: bool = True
    """Whether the idle worker has enough memory for these fits."""

    @property
    def next_fold(self) -> int | None:
        """First fold of `wanted` that is neither finished nor running.

        None if there is none, or if the idle worker has too little memory.
        """
        left = self.wanted - self.finished - self.running
        return min(left, default=None) if self.fits_worker else None


@dataclass(frozen=True, kw_only=True)
class StudyState:
    """State of a study that determines the next action."""

    n_left: int
    """Maximum number of trials still to be evaluated, including open trials."""
    n_suggested: int
    """Number of recorded trials, including open trials and trials that do not count toward `study.trials`."""
    open: tuple[OpenFits, ...] = ()
    """Open trials by number, or open replicates in shortlist order if there is a shortlist. On a cluster with unlike
    workers, those that fewer workers can train come first."""
    has_shortlist: bool = False
    """Whether the search has ended and the trials to replicate are selected."""
    lookahead: int = 0
    """If above 0, trial n is suggested only after all trials up to n - lookahead have ended, or, if folds are fitted
    as needed, have finished a fold."""
    folds: FoldOrder = "as needed"
    """How the pruner wants the folds of a trial to be fitted."""
    refine: tuple[int, ...] = ()
    """Open trials with a finished fold, in the order in which they should get further folds (only for folds as
    needed)."""
    n_screened: int = 0
    """Number of trials that have finished a fold."""
    n_further: int = 0
    """Number of fits, finished or running, beyond the first of each trial, excluding trial 0."""


@dataclass(frozen=True)
class Fit:
    """Action: fit this fold of a trial or replicate."""

    trial: int
    fold: int
    replicate: int = 0


@dataclass(frozen=True)
class Suggest:
    """Action: begin the next trial."""


@dataclass(frozen=True)
class MakeShortlist:
    """Action: end the search and select the trials to replicate."""


Action = Fit | Suggest | MakeShortlist


def next_action(state: StudyState) -> Action | None:
    """Return what an idle worker should do next; None if nothing can start now.

    1. Continue an open trial that no worker is fitting. If folds are fitted as needed, this is trial 0, or a trial
       without a finished fold.
    2. If folds are fitted as needed: after every `REFINE_EVERY` trials, fit a further fold of the most promising.
    3. Begin a trial, unless most open trials wait for a larger worker.
    4. Fit further folds of open trials, unless the pruner needs the folds in order.
    5. After the search, select the shortlist and fit its replicates.
    """
    if state.has_shortlist:
        return _first_fit(state.open)
    as_needed = state.folds == "as needed"
    # Trial 0 is completed first: the gain over it is reported, and a search that is stopped has a complete trial.
    waiting = {each.trial for each in state.open if as_needed and each.finished and each.trial > 0}
    if fit := _first_fit(each for each in state.open if not each.running and each.trial not in waiting):
        return fit
    is_due = as_needed and not state.lookahead and state.n_further < state.n_screened // REFINE_EVERY
    if is_due and (fit := _further_fit(state)):
        return fit
    wants_trials, last = state.n_left > len(state.open), state.n_suggested - state.lookahead
    is_settled = (each.trial > last or each.trial in waiting for each in state.open)
    n_waiting = sum(not (fits.fits_worker or fits.running) for fits in state.open)
    may_begin = wants_trials and 2 * n_waiting <= len(state.open)
    if may_begin and (state.lookahead == 0 or all(is_settled)):
        return Suggest()
    if as_needed and not wants_trials and (fit := _further_fit(state)):
        return fit
    if state.folds == "all" and (fit := _first_fit(state.open)):
        return fit
    return None if state.open or wants_trials else MakeShortlist()


def _further_fit(state: StudyState) -> Fit | None:
    """Return a fit of a further fold of the most promising trial.

    With a lookahead, the result must not depend on the number of workers. A trial is then chosen only while no fit is
    running, and all its folds are fitted.
    """
    by_number = {each.trial: each for each in state.open}
    candidates = [by_number[number] for number in state.refine if number in by_number]
    if state.lookahead:
        chosen = [each for each in candidates if len(each.finished | each.running) > 1]
        if not chosen and any(each.running for each in state.open):
            return None
        candidates = chosen or candidates[:1]
    return _first_fit(candidates)


def _first_fit(candidates: Iterable[OpenFits]) -> Fit | None:
    folds = ((fits, fits.next_fold) for fits in candidates)
    return next((Fit(fits.trial, fold, fits.replicate) for fits, fold in folds if fold is not None), None)
