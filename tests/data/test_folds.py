"""Every image is held out once, images that belong together in one fold, as scikit-learn would have it."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.model_selection import KFold

from hpsearch.config.data import DataConfig
from hpsearch.data.folds import (
    AUGMENTATION,
    AUGMENTED_GROUPS,
    Folds,
    connected,
    lesion_notes,
    load_groups,
    make_folds,
    read_groups,
)
from hpsearch.errors import ConfigError, DatasetError, RecordError


def ids(n: int) -> list[str]:
    return [f"image{i:03d}" for i in range(n)]


def test_folds_are_those_of_kfold_over_the_pool() -> None:
    folds = make_folds(ids(53), ["train"] * 53, ids(53), folds=5, seed=7)
    expected = KFold(5, shuffle=True, random_state=7).split(np.arange(53))
    for fold, (train, held_out) in enumerate(expected):
        assert folds.train(fold).tolist() == train.tolist()
        assert folds.held_out(fold).tolist() == held_out.tolist()
        assert folds.held_out(fold).dtype == np.int64
    assert folds.method == "kfold"


def test_byte_equal_images_fall_into_one_fold() -> None:
    hashes = ids(30)
    hashes[29] = hashes[3]
    hashes[17] = hashes[3]
    for seed in range(5):
        folds = make_folds(ids(30), ["train"] * 30, hashes, folds=5, seed=seed)
        assert len({folds.fold_of[i] for i in (3, 17, 29)}) == 1


def test_distinct_images_are_folded_as_if_their_copies_were_not_there() -> None:
    hashes = [*ids(20), "image004"]
    with_copy = make_folds(ids(21), ["train"] * 21, hashes, folds=4, seed=0)
    without = make_folds(ids(20), ["train"] * 20, ids(20), folds=4, seed=0)
    assert with_copy.fold_of[:20] == without.fold_of


def test_a_group_never_spans_two_folds() -> None:
    groups = {name: f"patient{i // 3}" for i, name in enumerate(ids(30))}
    folds = make_folds(ids(30), ["train"] * 30, ids(30), folds=5, seed=0, groups=groups)
    assert folds.method == "groups"
    for patient in range(10):
        assert len(set(folds.fold_of[3 * patient : 3 * patient + 3])) == 1
    assert sorted(Counter(folds.fold_of).values()) == [6] * 5


def test_groups_are_dealt_by_the_seed() -> None:
    groups = {name: f"patient{i // 3}" for i, name in enumerate(ids(60))}
    made = {make_folds(ids(60), ["train"] * 60, ids(60), folds=5, seed=s, groups=groups).fold_of for s in range(4)}
    assert len(made) == 4


def test_byte_equal_images_join_their_groups() -> None:
    groups = {name: f"patient{i // 2}" for i, name in enumerate(ids(20))}
    hashes = ids(20)
    hashes[19] = hashes[0]
    folds = make_folds(ids(20), ["train"] * 20, hashes, folds=3, seed=0, groups=groups)
    assert len({folds.fold_of[i] for i in (0, 1, 18, 19)}) == 1


def test_connected_units_are_numbered_by_first_appearance() -> None:
    groups = {"a": "x", "b": "y", "c": "z", "d": "y", "e": "w"}
    assert connected(list("abcde"), ["1", "2", "3", "4", "1"], groups) == [0, 1, 2, 1, 0]


def test_an_image_without_a_group_is_an_error() -> None:
    with pytest.raises(DatasetError, match="image001"):
        make_folds(ids(2), ["train"] * 2, ids(2), folds=2, seed=0, groups={"image000": "a"})


def test_fixed_holds_the_validation_split_out() -> None:
    folds = make_folds(ids(5), ["train"] * 3 + ["val"] * 2, ids(5), folds="fixed", seed=0)
    assert (folds.k, folds.method) == (1, "fixed")
    assert folds.train(0).tolist() == [0, 1, 2]
    assert folds.held_out(0).tolist() == [3, 4]


def test_fixed_trains_on_no_copy_of_a_validation_image() -> None:
    folds = make_folds(ids(5), ["train"] * 3 + ["val"] * 2, ["a", "b", "c", "b", "d"], folds="fixed", seed=0)
    assert folds.train(0).tolist() == [0, 2]


def test_fixed_trains_on_no_image_of_a_group_that_validates() -> None:
    groups = dict(zip(ids(5), ["p", "q", "r", "q", "s"], strict=True))
    folds = make_folds(ids(5), ["train"] * 3 + ["val"] * 2, ids(5), folds="fixed", seed=0, groups=groups)
    assert folds.train(0).tolist() == [0, 2]


@pytest.mark.parametrize("split", ["train", "val"])
def test_fixed_needs_both_splits(split: str) -> None:
    with pytest.raises(ConfigError, match="there are no"):
        make_folds(ids(3), [split] * 3, ids(3), folds="fixed", seed=0)  # type: ignore[list-item]


def test_more_folds_than_distinct_images_are_refused() -> None:
    with pytest.raises(ConfigError, match="folds = 4, but there are only 3 distinct images"):
        make_folds(ids(4), ["train"] * 4, ["a", "b", "c", "a"], folds=4, seed=0)


def test_a_fold_that_is_not_there_is_an_error() -> None:
    folds = make_folds(ids(6), ["train"] * 6, ids(6), folds=2, seed=0)
    with pytest.raises(ValueError, match="fold must lie between 0 and 1, got 2"):
        folds.train(2)


@given(
    labels=st.lists(st.tuples(st.integers(0, 12), st.integers(0, 8)), min_size=8, max_size=40),
    k=st.integers(2, 4),
    seed=st.integers(0, 3),
    grouped=st.booleans(),
)
def test_folds_are_a_partition_that_splits_no_unit(
    labels: list[tuple[int, int]], k: int, seed: int, grouped: bool
) -> None:
    names = ids(len(labels))
    hashes = [str(content) for content, _ in labels]
    groups = {name: str(group) for name, (_, group) in zip(names, labels, strict=True)} if grouped else None
    try:
        folds = make_folds(names, ["train"] * len(names), hashes, folds=k, seed=seed, groups=groups)
    except ConfigError:
        assert len(set(connected(names, hashes, groups))) < k
        return
    everything = np.concatenate([folds.held_out(fold) for fold in range(k)])
    assert sorted(everything.tolist()) == list(range(len(names)))
    for fold in range(k):
        train, held_out = set(folds.train(fold).tolist()), set(folds.held_out(fold).tolist())
        assert held_out
        assert train | held_out == set(range(len(names)))
        assert not {hashes[i] for i in train} & {hashes[i] for i in held_out}
        if groups is not None:
            assert not {groups[names[i]] for i in train} & {groups[names[i]] for i in held_out}


def test_a_fold_that_trains_on_no_lesion_is_refused_and_one_that_is_scored_on_none_is_noted() -> None:
    folds = Folds(tuple("abcdef"), (0, 0, 1, 1, 2, 2), 3, 0, "kfold")
    assert lesion_notes(folds, [True, False, True, False, False, True]) == []
    (note,) = lesion_notes(folds, [True, False, False, True, False, False])
    assert note.startswith("fold 3 of 3 is scored on 2 images without any lesion")
    with pytest.raises(DatasetError, match="fold 2 of 3 would train on 4 images without any lesion"):
        lesion_notes(folds, [False, False, True, True, False, False])


def test_folds_survive_json() -> None:
    folds = make_folds(ids(10), ["train"] * 10, ids(10), folds=3, seed=2)
    assert Folds.from_dict(json.loads(json.dumps(folds.to_dict()))) == folds


@pytest.mark.parametrize("key", ["ids", "fold_of", "seed", "digest", "method"])
def test_changed_folds_are_not_read(key: str) -> None:
    table = make_folds(ids(10), ["train"] * 10, ids(10), folds=3, seed=2).to_dict()
    table[key] = table[key][::-1] if key != "seed" else 3
    with pytest.raises(RecordError, match="folds are damaged"):
        Folds.from_dict(table)


def test_folds_that_lack_a_part_are_not_read() -> None:
    table = make_folds(ids(10), ["train"] * 10, ids(10), folds=3, seed=2).to_dict()
    del table["k"]
    with pytest.raises(RecordError, match="folds are damaged"):
        Folds.from_dict(table)


def test_groups_are_read_from_either_column(tmp_path: Path) -> None:
    path = tmp_path / "groups.csv"
    path.write_text("patient,image\r\np1,ISIC_1\r\np1,ISIC_2.jpg\r\n\r\np2, ISIC_3 \r\n", encoding="utf-8-sig")
    groups = read_groups(path)
    assert groups == {"isic_1": "p1", "isic_2": "p1", "isic_3": "p2"}
    assert connected(["ISIC_1", "isic_2", "ISIC_3"], ["1", "2", "3"], groups) == [0, 0, 1]


def test_an_augmented_set_brings_its_groups_and_a_setting_overrides_them(tmp_path: Path) -> None:
    config = DataConfig(root=str(tmp_path))
    (tmp_path / AUGMENTED_GROUPS).write_text("image,original\na_aug1,a\n")
    assert load_groups(config) is None
    (tmp_path / AUGMENTATION).write_text("{}")
    assert load_groups(config) == {"a_aug1": "a"}
    (tmp_path / "patients.csv").write_text("image,patient\na,p\n")
    assert load_groups(replace(config, groups=str(tmp_path / "patients.csv"))) == {"a": "p"}
    assert load_groups(replace(config, images="photos", masks="outlines")) is None


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "must have two columns"),
        ("image\na\n", "must have two columns"),
        ("name,patient\na,b\n", "must have two columns"),
        ("image,patient\na\n", "line 2: needs an image and its group"),
        ("image,patient\na,\n", "line 2: needs an image and its group"),
        ("image,patient\na,p\na,q\n", "line 3: a is in group 'p' and in 'q'"),
    ],
)
def test_damaged_groups_are_refused(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "groups.csv"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(DatasetError, match=message):
        read_groups(path)


def test_groups_that_are_not_there_are_an_error(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match=r"groups .*none\.csv does not exist"):
        read_groups(tmp_path / "none.csv")


def test_duplicates_are_connected_also_indirectly_and_numbered_by_first_appearance() -> None:
    names = list("abcdef")
    assert connected(names, names, None, [("e", "b"), ("b", "d"), ("c", "c")]) == [0, 1, 2, 1, 1, 3]
    assert connected(names[:3], names[:3], None, []) == [0, 1, 2]
    assert connected([], [], None, []) == []


def test_patients_that_share_a_duplicate_are_one_unit() -> None:
    patients = {"a": "Ada", "b": "Ben", "c": "Ada", "d": "Ben", "e": "Cy"}
    assert connected(list("abcde"), list("abcde"), patients, [("a", "b")]) == [0, 0, 0, 0, 1]


def test_near_duplicates_are_in_one_fold() -> None:
    pairs = [(ids(20)[i], ids(20)[i + 1]) for i in (0, 1, 18)]
    folds = make_folds(ids(20), ["train"] * 20, ids(20), folds=3, seed=0, duplicates=pairs)
    assert folds.method == "groups"
    assert len({folds.fold_of[i] for i in (0, 1, 2)}) == 1
    assert folds.fold_of[18] == folds.fold_of[19]
    assert make_folds(ids(20), ["train"] * 20, ids(20), folds=3, seed=0, duplicates=[]).method == "groups"
