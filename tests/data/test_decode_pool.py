"""The decoding subprocess answers for every job, says which file it died of, and ends with its parent."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import psutil
import pytest

from hpsearch.config.data import DataConfig
from hpsearch.data.decode_pool import DecodeError, Decoders, ImageStats, Job
from hpsearch.data.layouts import find_samples
from hpsearch.errors import CacheError


@pytest.fixture
def jobs(tiny_archive: Path) -> list[Job]:
    samples = find_samples(DataConfig(root=str(tiny_archive))).samples
    return [Job(s.image, s.mask, ("random crop", "resize"), 24, 16, s.id) for s in samples]


def test_every_job_is_answered_with_its_pixels(decoding_process: Decoders, jobs: list[Job]) -> None:
    answers = list(decoding_process.decode(jobs))
    assert len(answers) == len(jobs)
    for stats, pixels in answers:
        assert isinstance(stats, ImageStats)
        assert [(image.shape, mask.shape) for image, mask in pixels] == [((24, 16, 3), (24, 16))] * 2
        assert all(set(np.unique(mask)) <= {0, 1} for _, mask in pixels)


def test_the_same_jobs_give_the_same_bytes(decoding_process: Decoders, jobs: list[Job]) -> None:
    first, second = (
        [[array.tobytes() for pair in pixels for array in pair] for _, pixels in answers]
        for answers in (decoding_process.decode(jobs), decoding_process.decode(jobs))
    )
    assert first == second


def test_damage_is_an_answer_too(decoding_process: Decoders, jobs: list[Job], tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_text("no image")
    bad = Job(tmp_path / "a.jpg", jobs[0].mask)
    answers = [stats for stats, _ in decoding_process.decode([jobs[0], bad, jobs[1]])]
    assert isinstance(answers[1], DecodeError)
    assert answers[1].kind == "undecodable file"
    assert isinstance(answers[0], ImageStats)
    assert isinstance(answers[2], ImageStats)


@pytest.mark.slow
def test_answers_that_were_not_awaited_are_not_taken_for_others(jobs: list[Job]) -> None:
    with Decoders(1) as decoders:
        for _ in decoders.decode(jobs):
            break
        assert decoders._process is None
        again = list(decoders.decode(jobs[:1]))
    assert len(again) == 1


def test_a_call_that_is_never_finished_is_ended_by_the_next(jobs: list[Job]) -> None:
    with Decoders(1) as decoders:
        expected = [pixels for _, pixels in decoders.decode(jobs[::-1])]
        unfinished = decoders.decode(jobs)
        next(unfinished)
        answers = decoders.decode(jobs[::-1])
        _, first = next(answers)
        np.testing.assert_equal(first, expected[0])
        # A garbage collection may close it at any time.
        unfinished.close()  # type: ignore[attr-defined]
        np.testing.assert_equal([pixels for _, pixels in answers], expected[1:])


@pytest.mark.slow
def test_death_names_the_file_that_was_read(tmp_path: Path, jobs: list[Job]) -> None:
    # A pipe that nobody writes to holds the reader up, as a hung disk would.
    os.mkfifo(tmp_path / "hung.jpg")
    with Decoders(1) as decoders:
        answers = decoders.decode([jobs[0], Job(tmp_path / "hung.jpg", jobs[0].mask)])
        next(answers)
        assert decoders._process is not None
        process = psutil.Process(decoders._process.pid)
        # Once it is open for writing, somebody reads it.
        with (tmp_path / "hung.jpg").open("wb"):
            os.kill(process.pid, signal.SIGKILL)
        with pytest.raises(CacheError, match=r"ended by signal 9 while it was reading .*hung\.jpg"):
            next(answers)
    assert not process.is_running()


@pytest.mark.slow
def test_subprocess_ends_when_its_parent_does(jobs: list[Job]) -> None:
    parent = (
        "import pathlib, sys, time\n"
        "from hpsearch.data.decode_pool import Decoders, Job\n"
        "decoders = Decoders(1)\n"
        "answers = decoders.decode([Job(*map(pathlib.Path, sys.argv[1:]))])\n"
        "next(answers)\n"
        "print(decoders._process.pid, flush=True)\n"
        "time.sleep(60)\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", parent, jobs[0].image, jobs[0].mask], stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        child = psutil.Process(int(process.stdout.readline()))
        process.kill()
    psutil.wait_procs([child], timeout=30)
    assert not child.is_running() or child.status() == psutil.STATUS_ZOMBIE


def test_whoever_prepares_data_loads_no_torch() -> None:
    modules = "layouts, integrity, decode_pool, formats, cache, build, folds, prepare"
    code = f"import sys; from hpsearch.data import {modules}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
