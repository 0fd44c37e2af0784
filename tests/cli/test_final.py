from __future__ import annotations

import dataclasses
from pathlib import Path
from types import SimpleNamespace

import pytest
from click.testing import CliRunner

from hpsearch.cli import final as module
from hpsearch.cli import group
from hpsearch.errors import StudyError
from hpsearch.final.run import run_final
from tests.cli.test_main import exit_code
from tests.recorded import FakeStudy


def test_a_final_that_mlflow_lacks_ends_with_why_and_the_command_that_retries(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    result = SimpleNamespace(study="lesions", undelivered=1, tracking_error="the disk is full")
    monkeypatch.setattr("hpsearch.store.record.study_record", lambda *_: SimpleNamespace(name="lesions"))
    monkeypatch.setattr("hpsearch.final.run.run_final", lambda *_, **__: result)
    monkeypatch.setattr(module, "describe", lambda _: ["the table"])
    (tmp_path / "mlflow.db").touch()
    done = CliRunner().invoke(group, ["final", "--out", str(tmp_path)])
    assert done.exit_code == 0, done.output
    table, step, last = done.output.splitlines()
    assert table == "the table"
    assert step == f"Next: hpsearch report --study lesions --out {tmp_path}"
    assert "(the disk is full)" in last
    assert last.endswith(f"hpsearch track --study lesions --out {tmp_path}")


def test_a_final_forgets_the_workers_of_a_study_that_has_stopped(tmp_path: Path) -> None:
    study = FakeStudy(tmp_path)
    study.record.write_evaluation(dataclasses.replace(study.begin(), workers={"0": "lab1:1"}))
    with pytest.raises(StudyError, match="is still open"):
        run_final(study.project, trial=0)
    assert study.record.trial(0).workers == {}


def test_a_choice_of_studies_is_asked_for_before_anything_else_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("one", "two"):
        FakeStudy(tmp_path, name=name)
    assert exit_code("final", "--out", str(tmp_path)) == 1
    said = capsys.readouterr()
    assert said.out == ""
    assert "several studies" in said.err
