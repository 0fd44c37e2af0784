from __future__ import annotations

import csv
import dataclasses
import json
import shutil
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy

from hpsearch import final
from hpsearch.choices import Choices, Chosen
from hpsearch.cli.final import describe
from hpsearch.config import stable_seed
from hpsearch.data.config import DataConfig
from hpsearch.data.prepare import Prepared
from hpsearch.errors import StudyError
from hpsearch.final import FinalResult, fold_networks, run_final
from hpsearch.looks import find_look, n_seen, user_account
from hpsearch.paths import ProjectPaths
from hpsearch.predict import Ensemble, Predictor, find_images, load_predictor, predict_files
from hpsearch.report.rows import study_rows
from hpsearch.scoring import mask_name, official_scores, read_mask, score_folder
from hpsearch.training.metrics import SCORES, PixelCounts
from hpsearch.tuning.planning import MachineChoice
from hpsearch.tuning.record import load_array, study_record
from tests.tuning.studies import run, tiny_config, write_tiny_dataset

MACHINE = MachineChoice("cpu", 1, 1)


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> ProjectPaths:
    root = tmp_path_factory.mktemp("final")
    config = tiny_config(
        write_tiny_dataset(root), "study.pruner=none", "study.sampler=random", "study.trials=2", "study.confirm=2"
    )
    run(root, config)
    return ProjectPaths(root)


@pytest.fixture(scope="module")
def result(project: ProjectPaths) -> FinalResult:
    found = run_final(project, n_seeds=2, machine=MACHINE, submission=True, ensemble=True)
    assert found is not None
    return found


def test_final_trains_on_the_whole_pool_and_scores_every_test_image(result: FinalResult) -> None:
    assert (result.n_pool, result.n_test) == (11, 4)
    with result.paths.table.open() as file:
        rows = list(csv.DictReader(file))
    assert [row["image"] for row in rows] == [f"ISIC_{number:07d}" for number in range(11, 15)]
    mean = np.mean([float(row["dice"]) for row in rows])
    assert result.test["dice"].mean == pytest.approx(mean, abs=1e-5)


def test_the_test_score_is_the_mean_over_images_and_seeds(result: FinalResult) -> None:
    for name, score in SCORES.items():
        each = [
            np.mean(score(PixelCounts.from_columns(load_array(result.paths.seed(index).test_counts, ndim=2))))
            for index in range(2)
        ]
        assert result.per_seed[name] == pytest.approx(each)
        assert result.test[name].mean == pytest.approx(np.mean(each))


def test_each_seed_trains_another_network_for_as_many_epochs_as_the_trial(result: FinalResult) -> None:
    weights = [result.paths.seed(index).weights.read_bytes() for index in range(2)]
    assert weights[0] != weights[1]
    kept, first = (safetensors.numpy.load_file(path) for path in (result.paths.model, result.paths.seed(0).weights))
    assert all(np.array_equal(kept[name], tensor) for name, tensor in first.items())
    for index in range(2):
        rows = result.paths.seed(index).epochs.read_text().splitlines()
        assert [json.loads(row)["epoch"] for row in rows] == [1, 2]
    assert stable_seed(0, "final", 0) != stable_seed(0, "final", 1)


def test_what_final_prints_is_on_record(result: FinalResult) -> None:
    table = json.loads(result.paths.result.read_text())
    assert table["test"]["jaccard"]["mean"] == result.test["jaccard"].mean
    assert table["official"]["threshold_jaccard"]["mean"] == result.official["threshold_jaccard"].mean
    assert table["trial"] == result.trial.number
    assert result.paths.panels.read_bytes().startswith(b"\x89PNG")
    assert result.paths.curves.read_bytes().startswith(b"\x89PNG")
    card = result.paths.card.read_text(encoding="utf-8")
    assert f"{result.official['jaccard'].mean:.4f}" in card


