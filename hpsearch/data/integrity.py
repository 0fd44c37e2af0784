"""Find errors in a dataset, and facts about it that are worth a note."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from hpsearch.config.data import DataConfig
from hpsearch.data.cache import Cache
from hpsearch.data.dataset import Dataset, Problem, Sample, Split, file_sha256, same_bytes
from hpsearch.data.decode_pool import DecodeError, Decoders, ImageStats, Job, View
from hpsearch.data.folds import AUGMENTATION
from hpsearch.data.survey import Decision, decide_reading, reading_notes
from hpsearch.errors import DatasetError
from hpsearch.user_files import printable

OFFICIAL_COUNTS: dict[Split, int] = {"train": 2000, "val": 150, "test": 600}
N_NAMED = 3
"""Images of each kind of problem that a message names."""
SWAPPED = "were --images and --masks swapped? Most pairs can be used only the other way round"
Size = tuple[int, int]
"""Height and width."""
Decoded = tuple[Sample, ImageStats]


@dataclass(frozen=True)
class CheckReport:
    """Errors, notes and sizes of a whole dataset."""

    counts: dict[Split, int]
    """Usable pairs."""
    errors: tuple[Problem, ...]
    notes: tuple[Problem, ...]
    sizes: tuple[Size, ...]
    """Height and width of each usable pair, in the dataset's order."""

    def summary(self) -> list[str]:
        """Return all of it as lines of text."""
        lines = [*self.overview(), *(f"error: {line}" for line in describe(self.errors))]
        return lines + ([] if self.errors else ["no errors"]) + [f"note: {line}" for line in describe(self.notes)]

    def overview(self) -> list[str]:
        """Return the number of usable pairs and their sizes as lines of text."""
        usable = ", ".join(f"{n} {split}" for split, n in self.counts.items())
        lines = [f"{sum(self.counts.values())} pairs can be used: {usable}"]
        if self.sizes:
            low, high = min(self.sizes, key=lambda s: s[0] * s[1]), max(self.sizes, key=lambda s: s[0] * s[1])
            lines.append(f"sizes (height x width) from {low[0]}x{low[1]} to {high[0]}x{high[1]}")
        return lines

    def rows(self) -> list[tuple[str, str, int, list[str]]]:
        """Return level (`error` or `note`), kind, number and the first few texts of each kind of problem."""
        return [
            (level, kind, len(members), [problem.text for problem in members[:N_NAMED]])
            for level, problems in (("error", self.errors), ("note", self.notes))
            for kind, members in _by_kind(problems).items()
        ]

    def to_dict(self) -> dict[str, Any]:
        """Return counts, errors and notes as plain types."""
        return {
            "counts": dict(self.counts),
            "errors": [_plain(problem) for problem in self.errors],
            "notes": [_plain(problem) for problem in self.notes],
        }


