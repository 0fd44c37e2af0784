"""A view is updated in the background, and its failures cost nothing but delay."""

from __future__ import annotations

import logging
import threading

import pytest

from hpsearch.errors import TrackingError
from hpsearch.paths import StudyPaths
from hpsearch.views import ViewThread, is_updating


class FakeView:
    """View that counts its updates and raises `errors` one after another. It is its own view."""

    name = "MLflow"

    def __init__(self, *errors: Exception) -> None:
        self.errors = list(errors)
        self.attempts: list[bool] = []
        """`is_last` of every update."""
        self.attempted = threading.Semaphore(0)

    def update(self, *, is_last: bool = False) -> None:
        self.attempts.append(is_last)
        try:
            if self.errors:
                raise self.errors.pop(0)
        finally:
            self.attempted.release()

    def n_behind(self) -> int:
        return len(self.errors)

    def view(self, study: StudyPaths) -> FakeView:
        return self


def test_a_view_is_updated_when_woken_and_a_last_time_at_the_end() -> None:
    view = FakeView()
    thread = ViewThread(view, pause_s=0)
    for _ in range(3):
        assert view.attempted.acquire(timeout=60)
        thread.wake()
    assert view.attempted.acquire(timeout=60)
    assert thread.close() == 0
    assert view.attempts == [False] * 4 + [True]


def test_several_wakes_during_a_pause_are_one_update() -> None:
    view = FakeView()
    thread = ViewThread(view, pause_s=600)
    assert view.attempted.acquire(timeout=60)
    for _ in range(10):
        thread.wake()
    thread.close()
    assert view.attempts == [False, True]


def test_an_outage_is_logged_once_and_recovered_from(caplog: pytest.LogCaptureFixture) -> None:
    view = FakeView(TrackingError("away"), TrackingError("still away"), TrackingError("still away"))
    with caplog.at_level(logging.INFO, "hpsearch"):
        thread = ViewThread(view, pause_s=0, retry_s=0.001)
        for _ in range(4):
            assert view.attempted.acquire(timeout=60)
        assert thread.close() == 0
    assert thread.error == ""
    assert [record.levelname for record in caplog.records] == ["WARNING", "INFO"]
    assert "away" in caplog.text
    assert "Traceback" not in caplog.text


def test_close_tries_again_and_returns_what_is_missing() -> None:
    view = FakeView(*[TrackingError("away")] * 5)
    thread = ViewThread(view, retry_s=600)
    assert view.attempted.acquire(timeout=60)
    assert thread.close() == 3
    assert thread.error == "away"
    assert view.attempts == [False, True]


def test_close_returns_at_least_one_after_an_error() -> None:
    """The run of the study itself is not counted by `n_behind`."""
    view = FakeView(TrackingError("away"), TrackingError("away"))
    thread = ViewThread(view, retry_s=600)
    assert view.attempted.acquire(timeout=60)
    assert thread.close() == 1


def test_an_unexpected_error_is_logged_with_its_traceback_and_retried(caplog: pytest.LogCaptureFixture) -> None:
    view = FakeView(ZeroDivisionError("a fault"))
    thread = ViewThread(view, pause_s=0, retry_s=0.001)
    for _ in range(2):
        assert view.attempted.acquire(timeout=60)
    assert thread.close() == 0
    assert "ZeroDivisionError" in caplog.text


def test_close_gives_up_on_a_server_that_does_not_answer() -> None:
    answer = threading.Event()
    view = FakeView(TrackingError("never read"))
    view.update = lambda is_last=False: answer.wait(60) and None  # type: ignore[method-assign]
    thread = ViewThread(view)
    assert thread.close(0.1) == 1
    assert "does not answer" in thread.error
    answer.set()


def test_close_waits_while_the_view_makes_progress() -> None:
    class Slow(FakeView):
        left = 8

        def update(self, *, is_last: bool = False) -> None:
            while self.left:
                threading.Event().wait(0.15)
                self.left -= 1

        def n_behind(self) -> int:
            return self.left

    # All updates together take longer than the timeout without progress.
    assert ViewThread(Slow()).close(1.0) == 0


def test_an_update_that_nobody_waits_for_is_known() -> None:
    answer = threading.Event()
    view = FakeView()
    view.update = lambda is_last=False: answer.wait(60) and None  # type: ignore[method-assign]
    assert not is_updating()
    thread = ViewThread(view)
    thread.close(0.05)
    assert is_updating()
    answer.set()
    thread.join(60)
    assert not is_updating()
