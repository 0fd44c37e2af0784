"""The networks of a trial's folds that were kept, and which trial a final retrains."""

from dataclasses import dataclass
from pathlib import Path

from hpsearch.errors import StudyError
from hpsearch.report.estimates import Estimates
from hpsearch.store.record import StudyRecord
from hpsearch.store.trials import TrialRecord


@dataclass(frozen=True)
class FoldNetworks:
    """One network per fold, which has not seen its held-out images, and optionally a second one with other seeds."""

    source: str
    """Which networks these are, for people."""
    weights: tuple[Path, ...]
    others: tuple[Path | None, ...]
    """None if there is one network per fold."""


def fold_networks(record: StudyRecord, number: int) -> FoldNetworks | None:
    """Return the networks of a trial's replicate, else of its first fits; None if neither were kept."""
    found: list[tuple[str, tuple[Path, ...]]] = []
    for source, fit_of in (("second fits", record.replicate_fit), ("first fits", record.fit)):
        fits = [fit_of(number, fold) for fold in range(record.n_folds)]
        if all(fit.is_finished and fit.paths.weights.is_file() for fit in fits):
            found.append((f"{source} of trial {number}", tuple(fit.paths.weights for fit in fits)))
    if not found:
        return None
    return FoldNetworks(*found[0], found[1][1] if len(found) > 1 else (None,) * record.n_folds)


def why_no_ensemble(record: StudyRecord, number: int) -> str:
    having = [trial.number for trial in record.complete_trials() if fold_networks(record, trial.number) is not None]
    others = f"take --trial {' or '.join(map(str, having))}, or " if having else ""
    return (
        f"the networks of the folds of trial {number} were not kept, as they are for the best trials only: {others}"
        f"fit its folds again (`hpsearch export --toml FILE --trial {number}`, then `hpsearch train --config FILE "
        f"--folds {record.config.study.folds}`) and take the final of that study"
    )


def choose_trial(record: StudyRecord, number: int | None, cheapest_tied: bool) -> TrialRecord:
    """Return the trial `number`, the best one, or the fastest that is tied with it; StudyError if it cannot win."""
    if number is None:
        best = record.best()
        if best is None:
            raise StudyError(f"study {record.name!r} has no fully evaluated trial yet: run `hpsearch study` first")
        if cheapest_tied and (estimates := Estimates.of(record)) is not None:
            return record.trial(estimates.cheapest_tied(record))
        return best
    trial, named = record.known_trial(number), f"trial {number} of study {record.name!r}"
    if not trial.can_win:
        special = {"complete": "was changed by memory that ran out", None: "is still open"}
        what = special.get(trial.outcome, f"ended as {trial.outcome}")
        raise StudyError(f"{named} {what}: only trials that were evaluated on all folds can be final")
    configuration = record.configuration(trial.params)
    same = next(each for each in record.complete_trials() if record.configuration(each.params) == configuration)
    if same.number != number:
        raise StudyError(
            f"{named} is a copy of trial {same.number}, which stands for both: take --trial {same.number}"
        )
    return trial
