from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from hpsearch.looks import (
    Look,
    describe_looks,
    digest_of_test_set,
    first_look_of,
    looks_at,
    n_looks_before,
    note_look,
    user_account,
)
from hpsearch.paths import ProjectPaths
from tests.recorded import write_cache

LOOK = Look(
    test_set="0123",
    at=100.0,
    study="mine",
    study_began_at=50.0,
    trial=7,
    folder="/somewhere",
    n_images=600,
    metric="dice",
    score=0.86,
)


@pytest.fixture(autouse=True)
def state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    return tmp_path / "state"


def look(at: float, **changes: object) -> Look:
    return dataclasses.replace(LOOK, at=at, id=str(at), **changes)  # type: ignore[arg-type]


def test_a_look_is_remembered_in_the_project_and_by_the_user(tmp_path: Path) -> None:
    here, there = ProjectPaths(tmp_path / "here"), ProjectPaths(tmp_path / "there")
    here.root.mkdir()
    there.root.mkdir()
    note_look(here, look(1))
    note_look(there, look(2))
    assert [each.at for each in looks_at(here, "0123")] == [1, 2]
    user_account().unlink()
    assert [each.at for each in looks_at(here, "0123")] == [1]
    assert looks_at(here, "4567") == []


def test_a_state_folder_that_cannot_be_written_to_costs_nothing(
    tmp_path: Path, state: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    state.write_text("a file where a folder should be")
    note_look(ProjectPaths(tmp_path), look(1))
    assert len(looks_at(ProjectPaths(tmp_path), "0123")) == 1
    monkeypatch.delenv("XDG_STATE_HOME")
    monkeypatch.setenv("HOME", "/nowhere")
    note_look(ProjectPaths(tmp_path), look(2))
    assert len(looks_at(ProjectPaths(tmp_path), "0123")) == 2


def test_torn_and_foreign_lines_are_passed_over(tmp_path: Path) -> None:
    project = ProjectPaths(tmp_path)
    note_look(project, look(1))
    with project.looks.open("a") as file:
        file.write('{"test_set": "0123", "at"\n[1]\n{"test_set": "0123"}\n')
    note_look(project, look(2))
    assert [each.at for each in looks_at(project, "0123")] == [1, 2]


def test_looks_of_a_study_are_told_from_those_of_others() -> None:
    looks = [look(10), look(20, study="other"), look(60), look(70, trial=3)]
    first = first_look_of(looks[1:], "mine", 50.0)
    assert first is not None
    assert first.at == 60
    assert first_look_of(looks, "mine", 51.0) is None
    assert n_looks_before(looks, 50.0) == 2
    assert describe_looks(looks) == "this test set has been scored 4 times, with 3 configurations"
    assert describe_looks(looks[:1]) == "this is the first look at this test set"


def test_a_test_set_is_known_by_its_content_not_by_its_names(tmp_path: Path) -> None:
    for key in ("a", "b"):
        write_cache(tmp_path, key, [f"{key}{i}" for i in range(4)], ["test"] * 4, 16)
    write_cache(tmp_path, "c", ["a0", "a1", "a2"], ["test"] * 3, 16)
    first, second, third = (digest_of_test_set(tmp_path / f"{key}-memmap") for key in "abc")
    assert first == second != third
