from __future__ import annotations

import contextlib
import csv
import dataclasses
import json
import shutil
import zipfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import psutil
import pytest
import safetensors.numpy
import torch
from PIL import Image

from hpsearch.cli.final import describe
from hpsearch.config.data import DataConfig
from hpsearch.data.cache import open_cache
from hpsearch.data.decode import resize
from hpsearch.data.prepare import Prepared, prepare_pool
from hpsearch.errors import StoppedError, StudyError, TrackingError, WorkerError
from hpsearch.final import FinalResult, run_final
from hpsearch.final import run as final_run
from hpsearch.final.result import stored_result
from hpsearch.final.run import fold_networks
from hpsearch.inference.postprocessing import Postprocessing, SelectedPostprocessing
from hpsearch.inference.predictor import Ensemble, Predictor, find_images, load_predictor, predict_files
from hpsearch.inference.scoring import mask_name, read_mask, score_folder
from hpsearch.paths import FinalPaths, ProjectPaths
from hpsearch.report.rows import study_rows
from hpsearch.search.autotune import MachineChoice
from hpsearch.search.stopping import Stop
from hpsearch.stats.intervals import Paired
from hpsearch.store.fits import load_array
from hpsearch.store.record import study_record
from hpsearch.store.test_set_log import find_evaluation, n_seen, user_account
from hpsearch.store.trials import read_record
from hpsearch.training.checkpoint import load_weights
from hpsearch.training.metrics import SCORES, PixelCounts
from hpsearch.typed_json import from_json, to_json
from hpsearch.workers.jobs import CountJob, Job, WorkerSettings
from hpsearch.workers.local_pool import LocalPool
from hpsearch.workers.plan import ExecutionPlan
from tests.cached import images_of
from tests.data.conftest import tiny_pairs, write_oriented
from tests.search.studies import run, tiny_config, write_tiny_dataset
from tests.test_views import FakeView

MACHINE = MachineChoice("cpu", 1, 1)


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> ProjectPaths:
    """A study of images with all EXIF orientations, some of 12 bits; the masks are drawn on what people see."""
    root = tmp_path_factory.mktemp("final")
    dataset = write_tiny_dataset(root)
    for number, path in enumerate(sorted(dataset.glob("*_Data/*.png"))):
        with Image.open(path) as image:
            pixels = np.array(image)
        write_oriented(path, pixels, number % 8 + 1, deep=number % 3 == 0)
    for kind, ending in (("Data", ".png"), ("Part1_GroundTruth", "_segmentation.png")):
        shared = dataset / f"ISIC-2017_Training_{kind}" / f"ISIC_0000003{ending}"
        shutil.copy(shared, dataset / f"ISIC-2017_Test_v2_{kind}" / f"ISIC_0000012{ending}")
    settings = ("study.pruner=none", "study.sampler=random", "study.trials=2", "study.confirm=2")
    # The data are given by a relative path; everything after the search happens in another folder.
    with contextlib.chdir(root):
        run(Path(), tiny_config(Path("ISIC-2017"), *settings))
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
    means = {name: interval.mean for name, interval in result.official.items()}
    assert means == pytest.approx(table.mean().to_dict())
    for name in names:
        assert np.array_equal(read_mask(tmp_path / name), read_mask(result.paths.masks / name))
    with result.paths.table.open() as file:
        assert [float(row["official_dice"]) for row in csv.DictReader(file)] == pytest.approx(table["dice"], abs=1e-6)


def test_an_image_shared_by_pool_and_test_is_named_beside_the_test_mean_without_it(result: FinalResult) -> None:
    (pair,) = (pair for pair in result.leaks if pair.similarity == 1)
    assert (pair.a, pair.b, pair.split_a, pair.split_b) == ("ISIC_0000003", "ISIC_0000012", "train", "test")
    leaked = {pair.b for pair in result.leaks}
    with result.paths.table.open() as file:
        clean = [float(row["dice"]) for row in csv.DictReader(file) if row["image"] not in leaked]
    assert len(leaked) == 4 - len(clean)
    assert result.without_leaks == pytest.approx(np.mean(clean), abs=1e-5)
    lines = describe(result)
    (line,) = (line for line in lines if line.startswith("test, no duplicates"))
    assert line.endswith(f"{result.without_leaks:.4f}")
    assert any("ISIC_0000003 and ISIC_0000012" in line for line in lines)


