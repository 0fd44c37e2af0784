"""A study that version 0.1 recorded: it is shown, reported, continued and retrained.

`tests/recorded_0_1` holds the study's folder. Its images are drawn anew, to the same bytes.
"""

from __future__ import annotations

import shutil
import struct
import zlib
from pathlib import Path

import numpy as np
import optuna
import pytest
from numpy.typing import NDArray

from hpsearch import config as configs
from hpsearch.final import run_final
from hpsearch.paths import ProjectPaths
from hpsearch.report.page import write_report
from hpsearch.search.autotune import MachineChoice
from hpsearch.search.status import study_status
from hpsearch.store.record import StudyRecord
from hpsearch.study import run_study
from tests.search.in_process import workers_in_process

RECORDED = Path(__file__).parent / "recorded_0_1"
MACHINE = MachineChoice("cpu", 1, 1)


def stored_png(pixels: NDArray[np.uint8]) -> bytes:
    """Return a PNG of (H, W) or (H, W, 3) pixels without compression: its bytes depend on no library's version."""
    height, width = pixels.shape[:2]
    rows = b"".join(b"\0" + row.tobytes() for row in pixels)
    deflate = struct.pack("<BHH", True, len(rows), 65535 - len(rows)) + rows

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2 if pixels.ndim == 3 else 0, 0, 0, 0)
    zipped = b"\x78\x01" + deflate + struct.pack(">I", zlib.adler32(rows))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zipped) + chunk(b"IEND", b"")


def draw(folder: Path, n: int = 20, size: int = 32) -> None:
    """Write images of a dark disc on bright skin, and their masks."""
    for name in ("photos", "masks"):
        (folder / name).mkdir(parents=True)
    rows, columns = np.mgrid[:size, :size]
    for number in range(n):
        inside = (rows - 10 - number % 12) ** 2 + (columns - 9 - 5 * number % 13) ** 2 < (4 + number % 5) ** 2
        image = np.full((size, size, 3), (210, 160, 140), np.uint8)
        image[inside] = (110, 70, 60 + number)
        image += ((rows * 7 + columns * 13 + number * 29) % 17).astype(np.uint8)[..., None]
        (folder / "photos" / f"lesion{number:02d}.png").write_bytes(stored_png(image))
        (folder / "masks" / f"lesion{number:02d}.png").write_bytes(stored_png(inside.astype(np.uint8) * 255))


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ProjectPaths:
    draw(tmp_path)
    shutil.copytree(RECORDED, tmp_path, dirs_exist_ok=True)
    # Its settings hold relative paths.
    monkeypatch.chdir(tmp_path)
    return ProjectPaths(tmp_path)


def test_its_trials_are_shown_with_the_words_of_today(project: ProjectPaths) -> None:
    status = study_status(project, "recorded")
    assert [trial.outcome for trial in status.trials] == ["complete"] * 5
    assert status.n_counted == 5
    assert status.best is not None
    assert status.best.number == 3
    assert status.is_over
    StudyRecord.open(project.study("recorded")).verify()


def test_its_report_names_the_winner(project: ProjectPaths) -> None:
    page = write_report(StudyRecord.open(project.study("recorded"))).read_text()
    assert "trial 3" in page


def test_it_continues_with_more_trials_and_its_winner_is_retrained(project: ProjectPaths) -> None:
    study = project.study("recorded")
    before = StudyRecord.open(study).trials()
    config = configs.load(study.toml, ["study.trials=6"])
    with workers_in_process():
        record = run_study(project, "recorded", config, machine=MACHINE).record
        result = run_final(project, "recorded", machine=MACHINE)
    assert record.trials()[:5] == before
    assert record.trial(5).outcome in ("complete", "pruned")
    shown = optuna.load_study(study_name="recorded", storage=f"sqlite:///{project.optuna_db}").trials
    assert len(shown) == 6
    assert result is not None
    assert result.n_test == 4
