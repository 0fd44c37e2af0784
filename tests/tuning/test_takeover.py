from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from hpsearch import paths
from hpsearch.paths import ProjectPaths
from hpsearch.store.record import StudyRecord, TrialRecord
from hpsearch.tuning import takeover
from hpsearch.tuning.ownership import Asked
from tests.search.studies import tiny_config


@pytest.fixture
def record(tmp_path: Path) -> StudyRecord:
    return StudyRecord.create(ProjectPaths(tmp_path).study("tiny"), tiny_config(tmp_path))


def begin(record: StudyRecord, number: int, *, n_epochs: int = 1, **more: object) -> TrialRecord:
    """A trial as its coordinator left it in the midst of fold 0."""
    trial = TrialRecord(
        number=number, params={"unet.depth": 1}, config=record.config.to_dict(), began_at=10.0, owner="dead", **more
    )  # type: ignore[arg-type]
    record.write_trial(trial)
    fit = record.fit(number, 0).paths
    fit.root.mkdir(parents=True)
    fit.last.write_bytes(b"a checkpoint")
    np.save(fit.scores, np.full((n_epochs, 3), 0.5, np.float32))
    for epoch in range(1, n_epochs + 1):
        paths.append_line(fit.epochs, json.dumps({"epoch": epoch}))
    return trial


def test_a_trial_goes_on_in_a_folder_of_its_own_from_the_old_checkpoint(record: StudyRecord) -> None:
    begin(record, 5, decisions=({"drop": False, "fold": 0, "epoch": 1},))
    taken = takeover.take_up(record, Asked(30, {}, draw=5, history=(5,), owner="me"))
    assert taken is not None
    assert (taken.trial.number, taken.trial.place, taken.trial.owner, taken.outcome) == (30, 5, "me", None)
    assert taken.trial.decisions == record.trial(5, as_lost=False).decisions
    assert record.fit(30, 0).paths.last.read_bytes() == b"a checkpoint"
    assert record.fit(30, 0).scores().shape == (1, 3)


def test_what_the_old_owner_writes_later_counts_for_nothing(record: StudyRecord) -> None:
    old = begin(record, 5)
    takeover.take_up(record, Asked(30, {}, history=(5,), owner="me"))
    ended = TrialRecord(**{**vars(old), "outcome": "full", "value": 0.9, "ended_at": 20.0})
    record.write_trial(ended)
    assert record.trial(5).outcome == "lost"
    assert record.trial(5).value is None
    assert "trial 30" in record.trial(5).reason


def test_a_trial_that_was_on_record_as_ended_ends_as_it_was(record: StudyRecord) -> None:
    begin(record, 5, outcome="full", value=0.7, ended_at=20.0)
    taken = takeover.take_up(record, Asked(30, {}, history=(5,), owner="me"))
    assert taken is not None
    assert (taken.outcome, taken.value, taken.trial.outcome) == ("full", 0.7, None)


def test_a_trial_that_was_let_go_of_goes_on_where_it_is(record: StudyRecord) -> None:
    begin(record, 5)
    taken = takeover.take_up(record, Asked(5, {}, owner="me"))
    assert taken is not None
    assert (taken.trial.number, taken.trial.owner, taken.outcome) == (5, "me", None)
    assert record.trial(5).outcome is None


def test_a_retry_that_died_before_it_was_on_record_is_passed_over(record: StudyRecord) -> None:
    begin(record, 5)
    taken = takeover.take_up(record, Asked(40, {}, history=(5, 30), owner="me"))
    assert taken is not None
    assert record.fit(40, 0).paths.last.is_file()
    assert takeover.take_up(record, Asked(41, {}, history=(12,), owner="me")) is None


def test_a_trial_that_ends_every_coordinator_is_given_up_but_not_one_that_gets_on(record: StudyRecord) -> None:
    for number in (1, 2, 3, 4):
        begin(record, number, n_epochs=2)
    stuck = takeover.take_up(record, Asked(50, {}, history=(1, 2, 3, 4), owner="me"))
    assert stuck is not None
    assert stuck.outcome == "failed"
    for number in (11, 12, 13, 14):
        begin(record, number, n_epochs=number - 10)
    moving = takeover.take_up(record, Asked(51, {}, history=(11, 12, 13, 14), owner="me"))
    assert moving is not None
    assert moving.outcome is None
