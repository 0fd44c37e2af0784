from __future__ import annotations

from pathlib import Path

from hpsearch import tracked_runs as runs
from tests.recorded import FakeStudy

SCORE = {"mean": 0.87, "low": 0.86, "high": 0.88}
CLAIMS = {
    "corrected": {**SCORE, "mean": 0.851},
    "predicted": {"mean": 0.851, "low": 0.83, "high": 0.872},
    "chosen": {
        "choices": {"threshold": 0.4, "flips": False, "clean": False, "ensemble": False},
        "decisions": [],
        "n_images": 20,
        "source": "first fits of trial 0",
    },
    "chosen_test": {"dice": SCORE},
    "ensemble": {"n_networks": 2, "test": {"dice": {**SCORE, "mean": 0.88}}, "official": {}, "gain": {}},
    "test_set": "0123",
    "n_looks": 3,
    "leaks": [{"a": "x", "b": "y"}],
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
    assert all(runs.is_metric(point.key) for point in content.points)


def test_second_fits_are_found_again_by_their_tags(tmp_path: Path) -> None:
    study = FakeStudy(tmp_path, overrides=("study.confirm=2", "study.trials=2"))
    study.trial()
    study.trial()
    assert not runs.study_run(study.record, study.record.trials()).is_complete
    study.confirm(1, 0)
    second = study.record.second(1)
    assert second is not None
    content = runs.second_run(study.record, second)
    assert content.key == "second 1" == runs.key_of(content.tags)
    assert content.key in runs.run_keys(study.record.paths)
    assert content.is_complete
    ended = [each.ended_at for each in study.record.second_records()]
    whole = runs.study_run(study.record, study.record.trials())
    assert whole.ended_ms == round(max(each or 0 for each in ended) * 1000)
