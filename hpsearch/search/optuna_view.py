"""Keep Optuna's database up to date with the record, for `optuna-dashboard sqlite:///hpsearch.db`.

The record of a study is its folder. The database is a view, which is a copy derived from the record. It can be
deleted at any time, because suggestions are computed from the record (`search.suggest`). Complete trials have the
state COMPLETE and their ranking value. The exception is a complete trial that cannot win although its value is
higher than that of the winner: it has the state PRUNED, so that Optuna's best trial is the winner of the study.
Pruned trials have the state PRUNED, their intermediate values, and their estimate as a user attribute.
"""

import datetime as dt
import json
import logging
import os
import sqlite3
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import optuna
import sqlalchemy
from optuna.exceptions import StorageInternalError
from optuna.storages import RDBStorage
from optuna.study import Study
from optuna.trial import FrozenTrial, TrialState
from sqlalchemy.exc import NoSuchModuleError, SQLAlchemyError

from hpsearch.errors import ConfigError, StorageError, redact
from hpsearch.paths import StudyPaths
from hpsearch.search.space import Distributions, distributions, frozen_trial
from hpsearch.search.suggest import STATES, quiet
from hpsearch.stats.best import rank
from hpsearch.store.record import StudyRecord
from hpsearch.store.trials import Standing, TrialRecord
from hpsearch.typed_json import to_json

logger = logging.getLogger(__name__)

TIMEOUT_S = 60
"""Seconds to wait for another process that writes to the database."""


class OptunaView:
    """View of one study in the project's Optuna database."""

    name = "Optuna's database"

    def __init__(self, study: StudyPaths, url: str | None = None) -> None:
        """Use the database with the SQLAlchemy URL `url`, else `hpsearch.db` in the project folder.

        Does not connect yet. Raises ConfigError if the URL is invalid or its driver is not installed.
        """
        self._paths = study
        self._file = study.project.optuna_db if url is None else None
        self._url = sqlite_url(study.project.optuna_db) if url is None else url
        self._place = self._file or redact(self._url)
        try:
            sqlalchemy.create_engine(self._url)
        except (SQLAlchemyError, ImportError, ValueError) as error:
            # The text of other errors may contain a part of the password.
            is_driver = isinstance(error, ImportError | NoSuchModuleError)
            reason = error if is_driver else "it must look like postgresql+psycopg://user@host/database"
            raise ConfigError(f"--storage is not a usable database URL: {reason}") from error
        self._study: Study | None = None
        self._storage: RDBStorage | None = None
        self._shown: tuple[Any, ...] = ()
        """Fingerprint of the study's files at the last update of the database."""

    def update(self, *, is_last: bool = False) -> None:
        """Bring the database up to date with the study folder.

        A damaged database is renamed and replaced by a new one, and a deleted database is created again. If the
        database contradicts the record, its study is deleted and written again. Raises StorageError if the database
        cannot be written.
        """
        files = _fingerprint(self._paths)
        if files == self._shown:
            return
        record = StudyRecord.open(self._paths)
        with quiet():
            try:
                self._show(record)
            except DATABASE_ERRORS as error:
                # The file may have been deleted or replaced since it was opened.
                self._study, cause = None, _cause(error)
                if self._file is not None and not isinstance(cause, sqlite3.OperationalError):
                    aside = self._file.with_name(f"{self._file.name}.damaged")
                    os.replace(self._file, aside)
                    text = "Optuna's database is damaged (%s): it was renamed to %s, and a new one is created"
                    logger.warning(text, cause, aside.name)
                try:
                    self._show(record)
                except DATABASE_ERRORS as again:
                    self._study, cause = None, _cause(again)
                    reason = (str(cause).splitlines() or [type(cause).__name__])[0]
                    raise StorageError(f"{self._place} cannot be updated: {redact(reason)}") from again
            finally:
                # An idle connection may be lost without notice before the next update.
                if self._storage is not None:
                    self._storage.engine.dispose()
        self._shown = files

    def n_behind(self) -> int:
        """Return 1 if the record has changed since the last update, else 0."""
        return int(_fingerprint(self._paths) != self._shown)

    def _show(self, record: StudyRecord) -> None:
        trials, spaces = record.trials(), distributions(record.config.search)
        standing = record.standing(trials)
        wanted = [_shown_trial(trial, spaces, standing) for trial in trials]
        study, known = self._open(record)
        if not _agree(known, wanted):
            logger.info("Optuna's trials of study %s differ from the record and are rewritten", record.name)
            optuna.delete_study(study_name=record.name, storage=study._storage)
            self._study = None
            study, known = self._open(record)
        for index, (trial, shown) in enumerate(zip(trials, wanted, strict=True)):
            is_new = index >= len(known)
            if not is_new and (known[index].state.is_finished() or trial.outcome is None):
                continue
            if trial.outcome is not None:
                shown.intermediate_values = _scores_by_epoch(record, trial)
            if is_new:
                study.add_trial(shown)
            else:
                _finish(study, known[index], shown)

    def _open(self, record: StudyRecord) -> tuple[Study, list[FrozenTrial]]:
        """Return the study in the database and its trials. Create the study if it does not exist."""
        try:
            if self._study is None:
                if self._file is not None and self._file.is_file():
                    with closing(sqlite3.connect(self._file, timeout=TIMEOUT_S)) as database:
                        (found,) = database.execute("PRAGMA integrity_check(1)").fetchone()
                    if found != "ok":
                        raise sqlite3.DatabaseError(found)
                options = {"connect_args": {"timeout": TIMEOUT_S}} if self._file is not None else {}
                self._storage = RDBStorage(self._url, engine_kwargs=options)
                self._study = optuna.create_study(
                    storage=self._storage, study_name=record.name, direction="maximize", load_if_exists=True
                )
            return self._study, self._study.get_trials(deepcopy=False)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            # Optuna raises many kinds of exceptions if the database contains invalid values.
            raise sqlite3.DatabaseError("its content cannot be read") from error


