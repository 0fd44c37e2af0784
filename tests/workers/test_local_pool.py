from __future__ import annotations

import math
import time
from pathlib import Path
from typing import Any

import pytest

from hpsearch.workers.local_pool import Worker, Workers, WorkerSettings


def worker(job: dict[str, Any] | None, silent_s: float = 0.0) -> Worker:
    """A worker without a process that was heard so many seconds ago."""
    nothing: Any = None
    heard_at = time.monotonic() - silent_s
    return Worker(0, WorkerSettings(), nothing, nothing, Path(), is_ready=True, job=job, heard_at=heard_at)


def left_s(epoch_s: dict[int, float], *busy: Worker) -> float | None:
    workers = Workers(Path())
    workers._workers = list(busy)
    workers._epoch_s = epoch_s
    return workers.epoch_left_s()


def test_the_epochs_being_trained_end_when_the_longest_does() -> None:
    first, second = worker({"job": "fit", "trial": 1}, 4.0), worker({"job": "fit", "trial": 2}, 1.0)
    assert left_s({1: 10.0, 2: 3.0}, first, second) == pytest.approx(6.0, abs=0.5)
    assert left_s({1: 2.0, 2: 0.5}, first, second) == 0.0


def test_an_epoch_of_a_trial_without_any_before_may_take_any_time() -> None:
    first, second = worker({"job": "fit", "trial": 1}), worker({"job": "fit", "trial": 2})
    found = left_s({1: 10.0}, first, second)
    assert found is not None
    assert math.isnan(found)


def test_without_a_fit_no_epoch_is_trained() -> None:
    assert left_s({1: 10.0}, worker(None), worker({"job": "score"})) is None
    assert left_s({}) is None
