from __future__ import annotations

import dataclasses
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import optuna
import pytest

from hpsearch.paths import ProjectPaths
from hpsearch.report.estimates import Estimates
from hpsearch.report.rows import study_rows
from hpsearch.search import replicates as confirmation
from hpsearch.search.autotune import MachineChoice
from hpsearch.search.callbacks import NullCallback
from hpsearch.search.optuna_view import sqlite_url
from hpsearch.search.status import study_status
from hpsearch.search.stopping import Stop
from hpsearch.stats.selection import select_for_replication
from hpsearch.store.record import StudyRecord, has_all_replicates
from hpsearch.store.trials import ReplicateRecord, Shortlist
from hpsearch.study import StudySummary
from tests.recorded import FakeStudy
from tests.search.in_process import workers_in_process
from tests.search.studies import everything, run, tiny_config, write_tiny_dataset

ROOT = Path(__file__).parents[2]
ALWAYS_FULL = ("study.sampler=random", "study.pruner=none")


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_dataset(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def confirmed(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> StudySummary:
    """A study of three full trials, of which up to two were fitted once more; not to be changed."""
    config = tiny_config(dataset, *ALWAYS_FULL, "study.confirm=2")
    with workers_in_process():
        return run(tmp_path_factory.mktemp("confirmed"), config)


def optunas(record: StudyRecord) -> optuna.Study:
    """The study as Optuna has it."""
    return optuna.load_study(study_name=record.name, storage=sqlite_url(record.paths.project.optuna_db))


def second_scores(record: StudyRecord) -> dict[tuple[int, int], bytes]:
    return {
        (second.trial, fold): record.fit(second.trial, fold, replicate=1).paths.scores.read_bytes()
        for second in record.replicate_records()
        for fold in range(record.n_folds)
        if record.fit(second.trial, fold, replicate=1).is_finished
    }


def test_those_that_bootstrap_selection_picks_most_are_fitted_once_more_on_the_same_folds(
    confirmed: StudySummary,
) -> None:
    record = confirmed.record
    first = np.stack([record.out_of_fold(number) for number in range(3)])
    picked = select_for_replication(first, 2)
    shortlist = record.shortlist()
    assert shortlist is not None
    assert shortlist.trials == picked
    assert record.standing().confirmed == tuple(sorted(picked))
    for number in picked:
        assert record.fit(number, 0, replicate=1).scores().shape == record.fit(number, 0).scores().shape
        assert not np.array_equal(record.out_of_fold(number, replicate=1), record.out_of_fold(number))


def test_the_best_is_the_confirmed_one_with_the_highest_mean_over_both_fits(confirmed: StudySummary) -> None:
    record = confirmed.record
    both = {
        number: float((record.out_of_fold(number) + record.out_of_fold(number, replicate=1)).mean() / 2)
        for number in record.standing().confirmed
    }
    best = record.best()
    assert best is not None
    assert best.number == max(both, key=lambda number: (both[number], -number))
    assert record.standing().values[best.number] == pytest.approx(both[best.number], abs=1e-12)
    estimates = Estimates.of(record)
    assert estimates is not None
    assert estimates.winner == best.number
    assert estimates.corrected.method == "confirmed"
    rows = study_rows(record)
    assert rows.standing.confirmed == record.standing().confirmed
    assert rows.trial(best.number).value == pytest.approx(both[best.number], abs=1e-12)
    assert optunas(record).best_trial.number == best.number
    assert optunas(record).best_value == record.standing().values[best.number]


@pytest.mark.usefixtures("in_process")
def test_confirmation_changes_nothing_of_the_search(confirmed: StudySummary, dataset: Path, tmp_path: Path) -> None:
    without = run(tmp_path, tiny_config(dataset, *ALWAYS_FULL)).record
    assert without.standing().confirmed == ()
    assert without.shortlist() is None
    assert everything(without) == everything(confirmed.record)


@pytest.mark.usefixtures("in_process")
def test_the_same_study_again_makes_the_same_second_fits(
    confirmed: StudySummary, dataset: Path, tmp_path: Path
) -> None:
    again = run(tmp_path, tiny_config(dataset, *ALWAYS_FULL, "study.confirm=2")).record
    assert second_scores(again) == second_scores(confirmed.record)


def test_no_checkpoint_of_a_second_fit_stays(confirmed: StudySummary) -> None:
    """Of the networks, those of the two best stay: test_protocol.py, where more than two are confirmed."""
    assert list(confirmed.record.paths.root.rglob("second*/weights.safetensors"))
    assert not list(confirmed.record.paths.root.rglob("last.pt"))


@pytest.mark.usefixtures("in_process")
def test_a_study_that_goes_on_uses_the_second_fits_that_are_there(dataset: Path, tmp_path: Path) -> None:
    """Also where it is confirmed anew because the search went on or another number is wanted."""
    two = run(tmp_path, tiny_config(dataset, *ALWAYS_FULL, "study.trials=2", "study.confirm=1")).record
    before = {path: path.stat().st_mtime_ns for path in two.paths.trials.rglob("second*/fit.json")}
    assert len(two.standing().confirmed) == 1
    assert len(before) == 2
    searched = run(tmp_path, tiny_config(dataset, *ALWAYS_FULL, "study.trials=3")).record
    # The third trial has opened the choice again.
    assert searched.standing().confirmed == ()
    assert searched.best() == max(searched.trials(), key=lambda trial: trial.value or 0)
    assert [trial.value for trial in optunas(searched).trials] == [trial.value for trial in searched.trials()]
    three = run(tmp_path, tiny_config(dataset, *ALWAYS_FULL, "study.trials=3", "study.confirm=3")).record
    assert set(three.standing().confirmed) >= set(two.standing().confirmed) & set(three.standing().confirmed)
    assert three.standing().confirmed
    assert {path: path.stat().st_mtime_ns for path in before} == before


def test_the_fixed_split_a_single_full_trial_and_confirm_0_are_not_confirmed(tmp_path: Path) -> None:
    study = FakeStudy(tmp_path, overrides=("study.confirm=5",))
    study.trial()
    assert confirmation.shortlist(study.record) is None
    assert has_all_replicates(study.record)
    study.trial()
    assert not has_all_replicates(study.record)
    assert confirmation.n_left(study.record, 0) == 5
    # Of six trials no more than six can be.
    assert confirmation.n_left(FakeStudy(tmp_path, "other", overrides=("study.confirm=9",)).record, 2) == 6
    for setting in ({"confirm": 0}, {"folds": "fixed"}):
        config = dataclasses.replace(
            study.config,
            study=dataclasses.replace(study.config.study, **setting),  # type: ignore[arg-type]
        )
        record = StudyRecord(study.record.paths, config)
        assert confirmation.shortlist(record) is None
        assert has_all_replicates(record)
        assert confirmation.n_left(record, 3) == 0


def test_a_configuration_that_fails_with_other_seeds_cannot_win(tmp_path: Path) -> None:
    study = FakeStudy(tmp_path)
    study.trial(**{"train.lr": 0.05, "unet.depth": 4})
    study.trial(**{"train.lr": 0.02})
    study.replicate(1)
    study.record.write_evaluation(
        ReplicateRecord(trial=0, began_at=1.0, ended_at=2.0, outcome="diverged", reason="nan")
    )
    study.record.write_shortlist(Shortlist((0, 1), (0, 1), 5))
    best = study.record.best()
    assert best is not None
    assert (best.number, study.record.standing().confirmed) == (1, (1,))


def test_status_counts_second_fits(confirmed: StudySummary, tmp_path: Path) -> None:
    record = confirmed.record
    status = study_status(record.paths.project, record.name)
    n_fits = len(record.standing().confirmed) * record.n_folds
    assert (set(status.shortlist), status.n_replicate_fits) == (set(record.standing().confirmed), n_fits)
    assert status.is_confirmed


class _Confirming(NullCallback):
    """Notes the progress of second fits, and asks to stop in the first of them."""

    def __init__(self, stop: Stop) -> None:
        self.stop = stop
        self.progress: list[tuple[int, int]] = []

    def replicating(self, trials: Sequence[int], done: int, total: int) -> None:
        self.progress.append((done, total))

    def epoch_ended(self, trial: int, fold: int, row: object) -> None:
        if self.progress and not self.stop.is_requested:
            self.stop.request()


@pytest.mark.slow
@pytest.mark.parametrize("n_workers", [1, 2])
def test_second_fits_that_were_stopped_go_on_as_if_they_had_not_been(
    confirmed: StudySummary, dataset: Path, tmp_path: Path, n_workers: int
) -> None:
    config = tiny_config(dataset, *ALWAYS_FULL, "study.confirm=2")
    stop = Stop()
    listener = _Confirming(stop)
    machine = MachineChoice("cpu", n_workers, 1)
    summary = run(tmp_path, config, stop=stop, callback=listener, machine=machine)
    assert summary.stopped
    assert summary.record.standing().confirmed == ()
    (second, *_) = summary.record.replicate_records()
    assert second.outcome is None
    done = run(tmp_path, config, machine=machine).record
    assert second_scores(done) == second_scores(confirmed.record)
    assert done.best() is not None
    first_began = next(each for each in done.replicate_records() if each.trial == second.trial)
    assert first_began.began_at == second.began_at


KILLED = """
import os, signal, sys
from pathlib import Path

from hpsearch.search.callbacks import NullCallback
from tests.search.studies import run, tiny_config


class Dying(NullCallback):
    is_confirming = False

    def replicating(self, trials, done, total):
        self.is_confirming = True

    def __getattribute__(self, name):
        if name == deadly and object.__getattribute__(self, "is_confirming"):
            os.kill(os.getpid(), signal.SIGKILL)
        return super().__getattribute__(name)


dataset, project, deadly, *settings = sys.argv[1:]
run(Path(project), tiny_config(Path(dataset), *settings), callback=Dying())
"""
"""A study whose coordinator is killed when it tells its listener something, once second fits have begun."""


def outcome(record: StudyRecord) -> dict[str, bytes | None]:
    """Every file of the trials, with its bytes where those hold no time."""
    files = (path for path in record.paths.trials.rglob("*") if path.is_file())
    is_timeless = {".npy", ".safetensors"}
    return {
        path.relative_to(record.paths.root).as_posix(): path.read_bytes() if path.suffix in is_timeless else None
        for path in files
    }


@pytest.mark.slow
def test_second_fits_end_in_the_same_bytes_however_often_the_coordinator_was_killed(
    confirmed: StudySummary, dataset: Path, tmp_path: Path
) -> None:
    """Killed after an epoch, after a fold, and after the last fit of a trial, each time going on from the last."""
    settings = (*ALWAYS_FULL, "study.confirm=2")
    n_epochs = []
    for deadly in ("epoch_ended", "fold_ended", "message"):
        command = [sys.executable, "-c", KILLED, str(dataset), str(tmp_path), deadly, *settings]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
        assert done.returncode == -signal.SIGKILL, done.stderr
        n_epochs.append(sum(len(path.read_text().splitlines()) for path in tmp_path.rglob("second*/epochs.jsonl")))
        assert StudyRecord.open(ProjectPaths(tmp_path).study("tiny")).standing().confirmed == ()
    assert 1 <= n_epochs[0] <= n_epochs[1] <= n_epochs[2] < 8
    record = run(tmp_path, tiny_config(dataset, *settings)).record
    never = confirmed.record
    assert everything(record) == everything(never)
    assert outcome(record) == outcome(never)
    assert record.paths.confirmation.read_bytes() == never.paths.confirmation.read_bytes()
    best, expected = record.best(), never.best()
    assert best is not None
    assert expected is not None
    assert best.number == expected.number
    assert record.standing() == never.standing()
