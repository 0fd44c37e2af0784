from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from hpsearch.config import StudyConfig
from hpsearch.data.cache import Index
from hpsearch.data.decode_pool import Decoders
from hpsearch.data.prepare import PoolCaches
from hpsearch.errors import ConfigError
from hpsearch.final import run_final
from hpsearch.paths import ProjectPaths
from hpsearch.report import trial_rows
from hpsearch.search.autotune import MachineChoice
from hpsearch.search.callbacks import NullCallback
from hpsearch.search.stopping import Stop
from hpsearch.store.fits import load_array
from hpsearch.store.record import StudyRecord
from tests.data.conftest import decoding_process as decoding_process
from tests.data.conftest import one_decoder as one_decoder
from tests.search.studies import everything, run, tiny_config, write_tiny_dataset

EVAL = (40, 48)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_dataset(tmp_path_factory.mktemp("sizes"))


def searched_sizes(dataset: Path, *overrides: str) -> StudyConfig:
    sizes = ("search.data.size=[32, 24, [24, 40]]", "study.eval_size=[40, 48]", "study.pruner=none")
    return tiny_config(dataset, *sizes, "study.sampler=random", *overrides)


@pytest.fixture(scope="module")
def project(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished study of three trials that search the size of the images; not to be changed."""
    root = tmp_path_factory.mktemp("searched")
    run(root, searched_sizes(dataset, "study.trials=3"))
    return root


def record_in(project: Path) -> StudyRecord:
    return StudyRecord.open(ProjectPaths(project).study("tiny"))


def sizes_in(caches: Path) -> list[tuple[int, int]]:
    preparations = [Index.read(path.parent).preparation for path in caches.glob("*/index.json")]
    return sorted((each.height, each.width) for each in preparations)


@pytest.mark.slow
def test_every_listed_size_and_that_of_the_scores_has_a_cache(project: Path) -> None:
    assert sizes_in(project / "cache") == [(24, 24), (24, 40), (32, 32), EVAL]


@pytest.mark.slow
def test_trials_of_all_sizes_are_scored_at_one(project: Path) -> None:
    record = record_in(project)
    seen = {json.dumps(trial.config["data"]["size"]) for trial in record.trials()}
    assert len(seen) > 1
    for trial in record.trials():
        assert trial.outcome == "complete"
        for fold in range(record.n_folds):
            counts = record.fit(trial.number, fold).counts()
            assert np.array_equal(counts.sum(axis=1), np.full(len(counts), EVAL[0] * EVAL[1]))


@pytest.mark.slow
def test_the_true_lesions_are_the_same_for_all_sizes(project: Path) -> None:
    record = record_in(project)
    for fold in range(record.n_folds):
        tables = [record.fit(trial.number, fold).counts() for trial in record.trials()]
        lesions = [table[:, 0] + table[:, 2] for table in tables]
        assert all(np.array_equal(each, lesions[0]) for each in lesions)


@pytest.mark.slow
def test_panels_show_what_was_scored(project: Path) -> None:
    record = record_in(project)
    for number in record.trial_numbers()[:2]:
        cases = trial_rows.trial_cases(record, number)
        assert cases
        assert all(case.image.shape == (*EVAL, 3) and case.pred.shape == EVAL for case in cases)


@pytest.mark.slow
def test_final_scores_at_that_size_too(project: Path, quick_figures: None) -> None:
    record = record_in(project)
    other = next(trial for trial in record.trials() if trial.study_config.data.size != (24, 40))
    result = run_final(ProjectPaths(project), trial=other.number, machine=MachineChoice("cpu", 1, 1))
    assert result is not None
    counts = load_array(result.paths.seed(0).test_counts, ndim=2)
    assert np.array_equal(counts.sum(axis=1), np.full(4, EVAL[0] * EVAL[1]))
    cases = trial_rows.final_cases(record, result.paths, json.loads(result.paths.result.read_text())["test_key"])
    assert all(case.pred.shape == EVAL for case in cases)


@pytest.mark.slow
def test_a_stopped_search_of_sizes_goes_on_as_if_it_had_not_stopped(
    project: Path, dataset: Path, tmp_path: Path
) -> None:
    stop = Stop()

    class StopLater(NullCallback):
        def fold_ended(self, trial: int, fold: int, score: float) -> None:
            if trial == 1:
                stop.request()

    config = searched_sizes(dataset, "study.trials=3")
    assert run(tmp_path, config, stop=stop, callback=StopLater()).stopped
    run(tmp_path, config)
    assert everything(record_in(tmp_path)) == everything(record_in(project))


def test_sizes_of_a_range_are_cached_when_a_trial_wants_them(
    dataset: Path, tmp_path: Path, one_decoder: Decoders
) -> None:
    config = tiny_config(dataset, "search.data.size={low=16, high=48}", "study.eval_size=32")
    caches = PoolCaches(config, tmp_path)
    caches.prepare_listed(config)
    assert sizes_in(tmp_path) == [(32, 32)]
    assert caches.paths(config.with_params({}))[1] is None
    _, truth = caches.paths(config.with_params({"data.size": 17}))
    assert sizes_in(tmp_path) == [(17, 17), (32, 32)]
    assert truth is not None
    assert Index.read(truth).preparation.height == 32


def test_a_search_of_sizes_without_a_size_to_score_at_says_what_to_set(dataset: Path) -> None:
    with pytest.raises(ConfigError, match=r"--set study\.eval_size=32"):
        tiny_config(dataset, "search.data.size=[24, 32]")
