"""Decide what to train next, as a pure function of the state of a study.

`next_action` handles trials, folds, replicates and the end of a study. It uses no files, workers or clock, so it can
also be used to simulate studies.
"""

from collections.abc import Iterable
from dataclasses import dataclass


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
        """First wanted fold that is neither finished nor running; None if there is none for the idle worker."""
        left = self.wanted - self.finished - self.running
        return min(left, default=None) if self.fits_worker else None


@dataclass(frozen=True, kw_only=True)
class StudyState:
    """State of a study that determines the next action."""

    n_left: int
    """Maximum number of trials still to be evaluated, including open trials."""
    n_suggested: int
    """Number of recorded trials, including open trials and trials that do not count toward `study.trials`."""
    has_complete: bool
    """Whether any trial is complete, so that other trials can be compared with it."""
    open: tuple[OpenFits, ...] = ()
    """Open trials by number, or open replicates in shortlist order if there is a shortlist. On a cluster with unlike
    workers, those that fewer workers can train come first."""
    has_shortlist: bool = False
    """Whether the search has ended and the trials to replicate are selected."""
    lookahead: int = 0
    """If above 0, trial n is suggested only after all trials up to n - lookahead have ended."""
    folds_in_turn: bool = True
    """Whether the folds of a trial are fitted one after another, as long as other trials can use the free workers."""
    judges_any_fold: bool = True
    """Whether the pruner can judge a trial by any subset of its folds. If not, the folds must be fitted in order."""


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

    1. Continue an open trial that no worker is fitting.
    2. While no trial is complete, fit further folds of the first trial: pruning needs a complete trial.
    3. Begin a trial, unless most open trials wait for a larger worker.
    4. Fit further folds of open trials. If folds are fitted in turn, skip trials without a finished fold.
    5. After the search, select the shortlist and fit its replicates.

    Steps 2 and 4 are skipped if the pruner needs the folds in order, or if folds are fitted in turn with a lookahead.
    """
    if state.has_shortlist:
        return _first_fit(state.open)
    if fit := _first_fit(fits for fits in state.open if not fits.running):
        return fit
    # With a lookahead, the result must not depend on which of several folds of a trial finishes first.
    may_help = state.judges_any_fold and not (state.folds_in_turn and state.lookahead)
    helped = state.open if may_help else ()
    if state.folds_in_turn and not state.has_complete and (fit := _first_fit(helped[:1])):
        return fit
    wants_trials = state.n_left > len(state.open)
    last = state.n_suggested - state.lookahead
    n_waiting = sum(not (fits.fits_worker or fits.running) for fits in state.open)
    may_begin = wants_trials and 2 * n_waiting <= len(state.open)
    if may_begin and (state.lookahead == 0 or all(fits.trial > last for fits in state.open)):
        return Suggest()
    if fit := _first_fit(fits for fits in helped if fits.finished or not state.folds_in_turn):
        return fit
    return None if state.open or wants_trials else MakeShortlist()


def _first_fit(candidates: Iterable[OpenFits]) -> Fit | None:
    folds = ((fits, fits.next_fold) for fits in candidates)
    return next((Fit(fits.trial, fold, fits.replicate) for fits, fold in folds if fold is not None), None)
