from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from hpsearch import config as configs
from hpsearch import paths
from hpsearch.data.folds import make_folds
from hpsearch.errors import RecordError, StudyChangedError, StudyError
from hpsearch.paths import ProjectPaths
from hpsearch.store import lock
from hpsearch.store.record import StudyRecord, study_record
from hpsearch.store.trials import PruneDecision, Shortlist, TrialRecord, record_to_json
from hpsearch.training.rows import EpochRow, Scores, to_line

OVERRIDES = ["search.unet.depth=[2, 3, 4]", "study.folds=3", "study.trials=4"]

SCORES = Scores(loss=0.5, dice=0.8, jaccard=0.7, accuracy=0.9)
ROW = EpochRow(
    epoch=1,
    time=1.0,
    train=SCORES,
    held_out=SCORES,
    lr=0.1,
    train_s=1.0,
    eval_s=0.5,
    images_per_s=4.0,
    peak_bytes=1,
)

DECISION = PruneDecision(drop=True, estimate=0.3, fold=0, epoch=1, reason="after fold 1", d=0.1, against=0)


@pytest.fixture
def record(tmp_path: Path) -> StudyRecord:
    return make_record(ProjectPaths(tmp_path), "mine")


def make_record(project: ProjectPaths, name: str) -> StudyRecord:
    """A study of 12 images in 3 folds, with nothing evaluated."""
    record = StudyRecord.create(project.study(name), configs.load(None, OVERRIDES))
    ids = tuple(f"ISIC_{number:07d}" for number in range(12))
    folds = make_folds(ids, ("train",) * 12, ids, folds=3, seed=0, groups=None)
    record.write_folds(folds, "key")
    return record


def evaluate(record: StudyRecord, number: int, scores: np.ndarray, n_folds: int = 3) -> None:
    """Write what finished fits leave: `scores` (12,), in the order of the pool, after the last of 2 epochs."""
    for fold in range(n_folds):
        fit = record.fit(number, fold).paths
        fit.root.mkdir(parents=True)
        held_out = scores[record.folds.held_out(fold)].astype(np.float32)
        np.save(fit.scores, np.stack([held_out / 2, held_out]))
        paths.write_json(fit.fit, {"epochs": 2, "value": float(held_out.mean())})


def trial(record: StudyRecord, number: int, **changes: object) -> TrialRecord:
    params = {"unet.depth": 2 + number % 3}
    base = {"params": params, "config": record.config.with_params(params).to_dict(), "began_at": 1.5}
    return TrialRecord(number=number, **{**base, **changes})  # type: ignore[arg-type]


def test_a_trial_reads_back_as_it_was_written(record: StudyRecord) -> None:
    written = trial(record, 0, outcome="pruned", value=0.1 + 0.2, decisions=(DECISION,), ended_at=2.5)
    record.write_evaluation(written)
    assert record.trial(0) == written
    assert record.trial(0).study_config.unet.depth == 2


def test_a_trial_that_another_coordinator_of_version_0_1_continued_is_lost(record: StudyRecord) -> None:
    record.write_evaluation(trial(record, 0, outcome="complete", value=0.9, ended_at=2.5))
    paths.write_json(record.paths.trial(0).taken, {"by": 1, "at": 2.0})
    lost = record.trial(0)
    assert (lost.outcome, lost.value, lost.ended_at) == ("orphaned", None, 2.0)
    assert "trial 1" in lost.reason
    assert record.best() is None


def test_a_trial_that_continued_a_lost_one_keeps_its_place(record: StudyRecord) -> None:
    of_0_1 = {**record_to_json(trial(record, 1)), "draw": 0, "history": [0], "owner": "lab-4711-0"}
    paths.write_json(record.paths.trial(1).trial, of_0_1)
    assert record.trial(1).place == 0
    record.write_evaluation(record.trial(1))
    assert record.trial(1).place == 0
    assert trial(record, 1).place == 1


