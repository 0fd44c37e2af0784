"""Assign the images of the pool (training and validation images) to cross-validation folds."""

import csv
import io
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
from numpy.typing import NDArray

from hpsearch.config.data import DataConfig
from hpsearch.data.dataset import Split
from hpsearch.data.formats import without_suffix
from hpsearch.errors import ConfigError, DatasetError, RecordError
from hpsearch.paths import sha256_text
from hpsearch.typed_json import from_json
from hpsearch.user_files import name_key, read_text, user_path

AUGMENTATION, AUGMENTED_GROUPS = "augmentation.json", "groups.csv"
"""Names of two files in an augmented dataset: its settings, and the group of each image (by default its original)."""


@dataclass(frozen=True)
class Folds:
    """Folds of a study. All its trials use the same folds."""

    ids: tuple[str, ...]
    """Ids of the pool's images, in the order of the pool."""
    fold_of: tuple[int, ...]
    """Fold in which each image is held out. -1 for training images with `folds="fixed"`, which are never held out."""
    k: int
    seed: int
    method: Literal["kfold", "groups", "fixed"]

    def train(self, fold: int) -> NDArray[np.int64]:
        """Return, in ascending order, the pool indices of the images that `fold` trains on."""
        return np.setdiff1d(np.arange(len(self.ids)), self.held_out(fold))

    def held_out(self, fold: int) -> NDArray[np.int64]:
        """Return, in ascending order, the pool indices of the images that are held out in `fold`."""
        if not 0 <= fold < self.k:
            raise ValueError(f"fold must lie between 0 and {self.k - 1}, got {fold}")
        return np.flatnonzero(np.array(self.fold_of) == fold).astype(np.int64)

    def to_dict(self) -> dict[str, Any]:
        """Return the folds as plain types, with a digest that detects later changes."""
        table = asdict(self)
        return {**table, "digest": _digest(table)}

    @classmethod
    def from_dict(cls, table: Mapping[str, Any]) -> Self:
        """Return the folds in `table`, which `to_dict` returned. Raise RecordError if it was changed since then."""
        content = {key: value for key, value in table.items() if key != "digest"}
        if table.get("digest") != _digest(content):
            raise RecordError("the folds are damaged: their checksum is wrong")
        return from_json(cls, content)


def make_folds(
    ids: Sequence[str],
    splits: Sequence[Split],
    sha256: Sequence[str],
    *,
    folds: int | Literal["fixed"],
    seed: int,
    groups: Mapping[str, str] | None = None,
    duplicates: Sequence[tuple[str, str]] | None = None,
) -> Folds:
    """Return the folds of a pool. `ids`, `splits` and `sha256` (of the image file) have one entry per image.

    If `folds` is an integer, `sklearn.model_selection.KFold(folds, shuffle=True, random_state=seed)` divides the
    distinct images, in the order of the pool. Byte-identical images are in the same fold. With `groups` (maps an id
    to its group) or `duplicates` (pairs of ids that are near-duplicates), GroupKFold is used instead. Groups that
    are linked by byte-identical images or near-duplicates are merged.

    `folds="fixed"` gives a single fold, in which the validation split is held out. Training images that are
    byte-identical to a validation image, share its group or are near-duplicates of it are held out too.

    Raises ConfigError if there are fewer distinct images or groups than folds or if a split is empty for `fixed`, and
    DatasetError if an image has no group.
    """
    units = np.array(connected(ids, sha256, groups, duplicates))
    has_groups = groups is not None or duplicates is not None
    fold_of = np.full(len(ids), -1)
    if folds == "fixed":
        fold_of[np.isin(units, units[np.array(splits, dtype=str) == "val"])] = 0
        if not {0, -1} <= (found := set(fold_of.tolist())):
            missing = "training" if 0 in found else "validation"
            raise ConfigError(
                f"study.folds = 'fixed' needs a training and a validation split: there are no {missing} images; give "
                "a number of folds instead (--folds 5)"
            )
        return Folds(tuple(ids), tuple(fold_of.tolist()), 1, seed, "fixed")
    n_units = int(units.max(initial=-1)) + 1
    require_enough(n_units, folds, "groups" if has_groups else "distinct images")
    # scikit-learn is slow to import, and reading folds does not need it.
    from sklearn.model_selection import GroupKFold, KFold

    if has_groups:
        # GroupKFold balances the folds by size and breaks ties by label, so the labels are shuffled with the seed.
        labels = np.random.default_rng(seed).permutation(n_units)[units]
        for fold, (_, held_out) in enumerate(GroupKFold(folds).split(units, groups=labels)):
            fold_of[held_out] = fold
    else:
        for fold, (_, held_out) in enumerate(KFold(folds, shuffle=True, random_state=seed).split(np.arange(n_units))):
            fold_of[np.isin(units, held_out)] = fold
    return Folds(tuple(ids), tuple(fold_of.tolist()), folds, seed, "groups" if has_groups else "kfold")


