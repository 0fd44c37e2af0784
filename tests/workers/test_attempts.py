from __future__ import annotations

from pathlib import Path

import pytest

from hpsearch.data.prepare import PoolCaches
from hpsearch.errors import HpsearchError, WorkerError
from hpsearch.paths import FitPaths, ProjectPaths, StudyPaths, append_line, atomic_write, write_text
from hpsearch.search.evaluation import fit_seed
from hpsearch.store import lock
from hpsearch.workers import attempts
from hpsearch.workers.jobs import CachePaths, EpochEnded, Failed, Finished, FitJob, Ready, WorkerSettings
from hpsearch.workers.local_pool import LocalPool
from tests.search.in_process import run_planned, workers_in_process
from tests.search.studies import tiny_config, write_tiny_dataset
from tests.workers.pool_contract import wait_for


@pytest.fixture
def fit(tmp_path: Path) -> FitPaths:
    return FitPaths(tmp_path / "fold1")


def write_while_another_coordinator_starts(study: StudyPaths) -> None:
    with atomic_write(study.trial(0).fold(1).last) as temporary:
        temporary.write_text("late")
        with lock.hold(study):
            study.toml.touch()


def test_the_latest_attempt_may_write(fit: FitPaths) -> None:
    attempts.begin(fit)
    with attempts.writing(fit, attempts.begin(fit)):
        write_text(fit.last, "second")
        append_line(fit.epochs, "epoch 1")
    assert fit.last.read_text() == "second"
    assert fit.epochs.read_text() == "epoch 1\n"


def test_an_earlier_attempt_can_no_longer_write(fit: FitPaths) -> None:
    with attempts.writing(fit, attempts.begin(fit)):
        write_text(fit.last, "first")
        write_text(fit.epochs, "epoch 1\n")
        attempts.begin(fit)
        with pytest.raises(WorkerError, match=r"last\.pt is not written: another worker has taken over this fit"):
            write_text(fit.last, "late")
        with pytest.raises(WorkerError, match=r"epochs\.jsonl is not written"):
            append_line(fit.epochs, "epoch 2")
    assert fit.last.read_text() == "first"
    assert fit.epochs.read_text() == "epoch 1\n"
    assert {path.name for path in fit.root.iterdir()} == {"last.pt", "epochs.jsonl", "attempt"}


def test_a_write_that_was_checked_before_the_next_attempt_fails(
    fit: FitPaths, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The worker is suspended after its check, and continues after another worker has taken over."""
    replace = Path.replace

    def replace_late(self: Path, target: Path) -> Path:
        monkeypatch.setattr(Path, "replace", replace)
        attempts.begin(fit)
        return self.replace(target)

    with attempts.writing(fit, attempts.begin(fit)):
        write_text(fit.last, "first")
        monkeypatch.setattr(Path, "replace", replace_late)
        with pytest.raises(HpsearchError):
            write_text(fit.last, "late")
    assert fit.last.read_text() == "first"


def test_a_line_that_was_checked_before_the_next_attempt_goes_to_the_old_file(fit: FitPaths) -> None:
    attempts.begin(fit)
    write_text(fit.epochs, "epoch 1\n")
    with fit.epochs.open("ab") as file:
        attempts.begin(fit)
        # A fit that resumes rewrites this file.
        write_text(fit.epochs, "epoch 1\n")
        file.write(b"late\n")
    assert fit.epochs.read_text() == "epoch 1\n"


def test_a_fit_that_has_ended_is_not_written(fit: FitPaths) -> None:
    with attempts.writing(fit, attempts.begin(fit)):
        fit.attempt.unlink()
        with pytest.raises(WorkerError):
            write_text(fit.last, "late")


def test_other_folders_are_not_checked(fit: FitPaths, tmp_path: Path) -> None:
    with attempts.writing(fit, "never accepted"):
        write_text(tmp_path / "trial.json", "{}")
    write_text(fit.last, "of the coordinator")


def test_a_fit_without_attempt_is_not_checked(fit: FitPaths) -> None:
    attempts.begin(fit)
    with attempts.writing(fit, ""):
        write_text(fit.last, "on this machine")


def test_a_fit_that_was_taken_over_ends_and_the_other_one_has_the_same_bytes(tmp_path: Path) -> None:
    """Two workers believe that they own a fit, and take turns with its epochs until the first one writes again."""
    with workers_in_process():
        config = tiny_config(write_tiny_dataset(tmp_path), "train.epochs=4", "study.trials=1")
        record = run_planned(tmp_path, config).record
        caches = CachePaths(*PoolCaches(config, ProjectPaths(tmp_path).cache).paths(record.trial(0).study_config))
        folds = record.folds

        def job(folder: FitPaths) -> FitJob:
            return FitJob(
                trial=0,
                fold=0,
                config=record.trial(0).study_config,
                folder=folder.root,
                caches=caches,
                train=tuple(folds.train(0).tolist()),
                held_out=tuple(folds.held_out(0).tolist()),
                seed=fit_seed(config, 0, 0),
                attempt=attempts.begin(folder),
            )

        fit = FitPaths(tmp_path / "fit")
        with LocalPool(tmp_path) as pool:
            pool.resize([WorkerSettings("cpu", 1)] * 2)
            while len(pool.idle()) < 2:
                wait_for(pool, Ready)
            first, second = pool.idle()
            pool.submit(first, job(fit))
            wait_for(pool, EpochEnded)
            pool.submit(second, job(fit))
            # The second worker resumes after the first epoch, and the first worker does not know of it.
            assert wait_for(pool, EpochEnded).worker is second
            pool.reply(first, go=True)
            event = wait_for(pool, Failed)
            assert (event.worker, event.report.error) == (first, "WorkerError")
            assert "another worker has taken over" in event.report.text
            for _ in range(3):
                pool.reply(second, go=True)
                wait_for(pool, EpochEnded)
            pool.reply(second, go=True)
            wait_for(pool, Finished)
    alone = record.fit(0, 0).paths
    for name in ("scores.npy", "counts.npy", "weights.safetensors"):
        assert (fit.root / name).read_bytes() == (alone.root / name).read_bytes()
    assert not fit.attempt.exists()


def test_the_next_coordinator_ends_all_attempts(tmp_path: Path) -> None:
    study = ProjectPaths(tmp_path).study("tiny")
    fit = study.trial(0).fold(1)
    with attempts.writing(fit, attempts.begin(fit)):
        write_text(fit.last, "first")
        with pytest.raises(HpsearchError):
            write_while_another_coordinator_starts(study)
        with pytest.raises(WorkerError):
            write_text(fit.last, "late")
    assert fit.last.read_text() == "first"
