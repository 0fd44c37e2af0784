from __future__ import annotations

import dataclasses
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import optuna
import pytest

from hpsearch import config as configs
from hpsearch import paths, study
from hpsearch.data.folds import Folds
from hpsearch.data.prepare import PoolCaches
from hpsearch.errors import (
    CacheError,
    ConfigError,
    DatasetError,
    StoppedError,
    StudyChangedError,
    StudyError,
    StudyLockedError,
)
from hpsearch.paths import ProjectPaths
from hpsearch.search import coordinator, pruners, stopping
from hpsearch.search.autotune import MachineChoice
from hpsearch.search.callbacks import NullCallback
from hpsearch.search.coordinator import Coordinator
from hpsearch.search.evaluation import Evaluation, StudyPruner
from hpsearch.search.racing import Race, TrialScores
from hpsearch.search.scheduler import StudyState
from hpsearch.search.status import study_status
from hpsearch.search.stopping import Stop
from hpsearch.store import lock
from hpsearch.store.record import StudyRecord
from hpsearch.store.trials import PruneDecision, record_to_json
from hpsearch.study import StudySummary
from hpsearch.workers.jobs import Failed, FitJob, Job, WorkerSettings
from hpsearch.workers.local_pool import Event
from hpsearch.workers.pool import Worker
from tests.data.conftest import tiny_pairs, write_pairs
from tests.recorded import FakeStudy
from tests.search.in_process import PLAN, workers_in_process
from tests.search.simulated import SimulatedWorker, simulate
from tests.search.studies import everything, mean_of_counted_dice, run, tiny_config, write_tiny_dataset


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_dataset(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def finished(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> StudySummary:
    """A study of three trials by random search, without a pruner; not to be changed."""
    config = tiny_config(dataset, "study.sampler=random", "study.pruner=none")
    with workers_in_process():
        return run(tmp_path_factory.mktemp("finished"), config)


def optuna_study(project: Path, name: str = "tiny") -> optuna.Study:
    return optuna.load_study(study_name=name, storage=f"sqlite:///{project / 'hpsearch.db'}")


def test_every_trial_is_told_and_is_worth_the_mean_over_all_images(finished: StudySummary) -> None:
    record = finished.record
    told = optuna_study(record.paths.project.root).trials
    assert [trial.state.name for trial in told] == ["COMPLETE"] * 3
    for trial in told:
        assert trial.value == record.trial(trial.number).value
        assert trial.value == pytest.approx(mean_of_counted_dice(record, trial.number), abs=1e-7)
    assert (finished.n_counted, finished.stopped) == (3, False)


def test_trial_0_is_the_default_configuration(finished: StudySummary) -> None:
    assert finished.record.trial(0).params == {"unet.depth": 1, "train.lr": 0.05}


def test_only_the_two_best_trials_keep_their_weights(finished: StudySummary) -> None:
    record = finished.record
    ranked = sorted(record.trials(), key=lambda trial: -(trial.value or 0))
    has_weights = [record.fit(trial.number, 0).paths.weights.is_file() for trial in ranked]
    assert has_weights == [True, True, False]
    assert not list(record.paths.root.rglob("last.pt"))
    assert not list(record.paths.root.rglob("*.tmp"))


def test_the_log_has_a_line_for_every_event(finished: StudySummary) -> None:
    text = finished.record.paths.log.read_text()
    assert text.count("epoch 2:") == 6
    assert [text.count(f"fold {number}, epoch 1:") for number in range(4)] == [0, 3, 3, 0]
    assert text.count(" began: ") == 3
    assert text.count(", fold 1 starts on worker 1\n") == 3
    assert text.count("ended: complete") == 3


def test_a_study_does_not_read_the_test_split(finished: StudySummary) -> None:
    ids = finished.record.folds.ids
    assert len(ids) == 11
    assert not {f"ISIC_{number:07d}" for number in range(11, 15)} & set(ids)


@pytest.mark.usefixtures("in_process")
def test_the_same_study_again_gives_the_same_bytes(finished: StudySummary, dataset: Path, tmp_path: Path) -> None:
    config = tiny_config(dataset, "study.sampler=random", "study.pruner=none", "study.trials=2")
    again = run(tmp_path, config).record
    ours, theirs = everything(again), everything(finished.record)
    assert ours["folds"] == theirs["folds"]
    for key, scores in ours["scores"].items():
        assert scores == theirs["scores"][key]


@pytest.mark.usefixtures("in_process")
def test_a_finished_study_goes_on_to_more_trials_and_rebuilds_a_deleted_database(
    dataset: Path, tmp_path: Path
) -> None:
    config = tiny_config(dataset, "study.trials=1")
    run(tmp_path, config)
    before = optuna_study(tmp_path).trials
    (tmp_path / "hpsearch.db").unlink()
    summary = run(tmp_path, tiny_config(dataset, "study.trials=2"))
    after = optuna_study(tmp_path).trials
    assert summary.n_counted == len(after) == 2
    assert (after[0].params, after[0].value, after[0].state) == (before[0].params, before[0].value, before[0].state)


@pytest.mark.usefixtures("in_process")
def test_a_study_that_several_coordinators_of_version_0_1_shared_continues_alone(
    dataset: Path, tmp_path: Path
) -> None:
    record = run(tmp_path, tiny_config(dataset, "study.trials=1")).record
    before = record.trial(0)
    shutil.copytree(record.paths.trial(0).root, record.paths.trial(1).root)
    of_0_1 = {**record_to_json(before), "number": 1, "draw": 0, "history": [0], "owner": "lab-4711-0"}
    paths.write_json(record.paths.trial(1).trial, of_0_1)
    paths.write_json(record.paths.trial(0).taken, {"by": 1, "at": before.ended_at})
    (tmp_path / "hpsearch.db").unlink()
    again = run(tmp_path, tiny_config(dataset, "study.trials=2")).record
    assert [trial.outcome for trial in again.trials()[:2]] == ["orphaned", "complete"]
    assert again.trial(1).value == before.value
    assert [trial.state.name for trial in optuna_study(tmp_path).trials[:2]] == ["FAIL", "COMPLETE"]
    status = study_status(again.paths.project, "tiny")
    assert (len(status.trials), status.n_counted) == (3, 2)


@pytest.mark.usefixtures("in_process")
def test_a_study_refuses_other_settings_and_other_images_and_mends_an_edited_database(tmp_path: Path) -> None:
    dataset = write_tiny_dataset(tmp_path)
    run(tmp_path, tiny_config(dataset, "study.trials=1"))
    with pytest.raises(StudyChangedError, match=r"train\.batch_size: 4 in the study, 8 now"):
        run(tmp_path, tiny_config(dataset, "train.batch_size=8"))
    storage = optuna.storages.RDBStorage(f"sqlite:///{tmp_path / 'hpsearch.db'}")
    with storage.engine.begin() as connection:
        connection.exec_driver_sql("UPDATE trial_values SET value = 0.99")
    record = run(tmp_path, tiny_config(dataset, "study.trials=1")).record
    assert optuna_study(tmp_path).best_value == record.trial(0).value
    for path in dataset.rglob("ISIC_0000003*"):
        path.unlink()
    with pytest.raises(StudyChangedError, match="1 are missing, 0 are new"):
        run(tmp_path, tiny_config(dataset, "study.trials=2"))


@pytest.mark.usefixtures("in_process")
def test_a_study_goes_on_with_images_that_were_moved_and_remembers_no_folder_of_others(tmp_path: Path) -> None:
    dataset = write_tiny_dataset(tmp_path)
    record = run(tmp_path, tiny_config(dataset, "study.trials=1")).record
    moved = dataset.rename(tmp_path / "moved")
    others = write_tiny_dataset(tmp_path / "others")
    for path in others.rglob("ISIC_0000003*"):
        path.unlink()
    with pytest.raises(StudyChangedError, match=f"the images in {others} differ"):
        run(tmp_path, tiny_config(others, "study.trials=1"))
    assert StudyRecord.open(record.paths).config.data.root == str(dataset)
    assert run(tmp_path, tiny_config(moved, "study.trials=1")).n_counted == 1
    assert StudyRecord.open(record.paths).config.data.root == str(moved)


@pytest.mark.usefixtures("in_process")
def test_configurations_that_cannot_be_cost_no_training_and_are_free(dataset: Path, tmp_path: Path) -> None:
    config = tiny_config(
        dataset, "unet.padding=valid", "search.unet.depth=[1, 4]", "study.sampler=random", "study.seed=3"
    )
    record = run(tmp_path, config).record
    outcomes = [trial.outcome for trial in record.trials()]
    assert outcomes.count("complete") + outcomes.count("pruned") == 3
    assert "infeasible" in outcomes
    for trial in record.trials():
        if trial.outcome == "infeasible":
            assert trial.params["unet.depth"] == 4
            assert not record.fit(trial.number, 0).paths.root.exists()
    told = optuna_study(tmp_path).trials
    assert {t.state.name for t in told if t.constraints} == {"PRUNED"}


@pytest.mark.usefixtures("in_process")
def test_a_search_space_without_a_feasible_configuration_ends_with_a_reason(dataset: Path, tmp_path: Path) -> None:
    config = tiny_config(dataset, "unet.padding=valid", "unet.depth=4", "search.unet.depth=[4, 5]", "study.trials=1")
    with pytest.raises(StudyError, match="10 suggested configurations were infeasible"):
        run(tmp_path, config)


@pytest.mark.usefixtures("in_process")
def test_without_a_search_an_infeasible_configuration_ends_at_once(dataset: Path, tmp_path: Path) -> None:
    config = tiny_config(dataset, "unet.depth=9", "train.lr=0.01", "study.pruner=none")
    config = dataclasses.replace(config, search=configs.load(None, ["data.size=32"]).search)
    with pytest.raises(StudyError, match=r"every configuration is infeasible, the last because .* cannot halve"):
        run(tmp_path, config)


@pytest.mark.usefixtures("in_process")
def test_a_loss_that_is_not_finite_ends_its_trial_as_diverged(dataset: Path, tmp_path: Path) -> None:
    config = tiny_config(
        dataset,
        "train.lr=1e30",
        "unet.norm=none",
        "train.loss=bce",
        "search.train.lr={low=1e29, high=1e30}",
        "study.trials=1",
    )
    trial = run(tmp_path, config).record.trial(0)
    assert trial.outcome == "diverged"
    assert "epoch" in trial.reason
    assert optuna_study(tmp_path).trials[0].state.name == "PRUNED"


def test_a_second_command_on_one_study_is_refused_and_told_who_holds_it(dataset: Path, tmp_path: Path) -> None:
    with (
        lock.hold(ProjectPaths(tmp_path).study("tiny")),
        pytest.raises(StudyLockedError, match=rf"process {os.getpid()} on "),
    ):
        run(tmp_path, tiny_config(dataset))


def test_a_start_that_fails_for_its_data_binds_nothing(tmp_path: Path) -> None:
    with pytest.raises(DatasetError):
        run(tmp_path, tiny_config(tmp_path / "nowhere"))
    assert ProjectPaths(tmp_path).study_names() == []


@pytest.mark.usefixtures("in_process")
def test_a_start_that_fails_for_its_folds_binds_nothing(tmp_path: Path) -> None:
    root = tmp_path / "ISIC-2017"
    write_pairs(root, "archive", tiny_pairs(4, 0, 2))
    with pytest.raises(ConfigError, match="--folds 5"):
        run(tmp_path, tiny_config(root, "study.folds=fixed"))
    assert ProjectPaths(tmp_path).study_names() == []


@pytest.mark.parametrize(
    ("with_lesion", "reason"),
    [([], "none of the 4 masks .* has a lesion"), ([0], "fold . of 2 would train on 2 images without any lesion")],
)
def test_a_start_that_could_learn_nothing_binds_nothing(
    tmp_path: Path, with_lesion: Sequence[int], reason: str
) -> None:
    pairs = [
        pair if number in with_lesion else dataclasses.replace(pair, mask=pair.mask * 0)
        for number, pair in enumerate(tiny_pairs(4, 0, 2))
    ]
    write_pairs(tmp_path / "ISIC-2017", "archive", pairs)
    with pytest.raises(DatasetError, match=reason):
        run(tmp_path, tiny_config(tmp_path / "ISIC-2017"))
    assert ProjectPaths(tmp_path).study_names() == []


def test_the_coordinator_imports_no_torch() -> None:
    code = "import sys, hpsearch.search.coordinator, hpsearch.final; print(json.dumps(sorted(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", f"import json\n{code}"], capture_output=True, text=True, check=True)
    loaded = {name.partition(".")[0] for name in json.loads(done.stdout)}
    assert "optuna" in loaded
    assert not {"torch", "torchvision", "matplotlib", "click", "rich", "distributed"} & loaded