DATABASE_ERRORS = (SQLAlchemyError, StorageInternalError, sqlite3.Error)


def _cause(error: BaseException) -> BaseException:
    """Return the original database error, which SQLAlchemy or Optuna may have wrapped."""
    is_wrapper = isinstance(error, StorageInternalError | SQLAlchemyError)
    return _cause(error.__cause__) if is_wrapper and error.__cause__ is not None else error


def sqlite_url(path: Path) -> str:
    """Return the SQLAlchemy URL of a database file. The path may contain any characters."""
    return sqlalchemy.URL.create("sqlite", database=str(path.absolute())).render_as_string(hide_password=False)


def _fingerprint(study: StudyPaths) -> tuple[Any, ...]:
    """Return the path and modification time of each file of the study folder that the database mirrors."""
    files = (study.confirmation, *sorted(study.trials.glob("*/*.json")))
    return tuple((path, path.stat().st_mtime_ns) for path in files if path.is_file())


def _agree(known: Sequence[FrozenTrial], wanted: Sequence[FrozenTrial]) -> bool:
    """Return whether the database's trials, `known`, are a prefix of the trials that it should contain, `wanted`.

    A trial that is running in the database may have ended in the record.
    """
    return len(known) <= len(wanted) and all(
        (found.number, found.params, found.distributions) == (index, trial.params, trial.distributions)
        and (not found.state.is_finished() or (found.state, found.value) == (trial.state, trial.value))
        for index, (found, trial) in enumerate(zip(known, wanted, strict=False))
    )


def _shown_as(trial: TrialRecord, standing: Standing) -> tuple[TrialState, float | None]:
    """Return the state and the value that a trial should have in the database.

    Optuna considers the COMPLETE trial with the highest value the best. A complete trial that would precede the
    winner by this rule, for example because it was not replicated, is therefore shown as PRUNED with its value.
    """
    if trial.outcome != "complete":
        return STATES[trial.outcome], None
    value = standing.values.get(trial.number, trial.value)
    winner = standing.winner
    if value is None or winner is None:
        return TrialState.PRUNED, value
    leads = rank({trial.number: value, winner: standing.values[winner]})[0] == trial.number
    return (TrialState.PRUNED if leads and trial.number != winner else TrialState.COMPLETE), value


def _shown_trial(trial: TrialRecord, spaces: Distributions, standing: Standing) -> FrozenTrial:
    """Return a trial as the database should show it, without its intermediate values."""
    state, value = _shown_as(trial, standing)
    attributes = {
        "outcome": trial.outcome,
        "reason": trial.reason,
        "estimate": trial.value if trial.outcome == "pruned" else None,
        "decisions": json.dumps(to_json(trial.decisions)) if trial.decisions else None,
    }
    # Optuna requires a value for a complete trial and allows none for a failed trial.
    found = frozen_trial(trial.params, spaces, state, trial.constraint, value=value)
    found.user_attrs = {key: text for key, text in attributes.items() if text not in (None, "")}
    found.datetime_start = dt.datetime.fromtimestamp(trial.began_at)
    if trial.ended_at is not None:
        found.datetime_complete = dt.datetime.fromtimestamp(trial.ended_at)
    return found


def _scores_by_epoch(record: StudyRecord, trial: TrialRecord) -> dict[int, float]:
    """Return the mean score after each epoch, by step. Steps count epochs from 1 and continue across folds."""
    n_epochs = trial.study_config.train.epochs
    return {
        fold * n_epochs + epoch: float(scores.mean())
        for fold, fit in enumerate(record.fits(trial.number))
        for epoch, scores in enumerate(fit.scores(), start=1)
    }


def _finish(study: Study, known: FrozenTrial, ended: FrozenTrial) -> None:
    """Update a running trial of the database with the state and results of the ended trial."""
    storage, trial_id = study._storage, known._trial_id
    for key, value in ended.user_attrs.items():
        storage.set_trial_user_attr(trial_id, key, value)
    for key, value in ended.system_attrs.items():
        storage.set_trial_system_attr(trial_id, key, value)
    for step, value in ended.intermediate_values.items():
        storage.set_trial_intermediate_value(trial_id, step, value)
    storage.set_trial_state_values(trial_id, ended.state, ended.values)