def test_the_official_scores_are_those_of_the_submission_at_the_images_own_size(
    project: ProjectPaths, result: FinalResult, tmp_path: Path
) -> None:
    with zipfile.ZipFile(result.paths.submission) as archive:
        archive.extractall(tmp_path)
    names = [f"ISIC_{number:07d}_segmentation.png" for number in range(11, 15)]
    assert sorted(path.name for path in tmp_path.iterdir()) == names
    truths = project.root / "ISIC-2017" / "ISIC-2017_Test_v2_Part1_GroundTruth"
    # Refuses masks of another size than the truth's.
    table = score_folder(tmp_path, truths)
    assert {name: interval.mean for name, interval in result.official.items()} == pytest.approx(
        official_scores(table)
    )
    for name in names:
        assert np.array_equal(read_mask(tmp_path / name), read_mask(result.paths.masks / name))
    with result.paths.table.open() as file:
        assert [float(row["official_dice"]) for row in csv.DictReader(file)] == pytest.approx(table["dice"], abs=1e-6)


def test_predict_gives_the_masks_that_final_scored(
    project: ProjectPaths, result: FinalResult, tmp_path: Path
) -> None:
    predictor = load_predictor(result.paths.model, device="cpu", threads=1)
    images = find_images([project.root / "ISIC-2017" / "ISIC-2017_Test_v2_Data"])
    assert predict_files(predictor, images, tmp_path) == {}
    for path in images:
        name = mask_name(path.stem)
        assert (tmp_path / name).read_bytes() == (result.paths.masks / name).read_bytes()


def test_the_final_table_shows_both_kinds_of_score(result: FinalResult) -> None:
    lines = describe(result)
    for title, interval in (
        ("test at 32x32", result.test["dice"]),
        ("test, official", result.official["accuracy"]),
    ):
        (line,) = (line for line in lines if line.startswith(title))
        assert f"{interval.mean:.4f}  [{interval.low:.4f}, {interval.high:.4f}]" in line
    assert any(str(result.paths.submission) in line for line in lines)


def test_the_promise_is_the_mean_of_both_its_fits(project: ProjectPaths, result: FinalResult) -> None:
    record = study_record(project, None)
    assert result.is_confirmed
    assert result.cv.mean == pytest.approx(record.worth(result.trial), abs=1e-9)
    assert result.corrected is not None
    assert result.predicted is not None
    assert result.corrected.method == "confirmed"
    assert result.predicted.mean == result.corrected.mean
    assert result.predicted.high - result.predicted.low > result.corrected.high - result.corrected.low
    text = "\n".join(describe(result))
    assert f"[{result.predicted.low:.4f}, {result.predicted.high:.4f}]" in text
    if result.trial.number != 0:
        assert result.against_default is not None


def test_only_full_trials_can_be_final(project: ProjectPaths) -> None:
    with pytest.raises(StudyError, match="no trial 9"):
        run_final(project, trial=9, machine=MACHINE)
    with pytest.raises(StudyError, match="no study 'other'"):
        run_final(project, "other", machine=MACHINE)


def test_an_ensemble_without_networks_says_which_trials_have_them_and_how_to_get_some(
    project: ProjectPaths, result: FinalResult
) -> None:
    record = study_record(project, None)
    (other,) = {0, 1} - {result.trial.number}
    networks = fold_networks(record, other)
    assert networks is not None
    hidden = [path.rename(path.with_suffix(".hidden")) for path in (*networks.weights, *networks.others)]
    try:
        with pytest.raises(StudyError) as refused:
            run_final(project, trial=other, ensemble=True, machine=MACHINE)
    finally:
        for path in hidden:
            path.rename(path.with_suffix(".safetensors"))
    said = str(refused.value)
    assert f"take --trial {result.trial.number}, or fit its folds again" in said
    assert f"hpsearch export --toml FILE --trial {other}" in said
    assert "hpsearch train --config FILE --folds 2" in said


def test_choices_are_made_on_every_image_of_the_pool_out_of_fold(result: FinalResult) -> None:
    chosen = Chosen.read(result.paths.choices)
    assert chosen == result.chosen
    assert chosen.n_images == 11
    assert chosen.source == f"second fits of trial {result.trial.number}"
    assert [each.name for each in chosen.decisions] == ["flips", "threshold", "clean", "ensemble"]
    assert all(each.taken == (each.gain.low > 0) for each in chosen.decisions)
    info = Predictor.load(result.paths.model, device="cpu", threads=1)
    assert info.choices == chosen.choices
    assert bool(result.chosen_test) == (chosen.choices != Choices())


