from __future__ import annotations

import json
from pathlib import Path

import optuna
import pytest

from hpsearch.errors import ConfigError
from hpsearch.paths import ProjectPaths
from hpsearch.search.new_trials import enqueue, next_params, read_params
from hpsearch.store.record import StudyRecord
from tests.search.studies import run, tiny_config, write_tiny_dataset


def toml(folder: Path, text: str) -> Path:
    path = folder / "my.toml"
    path.write_text(text)
    return path


def test_what_the_file_does_not_say_is_as_in_the_default_configuration(tmp_path: Path) -> None:
    config = tiny_config(tmp_path)
    assert read_params(toml(tmp_path, "[unet]\ndepth = 2\n"), config) == {"unet.depth": 2, "train.lr": 0.05}


def test_the_configuration_of_a_trial_can_be_enqueued_as_it_was_saved(tmp_path: Path) -> None:
    config = tiny_config(tmp_path)
    params = {"unet.depth": 2, "train.lr": 0.2}
    assert read_params(toml(tmp_path, config.with_params(params).to_toml()), config) == params


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("[unet]\ndepht = 2\n", "unknown setting 'unet.depht'"),
        ("[unet]\ndepth = 3\n", r"unet\.depth = 3 lies outside the search \[1, 2\]"),
        ("[train]\nepochs = 9\n", r"train\.epochs = 9 is not searched and is 2 in this study"),
        ("[unet\n", "cannot be read as TOML"),
        ("[train]\nlr = 'fast'\n", r"train\.lr must be a number"),
    ],
)
def test_what_cannot_be_enqueued_is_refused_with_file_and_key(tmp_path: Path, text: str, reason: str) -> None:
    with pytest.raises(ConfigError, match=rf"my\.toml.*{reason}"):
        read_params(toml(tmp_path, text), tiny_config(tmp_path))


def test_a_configuration_is_enqueued_once(tmp_path: Path) -> None:
    record = StudyRecord.create(ProjectPaths(tmp_path).study("tiny"), tiny_config(tmp_path))
    mine, default = {"unet.depth": 2, "train.lr": 0.2}, {"unet.depth": 1, "train.lr": 0.05}
    assert enqueue(record, [mine, mine, default]) == ["is enqueued", "is already enqueued", "is already trial 0"]
    assert enqueue(record, [mine]) == ["is already enqueued"]
    assert next_params(record, []) == mine


@pytest.mark.usefixtures("in_process")
def test_enqueued_configurations_come_next_in_their_order(tmp_path: Path) -> None:
    config = tiny_config(write_tiny_dataset(tmp_path), "study.pruner=none", "train.epochs=1", "train.batch_size=8")
    wanted = [{"unet.depth": 2, "train.lr": 0.2}, {"unet.depth": 1, "train.lr": 0.1}]
    record = run(tmp_path, config, enqueued=wanted).record
    trials = record.trials()
    assert [trial.source for trial in trials] == ["default", "enqueued", "enqueued"]
    assert [trial.params for trial in trials[1:]] == wanted
    told = optuna.load_study(study_name="tiny", storage=f"sqlite:///{tmp_path / 'hpsearch.db'}").trials
    assert [trial.params for trial in told[1:]] == wanted
    assert {trial.state.name for trial in told} == {"COMPLETE"}
    assert json.loads(record.paths.enqueued.read_text())["params"] == wanted
