from __future__ import annotations

import time
from collections.abc import Callable, Iterator

import pytest
from optuna.exceptions import StorageInternalError

from hpsearch.tuning.heartbeat import Heart


class Beats:
    """Stands in for Optuna's storage: counts heartbeats, and may be away."""

    def __init__(self) -> None:
        self.of: list[int] = []
        self.is_away = False
        self.n_refused = 0

    def record_heartbeat(self, trial_id: int) -> None:
        if self.is_away:
            self.n_refused += 1
            raise StorageInternalError("away")
        self.of.append(trial_id)

    def remove_session(self) -> None:
        pass


@pytest.fixture
def storage() -> Beats:
    return Beats()


@pytest.fixture
def heart(storage: Beats) -> Iterator[Heart]:
    made = Heart(storage, 0.01)  # type: ignore[arg-type]
    yield made
    made.stop()


def wait_for(is_so: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not is_so():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.01)


def test_a_trial_that_is_taken_has_its_first_heartbeat_at_once_and_others_by_itself(
    storage: Beats, heart: Heart
) -> None:
    heart.take(7)
    assert storage.of[0] == 7
    wait_for(lambda: storage.of.count(7) > 3)


def test_what_is_not_kept_falls_silent(storage: Beats, heart: Heart) -> None:
    heart.take(1)
    heart.take(2)
    heart.keep([2])
    began = len(storage.of)
    # One round of heartbeats may have been under way.
    wait_for(lambda: storage.of[began:].count(2) > 1)
    silent = storage.of.count(1)
    wait_for(lambda: storage.of[began:].count(2) > 5)
    assert storage.of.count(1) == silent


def test_heartbeats_come_again_when_the_database_is_back(storage: Beats, heart: Heart) -> None:
    heart.take(1)
    storage.is_away = True
    wait_for(lambda: storage.n_refused > 2)
    n_beats = len(storage.of)
    storage.is_away = False
    wait_for(lambda: len(storage.of) > n_beats)


def test_a_trial_whose_first_heartbeat_was_refused_gets_no_other(storage: Beats, heart: Heart) -> None:
    storage.is_away = True
    with pytest.raises(StorageInternalError):
        heart.take(1)
    storage.is_away = False
    heart.take(2)
    wait_for(lambda: storage.of.count(2) > 3)
    assert 1 not in storage.of
