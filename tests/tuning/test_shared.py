from __future__ import annotations

import itertools
import logging
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from optuna.storages import RDBStorage
from optuna.trial import TrialState

from hpsearch import paths
from hpsearch.cli import main
from hpsearch.errors import StudyError, StudyLockedError
from hpsearch.paths import ProjectPaths
from hpsearch.search.optuna_view import StudyDatabase
from hpsearch.search.status import study_status
from hpsearch.store import lock
from hpsearch.store.record import Outcome, StudyRecord, TrialRecord, now
from hpsearch.tuning import chains, coordinators, shared
from hpsearch.tuning.coordinators import Sharing
from hpsearch.tuning.ownership import Asked, SoleSeat, take_seat
from hpsearch.tuning.shared import Shared, SharedSeat
from hpsearch.tuning.shared_storage import open_storage, quiet
from tests.search.studies import tiny_config
from tests.servers import Postgres

CALM = Sharing()
NERVOUS = Sharing(1, 3)
"""Only where one coordinator lives: on a busy machine others might be taken for dead."""
NAMES = itertools.count()


@pytest.fixture(scope="module")
def postgres() -> Iterator[Postgres]:
    with Postgres() as server:
        yield server


class Study:
    """A study on a fresh database, and coordinators of it that train nothing."""

    def __init__(self, folder: Path, url: str, n_trials: int, sharing: Sharing) -> None:
        self.url = url
        self._sharing = sharing
        config = tiny_config(folder, "study.sampler=random", f"study.trials={n_trials}")
        self.record = StudyRecord.create(ProjectPaths(folder).study("tiny"), config)
        coordinators.write_sharing(self.record.paths, sharing, "a server", now())
        self._members: list[Shared] = []

    def join(self) -> Shared:
        with quiet():
            storage = open_storage(self.url, self._sharing)
            database = StudyDatabase(self.record, storage)
        folder = coordinators.new_folder(self.record.paths)
        self._members.append(Shared(self.record, database, storage, self._sharing, folder))
        return self._members[-1]

    @contextmanager
    def database(self) -> Iterator[tuple[RDBStorage, StudyDatabase]]:
        """The study's database as nobody's."""
        with quiet():
            storage = open_storage(self.url, self._sharing)
            try:
                yield storage, StudyDatabase(self.record, storage)
            finally:
                storage.remove_session()
                storage.engine.dispose()

    def trials(self) -> list[Any]:
        with self.database() as (_, database):
            return database.optuna_study.get_trials()

    def begin(self, asked: Asked) -> TrialRecord:
        trial = TrialRecord(
            number=asked.number,
            params=asked.params,
            config=self.record.config.to_dict(),
            began_at=now(),
            owner=asked.owner,
            draw=asked.draw,
            history=asked.history,
        )
        self.record.write_trial(trial)
        return trial

    def end(self, member: Shared, trial: TrialRecord, value: float, outcome: Outcome = "diverged") -> None:
        ended = replace(trial, outcome=outcome, ended_at=now(), constraint=1.0, reason=str(value))
        self.record.write_trial(ended)
        member.tell(ended)

    def close(self) -> None:
        for member in self._members:
            member.close()


@pytest.fixture
def make_study(postgres: Postgres, tmp_path: Path) -> Iterator[Callable[..., Study]]:
    made: list[Study] = []

    def make(n_trials: int, sharing: Sharing = CALM) -> Study:
        made.append(Study(tmp_path, postgres.create(f"shared{next(NAMES)}"), n_trials, sharing))
        return made[-1]

    yield make
    for study in made:
        study.close()


def die(member: Shared) -> None:
    """End a coordinator as SIGKILL would: it lets go of nothing."""
    member._heart.stop()
    member._own.clear()
    member.close()


def wait_for(found: Callable[[], Any]) -> Any:
    deadline = time.monotonic() + 60
    while not (result := found()):
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.05)
    return result


def ask(member: Shared) -> Asked:
    asked: Asked = wait_for(lambda: member.ask(None))
    return asked


