"""What to train next: a pure function of the state of a study.

`next_action` covers trials, folds, replicates and the end. It knows no files, no workers and no clock, so recorded
studies can be simulated with it.
"""

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
    """Number of trials requested (`study.trials`)."""
    n_counted: int
    """Ended trials that count toward `n_trials`."""
    n_suggested: int
    """Trials on record, open ones and those that do not count included."""
    n_unused: int | None
    """Number of configurations that have not been tried; None if the search space is infinite."""
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
    """The search is over: choose the trials to replicate."""


@dataclass(frozen=True)
class Wait:
    """Nothing can start until a running fit ends."""


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
    if fit := _first_fit(state, [fits for fits in state.open if not fits.running]):
        return fit
    # Folds that are fitted at the same time must not make the result depend on their speed.
    may_help = state.judges_any_fold and not (state.folds_in_turn and state.lookahead)
    survivors = [fits for fits in state.open if may_help and not fits.is_pruned]
    first = [fits for fits in survivors if fits is state.open[0] and state.folds_in_turn and not state.has_complete]
    if fit := _first_fit(state, first):
        return fit
    wants_trials = state.n_counted + len(state.open) < state.n_trials and state.n_unused != 0
    last = state.n_suggested - state.lookahead
    if wants_trials and (state.lookahead == 0 or all(fits.trial > last for fits in state.open)):
        return Suggest()
    if fit := _first_fit(state, [fits for fits in survivors if fits.finished or not state.folds_in_turn]):
        return fit
    if state.open or wants_trials:
        return Wait()
    if state.replicates is None:
        return MakeShortlist()
    return _first_fit(state, state.replicates) or (Wait() if state.replicates else Done())


def _first_fit(state: StudyState, candidates: Iterable[OpenFits]) -> Fit | None:
    folds = ((fits, fits.next_fold(state.n_folds)) for fits in candidates)
    return next((Fit(fits.trial, fold, fits.replicate) for fits, fold in folds if fold is not None), None)
