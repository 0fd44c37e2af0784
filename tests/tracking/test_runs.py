"""What the runs of a study contain."""

from __future__ import annotations

import json
import shutil
import tomllib
from pathlib import Path

import numpy as np
import pytest

from hpsearch import config as configs
from hpsearch import paths
from hpsearch.errors import TrackingError
from hpsearch.store.trials import Outcome
from hpsearch.tracking import runs
from tests.recorded import FakeStudy
from tests.tracking.tracked import client, deliver, make_study, read, view_of


class TestWhatIsLogged:
    def test_a_trial_has_its_whole_configuration_as_params(self, study: FakeStudy) -> None:
        trial = study.trial("complete")
        run = deliver(study)["trial 0000"]
        assert set(run.params) == set(trial.study_config.flat())
        assert run.params["unet.depth"] == str(trial.study_config.unet.depth)
        assert float(run.params["train.lr"]) == trial.study_config.train.lr

    def test_a_trial_has_every_epoch_of_every_fold_at_its_recorded_time(self, study: FakeStudy) -> None:
        study.trial("complete")
        run = deliver(study)["trial 0000"]
        for fold in range(2):
            rows = study.record.fit(0, fold).epochs()
            assert len(rows) == 3
            for score in ("loss", "dice", "jaccard", "accuracy"):
                for key, which in ((f"fold{fold}/train_{score}", "train"), (f"fold{fold}/{score}", "held_out")):
                    expected = [
                        (row.epoch, getattr(getattr(row, which), score), round(row.time * 1000)) for row in rows
                    ]
                    assert run.metrics[key] == expected

    def test_second_fits_have_a_run_of_their_own_and_keep_the_study_open_until_they_are_there(
        self, tmp_path: Path, empty_mlflow_db: Path, quick_figures: None
    ) -> None:
        study = make_study(tmp_path / "project", empty_mlflow_db, overrides=("study.confirm=2", "study.trials=2"))
        study.trial("complete")
        study.trial("complete")
        before = deliver(study)
        assert before["fake"].status == "RUNNING"
        study.confirm(1, 0)
        runs = deliver(study)
        run = runs["trial 0001, refit"]
        rows = study.record.fit(1, 0, replicate=1).epochs()
        assert run.metrics["fold0/dice"] == [(row.epoch, row.scores.dice, round(row.time * 1000)) for row in rows]
        assert run.latest["cv/dice_mean"] == pytest.approx(study.record.out_of_fold(1, replicate=1).mean(), abs=1e-7)
        assert (run.status, run.parent, run.params) == ("FINISHED", "fake", runs["trial 0001"].params)
        assert runs["fake"].status == "FINISHED"
        assert deliver(study) == runs

    def test_five_folds_are_forty_metrics(self, tmp_path: Path, empty_mlflow_db: Path, quick_figures: None) -> None:
        study = make_study(tmp_path / "project", empty_mlflow_db, n_folds=5)
        study.trial("complete")
        assert sum(key.startswith("fold") for key in deliver(study)["trial 0000"].metrics) == 40

    def test_a_full_trial_has_means_over_images_and_the_spread_between_folds(self, study: FakeStudy) -> None:
        trial = study.trial("complete")
        latest = deliver(study)["trial 0000"].latest
        scores = [study.record.final_scores(study.record.fit(0, fold), fold) for fold in range(2)]
        assert latest["cv/dice_mean"] == trial.value
        assert latest["cv/dice_mean"] == pytest.approx(np.concatenate(scores).mean())
        assert latest["cv/dice_std"] == pytest.approx(np.std([each.mean() for each in scores], ddof=1), abs=1e-7)
        counts = np.concatenate([study.record.fit(0, fold).counts() for fold in range(2)])
        tp, fp, fn, tn = counts.T
        assert latest["cv/jaccard_mean"] == pytest.approx((tp / (tp + fp + fn)).mean())
        assert latest["cv/accuracy_mean"] == pytest.approx(((tp + tn) / counts.sum(1)).mean())

    def test_a_trial_has_seconds_speed_and_memory(self, study: FakeStudy) -> None:
        study.trial("complete")
        latest = deliver(study)["trial 0000"].latest
        assert latest["cost/seconds"] == pytest.approx(2 * 3 * 1.75)
        assert latest["cost/images_per_s"] == pytest.approx(800.5)
        assert latest["cost/peak_memory_mib"] == 600

    def test_a_dropped_trial_has_an_estimate_and_no_mean(self, study: FakeStudy) -> None:
        study.trial("complete")
        study.trial("pruned")
        latest = deliver(study)["trial 0001"].latest
        assert latest["cv/estimate"] == 0.61
        assert "cv/dice_mean" not in latest

    @pytest.mark.parametrize(
        ("outcome", "status"),
        [
            ("complete", "FINISHED"),
            ("pruned", "FINISHED"),
            ("infeasible", "FINISHED"),
            ("diverged", "FAILED"),
            ("failed", "FAILED"),
        ],
    )
    def test_outcome_status_and_times_are_the_recorded_ones(
        self, study: FakeStudy, outcome: Outcome, status: str
    ) -> None:
        trial = study.trial(outcome)
        run = deliver(study)["trial 0000"]
        assert (run.tags["outcome"], run.status) == (outcome, status)
        assert run.began_ms == round(trial.began_at * 1000)
        assert run.ended_ms == round((trial.ended_at or 0) * 1000)
        assert run.tags.get("reason", "") == trial.reason
        assert run.parent == "fake"

    def test_a_trial_is_tagged_with_seed_commit_device_and_versions(self, study: FakeStudy) -> None:
        study.trial("complete")
        tags = deliver(study)["trial 0000"].tags
        expected = {
            "hpsearch.study": "fake",
            "hpsearch.trial": "0",
            "seed": "0",
            "source": "default",
            "device": "cpu",
            "processor": "a processor",
            "version.torch": "2.9.0",
            "version.hpsearch": "0.1.0",
            "mlflow.source.git.commit": "0123456789abcdef",
        }
        assert expected.items() <= tags.items()

    def test_the_toml_of_a_trial_runs_it_again(self, study: FakeStudy, tmp_path: Path) -> None:
        study.trial("complete")
        trial = study.trial("complete")
        (tmp_path / "trial.toml").write_bytes(deliver(study)["trial 0001"].files["trial.toml"])
        assert configs.load(tmp_path / "trial.toml") == trial.study_config

    def test_a_trial_has_its_folds_scores_and_figures_as_files(self, study: FakeStudy) -> None:
        study.trial("complete")
        files = deliver(study)["trial 0000"].files
        assert set(files) == {"trial.toml", "folds.json", "scores.csv", "curves.png", "panels.png"}
        assert json.loads(files["folds.json"])["folds"] == json.loads(json.dumps(study.record.folds.to_dict()))
        lines = [line.split(",") for line in files["scores.csv"].decode().split()]
        assert lines[0] == ["image", "fold", "dice", "jaccard", "accuracy", "sensitivity", "specificity"]
        assert len(lines) == 21
        out_of_fold = study.record.out_of_fold(0)
        for image, fold, dice, *_ in lines[1:]:
            index = study.record.folds.ids.index(image)
            assert study.record.folds.fold_of[index] == int(fold)
            assert float(dice) == pytest.approx(out_of_fold[index], abs=1e-6)

    def test_verdicts_and_deaths_are_kept_as_decisions(self, study: FakeStudy) -> None:
        study.trial("pruned")
        study.trial("failed")
        runs = deliver(study)
        assert json.loads(runs["trial 0000"].files["decisions.json"])["decisions"][0]["p"] == 0.001
        assert json.loads(runs["trial 0001"].files["decisions.json"])["failures"] == {
            "0": ["was killed by signal 9"] * 3
        }
        assert "scores.csv" not in runs["trial 0000"].files

    def test_the_parent_has_settings_space_best_value_and_counts(self, study: FakeStudy) -> None:
        values = [study.trial("complete").value, study.trial("complete").value]
        last = study.trial("pruned")
        run = deliver(study)["fake"]
        assert run.params["study.folds"] == "2"
        assert run.params["search.unet.depth"] == "[2, 3, 4]"
        best = [value for _, value, _ in run.metrics["study/best_dice"]]
        assert best == [values[0], max(values), max(values)]  # type: ignore[type-var]
        assert run.metrics["study/n_complete"][-1] == (3, 2.0, round((last.ended_at or 0) * 1000))
        assert run.latest["study/n_pruned"] == 1
        assert set(run.files) == {"study.toml", "plan.json", "folds.json"}
        assert tomllib.loads(run.files["study.toml"].decode()) == tomllib.loads(study.record.paths.toml.read_text())

    def test_the_parent_ends_with_the_study(self, study: FakeStudy) -> None:
        for _ in range(5):
            study.trial("complete")
        assert deliver(study)["fake"].status == "RUNNING"
        last = study.trial("infeasible")
        assert deliver(study)["fake"].status == "RUNNING"  # an infeasible trial is free
        last = study.trial("pruned")
        run = deliver(study)["fake"]
        assert (run.status, run.ended_ms) == ("FINISHED", round((last.ended_at or 0) * 1000))

    def test_a_final_shows_what_was_promised_beside_what_came(self, study: FakeStudy) -> None:
        study.trial("complete")
        study.final(0)
        run = deliver(study)["final of trial 0000"]
        result = paths.read_json(study.record.paths.final("trial-0000").result)
        assert run.parent == "fake"
        assert run.status == "FINISHED"
        assert run.latest["cv/dice_mean"] == result["cv"]["mean"]
        assert run.latest["test/dice"] == result["test"]["dice"]["mean"]
        assert run.latest["test/dice_low"] == result["test"]["dice"]["low"]
        assert len(run.metrics["seed0/train_loss"]) == 3
        assert run.params["final.trial"] == "0"
        assert set(run.files) == {"config.toml", "final.json", "test.csv", "curves.png", "panels.png"}

    def test_an_open_trial_grows_epoch_by_epoch(self, study: FakeStudy) -> None:
        view, trial = view_of(study), study.begin()
        seen = []
        for _ in range(3):
            study.epoch(trial, 0)
            view.update()
            run = read(study.project)["trial 0000"]
            seen.append(len(run.metrics["fold0/dice"]))
            assert (run.status, run.ended_ms, run.tags["outcome"]) == ("RUNNING", None, "open")
        assert seen == [1, 2, 3]

    def test_a_stopped_study_has_nothing_running_until_it_goes_on(self, study: FakeStudy) -> None:
        trial = study.begin()
        runs = deliver(study, is_last=True)
        assert {run.status for run in runs.values()} == {"KILLED"}
        study.fold(trial, 0)
        assert {run.status for run in deliver(study).values()} == {"RUNNING"}

    def test_the_report_is_kept_with_the_study_also_when_it_comes_late_or_anew(self, study: FakeStudy) -> None:
        study.trial("complete")
        files = deliver(study)["fake"].files
        paths.write_text(study.record.paths.report, "<p>first</p>")
        paths.write_text(study.record.paths.figures / "race.png", "a figure")
        view = view_of(study)
        view.log_report()
        with_report = read(study.project)["fake"].files
        assert set(with_report) == {*files, "report.html", "figures/race.png"}
        paths.write_text(study.record.paths.report, "<p>second</p>")
        view.log_report()
        assert read(study.project)["fake"].files["report.html"] == b"<p>second</p>"
        study.project.mlflow_db.unlink()
        shutil.rmtree(study.project.mlruns)
        assert deliver(study)["fake"].files["report.html"] == b"<p>second</p>"

    def test_the_report_of_a_study_that_is_not_tracked_waits_for_it(self, study: FakeStudy) -> None:
        study.trial("complete")
        paths.write_text(study.record.paths.report, "<p></p>")
        with pytest.raises(TrackingError, match="study 'fake' is not in MLflow yet"):
            view_of(study).log_report()

    def test_figures_are_left_out_where_the_images_are_gone(self, study: FakeStudy) -> None:
        study.trial("complete")
        shutil.rmtree(study.project.cache)
        files = deliver(study)["trial 0000"].files
        assert "curves.png" in files
        assert "panels.png" not in files

    def test_a_study_without_trials_leaves_no_trace(self, study: FakeStudy) -> None:
        assert deliver(study) == {}

    def test_the_experiment_opens_as_training_with_a_view_that_begins_with_the_best(self, study: FakeStudy) -> None:
        study.trial("complete")
        deliver(study)
        tags = client(study.project).get_experiment_by_name("fake").tags
        assert tags["mlflow.experimentKind"] == "custom_model_development"
        view = json.loads(tags["mlflow.sharedViewState.hpsearch"])
        state = json.loads(view["state"])
        # By the mean, a run of second fits may come first.
        assert (view["name"], state["orderByKey"], state["orderByAsc"]) == ("Trials, best first", "tags.`rank`", True)
        assert "params.`unet.depth`" in state["selectedColumns"]


