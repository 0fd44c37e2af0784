from __future__ import annotations

import shutil
import signal
from pathlib import Path

import pytest
from click.testing import CliRunner

from hpsearch.cli import group
from hpsearch.data.decode_pool import Decoders
from hpsearch.errors import HpsearchError
from hpsearch.paths import ProjectPaths, StudyPaths
from hpsearch.search import status as statuses
from hpsearch.search.callbacks import NullCallback
from hpsearch.search.status import study_status
from hpsearch.search.stopping import Stop
from hpsearch.store import lock
from hpsearch.store.record import StudyRecord
from hpsearch.training.rows import EpochRow
from tests.recorded import FakeStudy
from tests.search.in_process import workers_in_process
from tests.search.studies import run, tiny_config, write_tiny_dataset


def output_of(*arguments: str) -> str:
    result = CliRunner().invoke(group, arguments)
    assert result.exit_code == 0, result.output
    return result.output


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--data", "nowhere"], "there is no folder"),
        (["--images", "nowhere", "--masks", "photos"], "nowhere: --images (data.images) must name a folder"),
        (["--images", "photos", "--masks", "nowhere"], "nowhere: --masks (data.masks) must name a folder"),
        (["--data", "data", "--groups", "nowhere.csv"], "nowhere.csv does not exist"),
        (["--data", "data", "--groups", "one.csv", "--folds", "2"], "folds = 2, but there are only 1 groups"),
        (["--data", "data", "--folds", "12"], "folds = 12, but there are only 11 images with a mask"),
        (["--config", "nowhere.toml", "--study", "a"], "nowhere.toml does not exist"),
        (["--data", "data", "--set", "data.cache_dir=one.csv"], "one.csv"),
    ],
)
def test_a_first_start_with_a_wrong_path_or_too_many_folds_decodes_nothing_and_leaves_no_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flags: list[str], said: str
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(Decoders, "_started", None)
    write_tiny_dataset(tmp_path).rename(tmp_path / "data")
    (tmp_path / "photos").mkdir()
    shutil.copy(next((tmp_path / "data").rglob("ISIC_0000001.*")), tmp_path / "photos")
    (tmp_path / "one.csv").write_text("image,patient\n" + "".join(f"ISIC_{n:07d},p\n" for n in range(15)))
    before = sorted(tmp_path.rglob("*"))
    result = CliRunner().invoke(group, ["study", "--out", "new", "--tracking", "none", "--threads", "1", *flags])
    assert isinstance(result.exception, HpsearchError), result.output
    assert said in str(result.exception)
    assert sorted(tmp_path.rglob("*")) == before


def test_a_study_says_that_it_waits_for_a_cluster(tmp_path: Path) -> None:
    data, address = write_tiny_dataset(tmp_path), "tcp://127.0.0.1:9"
    options = ["--out", str(tmp_path / "new"), "--tracking", "none", "--cluster", address, "--cluster-timeout", "2"]
    result = CliRunner().invoke(group, ["study", "--data", str(data), *options])
    assert "has had no workers for 2 s" in str(result.exception)
    assert result.output.startswith(f"waiting up to 2 s for the Dask cluster {address}: ")


def test_status_shows_the_study_that_runs_and_names_the_others(tmp_path: Path) -> None:
    project = ProjectPaths(tmp_path)
    for name in ("one", "two"):
        StudyRecord.create(project.study(name), tiny_config(tmp_path))
    shown = output_of("status", "--out", str(tmp_path))
    assert "study one:" in shown
    assert "study two:" in shown
    with lock.hold(project.study("two")):
        shown = output_of("status", "--out", str(tmp_path))
    assert "study one:" not in shown
    assert "study two: 0/3 trials (none ended); run by process" in shown
    assert "not running: one (--study NAME shows one)" in shown


def test_status_shows_a_study_that_is_starting(tmp_path: Path) -> None:
    project = ProjectPaths(tmp_path)
    with lock.hold(project.study("new")):
        assert "study new is starting; run by process" in output_of("status", "--out", str(tmp_path))
        StudyRecord.create(project.study("one"), tiny_config(tmp_path))
        shown = output_of("status", "--out", str(tmp_path))
    assert "study one:" in shown
    assert "study new is starting" in shown


