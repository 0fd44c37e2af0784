"""One coordinator's share of a study that several coordinators work on: asked, told and kept alive in a database.

The database is the arbiter. A trial belongs to whoever set it RUNNING, for as long as its heartbeats come; the first
to finish or to fail it has the last word, and whatever another says later is refused. One thread does all the
talking, so that a database that is slow, or away for minutes, holds up no training: what there is to tell waits, and
what was asked for comes when it comes. Heartbeats have a thread of their own (`heartbeat.py`).
"""

from __future__ import annotations

import copy
import dataclasses
import logging
import threading
import time
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import filelock
import sqlalchemy
from optuna.exceptions import UpdateFinishedTrialError
from optuna.storages import RDBStorage, RetryHeartbeatStaleTrialCallback, fail_stale_trials
from optuna.trial import FrozenTrial, Trial, TrialState

from hpsearch.errors import RecordError, StudyError, StudyLockedError
from hpsearch.paths import StudyPaths
from hpsearch.search.enqueue import is_same
from hpsearch.search.optuna_view import StudyDatabase
from hpsearch.search.samplers import decode, suggest
from hpsearch.store import lock
from hpsearch.store.record import StudyRecord, TrialRecord, now
from hpsearch.tuning import coordinators
from hpsearch.tuning.chains import (
    AsIfNobodyDied,
    Chain,
    chain_of,
    chains,
    history,
    is_begun,
    is_superfluous,
    is_told,
    n_taken,
    without_retry,
)
from hpsearch.tuning.coordinators import Sharing
from hpsearch.tuning.heartbeat import Heart
from hpsearch.tuning.ownership import Asked, Ownership, Params
from hpsearch.tuning.shared_storage import (
    AWAY,
    RETRY_S,
    beaten,
    n_by_state,
    open_storage,
    patiently,
    quiet,
    reason,
    refusals_named,
    uptime_s,
)

logger = logging.getLogger(__name__)

VIEW_S = 1.0
"""How old the view of the database may be while there is nothing to do."""
ASK_S = 0.25
"""How long to wait for a trial before going on without one."""
START_S = 60.0
"""How long a coordinator that joins others waits for a database that is away."""
CLOSE_S = 30.0
"""How long to try to tell the last results when the coordinator ends."""
READ_S = 60.0
"""How long to wait, at the end, for the files of others' trials to be seen."""


class SharedSeat:
    """A coordinator's seat at a study that others work on too."""

    is_shared = True

    def __init__(self, study: StudyPaths, url: str, sharing: Sharing | None) -> None:
        """`sharing` None: as the study is shared already, or else as `Sharing` has it."""
        self._study = study
        self._url = url
        self._wanted = sharing
        self._preparing = ExitStack()
        self._is_joining = True
        self.folder = coordinators.new_folder(study)
        self.log = self.folder / "study.log"

    @contextmanager
    def held(self) -> Iterator[None]:
        with self._preparing:
            self._prepare()
            yield

    def prepared(self) -> None:
        self._preparing.close()

    @contextmanager
    def trials(self, record: StudyRecord) -> Iterator[Ownership]:
        sharing = coordinators.read_sharing(self._study)
        assert sharing is not None
        if record.config.study.lookahead:
            raise StudyError(
                "--deterministic (study.lookahead) is for one machine: several share a study in whatever order they "
                "come; leave it out"
            )

        def opened() -> tuple[RDBStorage, StudyDatabase]:
            with refusals_named(self._url):
                storage = open_storage(self._url, sharing)
                database = StudyDatabase(record, storage)
                _bring_back(database, record)
                return storage, database

        # Who is the first hears at once that the address is wrong.
        storage, database = patiently(opened, START_S if self._is_joining else 0.0)
        shared = Shared(record, database, storage, sharing, self.folder)
        try:
            yield shared
        finally:
            shared.close()

    def _prepare(self) -> None:
        study = self._study
        made = (study.sharing, study.toml, study.folds, study.plan)
        if not all(path.is_file() for path in made):
            # By whoever comes first; the others wait, unless it is a coordinator that wants no company.
            said = False
            while True:
                try:
                    self._preparing.enter_context(lock.hold(study, among_others=True))
                    break
                except StudyLockedError as error:
                    if not study.sharing.is_file():
                        raise
                    if not said:
                        logger.info("waits while another coordinator prepares the study: %s", error)
                    said = True
                    time.sleep(0.5)
        sharing = coordinators.read_sharing(study)
        if sharing is None:
            shown = sqlalchemy.make_url(self._url).render_as_string(hide_password=True)
            trials = StudyRecord.open(study).trials() if study.toml.is_file() else []
            began_at = min((trial.began_at for trial in trials), default=now())
            coordinators.write_sharing(study, self._wanted or Sharing(), shown, began_at)
            self._is_joining = False
        elif self._wanted not in (None, sharing):
            raise StudyError(
                f"study {study.name!r} is shared with a heartbeat every {sharing.heartbeat_s} s and a grace period "
                f"of {sharing.grace_s} s, which all its coordinators must keep to; they are in {study.sharing}"
            )