SCORE = {"mean": 0.87, "low": 0.86, "high": 0.88}
GAIN = {"difference": 0.01, "low": 0.0, "high": 0.02, "p": 0.04}
VARIANCES = {"image_variance": 0.0, "run_variance": 0.0, "choice_variance": 0.0}
CLAIMS = {
    "corrected": {**SCORE, "mean": 0.851, "trial": 0, "naive": 0.86, "method": "first", **VARIANCES},
    "predicted": {"mean": 0.851, "low": 0.83, "high": 0.872},
    "chosen": {
        "choices": {"threshold": 0.4, "flips": False, "clean": False, "ensemble": False},
        "decisions": [],
        "n_images": 20,
        "source": "first fits of trial 0",
    },
    "chosen_test": {"dice": SCORE},
    "ensemble": {"n_networks": 2, "test": {"dice": {**SCORE, "mean": 0.88}}, "official": {}, "gain": GAIN},
    "test_set": "0123",
    "n_looks": 3,
    "leaks": [{"a": "x", "b": "y", "split_a": "train", "split_b": "test", "similarity": 0.99}],
}


def test_a_final_has_its_promise_its_choices_and_the_account_of_looks_and_leaks(tmp_path: Path) -> None:
    study = FakeStudy(tmp_path)
    study.trial()
    study.final(0, **CLAIMS)
    content = runs.final_run(study.record, "trial-0000")
    values = {point.key: point.value for point in content.points}
    assert (values["cv/dice_corrected"], values["cv/dice_predicted_low"]) == (0.851, 0.83)
    assert values["cv/dice_predicted_high"] == 0.872
    assert (values["test/chosen/dice"], values["test/ensemble/dice"]) == (0.87, 0.88)
    tags = {key: content.tags[f"hpsearch.{key}"] for key in ("test_set", "test_looks", "test_leaks")}
    assert tags == {"test_set": "0123", "test_looks": "3", "test_leaks": "1"}
    assert '"threshold": 0.4' in content.tags["hpsearch.choices"]


def test_a_refit_is_identified_by_its_tags(tmp_path: Path) -> None:
    study = FakeStudy(tmp_path, overrides=("study.confirm=2", "study.trials=2"))
    study.trial()
    study.trial()
    assert not whole_study(study).is_complete
    study.confirm(1, 0)
    second = study.record.replicate(1)
    assert second is not None
    content = runs.refit_run(study.record, second)
    assert content.key == "second 1" == runs.key_of(content.tags)
    assert content.key in runs.run_keys(study.record.paths)
    assert content.is_complete
    ended = [each.ended_at for each in study.record.replicate_records()]
    whole = whole_study(study)
    assert whole.ended_ms == round(max(each or 0 for each in ended) * 1000)


def whole_study(study: FakeStudy) -> runs.RunContent:
    trials = study.record.trials()
    return runs.study_run(study.record, trials, study.record.standing(trials))
