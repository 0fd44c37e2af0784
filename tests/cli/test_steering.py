"""What a second terminal can see of a study's race, and ask of it."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest
from click.testing import CliRunner

from hpsearch.cli import group
from hpsearch.errors import HpsearchError
from hpsearch.store import lock
from hpsearch.store.trials import PruneDecision
from tests.recorded import FakeStudy


def output_of(*arguments: str) -> str:
    result = CliRunner().invoke(group, arguments)
    assert result.exit_code == 0, result.output
    return result.output


def test_status_of_a_trial_shows_every_decision(tmp_path: Path) -> None:
    study = FakeStudy(tmp_path)
    study.trial()
    raced = study.trial("pruned")
    kept = PruneDecision(
        drop=False,
        estimate=0.7,
        fold=0,
        epoch=1,
        reason="after: 0.01 ± 0.02",
        d=-0.012,
        se=0.02,
        s=0.006,
        p=0.29,
        against=0,
    )
    dropped = dataclasses.replace(kept, drop=True, epoch=3, estimate=0.6543, d=0.11, se=0.03, p=0.0004)
    study.record.write_evaluation(dataclasses.replace(raced, decisions=(kept, dropped)))
    lines = output_of("status", "--out", str(tmp_path), "--trial", "1").splitlines()
    assert lines[0].startswith("trial 1 of study fake: pruned, dice 0.6100")
    assert lines[1].strip() == raced.reason
    assert lines[2:] == [
        "  fold 1, epoch 1: continues. Its expected score is at best 0.0120 above that of trial 0 (± 0.0200). In "
        "this best case, it wins with a probability of 29.0%.",
        "  fold 1, epoch 3: pruned. Its expected score is 0.1100 below that of trial 0 (± 0.0300). It wins with a "
        "probability of less than 0.1%.",
        "  To win, a trial must exceed the expected score of the leading trial by 0.003.",
        "  A trial is pruned below 1%, and in a best case below 1% (n + 1), at most 20%, if n other trials have "
        "finished a fold.",
    ]
    assert "no pruning decisions" in output_of("status", "--out", str(tmp_path), "--trial", "0")
    others = dataclasses.replace(kept, reason="in fold 1 at epoch 1: kept by Optuna's MedianPruner")
    study.record.write_evaluation(dataclasses.replace(raced, decisions=(others,)))
    assert "continues: kept by Optuna's MedianPruner" in output_of("status", "--out", str(tmp_path), "--trial", "1")


def test_status_names_workers_of_this_run_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    study, here = FakeStudy(tmp_path), ("status", "--out", str(tmp_path))
    trial = dataclasses.replace(study.begin(), workers={"0": "lab1:1", "1": "lab2:2"})
    study.fold(trial, 0)
    study.epoch(trial, 1)
    study.record.write_evaluation(trial)
    shown = output_of(*here)
    assert re.search(r"^stopped in +dice\ntrial 0, fold 2 of 2, epoch 1 of 3 +0\.\d{4}$", shown, re.MULTILINE)
    assert not re.search("runs|lab|images/s| $", shown, re.MULTILINE)
    monkeypatch.setattr(lock, "is_held", lambda _: True)
    assert re.search(r"^lab2:2 +trial 0, fold 2 of 2, epoch 1 of 3 .* images/s$", output_of(*here), re.MULTILINE)
    study.record.forget_workers()
    assert study.record.trial(0).workers == {"0": "lab1:1"}
    shown = output_of(*here)
    assert re.search(r"^\(waiting\) +trial 0, fold 2 of 2, epoch 1 of 3 +0\.\d{4}$", shown, re.MULTILINE)


def test_the_commands_that_status_shows_name_the_cluster_of_the_latest_run(tmp_path: Path) -> None:
    study, here = FakeStudy(tmp_path, overrides=("study.trials=1",)), ("status", "--out", str(tmp_path))
    trial = study.begin()
    study.record.write_plan({**(study.record.plan() or {}), "scheduler": "tcp://lab:8786"})
    assert f"hpsearch study --study fake --out {tmp_path} --cluster tcp://lab:8786\n" in output_of(*here)
    for fold in range(2):
        study.fold(trial, fold)
    study.end(trial)
    assert f"hpsearch final --best --study fake --out {tmp_path} --cluster tcp://lab:8786\n" in output_of(*here)


def test_status_of_an_infeasible_trial_says_why(tmp_path: Path) -> None:
    study = FakeStudy(tmp_path)
    study.trial("infeasible")
    shown = output_of("status", "--out", str(tmp_path), "--trial", "0")
    assert "needs about 9.1 GiB" in shown
    assert "no pruning decisions" not in shown


def refusal_of(*arguments: str) -> str:
    result = CliRunner().invoke(group, arguments)
    assert isinstance(result.exception, HpsearchError)
    return str(result.exception)


def test_stop_of_a_trial_asks_the_running_study_and_refuses_what_cannot_be_stopped(
    tmp_path: Path,
) -> None:
    study = FakeStudy(tmp_path)
    study.trial()
    study.begin()
    here = ("stop", "--out", str(tmp_path), "--trial")
    assert "is not running" in refusal_of(*here, "1")
    with lock.hold(study.record.paths):
        assert "trial 0 of study 'fake' has ended already: complete" in refusal_of(*here, "0")
        assert "has no trial 7" in refusal_of(*here, "7")
        output_of(*here, "1")
    assert study.record.paths.trial_stop_request(1).is_file()
    assert not study.record.paths.stop_request.exists()
