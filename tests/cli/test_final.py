from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
from click.testing import CliRunner

from hpsearch.cli import final as command
from hpsearch.cli import group


def test_a_final_that_mlflow_lacks_ends_with_why_and_the_command_that_retries(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    result = SimpleNamespace(study="lesions", undelivered=1, tracking_error="the disk is full")
    monkeypatch.setattr("hpsearch.final.run_final", lambda *_, **__: result)
    monkeypatch.setattr(command, "describe", lambda _: ["the table"])
    (tmp_path / "mlflow.db").touch()
    done = CliRunner().invoke(group, ["final", "--out", str(tmp_path)])
    assert done.exit_code == 0, done.output
    table, step, last = done.output.splitlines()
    assert table == "the table"
    assert step == f"Next: hpsearch report --study lesions --out {tmp_path}"
    assert "(the disk is full)" in last
    assert last.endswith(f"hpsearch track --study lesions --out {tmp_path}")
