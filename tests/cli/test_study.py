from __future__ import annotations

from pathlib import Path

import pytest
from click.testing import CliRunner

from hpsearch.cli import group
from hpsearch.paths import ProjectPaths
from hpsearch.tuning import status as statuses
from hpsearch.tuning.coordinator import Stop
from hpsearch.tuning.listener import Silent
from hpsearch.tuning.record import StudyRecord
from hpsearch.tuning.status import study_status
from tests.tuning.in_process import workers_in_process
from tests.tuning.studies import run, tiny_config, write_tiny_dataset


def output_of(*arguments: str) -> str:
    result = CliRunner().invoke(group, arguments)
    assert result.exit_code == 0, result.output
    return result.output


class _StopAfterAnEpoch(Silent):
    def __init__(self, stop: Stop) -> None:
        self._stop = stop

    def epoch_ended(self, trial: int, fold: int, row: object) -> None:
        self._stop.request()


def test_a_stopped_study_says_what_it_has_and_how_to_go_on_and_that_it_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    project = tmp_path / "a project"
    stop = Stop()
    config = tiny_config(write_tiny_dataset(tmp_path), "study.trials=1", "study.pruner=none")
    with workers_in_process():
        run(project, config, stop=stop, listener=_StopAfterAnEpoch(stop))

    shown = output_of("status", "--out", str(project))
    assert "study tiny: 0/1 trials (none ended); not running" in shown
    assert "trial 0, fold 0 of 2, epoch 1 of 2:" in shown
    assert f"go on with it: hpsearch study --study tiny --out '{project}'" in shown

    # As another terminal would see it while it runs, with no trial ended yet: by what the plan measured.
    record = StudyRecord.open(ProjectPaths(project).study("tiny"))
    plan = record.plan()
    assert plan is not None
    record.write_plan({**plan, "steps": [{"flops": 10**18, "train_s": 10.0, "eval_s": 1.0}]})
    with monkeypatch.context() as patched:
        patched.setattr(statuses.lock, "is_held", lambda _: True)
        eta_s = study_status(ProjectPaths(project), "tiny").eta_s
    record.write_plan(plan)
    spent_s = sum(row["train_s"] + row["eval_s"] for row in record.fit(0, 0).epochs())
    # Two folds of two epochs, each of 6 images that are trained on and 5 that are scored.
    assert eta_s == pytest.approx(2 * 2 * (6 * 10.0 + 5 * 1.0) - spent_s)

    with workers_in_process():
        shown = output_of("study", "--study", "tiny", "--out", str(project), "--tracking", "none", "--threads", "1")
    assert "study tiny is continued: 0 of 1 trials done, 1 goes on where it stopped" in shown
    assert f"hpsearch final --best --study tiny --out '{project}'" in shown
    assert "go on with it" not in output_of("status", "--out", str(project))
