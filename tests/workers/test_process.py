"""What a worker does when the memory runs out, when it is killed for it, and when it falls silent."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hpsearch import paths
from hpsearch.config import StudyConfig
from hpsearch.data.cache import Normalization
from hpsearch.errors import OutOfMemoryError
from hpsearch.search import coordinator
from hpsearch.training.task import FitTask
from hpsearch.workers.tasks import fit_within_memory
from tests.search.studies import everything, run, tiny_config, write_tiny_dataset

FAULTY = Path(__file__).parents[2] / "benchmarks" / "faulty"


def fit_of_at_most(n_images: int, asked: list[int | None]) -> Any:
    """A fit for which the memory suffices at that many images at once."""

    def run(task: FitTask) -> Any:
        asked.append(task.micro_batch)
        if (task.micro_batch or task.config.train.batch_size) > n_images:
            raise OutOfMemoryError("training on cpu ran out of memory: no memory left")
        return "the fit"

    return run


def task_of(config: StudyConfig) -> FitTask:
    return FitTask(
        config=config,
        train_indices=np.arange(16),
        held_out_indices=np.arange(0),
        normalization=Normalization((0.5,) * 3, (0.25,) * 3),
        seed=0,
    )


def test_batches_are_halved_until_they_fit_where_that_changes_nothing(tmp_path: Path) -> None:
    task = task_of(tiny_config(tmp_path, "unet.norm=group", "train.batch_size=16"))
    asked: list[int | None] = []
    assert fit_within_memory(task, fit_of_at_most(3, asked)) == "the fit"
    assert asked == [None, 8, 4, 2]


def test_with_batch_normalisation_a_fit_that_does_not_fit_is_infeasible(tmp_path: Path) -> None:
    asked: list[int | None] = []
    with pytest.raises(OutOfMemoryError):
        fit_within_memory(task_of(tiny_config(tmp_path)), fit_of_at_most(3, asked))
    assert asked == [None]


def test_one_image_at_once_that_does_not_fit_is_infeasible(tmp_path: Path) -> None:
    task = task_of(tiny_config(tmp_path, "unet.norm=group"))
    asked: list[int | None] = []
    with pytest.raises(OutOfMemoryError):
        fit_within_memory(task, fit_of_at_most(0, asked))
    assert asked == [None, 2, 1]


@pytest.fixture
def fault_in_every_worker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Has every worker send itself a signal when it begins a fit."""

    def arrange(number: signal.Signals) -> None:
        (tmp_path / "faults" / "fired").mkdir(parents=True)
        request = {"name": "always", "again": True, "signal": int(number), "role": "worker", "call": 1, "line": 1}
        (tmp_path / "faults" / "request.json").write_text(
            json.dumps([{**request, "function": "training/progress.py:resume_"}])
        )
        monkeypatch.setenv("HPSEARCH_FAULTS", str(tmp_path / "faults"))
        monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(FAULTY), os.environ.get("PYTHONPATH", "")]))

    return arrange


@pytest.mark.slow
@pytest.mark.parametrize(("number", "why"), [(signal.SIGKILL, "killed by SIGKILL"), (signal.SIGSTOP, "no epoch for")])
def test_a_fold_that_ends_its_worker_three_times_or_falls_silent_fails_its_trial_and_the_study_goes_on(
    fault_in_every_worker: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    number: signal.Signals,
    why: str,
) -> None:
    config = tiny_config(write_tiny_dataset(tmp_path), "study.trials=1", "study.pruner=none")
    monkeypatch.setattr(coordinator, "SILENCE_MIN_S", 8.0)
    fault_in_every_worker(number)
    record = run(tmp_path / "out", config).record
    trial = record.trial(0)
    assert trial.outcome == "failed"
    assert "3 workers died in fold 1 after epoch 0" in trial.reason
    assert why in record.paths.log.read_text()
    monkeypatch.delenv("HPSEARCH_FAULTS")
    more = run(tmp_path / "out", tiny_config(tmp_path / "ISIC-2017", "study.trials=2", "study.pruner=none")).record
    assert [each.outcome for each in more.trials()] == ["failed", "complete"]


@pytest.mark.slow
def test_a_trial_for_which_the_memory_does_not_suffice_is_infeasible_and_the_study_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The address space of the workers is limited after they have loaded what they need."""
    dataset = write_tiny_dataset(tmp_path)
    (tmp_path / "sitecustomize.py").write_text(LIMITED_WORKER)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")]))
    # Networks that large would not fit every disk either, which a study foresees.
    monkeypatch.setattr(paths, "free_bytes", lambda _: 2**50)
    searched = "search.unet.base_channels=[2, 2048]"
    config = tiny_config(dataset, searched, "study.trials=4", "study.sampler=random", "study.pruner=none")
    record = run(tmp_path / "out", config).record
    outcomes = {trial.params["unet.base_channels"]: trial.outcome for trial in record.trials()}
    assert outcomes == {2: "complete", 2048: "infeasible"}
    assert all("memory" in trial.reason for trial in record.trials() if trial.outcome == "infeasible")
    assert everything(record)["trials"]


LIMITED_WORKER = """
import resource, sys
if "hpsearch.workers.process" in sys.orig_argv:
    import torch, hpsearch.workers.process, hpsearch.workers.plan
    used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + 2**30, used + 2**30))
"""
