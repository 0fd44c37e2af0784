"""Describe the machine and library versions of a benchmark, and generate synthetic images."""

from __future__ import annotations

import datetime
import importlib.metadata
import importlib.util
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from hpsearch.cores import available_cores
from hpsearch.training import runtime as devices


def describe_machine(packages: Sequence[str] = ("torch",), *, device: str = "cpu", threads: int | None = None) -> str:
    """Date, device, threads (None: the cores there are), system, and versions of what is there of `packages`."""
    about = devices.describe(devices.make_runtime(device, threads=threads))
    installed = [name for name in packages if importlib.util.find_spec(name)]
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in installed)
    cores = f"{available_cores()} cores" if threads is None else f"{threads} threads"
    return f"{datetime.date.today()}, {about['device_name']}, {cores}, {about['platform']}; {versions}"


def draw_images(folder: Path, n_images: int) -> Path:
    """Small JPEGs and masks in the archive layout, drawn in a process of its own."""
    program = "import sys, pathlib; from hpsearch.data.sample import draw_sample; "
    program += f"draw_sample(pathlib.Path(sys.argv[1]), n_train={n_images}, n_val=2, n_test=2)"
    subprocess.run([sys.executable, "-c", program, str(folder)], check=True)
    return folder