def lesion_notes(folds: Folds, has_lesion: Sequence[bool]) -> list[str]:
    """Return a note for each fold in which no held-out image has a lesion.

    `has_lesion` has one value per pool image. Raises DatasetError if no training image of a fold has a lesion,
    because there is nothing to learn.
    """
    notes = []
    for fold in range(folds.k):
        train, held_out = folds.train(fold), folds.held_out(fold)
        if not any(has_lesion[i] for i in train):
            raise DatasetError(
                f"fold {fold + 1} of {folds.k} would train on {len(train)} images without any lesion: use another "
                "number of folds (--folds), another --seed, or more images with lesions"
            )
        if not any(has_lesion[i] for i in held_out):
            notes.append(
                f"fold {fold + 1} of {folds.k} is scored on {len(held_out)} images without any lesion: its Dice "
                "only counts false positives, that is how many of them are predicted to be free of lesions"
            )
    return notes


def require_enough(n: int, folds: int, what: str) -> None:
    """Raise ConfigError if `n` is less than `folds`. `what` names the counted objects: `images` or `groups`."""
    if n < folds:
        advice = f"use fewer folds (--folds {n})" if n > 1 else "more are needed"
        raise ConfigError(f"study.folds = {folds}, but there are only {n} {what}: {advice}")


def load_groups(config: DataConfig) -> dict[str, str] | None:
    """Return the groups from the file `data.groups` or from an augmented dataset, or None if there are none.

    The keys are `name_key` of the image names. An augmented dataset needs groups, so that no network is scored on
    augmented versions of its training images.
    """
    root = user_path(config.root)
    if config.groups:
        return read_groups(user_path(config.groups))
    if not config.images and (root / AUGMENTATION).is_file():
        return read_groups(root / AUGMENTED_GROUPS)
    return None


def read_groups(path: Path) -> dict[str, str]:
    """Read the group of each image from a CSV file with the column `image` and one other, such as patient or lesion.

    The keys of the result are `name_key` of the image names. Suffixes such as `.jpg` in the column `image` are
    ignored. Raises DatasetError if the file is invalid. The message names the line.
    """
    text = read_text(path, "groups", DatasetError)
    try:
        rows = [[cell.strip() for cell in row] for row in csv.reader(io.StringIO(text))]
    except csv.Error as error:
        raise DatasetError(f"groups {path} cannot be read: {error}") from error
    header = rows[0] if rows else []
    if len(header) != 2 or "image" not in header:
        raise DatasetError(
            f"groups {path} must have two columns, image and one other, got {', '.join(header) or 'none'}"
        )
    image = header.index("image")
    groups: dict[str, str] = {}
    for number, cells in enumerate(rows[1:], start=2):
        if not any(cells):
            continue
        if len(cells) != 2 or not all(cells):
            raise DatasetError(f"groups {path}, line {number}: needs an image and its group, got {','.join(cells)!r}")
        name, group = without_suffix(cells[image]), cells[1 - image]
        if (known := groups.setdefault(name_key(name), group)) != group:
            raise DatasetError(f"groups {path}, line {number}: {name} is in group {known!r} and in {group!r}")
    return groups


def connected(
    ids: Sequence[str],
    sha256: Sequence[str],
    groups: Mapping[str, str] | None,
    duplicates: Iterable[tuple[str, str]] | None = None,
) -> list[int]:
    """Return a unit number for each image. A unit is a set of images that must be in the same fold.

    Byte-identical images, images of one group and pairs of `duplicates` are in the same unit, as are images that
    are linked only through others. Units are numbered by first appearance. The ids in `groups` may differ from `ids`
    in case and Unicode form. Raises DatasetError if an image is missing from `groups`.
    """
    # scipy is slow to import, and reading folds does not need it.
    from scipy.sparse import coo_array, csgraph

    number = {id: i for i, id in enumerate(ids)}
    first: dict[tuple[str, str], int] = {}
    edges = [(number[a], number[b]) for a, b in duplicates or ()]
    edges += [(i, first.setdefault(("bytes", content), i)) for i, content in enumerate(sha256)]
    if groups is not None:
        group_of = {name_key(id): group for id, group in groups.items()}
        if missing := [id for id in ids if name_key(id) not in group_of]:
            raise DatasetError(f"the group table has no group for image {missing[0]}")
        edges += [(i, first.setdefault(("group", group_of[name_key(id)]), i)) for i, id in enumerate(ids)]
    n, (a, b) = len(ids), np.array(edges, dtype=np.int64).reshape(-1, 2).T
    _, labels = csgraph.connected_components(coo_array((np.ones(len(a)), (a, b)), shape=(n, n)), directed=False)
    numbers: dict[int, int] = {}
    return [numbers.setdefault(label, len(numbers)) for label in labels.tolist()]


def _digest(table: Mapping[str, Any]) -> str:
    return sha256_text(json.dumps(table, sort_keys=True, separators=(",", ":")))