def test_networks_are_trained_on_what_people_see_and_know_how_it_was_read(
    project: ProjectPaths, result: FinalResult
) -> None:
    seen = open_cache(prepare_pool(study_record(project, None).config.data, project.cache).cache_path)
    for pair, image in zip(tiny_pairs(), images_of(seen), strict=False):
        upright = torch.from_numpy(pair.image).permute(2, 0, 1)
        assert np.array_equal(image, resize(upright, 32, 32).permute(1, 2, 0).numpy())
    weights = [result.paths.model, *sorted(result.paths.ensemble.iterdir()), result.paths.seed(1).weights]
    for path in weights:
        assert load_weights(path)[1].extra["reading"] == {"exif": "apply", "max_value": 4095}


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


def test_the_prediction_is_the_mean_of_both_fits(project: ProjectPaths, result: FinalResult) -> None:
    record = study_record(project, None)
    assert result.is_confirmed
    assert result.cv.mean == pytest.approx(record.standing().values[result.trial.number], abs=1e-9)
    assert result.corrected is not None
    assert result.predicted is not None
    assert result.corrected.method == "confirmed"
    assert result.predicted.mean == result.corrected.mean
    assert result.predicted.high - result.predicted.low > result.corrected.high - result.corrected.low
    text = "\n".join(describe(result))
    assert f"[{result.predicted.low:.4f}, {result.predicted.high:.4f}]" in text
    assert (result.against_default is None) == (result.trial.number == 0)


def test_a_final_of_the_default_says_whether_the_search_found_better(result: FinalResult) -> None:
    gain = Paired(0.02, 0.01, 0.03, 0.001)
    other = dataclasses.replace(result, predicted=None, against_default=gain, is_default=False, winner=5)
    default = dataclasses.replace(other, against_default=None, is_default=True, winner_against_default=gain)
    assert any("The gain of trial 5, the best, over it is +0.0200" in line for line in describe(default))
    assert not any("nothing better" in line for line in describe(default))
    found = dataclasses.replace(default, winner=default.trial.number, winner_against_default=None)
    assert "This is the default configuration: the search found nothing better." in describe(found)
    assert any("The gain over the default (trial 0) is +0.0200" in line for line in describe(other))


@pytest.mark.parametrize(
    "change",
    [
        {"n_seeds": 1},
        {"ensemble": False},
        {"pool": SimpleNamespace(key="other")},
        {"test": SimpleNamespace(key="other", ids=())},
        {"missing": "test.csv"},
        {"missing": "final.json"},
        {"missing": "masks"},
        {},
    ],
)
def test_only_a_whole_result_of_the_same_images_is_taken_as_it_is(
    result: FinalResult, tmp_path: Path, change: dict[str, Any]
) -> None:
    folder = FinalPaths(tmp_path / "final")
    shutil.copytree(result.paths.root, folder.root)
    if missing := change.pop("missing", None):
        path = folder.root / missing
        shutil.rmtree(path) if path.is_dir() else path.unlink()
        change = {"missing": missing}
    table = json.loads(result.paths.result.read_text())
    pool, test = SimpleNamespace(key=table["pool_key"]), SimpleNamespace(key=table["test_key"])
    test.ids = tuple(f"ISIC_{number:07d}" for number in range(11, 15))
    given = {"pool": pool, "test": test, "n_seeds": 2, "ensemble": True}
    asked = {key: value for key, value in change.items() if key in given}
    assert (stored_result(folder, **{**given, **asked}) is not None) is (not change)


