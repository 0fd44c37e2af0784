"""Goes on with a trial whose coordinator died or let go of it: under a number, and in a folder, of its own.

A new folder, so that the old owner, should it only have been suspended, can overwrite nothing. What it writes into
its own folder from then on counts for nothing: `taken.json` says so to every reader.
"""

from __future__ import annotations

import dataclasses
import logging
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from hpsearch import paths
from hpsearch.errors import RecordError, StorageError
from hpsearch.paths import FitPaths
from hpsearch.store.record import Outcome, StudyRecord, TrialRecord, code_version, now
from hpsearch.workers.local_pool import DEATHS_PER_JOB

if TYPE_CHECKING:
    from hpsearch.tuning.ownership import Asked

logger = logging.getLogger(__name__)

ATTEMPTS = 5
"""How often a fit is copied anew because its old owner wrote to it meanwhile."""


@dataclass(frozen=True)
class TakenUp:
    """A trial to go on with, and the outcome that it has already, if it has one."""

    trial: TrialRecord
    outcome: Outcome | None = None
    value: float | None = None
    reason: str = ""
    constraint: float = 0.0


def take_up(record: StudyRecord, asked: Asked) -> TakenUp | None:
    """What there is to go on with; None if nothing of the trial is on record and it has to be begun.

    Marks the trial that it goes on from as taken, once all of it is copied.
    """
    if record.paths.trial(asked.number).trial.is_file():
        # Its coordinator let go of it: nobody else writes there.
        trial = dataclasses.replace(record.trial(asked.number), owner=asked.owner)
        return _as_it_was(trial, trial)
    for number in reversed(asked.history):
        if record.paths.trial(number).trial.is_file():
            return _copy(record, number, asked)
    return None


def _copy(record: StudyRecord, number: int, asked: Asked) -> TakenUp:
    # As its owner left it, whether or not somebody marked it before and died.
    before = record.trial(number, as_lost=False)
    for fold in record.fits_begun(number):
        _copy_fit(record.paths.trial(number).fold(fold), record.paths.trial(asked.number).fold(fold))
    trial = dataclasses.replace(
        before,
        number=asked.number,
        began_at=now(),
        outcome=None,
        value=None,
        reason="",
        ended_at=None,
        constraint=0.0,
        code=code_version(),
        draw=asked.draw,
        history=asked.history,
        owner=asked.owner,
    )
    for each in asked.history:
        if record.paths.trial(each).trial.is_file() and not record.paths.trial(each).taken.is_file():
            paths.write_json(record.paths.trial(each).taken, {"by": asked.number, "at": now()})
    if before.outcome is None and (reason := _why_hopeless(record, asked)):
        return TakenUp(trial, "failed", reason=reason)
    return _as_it_was(trial, before)


def _as_it_was(trial: TrialRecord, before: TrialRecord) -> TakenUp:
    """With the outcome that its owner recorded and could not tell."""
    blank = dataclasses.replace(trial, outcome=None, value=None, reason="", ended_at=None, constraint=0.0)
    return TakenUp(blank, before.outcome, before.value, before.reason, before.constraint)


def _why_hopeless(record: StudyRecord, asked: Asked) -> str:
    """Why a trial is given up: it ended one coordinator after another without an epoch in between."""
    epochs = [_n_epochs(record, number) for number in asked.history]
    if len(epochs) > DEATHS_PER_JOB and len(set(epochs[-DEATHS_PER_JOB - 1 :])) == 1:
        return f"{len(epochs)} coordinators died while they had it, the last {DEATHS_PER_JOB} without an epoch"
    return ""


def _n_epochs(record: StudyRecord, number: int) -> int:
    return sum(len(record.fit(number, fold).epochs()) for fold in record.fits_begun(number))


def _copy_fit(source: FitPaths, target: FitPaths) -> None:
    """Copy a fit, to whose folder its old owner may still be writing; what is copied is one moment of it or later.

    A fit writes its checkpoint, then its scores, then its line: read the other way round, no line is without its
    scores, and no score without its checkpoint.
    """
    for _ in range(ATTEMPTS):
        shutil.rmtree(target.root, ignore_errors=True)
        target.root.mkdir(parents=True)
        is_finished = source.fit.is_file()
        names = [source.epochs, source.scores, source.best, source.last, source.previous]
        if is_finished:
            names = [
                source.epochs,
                source.scores,
                source.counts,
                source.examples,
                source.weights,
                source.best,
                source.fit,
            ]
        had_checkpoint = source.last.is_file() or source.previous.is_file()
        for path in names:
            _copy_file(path, target.root)
        has_checkpoint = target.last.is_file() or target.previous.is_file()
        if is_finished or ((has_checkpoint or not had_checkpoint) and not source.fit.is_file()):
            return
    raise RecordError(f"{source.root} changes all the time: another coordinator still works on it")


def _copy_file(path: Path, folder: Path) -> None:
    try:
        with paths.atomic_write(folder / path.name) as temporary:
            shutil.copyfile(path, temporary)
    except StorageError as error:
        if not isinstance(error.__cause__, FileNotFoundError):
            raise
