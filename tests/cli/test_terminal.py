from __future__ import annotations

import signal

import pytest

from hpsearch.cli.terminal import stop_on_signals
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