def test_the_value_is_the_mean_over_images_not_over_folds(tmp_path: Path) -> None:
    record = make_record(ProjectPaths(tmp_path), "uneven")
    ids = record.folds.ids[:11]
    record.write_folds(make_folds(ids, ("train",) * 11, ids, folds=3, seed=0, groups=None), "key")
    scores = np.arange(12) / 16
    for fold in range(3):
        fit = record.fit(0, fold).paths
        fit.root.mkdir(parents=True)
        np.save(fit.scores, scores[record.folds.held_out(fold)][None].astype(np.float32))
        paths.write_json(fit.fit, {})
    assert record.value(0) == pytest.approx(scores[:11].mean(), abs=1e-12)


def test_out_of_fold_scores_are_in_the_order_of_the_pool(record: StudyRecord) -> None:
    scores = np.linspace(0, 1, 12)
    evaluate(record, 0, scores)
    np.testing.assert_allclose(record.out_of_fold(0), scores, atol=1e-7)


def test_images_of_unfinished_folds_have_no_score_and_the_trial_no_value(record: StudyRecord) -> None:
    evaluate(record, 0, np.ones(12), n_folds=2)
    assert np.isnan(record.out_of_fold(0)).sum() == len(record.folds.held_out(2))
    with pytest.raises(RecordError, match="no score"):
        record.value(0)


def test_only_full_trials_can_be_best_and_the_earlier_of_equals_is(record: StudyRecord) -> None:
    assert record.best() is None
    for number, outcome, value in [
        (0, "complete", 0.7),
        (1, "complete", 0.8),
        (2, "complete", 0.8),
        (3, "pruned", 0.9),
    ]:
        record.write_evaluation(trial(record, number, outcome=outcome, value=value))
    best = record.best()
    assert best is not None
    assert best.number == 1


def test_a_trial_that_version_0_1_trained_on_parts_of_batches_never_wins(record: StudyRecord) -> None:
    record.write_evaluation(trial(record, 0, outcome="complete", value=0.7))
    record.write_evaluation(trial(record, 1, outcome="complete", value=0.9, micro_batch=4))
    best = record.best()
    assert best is not None
    assert best.number == 0


def test_scores_that_are_not_those_of_the_value_on_record_are_noticed(record: StudyRecord) -> None:
    evaluate(record, 0, np.linspace(0.5, 0.6, 12))
    for fold in range(3):
        fit = record.fit(0, fold).paths
        np.save(fit.counts, np.ones((4, 4), np.int64))
        paths.append_line(fit.epochs, to_line(ROW))
        paths.write_json(fit.fit, {"value": 0.5, "epochs": 1})
    record.write_evaluation(trial(record, 0, outcome="complete", value=record.value(0)))
    record.verify()
    fit = record.fit(0, 1).paths
    np.save(fit.scores, np.load(fit.scores) + np.float32(0.001))
    with pytest.raises(RecordError, match="do not match the recorded value"):
        record.verify()


def test_an_edited_file_is_named(record: StudyRecord) -> None:
    record.write_evaluation(trial(record, 0, outcome="complete", value=0.75))
    path = record.paths.trial(0).trial
    path.write_text(path.read_text().replace("0.75", "0.85"))
    with pytest.raises(RecordError, match=r"trial\.json was changed after it was written"):
        record.trial(0)


def test_a_torn_line_of_epochs_is_left_out(record: StudyRecord) -> None:
    fit = record.fit(0, 0)
    fit.paths.root.mkdir(parents=True)
    paths.append_line(fit.paths.epochs, to_line(ROW))
    with fit.paths.epochs.open("ab") as file:
        file.write(b'{"epoch": 2, "tr')
    assert fit.epochs() == [ROW]


