"""One study in Optuna's database: asked, told, and brought up to date from the record.

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
from contextlib import AbstractContextManager, closing, contextmanager
from pathlib import Path
from typing import Any

import optuna
import sqlalchemy
from optuna.exceptions import ExperimentalWarning, UpdateFinishedTrialError
from optuna.storages import RDBStorage
from optuna.trial import FrozenTrial, Trial, TrialState, create_trial
from sqlalchemy.exc import ArgumentError, SQLAlchemyError

from hpsearch import paths
from hpsearch.errors import RecordError, StudyError, redact
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
    """Asks and tells one study. The record decides; this follows, and says so where the two disagree."""

    def __init__(self, record: StudyRecord, storage: str | RDBStorage) -> None:
        """Open the study at the SQLAlchemy URL, or begin it. StudyError if the database cannot be used.

        Of a storage that is open already the errors stay as they are, here and later.
        """
        # Its notes on every new study and trial are ours to give.
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self._record = record
        self._space = record.config.search
        self._url = storage if isinstance(storage, str) else None
        self._sampler = make_sampler(record.config, {0: default_params(record.config)})
        with self._errors_named(RuntimeError, sqlite3.Error, ImportError), _quiet():
            if isinstance(storage, str):
                _check_sound(storage)
            self._storage = _storage(storage) if isinstance(storage, str) else storage
            self._study = optuna.create_study(
                storage=self._storage,
                study_name=record.name,
                direction="maximize",
                sampler=self._sampler,
                load_if_exists=True,
            )

    def ask(self, enqueued: Mapping[str, Any] | None = None) -> tuple[int, dict[str, Any]]:
        """Number and params of a new trial: those given, but for trial 0, the default.

        Without any given the suggestion depends on the database and the number alone.
        """
        with self._errors_named(), _quiet(), self._sampler.giving(enqueued):
            trial = self._study.ask()
            return trial.number, suggest(trial, self._space)

    def giving(self, enqueued: Mapping[str, Any] | None) -> AbstractContextManager[None]:
        """For the block, suggestions are those params, if there are any."""
        return self._sampler.giving(enqueued)

    def adopt(self, number: int, enqueued: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """Params of a trial that was found RUNNING; those that a crash left out are given or suggested again."""
        with self._errors_named(), _quiet(), self._sampler.giving(enqueued):
            return suggest(self.trial(number), self._space)

    def trial(self, number: int) -> Trial:
        """Optuna's handle of a trial, for reports and attributes, whoever asked for it."""
        return Trial(self._study, self.frozen(number)._trial_id)

    def frozen(self, number: int) -> FrozenTrial:
        """A trial as it is in the database, read without all the others."""
        trial_id = self._id(number)
        with self._errors_named(*_DAMAGES):
            return self._study._storage.get_trial(trial_id)

    def running(self) -> list[int]:
        """Numbers of the trials that Optuna takes for running, ascending."""
        return [trial.number for trial in self._all() if trial.state == TrialState.RUNNING]

    def tell(self, record: TrialRecord) -> bool:
        """Tell a trial's outcome, and say whether that was news: a trial that was told before stays as it is."""
        if record.outcome is None:
            raise ValueError(f"trial {record.number} has no outcome to tell")
        storage, trial_id, state = self._study._storage, self._id(record.number), STATES[record.outcome]
        with self._errors_named(), _quiet():
            try:
                storage.set_trial_user_attr(trial_id, "outcome", record.outcome)
            except UpdateFinishedTrialError:
                return False
            if record.value is not None:
                storage.set_trial_user_attr(trial_id, SEARCH_VALUE, record.value)
            if record.reason:
                storage.set_trial_user_attr(trial_id, "reason", record.reason)
            if record.decisions:
                storage.set_trial_user_attr(trial_id, "decisions", json.dumps(record.decisions))
            if record.constraint > 0 and not (trial := self.trial(record.number)).constraints:
                trial.set_constraint("feasible", record.constraint)
            self._study.tell(record.number, record.value if state == TrialState.COMPLETE else None, state=state)
        return True

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

    def rebuild(self) -> None:
        """Fill an empty database from a record that several coordinators share, and that lacks what they lost."""
        records = {record.number: record for record in self._record.trials()}
        for number in range(max(records, default=-1) + 1):
            if number in records:
                self._add(records[number])
            else:
                self._study.add_trial(create_trial(state=TrialState.FAIL, user_attrs={"outcome": "unknown"}))
        self.show_ranking()

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
                    # A literal: PostgreSQL takes no text for its enumeration.
                    execute(f"UPDATE trials SET state = '{wanted_state.name}' WHERE trial_id = :id", id=trial_id)
                if wanted is None and value is not None:
                    execute("DELETE FROM trial_values WHERE trial_id = :id", id=trial_id)
                elif wanted != value:
                    execute("UPDATE trial_values SET value = :value WHERE trial_id = :id", value=wanted, id=trial_id)
                if trial_id not in learned:
                    # A trial that an earlier version of hpsearch has told.
                    said = json.dumps(records[number].value)
                    execute(_ADD_ATTRIBUTE, id=trial_id, key=SEARCH_VALUE, said=said)

    def finished(self) -> list[FrozenTrial]:
        """Optuna's own view of the finished trials, for importances."""
        return [trial for trial in self._all() if trial.state.is_finished()]

    @property
    def optuna_study(self) -> optuna.Study:
        return self._study

    def _all(self) -> list[FrozenTrial]:
        with self._errors_named(*_DAMAGES):
            return self._study.get_trials(deepcopy=False)

    @contextmanager
    def _errors_named(self, *damages: type[Exception]) -> Iterator[None]:
        """Turn what the database, or one of `damages`, raises into an error that names the database and a way out."""
        caught: tuple[type[Exception], ...] = (SQLAlchemyError, optuna.exceptions.StorageInternalError, *damages)
        try:
            yield
        except caught as error:
            if self._url is None:
                # Whoever brought the storage knows what to make of it.
                raise
            cause = error.__cause__ if isinstance(error.__cause__, SQLAlchemyError) else error
            reason = (str(getattr(cause, "orig", None) or cause).splitlines() or [type(cause).__name__])[0]
            shown, file = _shown(self._url)
            refusal = next((number for said, number in _REFUSALS.items() if said in reason), None)
            if file is not None and refusal is not None:
                raise paths.storage_error(file, OSError(refusal, reason)) from error
            advice = (
                ""
                if file is None
                else (
                    ". If the file is damaged, move it away and run the same command again: it is rebuilt from the "
                    "study folder"
                )
            )
            raise StudyError(f"Optuna cannot use {shown}: {redact(reason)}{advice}") from error

    def _id(self, number: int) -> int:
        with self._errors_named():
            try:
                return self._study._storage.get_trial_id_from_study_id_trial_number(self._study._study_id, number)
            except KeyError as error:
                raise StudyError(f"Optuna's database has no trial {number} of study {self._record.name!r}") from error

    def _add(self, record: TrialRecord) -> None:
        state = TrialState.RUNNING if record.outcome is None else STATES[record.outcome]
        attributes = {
            "outcome": record.outcome,
            "reason": record.reason,
            "owner": record.owner,
            SEARCH_VALUE: record.value,
        }
        spaces = distributions(self._space)
        with _quiet():
            trial = create_trial(
                state=state,
                value=record.value if state == TrialState.COMPLETE else None,
                params={name: encode(record.params[name]) for name in spaces},
                distributions=spaces,
                user_attrs={key: value for key, value in attributes.items() if value not in (None, "")},
                system_attrs={"failed_trial": record.history[0], "retry_history": list(record.history)}
                if record.history
                else None,
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
    """The SQLAlchemy URL of a database file, whatever characters its path has."""
    return sqlalchemy.URL.create("sqlite", database=str(path.absolute())).render_as_string(hide_password=False)


def _shown(url: str) -> tuple[str, Path | None]:
    """The URL without its password, and the file that it names, if it does."""
    try:
        parsed = sqlalchemy.make_url(url)
    except ArgumentError:
        return (
            "the database, whose address is not one of SQLAlchemy's (sqlite:///file, postgresql+psycopg://...)",
            None,
        )
    is_file = parsed.get_backend_name() == "sqlite" and parsed.database
    return parsed.render_as_string(hide_password=True), Path(parsed.database or "") if is_file else None


def _check_sound(url: str) -> None:
    """sqlite3.DatabaseError if SQLite finds its file damaged."""
    _, path = _shown(url)
    if path is not None and path.is_file():
        with closing(sqlite3.connect(path, timeout=60)) as database:
            (found,) = database.execute("PRAGMA integrity_check(1)").fetchone()
        if found != "ok":
            raise sqlite3.DatabaseError(found)


def _storage(url: str) -> RDBStorage:
    # A minute is far beyond any write of ours; it outlasts a slow disk or a copy being made of the file.
    arguments = {"connect_args": {"timeout": 60}} if url.startswith("sqlite") else {"pool_pre_ping": True}
    return RDBStorage(url, engine_kwargs=arguments)


class _quiet(warnings.catch_warnings):  # noqa: N801 - used like the context manager it is
    """Without Optuna's notes on what is experimental: the versions are pinned and the behaviour is tested."""

    def __enter__(self) -> None:
        super().__enter__()
        warnings.simplefilter("ignore", ExperimentalWarning)
