from __future__ import annotations

import ast
import dataclasses
import inspect
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import hpsearch
from hpsearch.data.sample import draw_sample

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("name", list(hpsearch.EXPORTS))
def test_every_name_leads_to_something_documented(name: str) -> None:
    found = getattr(hpsearch, name)
    assert f"{found.__module__}.{found.__qualname__}" == hpsearch.EXPORTS[name]
    assert inspect.getdoc(found)


@pytest.mark.parametrize("name", ["RoleDataset", "DataConfig", "FinalResult", "StudySummary", "StudyConfig"])
def test_every_field_of_what_is_given_or_returned_is_described_on_the_page(name: str) -> None:
    found = getattr(hpsearch, name)
    page = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
    section = page.partition(f"### `hpsearch.{name}`")[2].partition("\n### ")[0]
    names = [field.name for field in dataclasses.fields(found)] if dataclasses.is_dataclass(found) else None
    public = [name for name in names or found.__annotations__ if not name.startswith("_")]
    assert len(public) > 2
    described = dict(re.findall(r"^\| `(\w+)` \| (.+) \|$", section, re.MULTILINE))
    assert list(described) == public


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'run_stduy'"):
        hpsearch.run_stduy  # noqa: B018
    assert "run_study" in dir(hpsearch)


def test_the_list_of_names_is_part_of_the_package() -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]
    assert "__init__.pyi" in settings["package-data"]["hpsearch"]
    stub = ast.parse((ROOT / "hpsearch/__init__.pyi").read_text(encoding="utf-8"))
    imports = [node for node in stub.body if isinstance(node, ast.ImportFrom)]
    listed = {alias.asname: f"{node.module}.{alias.name}" for node in imports for alias in node.names}
    assert listed == hpsearch.EXPORTS
    assert set(hpsearch.EXPORTS) < set(hpsearch.__all__) == set(dir(hpsearch))


def test_importing_the_package_loads_nothing() -> None:
    code = "import sys, hpsearch; print(sorted(name for name in sys.modules if name.startswith('hpsearch.')))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_example_searches_evaluates_and_predicts_on_ones_own_images(
    tmp_path: Path, empty_mlflow_db: Path
) -> None:
    drawn = tmp_path / "drawn"
    draw_sample(drawn, n_train=15, n_val=0, n_test=0)
    folders = [drawn / "ISIC-2017_Training_Data", drawn / "ISIC-2017_Training_Part1_GroundTruth"]
    smaller = ["--trials", "2", "--folds", "2", "--size", "32", "--epochs", "2", "--out", str(tmp_path / "project")]
    (tmp_path / "project").mkdir()
    shutil.copyfile(empty_mlflow_db, tmp_path / "project/mlflow.db")
    done = subprocess.run(
        [sys.executable, str(ROOT / "examples/own_images.py"), *map(str, folders), *smaller],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "best of 2 trials" in done.stdout
    assert "on 3 images" in done.stdout
    masks = sorted((tmp_path / "project/masks").glob("*_segmentation.png"))
    assert len(masks) == 15
    assert list((tmp_path / "project/mlruns").iterdir())
    assert list((tmp_path / "project/studies/own").glob("**/report.html"))
