from __future__ import annotations

import csv
import json

import numpy as np
import pytest

from hpsearch.config import stable_seed
from hpsearch.errors import StudyError
from hpsearch.final import FinalResult, run_final
from hpsearch.paths import ProjectPaths
from hpsearch.training.metrics import SCORES, PixelCounts
from hpsearch.tuning.planning import MachineChoice
from hpsearch.tuning.record import load_array
from tests.tuning.studies import run, tiny_config, write_tiny_dataset

MACHINE = MachineChoice("cpu", 1, 1)


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> ProjectPaths:
    root = tmp_path_factory.mktemp("final")
    config = tiny_config(write_tiny_dataset(root), "study.pruner=none", "study.sampler=random", "study.trials=2")
    run(root, config)
    return ProjectPaths(root)


@pytest.fixture(scope="module")
def result(project: ProjectPaths) -> FinalResult:
    found = run_final(project, n_seeds=2, machine=MACHINE)
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
    assert result.paths.model.read_bytes() == weights[0]
    for index in range(2):
        rows = result.paths.seed(index).epochs.read_text().splitlines()
        assert [json.loads(row)["epoch"] for row in rows] == [1, 2]
    assert stable_seed(0, "final", 0) != stable_seed(0, "final", 1)


def test_what_final_prints_is_on_record(result: FinalResult) -> None:
    table = json.loads(result.paths.result.read_text())
    assert table["test"]["jaccard"]["mean"] == result.test["jaccard"].mean
    assert table["trial"] == result.trial.number
    assert result.paths.panels.read_bytes().startswith(b"\x89PNG")
    assert result.paths.curves.read_bytes().startswith(b"\x89PNG")


def test_the_promise_is_the_trials_own_value(project: ProjectPaths, result: FinalResult) -> None:
    assert result.trial.value == pytest.approx(result.cv.mean, abs=1e-9)
    if result.trial.number != 0:
        assert result.against_default is not None


def test_only_full_trials_can_be_final(project: ProjectPaths) -> None:
    with pytest.raises(StudyError, match="no trial 9"):
        run_final(project, trial=9, machine=MACHINE)
    with pytest.raises(StudyError, match="no study 'other'"):
        run_final(project, "other", machine=MACHINE)
