"""Optuna's database of one study: suggests params, stores outcomes, and follows the record.

Optuna's best trial is the winner of the study with the value that ranks it, so that `optuna-dashboard` shows what the
terminal shows. Full trials are COMPLETE, dropped ones PRUNED. The sampler learns from another number, `SEARCH_VALUE`,
which replicates do not change.
"""

from __future__ import annotations

import datetime as dt
import errno
import json
import logging
import sqlite3
import warnings
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import optuna
import sqlalchemy
from optuna.exceptions import ExperimentalWarning, UpdateFinishedTrialError
from optuna.storages import RDBStorage
from optuna.trial import FrozenTrial, Trial, TrialState, create_trial
from sqlalchemy.exc import SQLAlchemyError

from hpsearch import paths
from hpsearch.errors import RecordError, StudyError
from hpsearch.search.samplers import (
    SEARCH_VALUE,
    decode,
    default_params,
    distributions,
    encode,
    make_sampler,
    suggest,
)
from hpsearch.stats.best import rank
from hpsearch.store.record import Standing, StudyRecord, TrialRecord

logger = logging.getLogger(__name__)

STATES = {
    "full": TrialState.COMPLETE,
    "dropped": TrialState.PRUNED,
    "infeasible": TrialState.PRUNED,
    "diverged": TrialState.PRUNED,
    "failed": TrialState.FAIL,
    "lost": TrialState.FAIL,
}


_REFUSALS = {
    "disk is full": errno.ENOSPC,
    "readonly database": errno.EROFS,
    "disk I/O error": errno.EIO,
    "unable to open": errno.EIO,
    "is locked": errno.EIO,
}
"""What SQLite says where the disk, and not the file, is at fault; the system's number for what to do about it."""
_DAMAGES = (ValueError, KeyError, TypeError, AttributeError)
"""How a database whose text was damaged fails: in as many ways as there are texts."""