def test_a_worker_that_is_killed_before_it_has_a_job_leaves_a_line(tmp_path: Path) -> None:
    said: list[str] = []

    class Heard(NullCallback):
        def message(self, text: str) -> None:
            said.append(text)

    nothing: Any = None
    work = Coordinator(FakeStudy(tmp_path).record, nothing, nothing, nothing, Heard(), Stop(), lambda: None)
    local = SimulatedWorker(index=1, settings=WorkerSettings())
    work.on_event(Event(local, None, Failed(error="died", text="killed by SIGKILL (out of memory?)")))
    on_cluster = dataclasses.replace(local, machine=cast("Any", SimpleNamespace(name="lab1:4000")))
    work.on_event(Event(on_cluster, None, Failed(error="died", text="lab1:4000 is lost: it is no longer connected")))
    assert said == [
        "worker 2 ended before it had a job (killed by SIGKILL (out of memory?)): it is replaced",
        "worker lab1:4000 is lost: it is no longer connected",
    ]


def test_a_worker_that_dies_with_a_fit_leaves_a_line_that_says_where_the_fit_continues(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    said: list[str] = []

    class Heard(NullCallback):
        def message(self, text: str) -> None:
            said.append(text)

    study = FakeStudy(tmp_path)
    trial = study.begin()
    study.epoch(trial, 0)
    pool: Any = SimpleNamespace(busy=list, machines={})
    work = Coordinator(study.record, pool, PLAN, None, Heard(), Stop(), lambda: None)  # type: ignore[arg-type]
    work.resume()
    job: Any = FitJob(
        trial=0, fold=0, config=study.config, folder=tmp_path, caches=None, train=(), held_out=(0,), seed=0
    )  # type: ignore[arg-type]
    for _ in range(3):
        worker = SimulatedWorker(index=0, settings=WorkerSettings())
        work.on_event(Event(worker, job, Failed(error="died", text="lab1:4000 is lost: it is no longer connected")))
    what = "trial 0, fold 1: worker lab1:4000 is lost: it is no longer connected"
    assert said == [f"{what}; the fit continues on the next free worker"] * 2
    assert study.record.trial(0).outcome == "failed"
    assert what in caplog.messages


class _StopAfter(NullCallback):
    """Asks to stop after so many epochs."""

    def __init__(self, stop: Stop, n_epochs: int) -> None:
        self._stop, self._left = stop, n_epochs

    def epoch_ended(self, trial: int, fold: int, row: object) -> None:
        self._left -= 1
        if self._left == 0:
            self._stop.request()


@pytest.mark.slow
@pytest.mark.usefixtures("in_process")
@pytest.mark.parametrize("n_epochs", [1, 2, 3, 7])
def test_a_stopped_study_goes_on_as_if_it_had_not_stopped(dataset: Path, tmp_path: Path, n_epochs: int) -> None:
    config = tiny_config(dataset, "study.trials=4")
    never = everything(run(tmp_path / "never", config).record)
    stop = Stop()
    summary = run(tmp_path / "stopped", config, stop=stop, callback=_StopAfter(stop, n_epochs))
    assert summary.stopped
    assert everything(run(tmp_path / "stopped", config).record) == never


@pytest.mark.usefixtures("in_process")
def test_a_study_that_continues_forgets_the_workers_of_the_earlier_run(dataset: Path, tmp_path: Path) -> None:
    config, stop = tiny_config(dataset, "study.trials=1"), Stop()
    record = run(tmp_path, config, stop=stop, callback=_StopAfter(stop, 1)).record
    before, at_start = record.trial(0).workers, []

    class Look(NullCallback):
        def prepared(self, prepared: object) -> None:
            at_start.append(record.trial(0).workers)

    run(tmp_path, config, callback=Look())
    assert (before, at_start) == ({"0": "worker 1"}, [{}])


@pytest.mark.slow
def test_any_number_of_workers_gives_the_same_values_and_trains_each_fold_once(dataset: Path, tmp_path: Path) -> None:
    config = tiny_config(dataset, "study.sampler=random", "study.pruner=none", "study.trials=5")
    one = run(tmp_path / "one", config).record
    two = run(tmp_path / "two", config, machine=MachineChoice("cpu", 2, 1)).record
    assert everything(one) == everything(two)
    lines = [line for line in two.paths.log.read_text().splitlines() if " finished: " in line]
    assert len(lines) == len({line.split("INFO")[1].split(" finished")[0] for line in lines}) == 10


@pytest.mark.slow
def test_in_a_race_workers_fit_a_first_fold_of_every_trial_and_then_share_the_further_ones(
    dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pruners, "make_pruner", lambda _: Race(alpha=0.0))
    begun: list[tuple[int, int, list[int]]] = []
    make_job, next_job = coordinator.fold_job, Coordinator.next_job

    def fold_job(evaluation: Evaluation, fold: int, caches: PoolCaches) -> FitJob:
        begun.append((evaluation.record.number, fold, sorted(evaluation.open_fits().finished)))
        return make_job(evaluation, fold, caches)

    def once_both_have_started(self: Coordinator, worker: Worker) -> Job | None:
        return next_job(self, worker) if begun or len(self.pool.idle()) == len(self.plan.workers) else None

    monkeypatch.setattr(coordinator, "fold_job", fold_job)
    monkeypatch.setattr(Coordinator, "next_job", once_both_have_started)
    config = tiny_config(dataset, "study.sampler=random", "study.trials=2", "study.folds=3")
    two = run(tmp_path / "two", config, machine=MachineChoice("cpu", 2, 1)).record
    assert begun[:2] == [(0, 0, []), (1, 0, [])]
    assert all(0 in finished for _, _, finished in begun[2:])
    assert sorted(each[:2] for each in begun) == [(trial, fold) for trial in range(2) for fold in range(3)]
    one = run(tmp_path / "one", config).record
    assert everything(one)["scores"] == everything(two)["scores"]
    assert [trial.value for trial in one.trials()] == [trial.value for trial in two.trials()]


@pytest.mark.slow
def test_a_survivor_that_is_dropped_while_others_help_ends_whole(
    dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Late(Race):
        def should_prune(
            self, candidate: TrialScores, others: Sequence[TrialScores], folds: Folds
        ) -> PruneDecision | None:
            verdict = super().should_prune(candidate, others, folds)
            drop = candidate.number == 1 and len(candidate.finished) == 2
            return None if verdict is None else dataclasses.replace(verdict, drop=drop)

    monkeypatch.setattr(pruners, "make_pruner", lambda _: Late())
    config = tiny_config(dataset, "study.trials=2", "study.folds=4")
    record = run(tmp_path, config, machine=MachineChoice("cpu", 3, 1)).record
    dropped = record.trial(1)
    assert dropped.outcome == "pruned"
    assert [decision.drop for decision in dropped.decisions][-1]
    assert 2 <= len(record.finished_folds(1)) <= 4
    assert not list(record.paths.root.rglob("last.pt"))
    told = optuna_study(tmp_path).trials[1]
    assert (told.state.name, told.value, told.user_attrs["estimate"]) == ("PRUNED", None, dropped.value)


@pytest.mark.slow
def test_a_deterministic_study_is_the_same_for_any_number_of_workers(dataset: Path, tmp_path: Path) -> None:
    config = tiny_config(
        dataset,
        "study.lookahead=3",
        "study.trials=9",
        "study.folds=3",
        "search.train.lr={low=1e-5, high=0.3, log=true}",
    )
    one, two, three = (
        everything(run(tmp_path / str(n), config, machine=MachineChoice("cpu", n, 1)).record) for n in (1, 2, 3)
    )
    assert one == two == three
    outcomes = [outcome for _, outcome, _, _ in one["trials"].values()]
    assert {"complete", "pruned"} <= set(outcomes)


@pytest.mark.slow
@pytest.mark.usefixtures("in_process")
@pytest.mark.parametrize("late_s", [1, 100])
def test_a_study_whose_hours_are_used_up_goes_on_as_if_it_had_had_more(
    dataset: Path, tmp_path: Path, late_s: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny_config(dataset, "study.trials=2", "train.epochs=3")
    never = everything(run(tmp_path / "never", config).record)
    passed_s = 0.0

    class Clock(NullCallback):
        """After the first epoch of fold 0 the hour is over: by little, or by more than there is patience for."""

        def epoch_ended(self, trial: int, fold: int, row: object) -> None:
            nonlocal passed_s
            if (trial, fold) == (0, 0):
                passed_s = 3600 + late_s

    real = time.monotonic
    with monkeypatch.context() as patch:
        patch.setattr(stopping, "time", SimpleNamespace(monotonic=lambda: real() + passed_s))
        summary = run(tmp_path / "stopped", config, hours=1, callback=Clock())
    assert summary.stopped
    assert summary.n_counted == 0
    assert 1 <= len(summary.record.fit(0, 0).epochs()) < 3
    assert everything(run(tmp_path / "stopped", config, hours=10).record) == never


@pytest.mark.usefixtures("in_process")
def test_a_trial_that_is_stopped_on_request_ends_as_if_raced_out_and_the_study_goes_on(
    dataset: Path, tmp_path: Path
) -> None:
    study = ProjectPaths(tmp_path).study("tiny")

    class Asks(NullCallback):
        def epoch_ended(self, trial: int, fold: int, row: object) -> None:
            if trial == 0:
                study.trial_stop_request(0).write_text("stop")

    record = run(
        tmp_path, tiny_config(dataset, "study.trials=2", "study.pruner=none", "train.epochs=3"), callback=Asks()
    ).record
    stopped, other = record.trials()
    assert (stopped.outcome, stopped.reason, other.outcome) == ("pruned", "stopped on request", "complete")
    assert 0 <= (stopped.value or 0.0) <= 1
    assert stopped.decisions[-1].drop
    assert not study.trial_stop_request(0).exists()
    told = optuna_study(tmp_path).trials[0]
    # An estimate is nothing that was measured: Optuna must not take it for a value.
    assert (told.state.name, told.value, told.user_attrs["estimate"]) == ("PRUNED", None, stopped.value)


@pytest.mark.slow
def test_a_worker_that_is_killed_costs_an_epoch_and_changes_nothing(dataset: Path, tmp_path: Path) -> None:
    config = tiny_config(dataset, "study.trials=2", "study.pruner=none", "train.epochs=6")
    never = everything(run(tmp_path / "never", config).record)
    killed = threading.Event()

    class Killer(NullCallback):
        def epoch_ended(self, trial: int, fold: int, row: object) -> None:
            if not killed.is_set() and fold == 1:
                killed.set()
                threading.Thread(target=kill_worker).start()

    def kill_worker() -> None:
        time.sleep(0.02)
        for process in children():
            os.kill(process, 9)

    def children() -> list[int]:
        import psutil

        return [
            child.pid
            for child in psutil.Process().children()
            if "hpsearch.workers.process" in " ".join(child.cmdline())
        ]

    record = run(tmp_path / "killed", config, callback=Killer()).record
    assert killed.is_set()
    assert everything(record) == never
    assert StudyRecord.open(record.paths).trial(0).failures


@pytest.mark.parametrize(("signal_number", "error"), [(15, StoppedError), (0, CacheError)])
def test_a_signal_that_also_ends_the_process_that_decodes_reads_as_a_stop(
    dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, signal_number: int, error: type[Exception]
) -> None:
    stop = Stop()

    def caches(*_: object, **__: object) -> None:
        if signal_number:
            stop.request(signal_number)
        raise CacheError("the decoding process ended by signal 15")

    monkeypatch.setattr(study, "PoolCaches", caches)
    with pytest.raises(error):
        run(tmp_path, tiny_config(dataset), stop=stop)


def test_trials_are_pruned_until_every_open_one_may_still_win(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    losers, state_of, n_losers = StudyPruner.losers, coordinator._study_state, []

    def one_loser(pruner: StudyPruner) -> dict[int, PruneDecision]:
        """As if each trial became hopeless only when the one before it is pruned."""
        n_losers.append(len(found := losers(pruner)))
        return dict(list(found.items())[:1])

    def state(work: Coordinator, worker: Worker) -> StudyState:
        assert all(work.open[number, 0].running for number in losers(work.pruner))
        return state_of(work, worker)

    monkeypatch.setattr(StudyPruner, "losers", one_loser)
    monkeypatch.setattr(coordinator, "_study_state", state)
    simulate(tmp_path, "study.trials=30", "study.folds=3", n_folds=3)
    assert max(n_losers) > 1
