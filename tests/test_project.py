"""The files that describe the project to tools: Makefile, pre-commit hooks, citation, package metadata."""

from __future__ import annotations

import os
import re
import subprocess
import tomllib
from pathlib import Path

import pytest

from hpsearch import __version__

ROOT = Path(__file__).parents[1]
MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8")


def recipe(target: str) -> list[str]:
    """Return the commands of a target of the Makefile."""
    found = re.search(rf"^{target}:.*\n((?:\t.*\n)+)", MAKEFILE, re.MULTILINE)
    assert found is not None
    return [line.strip().replace("$(BIN)", ".venv/bin") for line in found[1].splitlines()]


def make(*arguments: str, path: Path | None = None) -> subprocess.CompletedProcess[str]:
    """Run make in the repository, with the programs of the folder `path` first."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "PYTHON"))}
    if path is not None:
        environment["PATH"] = f"{path}{os.pathsep}{environment['PATH']}"
    return subprocess.run(["make", *arguments], cwd=ROOT, env=environment, capture_output=True, text=True)


def test_pre_commit_runs_the_checks_of_make_lint() -> None:
    hooks = re.findall(
        r"^ +entry: (.+)$", (ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8"), re.MULTILINE
    )
    assert hooks == recipe("lint")


def test_make_help_lists_every_target() -> None:
    phony = re.search(r"^\.PHONY: (.+)$", MAKEFILE, re.MULTILINE)
    assert phony is not None
    assert re.findall(r"^  make ([a-z-]+)", make("help").stdout, re.MULTILINE) == phony[1].split()


def fake_pythons(folder: Path, runs: dict[str, bool]) -> Path:
    """Write programs of these names that start, or that fail as the shim of a version that is not installed."""
    for name, does_run in runs.items():
        (folder / name).write_text(f"#!/bin/sh\nexit {0 if does_run else 127}\n")
        (folder / name).chmod(0o755)
    return folder


@pytest.mark.parametrize(
    ("runs", "chosen"),
    [
        ({"python3.13": True, "python3.12": True, "python3.11": True}, "python3.13"),
        ({"python3.13": False, "python3.12": True, "python3.11": True}, "python3.12"),
        ({"python3.13": False, "python3.12": False, "python3.11": False, "python3": True}, "python3"),
    ],
)
def test_the_environment_is_made_with_the_newest_python_that_runs(
    runs: dict[str, bool], chosen: str, tmp_path: Path
) -> None:
    planned = make("--dry-run", "-W", "pyproject.toml", "env", "VENV=none", path=fake_pythons(tmp_path, runs))
    assert f"|| {chosen} -m venv none" in planned.stdout


def test_python_of_the_command_line_is_used() -> None:
    planned = make("--dry-run", "-W", "pyproject.toml", "env", "VENV=none", "PYTHON=/opt/python")
    assert "|| /opt/python -m venv none" in planned.stdout


def test_a_machine_without_a_supported_python_is_told_what_to_do() -> None:
    done = make("-W", "pyproject.toml", "env", "VENV=none", "PYTHON=")
    assert done.returncode != 0
    assert "No Python 3.11, 3.12 or 3.13 was found" in done.stdout


def test_the_citation_has_version_and_license_of_the_package() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    citation = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    assert f"\nversion: {__version__}\n" in citation
    assert f"\nlicense: {project['license']}\n" in citation
    assert project["version"] == __version__
    assert (ROOT / "LICENSE").read_text(encoding="utf-8").startswith(f"{project['license']} License")


def test_every_package_is_installed() -> None:
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]["packages"]
    found = {".".join(path.parent.relative_to(ROOT).parts) for path in (ROOT / "hpsearch").rglob("__init__.py")}
    assert set(listed) == found | {"hpsearch.experiments"}