class StudyDatabase:
    """One study in Optuna's database. The record decides; the database follows, and a contradiction is an error."""

    def __init__(self, record: StudyRecord) -> None:
        """Open the study in the project's `hpsearch.db`, or begin it there.

        Raises StudyError if the database cannot be used, StorageError if the disk refuses.
        """
        # hpsearch logs its own line for every new study and trial.
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self._record = record
        self._space = record.config.search
        self._path = record.paths.project.optuna_db.absolute()
        self._sampler = make_sampler(record.config, {0: default_params(record.config)})
        with self._errors_named(RuntimeError, sqlite3.Error), _quiet():
            _check_sound(self._path)
            # A minute outlasts a slow disk or a copy being made of the file.
            self._storage = RDBStorage(sqlite_url(self._path), engine_kwargs={"connect_args": {"timeout": 60}})
            self._study = optuna.create_study(
                storage=self._storage,
                study_name=record.name,
                direction="maximize",
                sampler=self._sampler,
                load_if_exists=True,
            )

    def ask(self, enqueued: Mapping[str, Any] | None = None) -> tuple[int, dict[str, Any]]:
        """Return number and params of a new trial: the default for trial 0, else those enqueued or suggested.

        A suggestion depends on the database and the number alone.
        """
        with self._errors_named(), _quiet(), self._sampler.giving(enqueued):
            trial = self._study.ask()
            return trial.number, suggest(trial, self._space)

    def adopt(self, number: int, enqueued: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """Return the params of a RUNNING trial; those that a crash left out are enqueued or suggested ones."""
        with self._errors_named(), _quiet(), self._sampler.giving(enqueued):
            return suggest(Trial(self._study, self._id(number)), self._space)

    def running(self) -> list[int]:
        """Return the numbers of the RUNNING trials, ascending."""
        return [trial.number for trial in self._all() if trial.state == TrialState.RUNNING]

    def tell(self, record: TrialRecord) -> None:
        """Store the outcome of an ended trial. A trial that was told before stays as it is."""
        assert record.outcome is not None
        storage, trial_id, state = self._study._storage, self._id(record.number), STATES[record.outcome]
        with self._errors_named(), _quiet():
            try:
                storage.set_trial_user_attr(trial_id, "outcome", record.outcome)
            except UpdateFinishedTrialError:
                return
            if record.value is not None:
                storage.set_trial_user_attr(trial_id, SEARCH_VALUE, record.value)
            if record.reason:
                storage.set_trial_user_attr(trial_id, "reason", record.reason)
            if record.decisions:
                storage.set_trial_user_attr(trial_id, "decisions", json.dumps(record.decisions))
            if record.constraint > 0 and not (trial := Trial(self._study, trial_id)).constraints:
                trial.set_constraint("feasible", record.constraint)
            self._study.tell(record.number, record.value if state == TrialState.COMPLETE else None, state=state)

    def catch_up(self) -> None:
        """Bring the database up to date with the record: add what it lacks, tell what it was not told.

        Raises RecordError or StudyError, with the way out, where the two contradict each other.
        """
        known = {trial.number: trial for trial in self._all()}
        records = self._record.trials()
        for expected, record in enumerate(records):
            if record.number != expected:
                raise RecordError(
                    f"{self._record.paths.trial(expected).trial} is missing while later trials are there: put the "
                    "folder back from a copy, or begin another study with --study NAME"
                )
            if record.number not in known:
                self._add(record)
            else:
                self._compare(known[record.number], record)
                if record.outcome is not None:
                    self.tell(record)
        self.show_ranking()
        for number, trial in known.items():
            if number >= len(records) and trial.state.is_finished():
                raise RecordError(
                    f"Optuna's database holds the finished trial {number}, its folder "
                    f"{self._record.paths.trial(number).root} is missing: put it back, or delete the database to go "
                    "on from the folders that are there"
                )

    def show_ranking(self) -> None:
        """Make Optuna's values and its best trial those of the study's ranking, in one transaction.

        Replicates, and full trials that come after them, change what ended trials are ranked by. Optuna has no call
        that changes an ended trial, and a study that is deleted and made anew loses the notes that people put on it,
        so this writes to its tables. This process may still see what it read before; nothing here goes by it.
        """
        records = {record.number: record for record in self._record.trials() if record.outcome in ("full", "dropped")}
        standing = self._record.standing(records.values())
        with self._errors_named(), self._storage.engine.begin() as connection:

            def execute(statement: str, **values: Any) -> Any:
                return connection.execute(sqlalchemy.text(statement), values)

            learned = {row[0] for row in execute(_WITH_ATTRIBUTE, key=SEARCH_VALUE)}
            for trial_id, number, state, value in execute(_ENDED, study=self._study._study_id).all():
                if number not in records:
                    continue
                wanted_state, wanted = _as_ranked(records[number], standing)
                if state != wanted_state.name:
                    execute(
                        "UPDATE trials SET state = :state WHERE trial_id = :id", state=wanted_state.name, id=trial_id
                    )
                if wanted is None and value is not None:
                    execute("DELETE FROM trial_values WHERE trial_id = :id", id=trial_id)
                elif wanted != value:
                    execute("UPDATE trial_values SET value = :value WHERE trial_id = :id", value=wanted, id=trial_id)
                if trial_id not in learned:
                    # A trial that an earlier version of hpsearch has told.
                    said = json.dumps(records[number].value)
                    execute(_ADD_ATTRIBUTE, id=trial_id, key=SEARCH_VALUE, said=said)

    def _all(self) -> list[FrozenTrial]:
        with self._errors_named(*_DAMAGES):
            return self._study.get_trials(deepcopy=False)

    @contextmanager
    def _errors_named(self, *damages: type[Exception]) -> Iterator[None]:
        """Turn errors of the database, and `damages`, into one that names the file and says what to do."""
        caught: tuple[type[Exception], ...] = (SQLAlchemyError, optuna.exceptions.StorageInternalError, *damages)
        try:
            yield
        except caught as error:
            cause = error.__cause__ if isinstance(error.__cause__, SQLAlchemyError) else error
            reason = (str(getattr(cause, "orig", None) or cause).splitlines() or [type(cause).__name__])[0]
            refusal = next((number for said, number in _REFUSALS.items() if said in reason), None)
            if refusal is not None:
                raise paths.storage_error(self._path, OSError(refusal, reason)) from error
            raise StudyError(
                f"Optuna cannot use {self._path}: {reason}. If the file is damaged, move it away and run the same "
                "command again: it is rebuilt from the study folder"
            ) from error

    def _id(self, number: int) -> int:
        with self._errors_named():
            try:
                return self._study._storage.get_trial_id_from_study_id_trial_number(self._study._study_id, number)
            except KeyError as error:
                raise StudyError(f"Optuna's database has no trial {number} of study {self._record.name!r}") from error

    def _add(self, record: TrialRecord) -> None:
        state = TrialState.RUNNING if record.outcome is None else STATES[record.outcome]
        attributes = {"outcome": record.outcome, "reason": record.reason, SEARCH_VALUE: record.value}
        spaces = distributions(self._space)
        with _quiet():
            trial = create_trial(
                state=state,
                value=record.value if state == TrialState.COMPLETE else None,
                params={name: encode(record.params[name]) for name in spaces},
                distributions=spaces,
                user_attrs={key: value for key, value in attributes.items() if value not in (None, "")},
                constraints={"feasible": record.constraint} if record.constraint > 0 else None,
            )
        trial.datetime_start = dt.datetime.fromtimestamp(record.began_at)
        if record.ended_at is not None:
            trial.datetime_complete = dt.datetime.fromtimestamp(record.ended_at)
        with self._errors_named():
            self._study.add_trial(trial)

    def _compare(self, trial: FrozenTrial, record: TrialRecord) -> None:
        params = {name: decode(value) for name, value in trial.params.items()}
        spaces = distributions(self._space)
        differs = [
            name
            for name, value in params.items()
            if record.params.get(name) != value or trial.distributions[name] != spaces.get(name)
        ]
        constraint = max((trial.constraints or {}).values(), default=0.0)
        if differs or (
            trial.state.is_finished()
            and (constraint != max(0.0, record.constraint) or not self._may_have_told(trial, record))
        ):
            what = f"{differs[0]} = {params[differs[0]]!r}" if differs else f"{trial.state.name}, value {trial.value}"
            raise StudyError(
                f"Optuna's database and {self._record.paths.trial(record.number).trial} disagree about trial "
                f"{record.number} ({what} in the database): one of them was edited. Restore that one, or delete the "
                "database: it is rebuilt from the study folder"
            )

    def _may_have_told(self, trial: FrozenTrial, record: TrialRecord) -> bool:
        """Whether this trial's state and value are those of the record, now or before the ranking changed."""
        if record.outcome == "dropped":
            # Earlier versions of hpsearch told the estimate of a dropped trial as its value.
            return trial.state in (TrialState.PRUNED, TrialState.COMPLETE) and trial.value in (None, record.value)
        if record.outcome == "full":
            return trial.state in (TrialState.PRUNED, TrialState.COMPLETE) and trial.value in (
                record.value,
                self._record.mean_of_fits(record.number),
            )
        return record.outcome is not None and trial.state == STATES[record.outcome]


_ENDED = (
    "SELECT trials.trial_id, trials.number, trials.state, trial_values.value FROM trials "
    "LEFT JOIN trial_values ON trial_values.trial_id = trials.trial_id "
    "WHERE trials.study_id = :study AND trials.state IN ('COMPLETE', 'PRUNED')"
)
_WITH_ATTRIBUTE = "SELECT trial_id FROM trial_user_attributes WHERE key = :key"
_ADD_ATTRIBUTE = "INSERT INTO trial_user_attributes (trial_id, key, value_json) VALUES (:id, :key, :said)"


def _as_ranked(record: TrialRecord, standing: Standing) -> tuple[TrialState, float | None]:
    """Return state and value of a full or dropped trial.

    Optuna takes the highest value of all COMPLETE trials for the best. A trial that would come before the winner by
    that rule, as one that was not fitted again may, is PRUNED with its value.
    """
    if record.outcome == "dropped":
        return TrialState.PRUNED, None
    value = standing.values.get(record.number, record.value)
    winner = standing.winner
    if value is None or winner is None:
        return TrialState.PRUNED, value
    leads = rank({record.number: value, winner: standing.values[winner]})[0] == record.number
    return (TrialState.PRUNED if leads and record.number != winner else TrialState.COMPLETE), value


def sqlite_url(path: Path) -> str:
    """Return the SQLAlchemy URL of a database file, whatever characters its path has."""
    return sqlalchemy.URL.create("sqlite", database=str(path.absolute())).render_as_string(hide_password=False)


def _check_sound(path: Path) -> None:
    """Raise sqlite3.DatabaseError if SQLite finds the file damaged."""
    if path.is_file():
        with closing(sqlite3.connect(path, timeout=60)) as database:
            (found,) = database.execute("PRAGMA integrity_check(1)").fetchone()
        if found != "ok":
            raise sqlite3.DatabaseError(found)


class _quiet(warnings.catch_warnings):  # noqa: N801 - used like the context manager it is
    """Without Optuna's notes on what is experimental: the versions are pinned and the behaviour is tested."""

    def __enter__(self) -> None:
        super().__enter__()
        warnings.simplefilter("ignore", ExperimentalWarning)