@pytest.mark.parametrize("damage", ["", "{", "[]", '{"format": 1, "number": 0}', '{"format": 2}'])
def test_a_damaged_trial_is_named(record: StudyRecord, damage: str) -> None:
    record.write_evaluation(trial(record, 0))
    record.paths.trial(0).trial.write_text(damage)
    with pytest.raises(RecordError, match=r"0000.trial\.json"):
        record.trial(0)


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"folds": {"ids": []}}', '{"trials": 3}'])
@pytest.mark.parametrize("name", ["trial.json", "folds.json", "confirmation.json", "fit.json"])
def test_a_damaged_file_is_named_in_one_line_with_the_remedy(record: StudyRecord, name: str, content: str) -> None:
    record.write_evaluation(trial(record, 0))
    record.write_shortlist(Shortlist((0,), (0, 1), 1))
    evaluate(record, 0, np.ones(12))
    (path, *_) = record.paths.root.rglob(name)
    path.write_text(content)
    opened = StudyRecord.open(record.paths)
    with pytest.raises(RecordError) as raised:
        assert [opened.trial(0), opened.folds, opened.shortlist(), *[fit.summary() for fit in opened.fits(0)]] == []
    assert str(raised.value) in {
        f"{fit} is damaged: restore it from a backup" for fit in record.paths.root.rglob(name)
    }


def test_scores_that_do_not_fit_the_folds_are_refused(record: StudyRecord) -> None:
    evaluate(record, 0, np.ones(12))
    np.save(record.fit(0, 1).paths.scores, np.ones((2, 3), np.float32))
    with pytest.raises(RecordError, match=r"scores\.npy"):
        record.value(0)


def test_a_pickle_where_scores_are_expected_is_not_opened(record: StudyRecord) -> None:
    evaluate(record, 0, np.ones(12))
    np.save(record.fit(0, 1).paths.scores, np.array([[print]], dtype=object))
    with pytest.raises(RecordError, match="damaged"):
        record.value(0)


def test_the_budget_may_change_under_a_study_and_nothing_else(record: StudyRecord) -> None:
    record.update_config(configs.load(None, [*OVERRIDES, "study.trials=9"]))
    assert StudyRecord.open(record.paths).config.study.trials == 9
    with pytest.raises(StudyChangedError, match=r"train\.epochs: 20 in the study, 3 now"):
        record.update_config(configs.load(None, [*OVERRIDES, "train.epochs=3"]))
    with pytest.raises(StudyChangedError, match="search"):
        record.update_config(configs.load(None, ["search.unet.depth=[2, 4]", "study.folds=3"]))


def test_relative_paths_of_an_older_study_are_those_of_the_folder_it_is_continued_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    config = configs.load(None, [*OVERRIDES, "data.root=photos", "data.groups=lists/patients.csv"])
    record = StudyRecord.create(ProjectPaths(tmp_path).study("old"), config)
    opened = StudyRecord.open(record.paths)
    assert opened.config.data.root == str(tmp_path / "photos")
    assert opened.config.data.groups == str(tmp_path / "lists" / "patients.csv")
    opened.update_config(opened.config)
    monkeypatch.chdir("/")
    assert StudyRecord.open(record.paths).config == opened.config


def test_the_only_study_needs_no_name_and_several_are_listed(tmp_path: Path) -> None:
    project = ProjectPaths(tmp_path)
    with pytest.raises(StudyError, match="hpsearch study"):
        study_record(project, None)
    make_record(project, "one")
    assert study_record(project, None).name == "one"
    make_record(project, "two")
    with pytest.raises(StudyError, match="one, two"):
        study_record(project, None)
    with pytest.raises(StudyError, match="three"):
        study_record(project, "three")


def test_of_several_studies_the_one_that_runs_is_meant(tmp_path: Path) -> None:
    project = ProjectPaths(tmp_path)
    for name in ("one", "two", "three"):
        make_record(project, name)
    with lock.hold(project.study("two")):
        assert study_record(project, None).name == "two"
        assert study_record(project, "one").name == "one"
        with (
            lock.hold(project.study("one")),
            pytest.raises(StudyError, match=r"one \(running\), three, two \(running\); choose one with --study NAME"),
        ):
            study_record(project, None)


@pytest.mark.parametrize(("of_0_1", "today"), [("full", "complete"), ("dropped", "pruned"), ("lost", "orphaned")])
def test_outcomes_of_version_0_1_are_read_under_their_names_of_today(
    record: StudyRecord, of_0_1: str, today: str
) -> None:
    table = record_to_json(trial(record, 0, outcome="complete", value=0.5))
    paths.write_json(record.paths.trial(0).trial, {**table, "outcome": of_0_1})
    assert record.trial(0).outcome == today
