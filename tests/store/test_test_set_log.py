from __future__ import annotations

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any

import pytest

from hpsearch.paths import ProjectPaths
from hpsearch.store.test_set_log import (
    Hashes,
    LoggedEvaluation,
    begin_evaluation,
    describe_evaluation_count,
    end_evaluation,
    enter_evaluation,
    evaluations_of,
    find_evaluation,
    hashes_in_cache,
    n_seen,
    user_account,
)
from tests.recorded import write_cache

LOOK = LoggedEvaluation(
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


def evaluation(at: float, **changes: Any) -> LoggedEvaluation:
    return dataclasses.replace(LOOK, at=at, id=str(at), **changes)


def pairs(*numbers: int) -> Hashes:
    return tuple((f"{number:064d}"[::-1], f"{number + 1000:064d}") for number in numbers)


def begin(project: ProjectPaths, test: Hashes, at: float, **changes: Any) -> LoggedEvaluation:
    facts = {"at": at, "study": "mine", "study_began_at": 50.0, "trial": 7, "folder": "/x", "metric": "dice"}
    return begin_evaluation(project, test, **{**facts, **changes})


def as_in_0_1(project: ProjectPaths, test: Hashes, at: float, **changes: Any) -> None:
    """An entry with the fields that version 0.1 wrote."""
    lines = sorted(f"{image} {mask}" for image, mask in test)
    test_set = hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]
    entry = dataclasses.asdict(evaluation(at, test_set=test_set, n_images=len(test), **changes))
    del entry["images"]
    with project.looks.open("a") as file:
        file.write(json.dumps(entry) + "\n")


def test_a_look_is_remembered_in_the_project_and_by_the_user(tmp_path: Path) -> None:
    here, there = ProjectPaths(tmp_path / "here"), ProjectPaths(tmp_path / "there")
    here.root.mkdir()
    there.root.mkdir()
    enter_evaluation(here, evaluation(1))
    enter_evaluation(there, evaluation(2))
    assert [each.at for each in evaluations_of(here, evaluation(3))] == [1, 2, 3]
    user_account().unlink()
    assert [each.at for each in evaluations_of(here, evaluation(3))] == [1, 3]
    assert len(evaluations_of(here, evaluation(3, test_set="4567", study="other"))) == 1


