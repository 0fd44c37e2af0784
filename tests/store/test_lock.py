from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from hpsearch.errors import StudyLockedError
from hpsearch.paths import ProjectPaths
from hpsearch.store import lock

HOLD = """
import sys, time
from pathlib import Path
from hpsearch.paths import ProjectPaths
from hpsearch.store import lock
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


def test_a_locked_study_names_the_commands_that_show_and_end_it(tmp_path: Path) -> None:
    study = ProjectPaths(tmp_path / "a project").study("mine")
    with lock.hold(study), pytest.raises(StudyLockedError) as refused, lock.hold(study):
        pass
    for command in ("status", "stop"):
        assert f"`hpsearch {command} --study mine --out '{tmp_path}/a project'`" in str(refused.value)


def test_a_study_without_settings_leaves_no_folder_that_was_made_for_it(tmp_path: Path) -> None:
    study = ProjectPaths(tmp_path / "new").study("mine")
    with lock.hold(study):
        (study.root / "study.log").write_text("a line")
    assert list(tmp_path.iterdir()) == []
    with lock.hold(study):
        study.project.cache.mkdir()
    # Decoded images were worth something.
    assert [path.name for path in study.project.root.iterdir()] == ["cache"]
    for text in ("begun", "continued"):
        with lock.hold(study):
            study.toml.write_text(text)
    assert study.toml.read_text() == "continued"
    (study.project.study("other").root).mkdir()
    with lock.hold(study.project.study("other")):
        pass
    assert study.project.study("other").root.is_dir()


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
