"""Subprocesses import this package and nothing from the folder in which somebody works."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from hpsearch import subprocesses
from hpsearch.data.decode_pool import Decoders, ImageStats, Job
from hpsearch.inference.postprocessing import Postprocessing
from hpsearch.tracking import mlflow_model
from hpsearch.workers.jobs import Finished, KeepJob, WorkerSettings
from hpsearch.workers.local_pool import LocalPool
from hpsearch.workers.loop import run_job
from tests.data.conftest import tiny_pairs, write_pairs
from tests.inference.test_predictor import write_model

SHADOWING = ("random", "json", "numpy", "torch", "mlflow", "click")


@pytest.fixture
def hostile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A current folder that shadows what a subprocess imports, also by PYTHONPATH."""
    folder = tmp_path / "here"
    (folder / "hpsearch" / "hpsearch").mkdir(parents=True)
    for name in SHADOWING:
        (folder / f"{name}.py").write_text("raise SystemExit('imported from the current folder')")
    monkeypatch.chdir(folder)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(["", ".", "./", "below"]))
    return folder


def test_a_worker_imports_nothing_from_the_current_folder(hostile: Path, tmp_path: Path) -> None:
    with LocalPool(tmp_path) as pool:
        pool.resize([WorkerSettings("cpu", 1)])
        assert run_job(pool, KeepJob(copies=(), postprocessing=Postprocessing())) == Finished()


def test_the_decoder_imports_nothing_from_the_current_folder(hostile: Path, tmp_path: Path) -> None:
    root = tmp_path / "data"
    write_pairs(root, "archive", tiny_pairs())
    image = next((root / "ISIC-2017_Training_Data").glob("*"))
    mask = root / "ISIC-2017_Training_Part1_GroundTruth" / f"{image.stem}_segmentation.png"
    with Decoders(1) as decoders:
        ((stats, _),) = decoders.decode([Job(image, mask)])
    assert isinstance(stats, ImageStats)


def test_packing_a_model_imports_nothing_from_the_current_folder(hostile: Path) -> None:
    command = subprocesses.command("hpsearch.tracking.mlflow_model", "gone.safetensors", "packed", "run", "model")
    done = subprocess.run(command, env=subprocesses.environment(), capture_output=True, text=True, check=False)
    assert "imported from the current folder" not in done.stderr
    assert "gone.safetensors" in done.stderr.splitlines()[-1]


@pytest.mark.slow
def test_a_model_is_packed_beside_a_folder_that_is_named_like_the_package(hostile: Path, tmp_path: Path) -> None:
    write_model(tmp_path / "model.safetensors")
    mlflow_model.pack(tmp_path / "model.safetensors", tmp_path / "packed", run_id="0" * 32, model_id="m-1")
    assert (tmp_path / "packed" / "MLmodel").is_file()


def test_a_subprocess_runs_the_package_that_starts_it(tmp_path: Path) -> None:
    """One that is not installed, or another one than the installed: a checkout that was put on sys.path."""
    package = tmp_path / "checkout" / "hpsearch"
    package.mkdir(parents=True)
    for name in ("__init__.py", "subprocesses.py"):
        shutil.copy(Path(subprocesses.__file__).parent / name, package)
    (package / "where.py").write_text("import hpsearch, sys; print(hpsearch.__file__, sys.argv[1])")
    starting = (
        f"import subprocess, sys; sys.path.insert(0, {str(package.parent)!r})\n"
        "from hpsearch import subprocesses\n"
        "subprocess.run(subprocesses.command('hpsearch.where', 'an argument'), env=subprocesses.environment())"
    )
    done = subprocess.run([sys.executable, "-P", "-c", starting], capture_output=True, text=True, check=True)
    assert done.stdout == f"{package / '__init__.py'} an argument\n"


def test_python_m_hpsearch_imports_nothing_from_the_current_folder(hostile: Path) -> None:
    # As from a checkout that is not installed, whose folder is the current one.
    (hostile / "hpsearch" / "hpsearch").rmdir()
    (hostile / "hpsearch").rmdir()
    (hostile / "hpsearch").symlink_to(Path(subprocesses.__file__).parent)
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, "-m", "hpsearch", "--version"], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_processes_that_a_subprocess_starts_import_nothing_from_the_current_folder(hostile: Path) -> None:
    program = hostile.parent / "program.py"
    program.write_text(
        "import multiprocessing, subprocess, sys\n"
        "def draw(): import random; print(random.__file__, flush=True)\n"
        "if __name__ == '__main__':\n"
        "    child = multiprocessing.get_context('spawn').Process(target=draw)\n"
        "    child.start(); child.join()\n"
        "    sys.exit(child.exitcode or subprocess.call([sys.executable, '-c', 'import random']))\n"
    )
    done = subprocess.run(
        [sys.executable, "-P", str(program)],
        env=subprocesses.environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert str(hostile) not in done.stdout


def test_a_relative_folder_of_pythonpath_stays_the_one_it_was(hostile: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(["/elsewhere", "below", ""]))
    changed = subprocesses.environment(OMP_NUM_THREADS="3")
    assert changed["PYTHONPATH"].split(os.pathsep) == ["/elsewhere", str(hostile / "below")]
    assert (changed["OMP_NUM_THREADS"], changed["PYTHONSAFEPATH"]) == ("3", "1")