def test_a_state_folder_that_cannot_be_written_to_costs_nothing(
    tmp_path: Path, state: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    state.write_text("a file where a folder should be")
    project = ProjectPaths(tmp_path)
    enter_evaluation(project, evaluation(1))
    monkeypatch.delenv("XDG_STATE_HOME")
    monkeypatch.setenv("HOME", "/nowhere")
    enter_evaluation(project, evaluation(2))
    assert [each.at for each in evaluations_of(project, evaluation(2))] == [1, 2]


def test_torn_and_foreign_lines_are_passed_over(tmp_path: Path) -> None:
    project = ProjectPaths(tmp_path)
    enter_evaluation(project, evaluation(1))
    with project.looks.open("a") as file:
        file.write('{"test_set": "0123", "at"\n[1]\n{"test_set": "0123"}\n{"id": "unknown", "score": 1}\n')
    enter_evaluation(project, evaluation(2))
    assert [each.at for each in evaluations_of(project, evaluation(2))] == [1, 2]


def test_looks_of_a_study_are_told_from_those_of_others() -> None:
    same = [evaluation(10), evaluation(70, trial=3)]
    others = [evaluation(20, study="other"), evaluation(60, study_began_at=51.0)]
    assert [LOOK.is_of_same_study(each) for each in (*same, *others)] == [True, True, False, False]


def test_an_evaluation_of_a_few_images_is_one_of_those_images(tmp_path: Path) -> None:
    project = ProjectPaths(tmp_path)
    few = begin(project, pairs(*range(50)), 1.0)
    other = begin(project, pairs(*range(900, 940)), 2.0)
    whole = begin(project, pairs(*range(600)), 3.0, trial=8)
    evaluations = evaluations_of(project, whole)
    assert evaluations == (few, whole)
    assert n_seen(whole, evaluations[:1]) == 50
    assert (
        describe_evaluation_count(whole, evaluations)
        == "50 of these 600 test images had been evaluated before: 1 evaluation of 1 configuration"
    )
    # Afterwards the few were evaluated with all of them.
    again = begin(project, pairs(*range(49, -1, -1)), 4.0)
    evaluations = evaluations_of(project, again)
    assert evaluations == (few, whole, again)
    assert (
        describe_evaluation_count(again, evaluations)
        == "these 50 test images had been evaluated before: 2 evaluations of 2 configurations"
    )
    assert (
        describe_evaluation_count(few, evaluations)
        == "this is the first evaluation of these 50 test images; 2 evaluations came later"
    )
    assert evaluations_of(project, other) == (other,)


def test_images_seen_in_several_evaluations_count_once(tmp_path: Path) -> None:
    project = ProjectPaths(tmp_path)
    first, second = begin(project, pairs(1, 2, 3), 1.0), begin(project, pairs(3, 4), 2.0)
    assert n_seen(begin(project, pairs(*range(10)), 3.0), [first, second]) == 4


def test_an_evaluation_counts_before_it_has_a_score(tmp_path: Path) -> None:
    project = ProjectPaths(tmp_path)
    killed = begin(project, pairs(1, 2), 1.0)
    later = begin(project, pairs(1, 2), 2.0)
    assert [each.score for each in evaluations_of(project, later)] == [None, None]
    end_evaluation(project, later, 0.875)
    ended = dataclasses.replace(later, score=0.875)
    assert ended == find_evaluation(project, later.id)
    assert [(each.id, each.score) for each in evaluations_of(project, ended)] == [
        (killed.id, None),
        (later.id, 0.875),
    ]
    project.looks.unlink()
    assert find_evaluation(project, later.id) == ended
    assert find_evaluation(project, "") is None


def test_an_image_is_known_by_its_file_whatever_its_mask(tmp_path: Path) -> None:
    project = ProjectPaths(tmp_path)
    first = begin(project, (("a" * 64, "b" * 64),), 1.0)
    assert evaluations_of(project, begin(project, (("a" * 64, "c" * 64),), 2.0, study="other"))[0] == first


def test_entries_of_version_0_1_are_still_counted(tmp_path: Path) -> None:
    project = ProjectPaths(tmp_path)
    test = pairs(*range(30))
    as_in_0_1(project, test, 1.0, study="same images")
    as_in_0_1(project, pairs(*range(10)), 2.0, study="the first ten", trial=3)
    as_in_0_1(project, pairs(*range(20, 25)), 3.0)
    mine = begin(project, test, 4.0)
    evaluations = evaluations_of(project, mine)
    assert [each.at for each in evaluations] == [1, 3, 4]
    assert [n_seen(mine, [each]) for each in evaluations[:2]] == [30, 5]
    assert [each.at for each in evaluations_of(project, begin(project, test, 5.0, study="later"))] == [1, 4, 5]
    assert find_evaluation(project, "1.0").images == ()


def test_a_test_set_is_known_by_its_content_not_by_its_names(tmp_path: Path) -> None:
    for key in ("a", "b"):
        write_cache(tmp_path, key, [f"{key}{i}" for i in range(4)], ["test"] * 4, 16)
    write_cache(tmp_path, "c", ["a0", "a1", "a2"], ["test"] * 3, 16)
    first, second, third = (hashes_in_cache(tmp_path / f"{key}-memmap") for key in "abc")
    assert first == second != third
    assert first[:3] == third
    project = ProjectPaths(tmp_path)
    begun = begin(project, first, 1.0)
    assert begun.test_set == begin(project, first[::-1], 2.0).test_set
    assert begun.test_set != begin(project, third, 3.0).test_set
    assert len(begun.images[0]) == 12
