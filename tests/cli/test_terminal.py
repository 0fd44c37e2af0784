from __future__ import annotations

import signal
import sys

import pytest

from hpsearch.cli.terminal import counter, stop_on_signals
from hpsearch.search.stopping import Stop


@pytest.mark.parametrize(
    ("left_s", "said"),
    [
        (12.4, "Finishing the current epoch (about 12 s); press Ctrl-C again to stop now"),
        (0.0, "Finishing the current epoch (about 1 s); press Ctrl-C again to stop now"),
        (float("nan"), "Finishing the current epoch; press Ctrl-C again to stop now"),
        (None, "Stopping"),
    ],
)
def test_ctrl_c_says_at_once_how_long_the_epoch_lasts_and_how_to_stop_now(
    left_s: float | None, said: str, capfd: pytest.CaptureFixture[str]
) -> None:
    stop = Stop()
    stop.epoch_left_s = lambda: left_s
    with stop_on_signals(stop):
        signal.raise_signal(signal.SIGINT)
        assert capfd.readouterr().err.strip() == said
        assert stop.is_requested
        assert not stop.is_urgent
        signal.raise_signal(signal.SIGINT)
        assert capfd.readouterr().err.strip() == "Stopping now"
        assert stop.is_urgent


def test_the_signal_handlers_of_before_are_restored() -> None:
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with stop_on_signals(Stop()):
        assert signal.getsignal(signal.SIGINT) != before[0]
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


def test_sigterm_does_not_wait_for_the_end_of_the_epoch() -> None:
    shown: list[str] = []
    stop = Stop()
    stop.epoch_left_s = lambda: 60.0
    with stop_on_signals(stop, shown.append):
        signal.raise_signal(signal.SIGTERM)
    assert shown == ["Stopping now"]
    assert stop.is_urgent


@pytest.mark.parametrize(
    ("total", "shown"), [(2150, [1, 538, 1075, 1613, 2150]), (8, [1, 2, 4, 6, 8]), (2, [1, 2]), (1, [1])]
)
def test_progress_is_a_few_lines_without_a_terminal(
    total: int, shown: list[int], capsys: pytest.CaptureFixture[str]
) -> None:
    show = counter("decoding images")
    for _ in range(2):
        for done in range(1, total + 1):
            show(done, total)
        assert capsys.readouterr().err.splitlines() == [f"decoding images {done}/{total}" for done in shown]


def test_progress_is_one_line_with_the_time_left_on_a_terminal(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    seconds = iter([0.0, 5.0, 5.0, 25.0, 25.0])
    monkeypatch.setattr("time.monotonic", lambda: next(seconds))
    show = counter("predicting")
    for done in (1, 2, 2):
        show(done, 5 - done)
    lines = capsys.readouterr().err.split("\r")
    assert "predicting 2/3, 10 s left" in lines[2]