def check(
    dataset: Dataset,
    *,
    config: DataConfig | None = None,
    cache_root: Path | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> CheckReport:
    """Decode all of `dataset` in a subprocess and return its errors and notes.

    Files are read as `config` says. A survey of them is kept in `cache_root` if it is given. With `config` the
    report includes masks that lose their lesion when they are resized to `data.size`.
    """
    size = config.cached_size if config is not None and config.match == "resize" else None
    views: tuple[View, ...] = ("resize",) if size else ()
    results: dict[int, ImageStats | DecodeError] = {}
    with Decoders() as decoders:
        decision = decide_reading(dataset, config or DataConfig(), cache_root, decoders)
        jobs = [
            Job(s.image, s.mask, views, *(size or (0, 0)), send=False, reading=decision.reading)
            for s in dataset.samples
        ]
        for number, result, _ in decoders.decode(jobs):
            results[number] = result
            if progress is not None:
                progress(len(results), len(jobs))
    decoded = [(sample, results[i]) for i, sample in enumerate(dataset.samples)]
    usable = [(sample, result) for sample, result in decoded if isinstance(result, ImageStats)]
    damaged = [(sample, result) for sample, result in decoded if isinstance(result, DecodeError)]
    pool = [(sample, stats) for sample, stats in usable if sample.split != "test"]
    errors = [*dataset.problems, *(sample.problem(error.kind, error.text) for sample, error in damaged)]
    if were_swapped(dataset, [sample for sample, _ in damaged]):
        errors.insert(0, dataset.problem("swapped folders", SWAPPED))
    if fault := lesion_fault([stats for _, stats in pool], size):
        errors.append(dataset.problem("nothing to learn", fault))
    notes = [
        *dataset_notes(dataset),
        *shared_images(dataset.split("train", "val"), dataset.split("test")),
        *duplicates(pool),
        *content_notes(dataset, usable, decision, size),
    ]
    counts = {split: sum(sample.split == split for sample, _ in usable) for split in get_args(Split)}
    return CheckReport(counts, tuple(errors), tuple(notes), tuple((stats.height, stats.width) for _, stats in usable))


def check_stored(cache: Cache) -> list[Problem]:
    """Return files whose content has changed since `cache` was made, and images whose cached pixels have changed."""
    changed = []
    for sample, stats in cache.index.pairs:
        for path, sha256 in ((sample.image, stats.image_sha256), (sample.mask, stats.mask_sha256)):
            if file_sha256(path) != sha256:
                text = f"{path} is not what it was when the cache was made"
                changed.append(sample.problem("changed file", text, path))
    damaged = set(cache.damaged())
    return changed + [
        s.problem("damaged cache", f"{cache.path} is damaged at {s.id}: remove the folder", cache.path)
        for s in cache.index.samples
        if s.id in damaged
    ]


def shared_images(pool: Sequence[Sample], test: Sequence[Sample]) -> list[Problem]:
    """Return a note for each image of the pool that is byte-identical to images of the test split.

    This is no error, because ISIC-2017 as published has such a pair. `final` also gives the test mean without them.
    """
    labels = same_bytes([*pool, *test])
    in_test: dict[str, list[Sample]] = defaultdict(list)
    for sample, label in zip(test, labels[len(pool) :], strict=True):
        in_test[label].append(sample)
    found = []
    for sample, label in zip(pool, labels, strict=False):
        if others := in_test.get(label):
            named = ", ".join(other.id for other in others[:N_NAMED]) + (", ..." if len(others) > N_NAMED else "")
            has_other_mask = len({file_sha256(each.mask) for each in (sample, *others)}) > 1
            text = (
                f"{sample.id} of the pool is the same file as {named} of the test split"
                f"{', with another mask' if has_other_mask else ''}; `final` also gives the test mean without such "
                "images"
            )
            files = (sample.image, *(other.image for other in others))
            found.append(sample.problem("image in pool and test", text, *files))
    return found


def dataset_notes(dataset: Dataset) -> list[Problem]:
    """Return a note on how own images were divided, or on an ISIC-2017 that differs from the official one."""
    counts = {split: len(dataset.split(split)) for split in get_args(Split)}
    if dataset.layout == "folders":
        text = (
            f"set aside as the test split: {counts['test']} of these {sum(counts.values())} images, which the search "
            "does not see and `final` is scored on (data.test_share, data.test_list)"
        )
        return [dataset.problem("test split", text, "test")]
    is_augmented = (dataset.root / AUGMENTATION).is_file()
    if dataset.layout != "archive" or counts == OFFICIAL_COUNTS or is_augmented:
        return []
    got, official = ("/".join(str(n) for n in each.values()) for each in (counts, OFFICIAL_COUNTS))
    text = f"{got} training/validation/test pairs, where the official ISIC-2017 has {official}"
    return [dataset.problem("counts", text)]


def duplicates(pairs: Sequence[Decoded]) -> list[Problem]:
    """Return a note for each image that occurs more than once."""
    same: dict[str, list[Decoded]] = defaultdict(list)
    for pair in pairs:
        same[pair[1].image_sha256].append(pair)
    found = []
    for members in same.values():
        if len(members) > 1:
            ids = " and ".join(sample.id for sample, _ in members)
            n_masks = len({stats.mask_sha256 for _, stats in members})
            text = f"{ids} are one image with {f'{n_masks} masks' if n_masks > 1 else 'one mask'}"
            files = [sample.image for sample, _ in members]
            found.append(members[0][0].problem("duplicate image", text, *files))
    return found


def content_notes(
    dataset: Dataset, pairs: Sequence[Decoded], decision: Decision, size: Size | None, *, is_cropped: bool = False
) -> list[Problem]:
    """Return the notes on decoded pairs: how they are read, and what is unusual in images and masks."""
    notes = [*decision.notes, *mask_notes(pairs, size, is_cropped=is_cropped)]
    test = [stats for sample, stats in pairs if sample.split == "test"]
    if test and all(stats.is_empty(size) for stats in test):
        text = (
            f"none of the {len(test)} test masks has a lesion{_at(size)}: Dice then only counts false positives, "
            "that is how many images are predicted to be free of lesions"
        )
        notes.append(dataset.problem("no lesion in the test split", text, "test"))
    return [*notes, *reading_notes(pairs, decision.reading)]


def mask_notes(pairs: Sequence[Decoded], size: Size | None = None, *, is_cropped: bool = False) -> list[Problem]:
    """Return a note for each mask that is empty or full, in the file or once it is brought to `size`."""
    found = []
    for sample, stats in pairs:
        if stats.is_empty() or stats.is_full():
            what, pixels = ("empty", "lesion") if stats.is_empty() else ("full", "skin")
            text = f"{sample.mask} is {what}: no pixel is {pixels}"
            found.append(sample.problem(f"{what} mask", text, sample.mask))
        elif size and (stats.is_empty(size) or stats.is_full(size)):
            kind, n, pixels = "vanishing lesion", stats.foreground, "lesion pixels"
            if stats.is_full(size):
                kind, n = "vanishing skin", stats.height * stats.width - stats.foreground
                pixels = "pixels beside the lesion"
            at = f"in its crop of {size[0]}x{size[1]}" if is_cropped else _at(size).strip()
            text = f"{sample.id} has {n} {pixels} at {stats.height}x{stats.width} and none {at}"
            found.append(sample.problem(kind, text, sample.mask))
    return found


def lesion_fault(stats: Sequence[ImageStats], size: Size | None) -> str:
    """Return why a network cannot learn from these pairs: no mask has a lesion, or none has anything else.

    With `size` the masks count as they are at that size. The text is empty if something can be learned, or without
    pairs.
    """
    n, at = len(stats), _at(size)
    if n and all(each.is_empty(size) for each in stats):
        if n_vanish := sum(not each.is_empty() for each in stats):
            others = f", and the other {n - n_vanish} are empty" if n_vanish < n else ""
            return (
                f"none of the {n} masks of training and validation has a lesion{at}: the lesions of {n_vanish} "
                f"vanish at that size{others}. Choose a larger data.size"
            )
        return (
            f"none of the {n} masks of training and validation has a lesion, so there is nothing to learn: check "
            "that they are the right masks"
        )
    if n and all(each.is_full(size) for each in stats):
        return (
            f"all {n} masks of training and validation are nothing but lesion{at}, so there is nothing to learn: "
            "check that they are the right masks"
        )
    return ""


def were_swapped(dataset: Dataset, damaged: Sequence[Sample]) -> bool:
    """Return whether a user exchanged the two folders: most pairs are unusable, but usable the other way round."""
    if dataset.layout != "folders" or 2 * len(damaged) <= len(dataset.samples):
        return False
    some = damaged[:: max(1, len(damaged) // N_NAMED)][:N_NAMED]
    with Decoders() as decoders:
        swapped = list(decoders.decode([Job(sample.mask, sample.image) for sample in some]))
    return all(isinstance(result, ImageStats) for _, result, _ in swapped)


def describe(problems: Iterable[Problem]) -> list[str]:
    """Return a line for each kind that names the first few images, and a line for each problem of the whole."""
    lines = []
    for kind, members in _by_kind(problems).items():
        if not members[0].id:
            lines += [problem.text for problem in members]
            continue
        named = "; ".join(problem.text for problem in members[:N_NAMED])
        more = f"; and {len(members) - N_NAMED} more" if len(members) > N_NAMED else ""
        lines.append(f"{kind} ({len(members)}): {named}{more}")
    return lines


def refusal(problems: Sequence[Problem], flags: str, question: str = "") -> DatasetError:
    """Return the error that reports all problems. `flags` names the dataset on the command line."""
    n = len({(problem.split, problem.id) for problem in problems})
    texts = ". ".join([*describe(problems), *([question] if question else [])])
    return DatasetError(
        f"{n} image{'s' if n > 1 else ''} cannot be used: {texts}. "
        f"`hpsearch data check {flags} --json` names all; --exclude-bad leaves them out"
    )


def _by_kind(problems: Iterable[Problem]) -> dict[str, list[Problem]]:
    by_kind: dict[str, list[Problem]] = defaultdict(list)
    for problem in problems:
        by_kind[problem.kind].append(problem)
    return by_kind


def _at(size: Size | None) -> str:
    return f" at {size[0]}x{size[1]}" if size else ""


def _plain(problem: Problem) -> dict[str, Any]:
    return {**vars(problem), "files": [printable(path) for path in problem.files]}
