"""Which trials of a study are this coordinator's: all of them on one machine, its share where several work on it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import sqlalchemy
from sqlalchemy.exc import ArgumentError

from hpsearch.errors import StudyError
from hpsearch.paths import StudyPaths
from hpsearch.search.enqueue import is_same
from hpsearch.search.optuna_view import StudyDatabase
from hpsearch.store import lock
from hpsearch.store.record import StudyRecord, TrialRecord
from hpsearch.tuning.coordinators import Sharing

Params = Mapping[str, Any]


@dataclass(frozen=True)
class Asked:
    """A trial that shall be evaluated here."""

    number: int
    params: dict[str, Any]
    draw: int | None = None
    """Its place among the suggestions, which seeds it; None: its number."""
    history: tuple[int, ...] = ()
    """Numbers that the same configuration had before, where its coordinators died; the latest last."""
    owner: str = ""
    """Id of this coordinator, empty on one machine."""
    is_enqueued: bool = False
    """Whether the params are those that a user wanted."""

    @property
    def place(self) -> int:
        """Its place among the suggestions."""
        return self.number if self.draw is None else self.draw


class Ownership(Protocol):
    """Where a coordinator has its trials from, and tells them to."""

    is_shared: bool
    """Whether other coordinators work on the study too."""

    def running(self) -> Sequence[int]:
        """Trials that an earlier start of this coordinator began, and that may not be on record yet."""

    def adopt(self, number: int, enqueued: Params | None) -> Asked:
        """One of them; what a crash left out of its params comes from those that a user wants tried next."""

    def wants_trial(self, n_taken: int, n_unused: int | None = None) -> bool:
        """Whether a trial may be begun, where `n_taken` on record count or are open. Returns at once.

        `n_unused` configurations have been tried by none of them; None: without end.
        """

    def ask(self, enqueued: Params | None) -> Asked | None:
        """A trial to begin, with the params that a user wants tried next, or to go on with; None: not now."""

    def tell(self, trial: TrialRecord) -> None:
        """A trial of this coordinator has ended and is on record."""

    def show_ranking(self) -> None:
        """Replicates have changed how the trials rank: bring the database up to date."""

    def lost(self) -> Sequence[int]:
        """Own trials that others have taken over since this was last asked."""

    def is_over(self) -> bool:
        """Whether nobody has anything left to do, as far as this coordinator's own trials do not tell."""

    def others(self) -> Sequence[TrialRecord]:
        """What became of other coordinators' trials since this was last asked."""

    def confirming(self) -> AbstractContextManager[bool]:
        """Whether the second fits are this coordinator's to make, for the block."""

    def is_meant(self, request: Path) -> bool:
        """Whether the request in that file is to this coordinator, and new."""

    def epoch_ended(self, trial: int, fold: int, epoch: int, n_images: int) -> None:
        """An epoch was trained here, for whoever wants to know what this coordinator does."""


class Seat(Protocol):
    """The place that a coordinator takes at a study for the time of its run."""

    is_shared: bool
    log: Path
    """Where its events are logged."""
    folder: Path
    """Where its workers' output goes."""

    def held(self) -> AbstractContextManager[None]:
        """Sit there for the block, at first as the only one; StudyLockedError if it is taken."""

    def prepared(self) -> None:
        """Settings, folds and plan are made: the next coordinator may come."""

    def trials(self, record: StudyRecord) -> AbstractContextManager[Ownership]:
        """The study's trials, for the block; the database is brought up to date with the record."""


def take_seat(study: StudyPaths, url: str, sharing: Sharing | None = None) -> Seat:
    """A seat at a study whose database is at the SQLAlchemy URL: the only one if that is a file, else one of many.

    Raises StudyError for a file where others share the study.
    """
    if _is_server(url):
        # Here, for it needs what is defined in this module.
        from hpsearch.tuning.shared import SharedSeat

        return SharedSeat(study, url, sharing)
    if study.sharing.is_file():
        raise StudyError(
            f"study {study.name!r} is shared through a database that {study.sharing} names: give its address with "
            "--storage, or remove that file once nobody shares the study any more"
        )
    return SoleSeat(study, url)


def _is_server(url: str) -> bool:
    try:
        return sqlalchemy.make_url(url).get_backend_name() != "sqlite"
    except ArgumentError:
        # Whoever opens it says so.
        return False


class SoleSeat:
    """The one coordinator of a study: holds it for the whole time."""

    is_shared = False

    def __init__(self, study: StudyPaths, url: str) -> None:
        self._study = study
        self._url = url
        self.log = study.log
        self.folder = study.root

    def held(self) -> AbstractContextManager[None]:
        return lock.hold(self._study)

    def prepared(self) -> None:
        pass

    @contextmanager
    def trials(self, record: StudyRecord) -> Iterator[Ownership]:
        database = StudyDatabase(record, self._url)
        database.catch_up()
        yield Sole(database, record)


class Sole:
    """Every trial of the study."""

    is_shared = False

    def __init__(self, database: StudyDatabase, record: StudyRecord) -> None:
        self._database = database
        self._record = record

    def running(self) -> Sequence[int]:
        return self._database.running()

    def adopt(self, number: int, enqueued: Params | None) -> Asked:
        params = self._database.adopt(number, enqueued)
        return Asked(number, params, is_enqueued=is_same(params, enqueued))

    def wants_trial(self, n_taken: int, n_unused: int | None = None) -> bool:
        return n_taken < self._record.config.study.trials and n_unused != 0

    def ask(self, enqueued: Params | None) -> Asked:
        number, params = self._database.ask(enqueued)
        return Asked(number, params, is_enqueued=is_same(params, enqueued))

    def tell(self, trial: TrialRecord) -> None:
        self._database.tell(trial)
        if trial.outcome == "full":
            self._database.show_ranking()

    def show_ranking(self) -> None:
        self._database.show_ranking()

    def lost(self) -> Sequence[int]:
        return ()

    def is_over(self) -> bool:
        return True

    def others(self) -> Sequence[TrialRecord]:
        return ()

    def confirming(self) -> AbstractContextManager[bool]:
        return nullcontext(True)

    def is_meant(self, request: Path) -> bool:
        return True

    def epoch_ended(self, trial: int, fold: int, epoch: int, n_images: int) -> None:
        pass
