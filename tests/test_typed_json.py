from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from hpsearch import config as configs
from hpsearch.config import StudyConfig
from hpsearch.typed_json import from_json, to_json


@dataclass(frozen=True)
class Part:
    name: str
    weights: Path
    other: Path | None = None


@dataclass(frozen=True, kw_only=True)
class Whole:
    parts: tuple[Part, ...]
    size: tuple[int, int]
    config: StudyConfig
    by_name: dict[str, list[str]] = field(default_factory=dict)
    limit: int | float = 0


def whole(tmp_path: Path) -> Whole:
    parts = (Part("a", tmp_path / "a", tmp_path / "b"), Part("b", tmp_path / "c"))
    return Whole(parts=parts, size=(3, 4), config=configs.load(None), by_name={"1": ["x"]}, limit=0.5)


def test_a_dataclass_survives_json(tmp_path: Path) -> None:
    before = whole(tmp_path)
    assert from_json(Whole, json.loads(json.dumps(to_json(before)))) == before


def test_keys_of_a_later_version_are_ignored_and_missing_ones_keep_their_defaults(tmp_path: Path) -> None:
    table = to_json(whole(tmp_path))
    del table["limit"]
    assert from_json(Whole, {**table, "added_later": 1}).limit == 0


def test_a_missing_field_without_a_default_is_an_error() -> None:
    with pytest.raises(TypeError, match="weights"):
        from_json(Part, {"name": "a"})


@pytest.mark.parametrize("size", ["34", [1], [1, 2, 3], 5])
def test_a_part_of_another_kind_is_an_error(size: object, tmp_path: Path) -> None:
    with pytest.raises((TypeError, ValueError)):
        from_json(Whole, {**to_json(whole(tmp_path)), "size": size})


def test_relative_paths_become_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert to_json(Part("a", Path("x")))["weights"] == str(tmp_path / "x")
