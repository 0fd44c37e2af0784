from __future__ import annotations

from pathlib import Path

import pytest
from click.testing import CliRunner

from hpsearch.cli import group
from hpsearch.paths import ProjectPaths
from hpsearch.tuning import status as statuses
from hpsearch.tuning.coordinator import Stop
from hpsearch.tuning.listener import Silent
from hpsearch.tuning.status import study_status
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
    run(project, config, stop=stop, listener=_StopAfterAnEpoch(stop))

    shown = output_of("status", "--out", str(project))
    assert "study tiny: 0/1 trials (none ended); not running" in shown
    assert "trial 0, fold 0 of 2, epoch 1 of 2:" in shown
    assert f"go on with it: hpsearch study --study tiny --out '{project}'" in shown

    # As another terminal would see it while it runs, with no trial ended yet.
    with monkeypatch.context() as patched:
        patched.setattr(statuses.lock, "is_held", lambda _: True)
        eta_s = study_status(ProjectPaths(project), "tiny").eta_s
    assert eta_s is not None
    assert eta_s > 0

    shown = output_of("study", "--study", "tiny", "--out", str(project), "--tracking", "none", "--threads", "1")
    assert "study tiny is continued: 0 of 1 trials done, 1 goes on where it stopped" in shown
    assert f"hpsearch final --best --study tiny --out '{project}'" in shown
    assert "go on with it" not in output_of("status", "--out", str(project))
