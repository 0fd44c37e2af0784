from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

import optuna
import pytest

from hpsearch.errors import ConfigError, RecordError, StorageError
from hpsearch.search import optuna_view
from hpsearch.search.optuna_view import OptunaView, sqlite_url
from tests.recorded import FakeStudy


@pytest.fixture
def study(tmp_path: Path) -> FakeStudy:
    study = FakeStudy(tmp_path, n_images=20)
    study.trial(**{"train.lr": 0.01, "unet.depth": 3, "unet.base_channels": 8})
    return study


def shown(study: FakeStudy) -> list[optuna.trial.FrozenTrial]:
    return optuna.load_study(study_name="fake", storage=sqlite_url(study.project.optuna_db)).trials


def test_a_pruned_trial_has_intermediate_values_and_its_estimate_and_no_value(study: FakeStudy) -> None:
    study.trial("pruned")
    OptunaView(study.record.paths).update()
    trial = shown(study)[1]
    assert (trial.state.name, trial.value) == ("PRUNED", None)
    assert trial.user_attrs["estimate"] == study.record.trial(1).value
    means = [float(scores.mean()) for scores in study.record.fit(1, 0).scores()]
    assert list(trial.intermediate_values.values()) == pytest.approx(means)


def test_a_running_trial_is_finished_in_place(study: FakeStudy) -> None:
    view = OptunaView(study.record.paths)
    trial = study.begin()
    view.update()
    assert shown(study)[1].state.name == "RUNNING"
    study.fold(trial, 0)
    study.fold(trial, 1)
    study.end(trial)
    view.update()
    (_, ended) = shown(study)
    assert (ended.state.name, ended.value) == ("COMPLETE", study.record.trial(1).value)


def test_a_running_trial_without_scores_is_finished_in_place(study: FakeStudy) -> None:
    view = OptunaView(study.record.paths)
    trial = study.begin()
    view.update()
    study.record.write_evaluation(dataclasses.replace(trial, outcome="failed", reason="its worker died"))
    view.update()
    (_, ended) = shown(study)
    assert (ended.state.name, ended.user_attrs["reason"]) == ("FAIL", "its worker died")


def test_a_database_that_is_deleted_while_it_is_open_is_made_anew(study: FakeStudy) -> None:
    view = OptunaView(study.record.paths)
    view.update()
    study.project.optuna_db.unlink()
    study.trial()
    view.update()
    assert [trial.value for trial in shown(study)] == [trial.value for trial in study.record.trials()]


def test_a_damaged_database_is_set_aside(study: FakeStudy) -> None:
    study.project.optuna_db.write_bytes(b"not a database" * 100)
    OptunaView(study.record.paths).update()
    assert len(shown(study)) == 1
    assert study.project.optuna_db.with_name("hpsearch.db.damaged").is_file()


def test_a_database_whose_text_was_changed_is_set_aside(study: FakeStudy) -> None:
    OptunaView(study.record.paths).update()
    storage = optuna.storages.RDBStorage(sqlite_url(study.project.optuna_db))
    with storage.engine.begin() as connection:
        connection.exec_driver_sql("UPDATE trial_params SET distribution_json = '{'")
    OptunaView(study.record.paths).update()
    assert shown(study)[0].value == study.record.trial(0).value
    assert study.project.optuna_db.with_name("hpsearch.db.damaged").is_file()


@pytest.mark.parametrize("fault", [KeyError, ValueError, TypeError, AttributeError])
def test_a_fault_of_the_program_leaves_the_database_of_all_studies(
    study: FakeStudy, fault: type[Exception], monkeypatch: pytest.MonkeyPatch
) -> None:
    view = OptunaView(study.record.paths)
    view.update()
    study.trial()

    def fail(*_: object) -> None:
        raise fault

    monkeypatch.setattr(optuna_view, "_shown_trial", fail)
    with pytest.raises(fault):
        view.update()
    assert len(shown(study)) == 1
    assert not study.project.optuna_db.with_name("hpsearch.db.damaged").exists()


def test_a_database_that_cannot_be_written_is_named_in_one_line(study: FakeStudy) -> None:
    study.project.optuna_db.mkdir()
    view = OptunaView(study.record.paths)
    with pytest.raises(StorageError, match=r"hpsearch\.db cannot be updated: ") as raised:
        view.update()
    assert "\n" not in str(raised.value)
    assert view.n_behind() == 1


def test_params_that_were_changed_in_the_database_are_those_of_the_record_again(study: FakeStudy) -> None:
    OptunaView(study.record.paths).update()
    storage = optuna.storages.RDBStorage(sqlite_url(study.project.optuna_db))
    with storage.engine.begin() as connection:
        connection.exec_driver_sql(
            "UPDATE trial_params SET param_value = param_value + 1 WHERE param_name = 'unet.depth'"
        )
    OptunaView(study.record.paths).update()
    (trial,) = shown(study)
    assert trial.params["unet.depth"] == study.record.trial(0).params["unet.depth"]


def test_a_missing_trial_among_later_ones_is_named(study: FakeStudy) -> None:
    for _ in range(2):
        study.trial()
    study.record.paths.trial(1).trial.unlink()
    with pytest.raises(RecordError, match=r"0001.trial\.json is missing, but later trials exist"):
        study.record.verify()


@pytest.mark.parametrize("content", ["[]", "{}"])
def test_a_result_of_a_fit_that_is_none_is_named(study: FakeStudy, content: str) -> None:
    path = study.record.fit(0, 0).paths.fit
    path.write_text(content)
    with pytest.raises(RecordError, match=r"fit\.json is damaged"):
        study.record.verify()


@pytest.mark.parametrize(
    ("url", "reason"),
    [
        ("postgresql+no_driver://user:secret@host/optuna", "no_driver"),
        ("user:secret@host", "must look like postgresql"),
        ("postgresql+psycopg://user@host:secret/optuna", "must look like postgresql"),
    ],
)
def test_a_storage_that_cannot_be_used_is_refused_without_its_password(
    study: FakeStudy, url: str, reason: str
) -> None:
    with pytest.raises(ConfigError, match=f"^--storage is not a usable database URL: .*{reason}") as raised:
        OptunaView(study.record.paths, url)
    assert "secret" not in str(raised.value)


def test_a_storage_whose_driver_is_missing_names_the_driver(
    study: FakeStudy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "psycopg", None)
    with pytest.raises(ConfigError, match=r"^--storage is not a usable database URL: .*psycopg"):
        OptunaView(study.record.paths, "postgresql+psycopg://user:secret@host/optuna")


def test_a_damaged_database_of_another_place_is_never_moved(study: FakeStudy, tmp_path: Path) -> None:
    other = tmp_path / "other.db"
    other.write_bytes(b"not a database" * 100)
    with pytest.raises(StorageError, match=r"other\.db cannot be updated: "):
        OptunaView(study.record.paths, sqlite_url(other)).update()
    assert other.read_bytes() == b"not a database" * 100
