from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from hpsearch.errors import StudyLockedError
from hpsearch.paths import ProjectPaths
from hpsearch.tuning import lock

HOLD = """
import sys, time
from pathlib import Path
from hpsearch.paths import ProjectPaths
from hpsearch.tuning import lock
with lock.hold(ProjectPaths(Path(sys.argv[1])).study("mine")):
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def holder(tmp_path: Path) -> subprocess.Popen[str]:
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    yield process  # type: ignore[misc]
    process.kill()
    process.wait()
    process.stdout.close()


def test_a_second_process_is_told_who_holds_the_study(tmp_path: Path, holder: subprocess.Popen[str]) -> None:
    study = ProjectPaths(tmp_path).study("mine")
    assert lock.is_held(study)
    with (
        pytest.raises(StudyLockedError, match=rf"'mine' is being run by process {holder.pid} on .* since "),
        lock.hold(study),
    ):
        pass


def test_a_dead_holder_does_not_block(tmp_path: Path, holder: subprocess.Popen[str]) -> None:
    study = ProjectPaths(tmp_path).study("mine")
    os.kill(holder.pid, signal.SIGKILL)
    holder.wait()
    assert not lock.is_held(study)
    with lock.hold(study):
        assert str(os.getpid()) in lock.describe_holder(study)


def test_nothing_is_held_after_the_block(tmp_path: Path) -> None:
    study = ProjectPaths(tmp_path).study("mine")
    with lock.hold(study):
        assert study.holder.exists()
    assert not study.holder.exists()
    assert not lock.is_held(study)