def test_an_empty_cluster_address_is_refused(tmp_path: Path) -> None:
    result = CliRunner().invoke(group, ["study", "--out", str(tmp_path), "--cluster", ""])
    assert result.exit_code == 2
    assert "--cluster" in result.output
    assert "the address is empty" in result.output


class _StopAfterAnEpoch(NullCallback):
    def __init__(self, stop: Stop) -> None:
        self._stop = stop
        self.left_s: list[float | None] = []

    def epoch_ended(self, trial: int, fold: int, row: EpochRow) -> None:
        self.left_s.append(self._stop.epoch_left_s())
        self.epoch_s = row.seconds
        self._stop.request()


def test_a_stopped_study_says_what_it_has_and_how_to_go_on_and_that_it_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    project = tmp_path / "a project"
    stop = Stop()
    config = tiny_config(write_tiny_dataset(tmp_path), "study.trials=1", "study.pruner=none")
    assert stop.epoch_left_s() is None
    listener = _StopAfterAnEpoch(stop)
    with workers_in_process():
        run(project, config, stop=stop, callback=listener)
    # The next epoch is expected to last as long as the one that has just ended.
    (left_s,) = listener.left_s
    assert left_s is not None
    assert 0 < left_s <= listener.epoch_s
    assert stop.epoch_left_s() is None

    shown = output_of("status", "--out", str(project))
    assert "study tiny: 0/1 trials (1 open); not running" in shown
    assert "\ntrial 0, fold 1 of 2, epoch 1 of 2  " in shown
    assert f"continue with: hpsearch study --study tiny --out '{project}'" in shown

    # As another terminal would see it while it runs, with no trial ended yet: by what the plan measured.
    record = StudyRecord.open(ProjectPaths(project).study("tiny"))
    plan = record.plan()
    assert plan is not None
    record.write_plan({**plan, "steps": [{"flops": 10**18, "train_s": 10.0, "eval_s": 1.0}]})
    with monkeypatch.context() as patched:
        patched.setattr(statuses.lock, "is_held", lambda _: True)
        eta_s = study_status(ProjectPaths(project), "tiny").eta_s
    record.write_plan(plan)
    spent_s = sum(row.seconds for row in record.fit(0, 0).epochs())
    # Two folds of two epochs, each of 6 images that are trained on and 5 that are scored.
    assert eta_s == pytest.approx(2 * 2 * (6 * 10.0 + 5 * 1.0) - spent_s)

    with workers_in_process():
        shown = output_of("study", "--study", "tiny", "--out", str(project), "--tracking", "none", "--threads", "1")
    assert "continuing study tiny: 0 of 1 trial done" in shown
    assert f"hpsearch final --best --study tiny --out '{project}'" in shown
    assert "continue with" not in output_of("status", "--out", str(project))


class _AskToStop(NullCallback):
    """Asks as `hpsearch stop` does, once an epoch has ended."""

    def __init__(self, study: StudyPaths) -> None:
        self._study = study

    def epoch_ended(self, trial: int, fold: int, row: EpochRow) -> None:
        self._study.stop_request.write_text("after this epoch")


def test_hpsearch_stop_counts_as_a_termination(tmp_path: Path) -> None:
    stop, study = Stop(), ProjectPaths(tmp_path / "project").study("tiny")
    config = tiny_config(write_tiny_dataset(tmp_path), "study.trials=1", "study.pruner=none")
    with workers_in_process():
        summary = run(tmp_path / "project", config, stop=stop, callback=_AskToStop(study))
    assert summary.stopped
    assert stop.signal == signal.SIGTERM


def test_status_shows_a_final_that_runs(tmp_path: Path) -> None:
    study = FakeStudy(tmp_path, overrides=("study.trials=1",))
    study.trial()
    study.final(0)
    study.record.paths.final("trial-0000").seed(0).fit.unlink()
    assert "network 1: epoch 3" not in output_of("status", "--out", str(tmp_path))
    with lock.hold(study.record.paths):
        assert "final of trial-0000, network 1: epoch 3" in output_of("status", "--out", str(tmp_path))