def test_the_ensemble_has_a_network_for_each_fold_and_is_shown_beside_the_one_kept(
    project: ProjectPaths, result: FinalResult, tmp_path: Path
) -> None:
    assert result.ensemble is not None
    assert result.ensemble.n_networks == 2
    together = load_predictor(result.paths.model, device="cpu", threads=1, ensemble=True)
    assert isinstance(together, Ensemble)
    images = find_images([project.root / "ISIC-2017" / "ISIC-2017_Test_v2_Data"])
    predict_files(together, images, tmp_path)
    truths = project.root / "ISIC-2017" / "ISIC-2017_Test_v2_Part1_GroundTruth"
    found = official_scores(score_folder(tmp_path, truths))
    assert {name: interval.mean for name, interval in result.ensemble.official.items()} == pytest.approx(found)


def test_an_evaluation_that_is_killed_midway_and_one_of_a_few_images_are_counted(
    project: ProjectPaths, result: FinalResult, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    assert result.look.score is None
    (noted,) = result.looks
    found = find_look(project, noted.id)
    assert found is not None
    assert found.score == pytest.approx(result.test["dice"].mean)
    # The same study in another project folder; the user's account, of which this test has a copy, knows both.
    account = user_account()
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    user_account().parent.mkdir()
    user_account().write_text(account.read_text())
    other = ProjectPaths(tmp_path / "other")
    shutil.copytree(project.root, other.root)
    other.looks.unlink()

    class KilledError(Exception):
        pass

    def kill_at_the_first_score(workers: object, job: dict[str, Any], **more: Any) -> Any:
        if job["job"] == "score":
            raise KilledError
        return do(workers, job, **more)

    def prepare_two(data: DataConfig, root: Path, **more: Any) -> Prepared:
        return prepare_test(dataclasses.replace(data, n_final_test=2), root, **more)

    do, prepare_test = final.do, final.prepare_test
    with monkeypatch.context() as killing:
        killing.setattr(final, "do", kill_at_the_first_score)
        killing.setattr(final, "prepare_test", prepare_two)
        with pytest.raises(KilledError):
            run_final(other, machine=MACHINE, n_seeds=2)
    whole = run_final(other, machine=MACHINE, n_seeds=2)
    assert whole is not None
    assert [(look.n_images, look.score is None) for look in whole.looks] == [(4, False), (2, True), (4, True)]
    assert n_seen(whole.look, whole.looks[1:2]) == 2
    text = "\n".join(describe(whole))
    assert "these 4 test images had been evaluated before: 2 evaluations of 1 configuration" in text
    assert "(did not end)" in text


def test_every_look_at_the_test_set_is_counted_and_a_search_that_goes_on_after_one_is_marked(
    project: ProjectPaths, result: FinalResult
) -> None:
    assert [look.trial for look in result.looks] == [result.trial.number]
    assert (result.n_looks_before, result.n_trials_after) == (0, 0)
    dataset = project.root / "ISIC-2017"
    settings = ("study.pruner=none", "study.sampler=random", "study.trials=3", "study.confirm=0")
    run(project.root, tiny_config(dataset, *settings))
    again = run_final(project, trial=0, machine=MACHINE)
    assert again is not None
    assert (len(again.looks), again.n_trials_after) == (2, 1)
    # Near-duplicates were looked for once: the images are the same.
    assert len(list(project.cache.glob("near-duplicates-*.json"))) == 1
    assert again.leaks == result.leaks
    text = "\n".join(describe(again))
    assert "4 test images had been evaluated before: 1 evaluation of 1 configuration" in text
    assert "1 trial of this study began after its first evaluation" in text
    rows = study_rows(study_record(project, None))
    assert {final.n_trials_after for final in rows.finals} == {1}
