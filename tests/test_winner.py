"""One winner: terminal, status, report, final, MLflow and Optuna's database name it, also after replicates."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import optuna
import pytest

from hpsearch.cli.progress import StudyProgress
from hpsearch.report.estimates import Estimates
from hpsearch.report.rows import study_rows
from hpsearch.report.text import paragraphs
from hpsearch.search.optuna_view import OptunaView, sqlite_url
from hpsearch.search.status import study_status
from hpsearch.store.record import StudyRecord
from hpsearch.store.trials import ReplicateRecord, Shortlist
from hpsearch.study import StudySummary
from tests.recorded import FakeStudy
from tests.tracking.tracked import client, read, view_of

pytestmark = pytest.mark.filterwarnings("ignore::optuna.exceptions.ExperimentalWarning")


@pytest.fixture
def study(tmp_path: Path, empty_mlflow_db: Path, quick_figures: None) -> FakeStudy:
    """Four full trials and a dropped one; by their first fits 1 leads, then 2 and 3."""
    (tmp_path / "project").mkdir()
    shutil.copy(empty_mlflow_db, tmp_path / "project" / "mlflow.db")
    study = FakeStudy(tmp_path / "project", n_images=40, overrides=("study.confirm=2", "study.trials=5"))
    study.trial(**{"train.lr": 0.01, "unet.depth": 3, "unet.base_channels": 8})
    for lr in (0.05, 0.045, 0.04):
        study.trial(**{"train.lr": lr, "unet.depth": 4, "unet.base_channels": 16})
    study.trial("pruned")
    return study


def refit(study: FakeStudy) -> None:
    """The refit changes the winner to trial 2; trial 3, which was not fitted again, has the highest value."""
    study.confirm(1, 2, gains={1: -0.08, 2: -0.02})
    worth = study.record.standing().values
    assert worth[3] > worth[2] > worth[1]


def optunas_best(record: StudyRecord) -> tuple[int, float]:
    """By Optuna itself, and as optuna-dashboard reads it."""
    url = sqlite_url(record.paths.project.optuna_db)
    best = optuna.load_study(study_name=record.name, storage=url).best_trial
    storage = optuna.storages.RDBStorage(url)
    (number,) = [each._study_id for each in storage.get_all_studies() if each.study_name == record.name]
    assert storage.get_best_trial(number) == best
    assert best.value is not None
    return best.number, best.value


def told(capsys: pytest.CaptureFixture[str], record: StudyRecord) -> str:
    """The line of the terminal at the end of a study."""
    StudyProgress(record.name, record.paths.project).summarise(StudySummary(record, 5, False, 0))
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("best: ")]
    return line


def assert_one_winner(study: FakeStudy, number: int, capsys: pytest.CaptureFixture[str]) -> None:
    record = study.record
    OptunaView(record.paths).update()
    view_of(study).update()
    best = record.best()
    assert best is not None
    worth = record.standing().values[best.number]
    assert worth is not None
    assert best.number == number
    shown = f"trial {number}, dice {worth:.4f}"
    assert f"best: {shown} out of fold" in told(capsys, record)
    status = study_status(study.project, record.name)
    assert status.best == best
    assert status.values[number] == worth
    rows = study_rows(record)
    assert rows.estimates is not None
    assert (rows.estimates.winner, rows.complete[0].number) == (number, number)
    assert rows.estimates.statistics[number].mean == pytest.approx(worth, abs=1e-12)
    estimates = Estimates.of(record)
    assert estimates is not None
    assert estimates.winner == number
    assert optunas_best(record) == (number, worth)
    runs = read(study.project)
    assert [name for name, run in runs.items() if "winner" in run.tags] == [f"trial {number:04d}"]
    winner = runs[f"trial {number:04d}"]
    assert (winner.tags["winner"], winner.tags["rank"]) == ("true", "0001")
    for trial in record.contenders(record.trials()):
        run = runs[f"trial {trial.number:04d}"]
        assert latest(run.metrics["cv/dice_mean"]) == record.standing().values[trial.number]
        assert f"ut-of-fold dice **{record.standing().values[trial.number]:.4f}**" in run.tags["mlflow.note.content"]
    assert latest(runs["fake"].metrics["study/best_dice"]) == worth
    note = runs["fake"].tags["mlflow.note.content"]
    assert f"trial {number}" in note
    assert f"{worth:.4f}" in note
    assert all(name in note for name in best.params)
    reader = client(study.project)
    experiment = reader.get_experiment_by_name("fake").experiment_id
    (first, *_) = reader.search_runs([experiment], order_by=["tags.`rank` ASC"])
    assert first.info.run_name == f"trial {number:04d}"


def latest(history: list[tuple[int, float, int]]) -> float:
    """The value that MLflow shows: that of the highest step, and of equal ones the latest."""
    return max(history, key=lambda point: (point[0], point[2]))[1]


def test_a_refit_changes_the_winner_everywhere_and_a_trial_that_comes_after_it_opens_the_choice_again(
    study: FakeStudy, capsys: pytest.CaptureFixture[str]
) -> None:
    assert_one_winner(study, 1, capsys)
    refit(study)
    assert_one_winner(study, 2, capsys)
    run = read(study.project)["trial 0002"]
    assert latest(run.metrics["cv/dice_first"]) == study.record.trial(2).value
    counts = [study.record.fit(2, fold).counts() for fold in range(2)]
    assert sum(map(len, counts)) == 40
    assert latest(run.metrics["cv/jaccard_mean"]) < latest(run.metrics["cv/jaccard_first"])
    # Nothing of it is lost or said twice by another start.
    assert_one_winner(study, 2, capsys)
    study.trial("pruned")
    assert_one_winner(study, 2, capsys)
    study.trial(**{"train.lr": 0.3, "unet.depth": 2, "unet.base_channels": 4})
    assert_one_winner(study, 1, capsys)
    study.record.write_shortlist(Shortlist((1, 2), (0, 1, 2, 3, 6), 2))
    assert_one_winner(study, 2, capsys)


def test_views_that_are_made_anew_show_the_winner_of_the_refit(
    study: FakeStudy, empty_mlflow_db: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert_one_winner(study, 1, capsys)
    refit(study)
    study.project.optuna_db.unlink()
    shutil.copy(empty_mlflow_db, study.project.mlflow_db)
    assert_one_winner(study, 2, capsys)


def test_mlflow_rebuilt_has_one_winner_and_no_stale_note(
    study: FakeStudy, capsys: pytest.CaptureFixture[str]
) -> None:
    assert_one_winner(study, 1, capsys)
    run = next(run for run in client(study.project).search_runs(["1"]) if run.info.run_name == "trial 0002")
    client(study.project).log_metric(run.info.run_id, "cv/dice_mean", 0.99, step=7)
    refit(study)
    assert view_of(study).rebuild() == (6, 8)
    assert_one_winner(study, 2, capsys)


def test_the_description_that_somebody_wrote_stays(study: FakeStudy) -> None:
    view_of(study).update()
    reader = client(study.project)
    names = ("fake", "trial 0002")
    for run in reader.search_runs(["1"]):
        if run.info.run_name in names:
            reader.set_tag(run.info.run_id, "mlflow.note.content", "mine")
    refit(study)
    view_of(study).update()
    runs = read(study.project)
    assert [runs[name].tags["mlflow.note.content"] for name in names] == ["mine", "mine"]


def test_a_view_that_showed_the_first_winner_moves_the_tag(study: FakeStudy) -> None:
    view = view_of(study)
    view.update()
    refit(study)
    view.update()
    runs = read(study.project)
    assert [name for name, run in runs.items() if "winner" in run.tags] == ["trial 0002"]
    assert latest(runs["trial 0002"].metrics["cv/dice_mean"]) == study.record.standing().values[2]


def test_every_refitted_trial_that_failed_leaves_the_best_of_the_others(study: FakeStudy) -> None:
    for number in (1, 2):
        study.record.write_evaluation(
            ReplicateRecord(trial=number, began_at=1.0, ended_at=2.0, outcome="diverged", reason="nan")
        )
    study.record.write_shortlist(Shortlist((1, 2), (0, 1, 2, 3), 2))
    OptunaView(study.record.paths).update()
    assert study.record.standing().ranking == (3, 0, 1, 2)
    assert optunas_best(study.record)[0] == 3


def update(study: FakeStudy) -> None:
    OptunaView(study.record.paths).update()


def test_optuna_shows_the_ranking_by_both_fits(study: FakeStudy) -> None:
    update(study)
    refit(study)
    update(study)
    after = optuna.load_study(study_name="fake", storage=sqlite_url(study.project.optuna_db))
    states = [trial.state.name for trial in after.trials]
    # Trial 3 is above the winner and was not fitted again: Optuna would take it for the best.
    assert states == ["COMPLETE", "COMPLETE", "COMPLETE", "PRUNED", "PRUNED"]
    standing = study.record.standing()
    assert [trial.value for trial in after.trials[:4]] == [standing.values[number] for number in range(4)]
    assert after.trials[4].user_attrs["estimate"] == study.record.trial(4).value
    assert after.trials[4].value is None


def test_a_database_of_version_0_1_is_brought_up_to_date(study: FakeStudy) -> None:
    """It shows the estimate of a pruned trial as a value."""
    update(study)
    storage = optuna.storages.RDBStorage(sqlite_url(study.project.optuna_db))
    with storage.engine.begin() as connection:
        connection.exec_driver_sql("UPDATE trials SET state = 'COMPLETE' WHERE number = 4")
        connection.exec_driver_sql(
            "INSERT INTO trial_values (trial_id, objective, value, value_type) "
            "SELECT trial_id, 0, 0.61, 'FINITE' FROM trials WHERE number = 4"
        )
    refit(study)
    update(study)
    assert optunas_best(study.record)[0] == 2
    trial = optuna.load_study(study_name="fake", storage=sqlite_url(study.project.optuna_db)).trials[4]
    assert (trial.state.name, trial.value) == ("PRUNED", None)


def test_a_trial_that_memory_changed_is_never_optunas_best(study: FakeStudy) -> None:
    import dataclasses

    study.record.write_evaluation(dataclasses.replace(study.record.trial(1), micro_batch=2))
    update(study)
    assert optunas_best(study.record)[0] == study.record.standing().winner == 2


def test_equal_values_go_to_the_earlier_trial_in_optuna_too(tmp_path: Path) -> None:
    study = FakeStudy(tmp_path)
    for depth in (2, 3, 4):
        trial = study.trial(**{"unet.depth": depth, "train.lr": 0.05, "unet.base_channels": 8})
        for fold in range(2):
            fit = study.record.fit(trial.number, fold).paths
            shutil.copy(study.record.fit(0, fold).paths.scores, fit.root / "copy.npy")
            (fit.root / "copy.npy").replace(fit.scores)
        study.end(trial)
    values = [trial.value for trial in study.record.trials()]
    assert len(set(values)) == 1
    update(study)
    assert optunas_best(study.record)[0] == study.record.standing().winner == 0


class TestEqualConfigurations:
    @pytest.fixture
    def twins(self, tmp_path: Path) -> FakeStudy:
        """Trial 1 is a copy of trial 0 with better luck; trial 2 is worse than both."""
        study = FakeStudy(tmp_path, n_images=40, overrides=("study.confirm=3",))
        default = {"train.lr": 0.05, "unet.depth": 3, "unet.base_channels": 8}
        study.trial(**default)
        better = study.trial(**{**default, "train.lr": 0.04, "unet.depth": 4})
        study.record.write_evaluation(
            _with(better, params=default, config=study.config.with_params(default).to_dict())
        )
        study.trial(**{**default, "train.lr": 0.005})
        values = [trial.value or 0.0 for trial in study.record.trials()]
        assert values[1] > values[0] > values[2]
        return study

    def test_the_earlier_of_two_stands_for_both_and_gains_nothing_over_itself(self, twins: FakeStudy) -> None:
        record = twins.record
        assert record.standing().ranking == (0, 2)
        estimates = Estimates.of(record)
        assert estimates is not None
        assert (estimates.winner, estimates.complete, estimates.gain(0)) == (0, (0, 2), None)
        text = " ".join(paragraphs("answer", rows=study_rows(record)))
        assert "It is the default configuration: the search has found nothing better so far." in text
        assert "gains" not in text
        update(twins)
        assert optunas_best(record) == (0, record.trial(0).value)

    def test_a_copy_is_not_fitted_again(self, twins: FakeStudy) -> None:
        from hpsearch.search import replicates as confirmation

        chosen = confirmation.shortlist(twins.record)
        assert chosen is not None
        assert chosen.of == (0, 2)
        assert 1 not in chosen.trials

    def test_a_copy_of_a_default_that_was_not_evaluated_fully_is_the_default_too(self, twins: FakeStudy) -> None:
        twins.record.write_evaluation(_with(twins.record.trial(0), outcome="failed", value=None))
        text = " ".join(paragraphs("answer", rows=study_rows(twins.record)))
        assert "Trial 1 is the best" in text
        assert "It is the default configuration" in text


def _with(trial: Any, **changes: Any) -> Any:
    import dataclasses

    return dataclasses.replace(trial, **changes)