def test_final_trains_with_the_threads_that_the_studys_plan_says(project: ProjectPaths, result: FinalResult) -> None:
    record = study_record(project, None)
    plan = from_json(ExecutionPlan, record.plan() or {})
    record.write_plan(to_json(dataclasses.replace(plan, workers=(WorkerSettings("cpu", 1),) * 2, alone_threads=0)))
    (other,) = {0, 1} - {result.trial.number}
    threads, stop = [], Stop()

    def stop_at_once(index: int, row: object) -> None:
        children = psutil.Process().children()
        trainers = [child for child in children if "hpsearch.workers.process" in " ".join(child.cmdline())]
        threads.extend(child.environ()["OMP_NUM_THREADS"] for child in trainers)
        stop.request()

    with pytest.raises(StoppedError, match="run the same command again"):
        run_final(project, trial=other, machine=MachineChoice(), on_epoch=stop_at_once, stop=stop)
    assert threads == ["1"]


@pytest.mark.parametrize("asked_by", ["signal", "hpsearch stop"])
def test_a_final_that_is_told_to_stop_at_once_ends_with_its_checkpoint(
    project: ProjectPaths, result: FinalResult, asked_by: str
) -> None:
    (other,) = {0, 1} - {result.trial.number}
    stop = Stop()

    def stop_now(index: int, row: object) -> None:
        if asked_by == "signal":
            stop.request(at_once=True)
        else:
            study_record(project, None).paths.stop_request.write_text("now")

    with pytest.raises(StoppedError, match="run the same command again"):
        run_final(project, trial=other, n_seeds=2, machine=MACHINE, on_epoch=stop_now, stop=stop)
    assert not (result.paths.root.parent / f"trial-{other:04d}" / "final.json").exists()


def test_a_final_says_that_it_waits_for_a_cluster_before_it_decodes_images(
    project: ProjectPaths, result: FinalResult, monkeypatch: pytest.MonkeyPatch
) -> None:
    (other,) = {0, 1} - {result.trial.number}
    monkeypatch.setattr(final_run, "PoolCaches", lambda *_, **__: pytest.fail("images are decoded"))
    said: list[str] = []
    machine = MachineChoice("cpu", cluster="tcp://127.0.0.1:9", cluster_timeout_s=2.0)
    with pytest.raises(WorkerError, match="has had no workers for 2 s"):
        run_final(project, trial=other, machine=machine, on_step=said.append)
    assert said[-1].startswith("waiting up to 2 s for the Dask cluster tcp://127.0.0.1:9: ")


def test_only_full_trials_can_be_final(project: ProjectPaths) -> None:
    with pytest.raises(StudyError, match="no trial 9"):
        run_final(project, trial=9, machine=MACHINE)
    with pytest.raises(StudyError, match="no study 'other'"):
        run_final(project, "other", machine=MACHINE)


def test_an_ensemble_without_networks_says_how_to_get_some(project: ProjectPaths, result: FinalResult) -> None:
    record = study_record(project, None)
    (other,) = {0, 1} - {result.trial.number}
    _, networks = fold_networks(record, other)
    assert networks
    kept = [path for network in networks for path in (network.weights, network.other) if path is not None]
    hidden = [path.rename(path.with_suffix(".hidden")) for path in kept]
    try:
        with pytest.raises(StudyError) as refused:
            run_final(project, trial=other, ensemble=True, machine=MACHINE)
    finally:
        for path in hidden:
            path.rename(path.with_suffix(".safetensors"))
    said = str(refused.value)
    assert f"the fold networks of trial {other} were not kept" in said
    assert f"hpsearch export --toml FILE --trial {other}" in said
    assert "hpsearch train --config FILE --folds 2" in said