def test_coordinators_share_out_exactly_the_trials_that_are_wanted(make_study: Callable[..., Study]) -> None:
    study = make_study(5)
    members = [study.join() for _ in range(3)]
    begun: list[int] = []
    while not all(member.is_over() for member in members):
        for member in members:
            if member.wants_trial(0) and (asked := member.ask(None)) is not None:
                begun.append(asked.number)
                study.end(member, study.begin(asked), 0.5)
            member.others()
        time.sleep(0.02)
    assert sorted(begun) == [0, 1, 2, 3, 4]
    # One that lost the race for the last place keeps its number, should the study be given more trials.
    assert Counter(trial.state for trial in study.trials() if trial.state != TrialState.WAITING) == {
        TrialState.PRUNED: 5
    }


def test_the_best_trial_of_a_shared_database_is_the_winner(make_study: Callable[..., Study]) -> None:
    """Also where another full trial, which memory changed, has a higher value: it counts and cannot win."""
    study = make_study(2)
    member = study.join()
    for value, micro_batch in ((0.8, 2), (0.7, None)):
        trial = study.begin(ask(member))
        ended = replace(trial, outcome="full", value=value, micro_batch=micro_batch, ended_at=now())
        study.record.write_trial(ended)
        for fold in range(2):
            paths.write_json(study.record.fit(trial.number, fold).paths.fit, {})
        member.tell(ended)
    wait_for(lambda: [trial.state.name for trial in study.trials()] == ["PRUNED", "COMPLETE"])
    with study.database() as (_, database):
        best = database.optuna_study.best_trial
    assert (best.number, best.value) == (1, 0.7) == (study.record.standing().winner, 0.7)
    wait_for(lambda: (member.others(), member.is_over())[1])


def test_an_infeasible_trial_makes_room_for_another(make_study: Callable[..., Study]) -> None:
    study = make_study(1)
    member = study.join()
    study.end(member, study.begin(ask(member)), 0.5, "infeasible")
    assert ask(member).number == 1


def test_a_dead_coordinators_trial_goes_to_another_with_its_params_and_place(
    make_study: Callable[..., Study],
) -> None:
    study = make_study(1, NERVOUS)
    dying = study.join()
    first = ask(dying)
    study.begin(first)
    die(dying)
    second = ask(study.join())
    assert (second.number, second.place, second.history) == (1, 0, (0,))
    assert second.params == first.params


@pytest.mark.slow
def test_so_does_one_that_died_before_its_first_heartbeat(make_study: Callable[..., Study]) -> None:
    study = make_study(1, NERVOUS)
    with study.database() as (_, database):
        database.ask()
    second = ask(study.join())
    assert (second.number, second.place, second.history) == (1, 0, (0,))


@pytest.mark.slow
def test_so_does_one_that_was_failed_by_who_died_before_queueing_it_again(make_study: Callable[..., Study]) -> None:
    study = make_study(1, NERVOUS)
    with study.database() as (storage, database):
        trial = database.trial(database.ask()[0])
        trial.set_user_attr("owner", "somebody")
        storage.set_trial_state_values(trial._trial_id, TrialState.FAIL)
    assert ask(study.join()).history == (0,)


def test_a_late_result_is_refused_and_its_trial_is_lost(
    make_study: Callable[..., Study], caplog: pytest.LogCaptureFixture
) -> None:
    study = make_study(1)
    slow = study.join()
    trial = study.begin(ask(slow))
    with study.database() as (storage, _):
        storage.set_trial_state_values(slow._own[0], TrialState.FAIL)
    with caplog.at_level(logging.WARNING, "hpsearch"):
        study.end(slow, trial, 0.5)
        assert wait_for(slow.lost) == [0]
    assert study.trials()[0].state == TrialState.FAIL
    assert not any(map(chains.is_told, study.trials()))
    assert "trial 0 was taken over" in caplog.text


def test_who_ends_in_order_lets_go_and_the_next_goes_on_at_once_under_the_same_number(
    make_study: Callable[..., Study],
) -> None:
    study = make_study(1)
    leaving = study.join()
    first = ask(leaving)
    study.begin(first)
    leaving.close()
    assert study.trials()[0].state == TrialState.WAITING
    second = ask(study.join())
    assert (second.number, second.history, second.params) == (first.number, (), first.params)