class Shared:
    """This coordinator's trials among those of all."""

    is_shared = True

    def __init__(
        self, record: StudyRecord, database: StudyDatabase, storage: RDBStorage, sharing: Sharing, folder: Path
    ) -> None:
        """Begins at once to talk to the database; `close` ends it."""
        self._record = record
        self._database = database
        self._storage = storage
        self._sharing = sharing
        self._folder = folder
        self._study = database.optuna_study
        self._study.sampler = AsIfNobodyDied(self._study.sampler, [name for name, _ in record.config.search])
        with quiet():
            self._retry = RetryHeartbeatStaleTrialCallback()
        # Shared with the coordinator's thread, behind the lock.
        self._lock = threading.Condition()
        self._is_wanted = False
        self._enqueued: Params | None = None
        self._box: deque[Asked] = deque()
        self._pending: deque[TrialRecord] = deque()
        self._lost: list[int] = []
        self._unread: set[int] = set()
        self._refused: set[int] = set()
        """Those of the unread that were this coordinator's: what it recorded itself says nothing."""
        self._is_misranked = False
        """Whether the database may not show the ranking of the record."""
        self._may_ask = True
        self._is_over = False
        self._over_since = 0.0
        self._closing = False
        self._state = coordinators.new_state(folder)
        # The thread's own.
        self._own: dict[int, int] = {}
        """Number to Optuna's id of the trials that are this coordinator's."""
        self._seen: set[int] = set()
        """Trials of others that were told and that the coordinator has heard of, or will."""
        self._trials: list[FrozenTrial] = []
        self._n_by_state: Counter[str] = Counter()
        self._looked_at = self._next_watch = -1e9
        self._must_look = True
        """Whether this coordinator did something since it looked."""
        self._in_touch_at = time.monotonic()
        self._steady_since = time.monotonic()
        """Since when this coordinator has been in touch: who was not may take others for dead that could not beat."""
        self._silent: dict[int, float] = {}
        """Trials without any heartbeat, or failed without a retry, and when that was first seen."""
        self._is_away = False
        self._failure: BaseException | None = None
        self._write_state()
        self._heard_at = (folder / "state.json").stat().st_mtime
        if uptime_s(storage) > sharing.grace_s:
            self._steady_since -= sharing.grace_s
        self._heart = Heart(storage, sharing.heartbeat_s)
        self._thread = threading.Thread(target=self._run, name="database", daemon=True)
        self._thread.start()

    def running(self) -> Sequence[int]:
        return ()

    def adopt(self, number: int, enqueued: Params | None) -> Asked:
        raise AssertionError("what a coordinator began is taken over by another, or by its next start as one")

    def wants_trial(self, n_taken: int, n_unused: int | None = None) -> bool:
        # How many are taken is for the database to say: others take them too.
        return bool(self._box) or self._may_ask

    def ask(self, enqueued: Params | None) -> Asked | None:
        with self._lock:
            if not self._box:
                self._enqueued = enqueued
                self._is_wanted = True
                self._lock.notify_all()
                self._lock.wait_for(lambda: self._box or not self._is_wanted, ASK_S)
            return self._box.popleft() if self._box else None

    def tell(self, trial: TrialRecord) -> None:
        with self._lock:
            self._pending.append(trial)
            self._state = dataclasses.replace(
                self._state,
                n_trials=self._state.n_trials + (trial.outcome != "infeasible"),
                fits=tuple(fit for fit in self._state.fits if fit["trial"] != trial.number),
            )
            self._lock.notify_all()

    def show_ranking(self) -> None:
        with self._lock:
            self._is_misranked = True
            self._lock.notify_all()

    def lost(self) -> Sequence[int]:
        if self._failure is not None:
            raise self._failure
        with self._lock:
            lost, self._lost = self._lost, []
            gone = set(lost)
            fits = tuple(fit for fit in self._state.fits if fit["trial"] not in gone)
            self._state = dataclasses.replace(self._state, fits=fits)
        return lost

    def is_over(self) -> bool:
        with self._lock:
            waited = time.monotonic() - self._over_since > READ_S
            return self._is_over and not self._pending and (waited or not self._unread)

    def others(self) -> list[TrialRecord]:
        with self._lock:
            numbers = sorted(self._unread)
        read = []
        for number in numbers:
            # Told is told, but on a network disk its files may come later.
            trial = _read_ended(self._record, number)
            if trial is not None and (number not in self._refused or trial.outcome == "lost"):
                read.append(trial)
        with self._lock:
            self._unread -= {trial.number for trial in read}
        return read

    @contextmanager
    def confirming(self) -> Iterator[bool]:
        """Whoever is there first; the others have nothing left to do."""
        alone = filelock.FileLock(self._record.paths.confirmation.with_suffix(".lock"))
        try:
            alone.acquire(timeout=0)
        except filelock.Timeout:
            logger.info("another coordinator fits the shortlist once more")
            yield False
            return
        try:
            yield True
        finally:
            alone.release()

    def is_meant(self, request: Path) -> bool:
        # It stays there for the others. By the clock of the disk, which is that of all.
        with suppress(OSError):
            if (asked_at := request.stat().st_mtime) > self._heard_at:
                self._heard_at = asked_at
                return True
        return False

    def epoch_ended(self, trial: int, fold: int, epoch: int, n_images: int) -> None:
        with self._lock:
            others = [fit for fit in self._state.fits if (fit["trial"], fit["fold"]) != (trial, fold)]
            self._state = dataclasses.replace(
                self._state,
                n_epochs=self._state.n_epochs + 1,
                n_images=self._state.n_images + n_images,
                fits=(*others, {"trial": trial, "fold": fold, "epoch": epoch}),
            )

    def close(self) -> None:
        """Tell what is left and let go of what has not ended, so that others go on with it at once."""
        with self._lock:
            self._closing = True
            self._lock.notify_all()
        self._thread.join(CLOSE_S)
        if self._thread.is_alive() or self._is_away:
            logger.warning(
                "the database is away: %d ended trials are on record and not told; another start goes on with them",
                len(self._pending),
            )

    def _run(self) -> None:
        try:
            self._talk()
        except BaseException as error:
            # Raised where it is seen, in the coordinator's own thread.
            self._failure = error
        finally:
            self._heart.stop()
            self._storage.remove_session()
            self._storage.engine.dispose()

    def _talk(self) -> None:
        with quiet():
            give_up_at = None
            while True:
                with self._lock:
                    is_closing = self._closing
                if is_closing and give_up_at is None:
                    give_up_at = time.monotonic() + CLOSE_S / 2
                try:
                    self._round()
                    if is_closing:
                        self._let_go()
                except AWAY as error:
                    self._note_away(error)
                    # A session whose connection broke in the midst of a transaction never recovers by itself.
                    self._storage.remove_session()
                    self._storage.engine.dispose()
                    if give_up_at is not None and time.monotonic() > give_up_at:
                        return
                    pause = min(RETRY_S, self._sharing.heartbeat_s)
                else:
                    self._note_back()
                    if is_closing:
                        return
                    pause = min(VIEW_S, max(0.01, self._next_watch - time.monotonic()))
                with self._lock:
                    busy = not self._is_away and (self._pending or (self._is_wanted and self._may_ask))
                    if not busy and self._closing == is_closing:
                        self._lock.wait(pause)

    def _round(self) -> None:
        if time.monotonic() >= self._next_watch:
            self._watch()
        while (trial := self._next_to_tell()) is not None:
            is_ours = self._tell(trial)
            self._disown(trial.number)
            with self._lock:
                self._pending.popleft()
                if not is_ours:
                    self._note_lost(trial.number)
                self._is_misranked |= trial.outcome == "full"
            self._seen.add(trial.number)
            self._must_look = True
        if self._is_misranked:
            with self._lock:
                self._is_misranked = False
            try:
                self._database.show_ranking()
            except AWAY:
                self.show_ranking()
                raise
        with self._lock:
            is_wanted = self._is_wanted and not self._closing
        if is_wanted:
            asked = self._ask()
            with self._lock:
                self._is_wanted = False
                if asked is not None:
                    self._box.append(asked)
                self._lock.notify_all()
        elif self._must_look or time.monotonic() - self._looked_at >= VIEW_S:
            self._glance()

    def _next_to_tell(self) -> TrialRecord | None:
        with self._lock:
            return self._pending[0] if self._pending else None

    def _disown(self, number: int) -> None:
        self._own.pop(number, None)
        self._heart.keep(self._own.values())

    def _note_lost(self, number: int) -> None:
        logger.warning("trial %d was taken over: what became of it here counts for nothing", number)
        self._lost.append(number)
        self._refused.add(number)
        self._unread.add(number)

    # What others do.

    def _glance(self) -> None:
        """Look if there is anything to see."""
        if self._must_look or n_by_state(self._storage, self._study._study_id) != self._n_by_state:
            self._look()
        else:
            self._looked_at = time.monotonic()

    def _look(self) -> list[Chain]:
        """Read what is new in the database, and work out what follows from it."""
        self._trials = self._study.get_trials(deepcopy=False)
        self._looked_at, self._must_look = time.monotonic(), False
        self._n_by_state = Counter(trial.state.name for trial in self._trials)
        found = chains(self._trials)
        n_trials = self._record.config.study.trials
        states = Counter(chain.state for chain in found)
        waits = any(trial.state == TrialState.WAITING and is_begun(trial) for trial in self._trials)
        told = {trial.number for trial in self._trials if is_told(trial)} - self._seen - set(self._own)
        with self._lock:
            told -= {trial.number for trial in self._pending}
            self._may_ask = waits or (states["open"] + states["counted"] < n_trials and not self._is_used_up())
            is_enough = states["counted"] >= n_trials or self._is_used_up()
            is_over = is_enough and not states["open"] and not self._own
            if is_over and not self._is_over:
                self._over_since = time.monotonic()
            self._is_over = is_over
            self._unread |= told
        self._seen |= told
        return found

    def _is_used_up(self) -> bool:
        """Whether the trials in the database have had every configuration of the search space."""
        n_configurations = self._record.config.search.n_configurations
        return n_configurations is not None and n_configurations <= len(
            {self._record.configuration(_decoded(trial.params)) for trial in self._trials if is_begun(trial)}
        )

    def _ask(self) -> Asked | None:
        """A trial to begin, or one to go on with; None if all are taken."""
        found = self._look()
        try:
            if (trial := self._pop()) is None:
                if n_taken(found) >= self._record.config.study.trials or self._is_used_up():
                    return None
                trial = self._study.ask()
                self._heart.take(trial._trial_id)
            return self._claim(trial)
        except (UpdateFinishedTrialError, ValueError) as error:
            logger.debug("a trial was taken for dead before it had begun: %s", error)
            return None
        finally:
            # Whatever went wrong: nothing may beat for a trial that nobody has.
            self._heart.keep(self._own.values())

    def _claim(self, trial: Trial) -> Asked | None:
        """Make a trial that was just set RUNNING this coordinator's; None if it is one too many.

        Raises UpdateFinishedTrialError or ValueError if others failed it meanwhile.
        """
        found = self._look()
        number, trial_id = trial.number, trial._trial_id
        chain, frozen = chain_of(found, number), self._trials[number]
        if history(frozen):
            if is_superfluous(chain, number):
                trial.set_user_attr("outcome", "superfluous")
                self._study.tell(trial, state=TrialState.FAIL)
                return None
        elif not is_begun(frozen) and n_taken(found, chain.draw) >= self._record.config.study.trials:
            # Somebody else was faster. It keeps its place among the suggestions, should one turn out infeasible.
            self._storage.set_trial_state_values(trial_id, TrialState.WAITING)
            return None
        trial.set_user_attr("owner", self._state.id)
        enqueued = self._enqueued
        if enqueued and any(is_same(_decoded(each.params), enqueued) for each in self._trials):
            # Another coordinator has just begun it.
            enqueued = None
        with self._database.giving(enqueued):
            params = suggest(trial, self._record.config.search)
        self._own[number] = trial_id
        draw = chain.draw if chain.draw != number else None
        return Asked(number, params, draw, history(frozen), self._state.id, is_same(params, enqueued))

    def _pop(self) -> Trial | None:
        """A trial that somebody began and that waits to be gone on with, set RUNNING for this coordinator."""
        for trial in self._trials:
            if trial.state == TrialState.WAITING and is_begun(trial):
                # First, for its old heartbeat would make it a dead one.
                self._heart.take(trial._trial_id)
                with suppress(UpdateFinishedTrialError):
                    if self._storage.set_trial_state_values(trial._trial_id, TrialState.RUNNING):
                        return Trial(self._study, trial._trial_id)
        return None

    def _tell(self, record: TrialRecord) -> bool:
        """Whether the trial was still this coordinator's to tell."""
        try:
            # What still runs is this coordinator's: whoever takes it for dead fails it, for good.
            if self._database.tell(record):
                return True
        except (UpdateFinishedTrialError, ValueError):
            logger.debug("trial %d was finished while it was told", record.number)
        # Where only the answer was lost, it was told by us.
        frozen = self._database.frozen(record.number)
        return is_told(frozen) and frozen.user_attrs.get("owner") == self._state.id

    def _let_go(self) -> None:
        """Put back what has not ended: whoever is next goes on with it, under its number."""
        with self._lock:
            self._box.clear()
        for number, trial_id in list(self._own.items()):
            try:
                self._storage.set_trial_state_values(trial_id, TrialState.WAITING)
                logger.info("let go of trial %d", number)
            except UpdateFinishedTrialError:
                logger.info("trial %d was taken over", number)
            self._disown(number)
        self._state = dataclasses.replace(self._state, left_at=time.time(), fits=())
        self._write_state()

    # Who lives.

    def _watch(self) -> None:
        """See who does not live any more, and whether others took this coordinator for dead."""
        now = time.monotonic()
        self._next_watch = now + self._sharing.heartbeat_s
        if now - self._in_touch_at > self._sharing.grace_s / 2:
            # Nor could the others be, perhaps: they get the time to say that they live.
            self._steady_since = now
        is_steady = now - self._steady_since >= self._sharing.grace_s
        try:
            if is_steady:
                fail_stale_trials(self._study)
            self._look()
            if is_steady:
                self._fail_the_silent()
        except AWAY:
            self._write_state()
            raise
        self._in_touch_at = now
        self._state = dataclasses.replace(self._state, beat_at=time.time())
        self._write_state()
        for number in list(self._own):
            trial = self._trials[number]
            if trial.state.is_finished() and not is_told(trial):
                self._disown(number)
                with self._lock:
                    self._box = deque(asked for asked in self._box if asked.number != number)
                    self._note_lost(number)

    def _fail_the_silent(self) -> None:
        """Queue again what Optuna's heartbeats say nothing of: what died before its first, or before its retry."""
        beating = beaten(self._storage, self._study._study_id)
        unbeaten = [
            trial for trial in self._trials if trial.state == TrialState.RUNNING and trial._trial_id not in beating
        ]
        for trial in self._silent_for(unbeaten, self._sharing.grace_s):
            with suppress(UpdateFinishedTrialError):
                self._storage.set_trial_state_values(trial._trial_id, TrialState.FAIL)
                self._retry(self._study, copy.deepcopy(trial))
        # Whoever failed a trial may have died before it was queued again.
        alone = without_retry(self._trials)
        for trial in self._silent_for(alone, self._sharing.heartbeat_s):
            self._retry(self._study, copy.deepcopy(trial))
        silent = {trial._trial_id for trial in (*unbeaten, *alone)}
        self._silent = {trial_id: since for trial_id, since in self._silent.items() if trial_id in silent}

    def _silent_for(self, trials: Sequence[FrozenTrial], seconds: float) -> list[FrozenTrial]:
        """Those seen like this for so long, by this clock: their start is by that of another machine."""
        now = time.monotonic()
        return [trial for trial in trials if now - self._silent.setdefault(trial._trial_id, now) >= seconds]

    def _note_away(self, error: Exception) -> None:
        if not self._is_away:
            logger.warning("the database is away; training goes on, and it is told later: %s", reason(error))
        self._is_away = True

    def _note_back(self) -> None:
        if self._is_away:
            logger.info("the database is back")
        self._is_away = False

    def _write_state(self) -> None:
        with self._lock:
            self._state = dataclasses.replace(self._state, seen_at=time.time())
            state = self._state
        coordinators.write_state(self._folder, state)


def _bring_back(database: StudyDatabase, record: StudyRecord) -> None:
    """Make a database that was deleted anew from the record."""
    known = len(database.optuna_study.get_trials(deepcopy=False))
    numbers = record.trial_numbers()
    if numbers and known == 0:
        logger.info("the database lacks the study: it is made anew from the record")
        database.rebuild()
    elif numbers and numbers[-1] >= known:
        raise RecordError(
            f"the database holds {known} trials of study {record.name!r}, its folder goes up to trial {numbers[-1]}: "
            "give the database that it was begun with, or an empty one, which is made anew from the folder"
        )


def _decoded(params: Params) -> dict[str, Any]:
    return {name: decode(value) for name, value in params.items()}


def _read_ended(record: StudyRecord, number: int) -> TrialRecord | None:
    """An ended trial with all its files; None while one of them is not to be seen."""
    if not record.paths.trial(number).trial.is_file():
        return None
    trial = record.trial(number)
    if trial.outcome is None:
        return None
    if trial.outcome == "full" and len(record.finished_folds(number)) < record.n_folds:
        return None
    return trial