def test_choices_are_on_record_and_in_the_weights_file(result: FinalResult) -> None:
    chosen = read_record(SelectedPostprocessing, result.paths.choices)
    assert chosen == result.chosen
    assert chosen.source == f"refits of trial {result.trial.number}"
    assert [each.name for each in chosen.decisions] == ["flips", "threshold", "clean", "ensemble"]
    assert all(each.taken == (each.gain.low > 0) for each in chosen.decisions)
    info = Predictor.load(result.paths.model, device="cpu", threads=1)
    assert info.choices == chosen.choices
    assert bool(result.chosen_test) == (chosen.choices != Postprocessing())


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
    found = score_folder(tmp_path, truths).mean().to_dict()
    assert {name: interval.mean for name, interval in result.ensemble.official.items()} == pytest.approx(found)


def test_an_evaluation_that_is_killed_midway_and_one_of_a_few_images_are_counted(
    project: ProjectPaths, result: FinalResult, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (noted,) = result.evaluations
    assert noted == result.evaluation
    found = find_evaluation(project, noted.id)
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

    def kill_at_the_first_score(pool: LocalPool, job: Job, **more: Any) -> Any:
        if isinstance(job, CountJob):
            raise KilledError
        return run_job(pool, job, **more)

    def prepare_two(data: DataConfig, root: Path, **more: Any) -> Prepared:
        return prepare_test(dataclasses.replace(data, n_final_test=2), root, **more)

    run_job, prepare_test = final_run.run_job, final_run.prepare_test
    with monkeypatch.context() as killing:
        killing.setattr(final_run, "run_job", kill_at_the_first_score)
        killing.setattr(final_run, "prepare_test", prepare_two)
        with pytest.raises(KilledError):
            run_final(other, machine=MACHINE, n_seeds=2)
    whole = run_final(other, machine=MACHINE, n_seeds=2)
    assert whole is not None
    assert [(evaluation.n_images, evaluation.score is None) for evaluation in whole.evaluations] == [
        (4, False),
        (2, True),
        (4, False),
    ]
    assert n_seen(whole.evaluation, whole.evaluations[1:2]) == 2
    text = "\n".join(describe(whole))
    assert "These 4 test images had been evaluated before: 2 evaluations of 1 configuration" in text
    assert "(not finished)" in text


def test_every_look_at_the_test_set_is_counted_and_a_search_that_goes_on_after_one_is_marked(
    project: ProjectPaths, result: FinalResult
) -> None:
    assert [evaluation.trial for evaluation in result.evaluations] == [result.trial.number]
    assert (result.n_evaluations_before, result.n_trials_after) == (0, 0)
    dataset = project.root / "ISIC-2017"
    settings = ("study.pruner=none", "study.sampler=random", "study.trials=3", "study.confirm=0")
    run(project.root, tiny_config(dataset, *settings))
    steps: list[str] = []
    tracker = FakeView(*[TrackingError("away")] * 9)
    again = run_final(project, trial=0, machine=MACHINE, on_step=steps.append, tracker=tracker)
    assert again is not None
    assert any(step.startswith("note on the test split: 8/3/4 training/validation/test pairs") for step in steps)
    assert again.undelivered > 0
    assert again.tracking_error == "away"
    assert (len(again.evaluations), again.n_trials_after) == (2, 1)
    # Near-duplicates were looked for once: the images are the same.
    assert len(list(project.cache.glob("near-duplicates-*.json"))) == 1
    assert again.leaks == result.leaks
    n_entries = len(project.looks.read_text().splitlines())
    # The same again is the stored result, and no evaluation; the zip is made of the stored masks.
    said: list[str] = []
    stored = run_final(project, trial=0, machine=MACHINE, submission=True, on_step=said.append)
    assert stored == dataclasses.replace(again, undelivered=0, tracking_error="")
    assert said[-1] == "trial 0 was evaluated on these images before; this is the stored result"
    assert len(project.looks.read_text().splitlines()) == n_entries
    assert stored.paths.submission.is_file()
    text = "\n".join(describe(again))
    assert "4 test images had been evaluated before: 1 evaluation of 1 configuration" in text
    assert "1 trial of this study began after its first evaluation" in text
    rows = study_rows(study_record(project, None))
    assert {final.n_trials_after for final in rows.finals} == {1}