def test_what_ended_while_the_database_was_away_is_told_when_it_is_back(
    make_study: Callable[..., Study], postgres: Postgres
) -> None:
    study = make_study(1)
    member = study.join()
    trial = study.begin(ask(member))
    postgres.stop()
    try:
        study.end(member, trial, 0.5)
        assert member.ask(None) is None
        assert not member.is_over()
        wait_for(lambda: member._is_away)
    finally:
        postgres.start()
    wait_for(member.is_over)
    assert study.trials()[0].state == TrialState.PRUNED
    assert not member.lost()


@pytest.mark.slow
def test_a_deleted_database_is_made_anew_from_the_record(
    make_study: Callable[..., Study], postgres: Postgres
) -> None:
    study = make_study(2, NERVOUS)
    member = study.join()
    study.end(member, study.begin(ask(member)), 0.5)
    study.begin(ask(member))
    wait_for(lambda: chains.is_told(study.trials()[0]))
    die(member)
    study.url = postgres.create(f"anew{next(NAMES)}")
    with study.database() as (_, database):
        shared._bring_back(database, study.record)
    assert [trial.state for trial in study.trials()] == [TrialState.PRUNED, TrialState.RUNNING]
    assert ask(study.join()).history == (1,)


def test_status_shows_who_has_what_and_how_fast_it_is(
    make_study: Callable[..., Study], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    study = make_study(3)
    member = study.join()
    study.end(member, study.begin(ask(member)), 0.5)
    study.begin(ask(member))
    member.epoch_ended(1, 0, 2, n_images=300)
    wait_for(lambda: member._state.beat_at is not None)
    member._write_state()
    (state,) = study_status(ProjectPaths(tmp_path), "tiny").coordinators
    assert state.fits == ({"trial": 1, "fold": 0, "epoch": 2},)
    assert (state.n_trials, state.n_epochs, state.n_images) == (1, 1, 300)
    assert state.trials_per_hour > 0
    with pytest.raises(SystemExit, match="0"):
        main(["status", "--out", str(tmp_path)])
    shown = capsys.readouterr().out
    assert f"run by process {state.pid} on {state.host}" in shown
    assert "trial/fold 1/0" in shown
    with pytest.raises(StudyLockedError, match=f"process {state.pid}"), lock.hold(study.record.paths):
        pass


def test_a_shared_study_is_not_run_on_a_file_beside(make_study: Callable[..., Study], tmp_path: Path) -> None:
    study = make_study(1)
    with pytest.raises(StudyError, match="is shared through a database"):
        take_seat(study.record.paths, f"sqlite:///{tmp_path / 'hpsearch.db'}")
    assert isinstance(take_seat(ProjectPaths(tmp_path).study("other"), "sqlite:///x.db"), SoleSeat)


def test_who_joins_others_waits_for_a_database_that_is_away_and_the_first_does_not(
    make_study: Callable[..., Study], postgres: Postgres, monkeypatch: pytest.MonkeyPatch
) -> None:
    # On a busy machine the server takes its time.
    monkeypatch.setattr(shared, "START_S", 600.0)
    study = make_study(1)
    joining = SharedSeat(study.record.paths, study.url, None)
    with study.database(), joining.held():
        postgres.stop()
        back = threading.Timer(1.0, postgres.start)
        back.start()
        try:
            with joining.trials(study.record) as ownership:
                assert wait_for(lambda: ownership.ask(None)).number == 0
        finally:
            back.join()
    study.record.paths.sharing.unlink()
    first = SharedSeat(study.record.paths, "postgresql+psycopg://me@127.0.0.1:1/optuna", None)
    with first.held(), pytest.raises(StudyError, match=r"127\.0\.0\.1:1"), first.trials(study.record):
        pass


def test_an_address_that_does_not_answer_is_named_without_its_password() -> None:
    with pytest.raises(StudyError, match=r"postgresql\+psycopg://me:\*\*\*@127.0.0.1:1/optuna") as caught:
        open_storage("postgresql+psycopg://me:secret@127.0.0.1:1/optuna", CALM)
    assert "secret" not in str(caught.value)
