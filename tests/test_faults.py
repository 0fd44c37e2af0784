"""The short form of `benchmarks/faults.py`: studies that are killed, signalled and refused their writes."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from benchmarks import faults

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, empty_mlflow_db: Path) -> faults.Place:
    return faults.Place.make(tmp_path_factory.mktemp("faults"), n_trials=2, mlflow_db=empty_mlflow_db)


def differences(outcomes: list[faults.Outcome]) -> list[str]:
    return [each for outcome in outcomes for each in outcome.differences]


def test_a_study_that_is_killed_again_and_again_ends_as_if_it_had_not_been(place: faults.Place) -> None:
    outcomes = list(faults.disturb_studies(place, 1, 6, ("KILL",), seed=7, prefix="killed"))
    assert differences(outcomes) == []
    assert sum(outcome.n_faults for outcome in outcomes) >= 6


def test_a_study_that_is_signalled_stops_and_goes_on(place: faults.Place) -> None:
    outcomes = list(faults.disturb_studies(place, 1, 4, ("TERM", "INT", "HUP", "STOP"), seed=3, prefix="signalled"))
    assert differences(outcomes) == []
    assert sum(outcome.n_faults for outcome in outcomes) >= 4


def test_a_write_that_fails_is_named_or_survived_and_costs_nothing(place: faults.Place) -> None:
    outcome = faults.fail_every_write(place, every=18)
    assert outcome.differences == []
    assert outcome.n_faults >= 3


def test_a_disk_that_fills_up_is_named_and_costs_nothing(place: faults.Place) -> None:
    probe = place.root / "probe"
    probe.mkdir()
    if (
        shutil.which("mount") is None
        or subprocess.run(["mount", "-t", "tmpfs", "tmpfs", str(probe)], capture_output=True, check=False).returncode
    ):
        pytest.skip("no right to mount")
    subprocess.run(["umount", str(probe)], check=True)
    outcome = faults.fill_the_disk(place, squeezed_kib=(40,))
    assert outcome.differences == []
    assert outcome.n_faults == 1
