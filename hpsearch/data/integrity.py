"""Check a dataset and report errors and notes. decode.py detects the errors of a single image/mask pair."""

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from hpsearch.config.data import DataConfig
from hpsearch.data.cache import Cache
from hpsearch.data.dataset import Dataset, Problem, Sample, Split, file_sha256, same_bytes
from hpsearch.data.decode_pool import Decoders, ImageStats, Job, Progress, View
from hpsearch.data.folds import AUGMENTATION
from hpsearch.data.survey import decide_reading
from hpsearch.errors import DatasetError
from hpsearch.user_files import printable

OFFICIAL_COUNTS: dict[Split, int] = {"train": 2000, "val": 150, "test": 600}
N_NAMED = 3
"""Maximum number of images that a message names for each kind of problem."""
Size = tuple[int, int]
"""Height and width in pixels."""
Decoded = tuple[Sample, ImageStats]


@dataclass(frozen=True)
class CheckReport:
    """Errors, notes and image sizes of a dataset."""

    counts: dict[Split, int]
    """Number of usable pairs in each split."""
    errors: tuple[Problem, ...]
    notes: tuple[Problem, ...]
    sizes: tuple[Size, ...]
    """Height and width of each usable pair, in the order of the dataset."""

    def overview(self) -> list[str]:
        """Return lines of text with the number of usable pairs and the range of their sizes."""
        usable = ", ".join(f"{n} {split}" for split, n in self.counts.items())
        lines = [f"{sum(self.counts.values())} pairs can be used: {usable}"]
        if self.sizes:
            low, high = min(self.sizes, key=math.prod), max(self.sizes, key=math.prod)
            lines.append(f"sizes (height x width) from {low[0]}x{low[1]} to {high[0]}x{high[1]}")
        return lines

    def rows(self) -> list[tuple[str, str, int, list[str]]]:
        """Return one row per kind of problem: level (`error` or `note`), kind, number and first few texts."""
        return [
            (level, kind, len(members), [problem.text for problem in members[:N_NAMED]])
            for level, problems in (("error", self.errors), ("note", self.notes))
            for kind, members in _by_kind(problems).items()
        ]

    def to_dict(self) -> dict[str, Any]:
        """Return the counts, errors and notes as plain types."""
        plain = {
            level: [{**vars(problem), "files": [printable(path) for path in problem.files]} for problem in problems]
            for level, problems in (("errors", self.errors), ("notes", self.notes))
        }
        return {"counts": dict(self.counts), **plain}


def check(
    dataset: Dataset,
    *,
    config: DataConfig | None = None,
    cache_root: Path | None = None,
    progress: Progress | None = None,
) -> CheckReport:
    """Decode all pairs of `dataset` in a subprocess and return a report of the errors and notes.

    `config` determines how files are decoded. If it is given and images are resized rather than cropped, the report
    also lists masks that lose their lesion or background when they are resized to the cached size. `cache_root` is
    described in `survey.decide_reading`. `progress` is called with the number of pairs (done, total).
    """
    size = config.cached_size if config is not None and config.match == "resize" else None
    views: tuple[View, ...] = ("resize",) if size else ()
    usable: list[Decoded] = []
    errors = list(dataset.problems)
    with Decoders() as decoders:
        reading, notes = decide_reading(dataset, config or DataConfig(), cache_root, decoders)
        jobs = [Job(s.image, s.mask, views, *(size or (0, 0)), send=False, reading=reading) for s in dataset.samples]
        for sample, (result, _) in zip(dataset.samples, decoders.decode(jobs, progress), strict=True):
            if isinstance(result, ImageStats):
                usable.append((sample, result))
            else:
                errors.append(sample.problem(result.kind, result.text))
    if fault := lesion_fault([stats for sample, stats in usable if sample.split != "test"], size):
        errors.append(dataset.problem("nothing to learn", fault))
    notes = dataset_notes(dataset) + same_images(dataset.split("train", "val"), dataset.split("test")) + notes
    notes += content_notes(dataset, usable, size)
    counts = {split: sum(sample.split == split for sample, _ in usable) for split in get_args(Split)}
    return CheckReport(counts, tuple(errors), tuple(notes), tuple((stats.height, stats.width) for _, stats in usable))


def check_stored(cache: Cache) -> list[Problem]:
    """Return a problem for each file that changed after `cache` was built and for each damaged cached image."""
    changed = [
        sample.problem("changed file", f"{path} has changed since the cache was built", path)
        for sample, stats in cache.index.pairs
        for path, sha256 in ((sample.image, stats.image_sha256), (sample.mask, stats.mask_sha256))
        if file_sha256(path) != sha256
    ]
    return changed + [
        sample.problem("damaged cache", f"{cache.path} is damaged at {sample.id}: remove the folder", cache.path)
        for sample in cache.damaged()
    ]


def same_images(pool: Sequence[Sample], test: Sequence[Sample]) -> list[Problem]:
    """Return a note for each image that occurs more than once in the pool, or both in the pool and in the test split.

    The pool consists of the training and validation images. An image in the pool and in the test split is not an
    error, because the published ISIC-2017 contains one.
    """
    copies: dict[str, list[Sample]] = defaultdict(list)
    for sample, label in zip([*pool, *test], same_bytes([*pool, *test]), strict=True):
        copies[label].append(sample)
    found = []
    for samples in copies.values():
        in_pool, in_test = ([s for s in samples if (s.split == "test") == is_test] for is_test in (False, True))
        if not in_pool or len(samples) == 1:
            continue
        n_masks = len({file_sha256(sample.mask) for sample in samples})
        masks = f"{n_masks} masks" if n_masks > 1 else "one mask"
        names, test_names = (" and ".join(sample.id for sample in some) for some in (in_pool, in_test))
        kind, text = "duplicate image", f"{names} are the same image, with {masks}"
        if in_test:
            kind, verb = "image in pool and test", "is" if len(in_pool) == 1 else "are"
            text = f"{names} of the pool {verb} the same file as {test_names} of the test split, with {masks}"
        found.append(in_pool[0].problem(kind, text, *(sample.image for sample in samples)))
    return found


def dataset_notes(dataset: Dataset) -> list[Problem]:
    """Return notes on the splits of a dataset.

    For the layout `folders`, the note gives the size of the test split. For the layout `archive`, it gives the number
    of pairs in each split if this differs from the official ISIC-2017.
    """
    counts = {split: len(dataset.split(split)) for split in get_args(Split)}
    if dataset.layout == "folders":
        text = (
            f"set aside as the test split: {counts['test']} of these {sum(counts.values())} images, which the search "
            "does not use and `final` evaluates on (data.test_share, data.test_list)"
        )
        return [dataset.problem("test split", text, "test")]
    is_augmented = (dataset.root / AUGMENTATION).is_file()
    if dataset.layout != "archive" or counts == OFFICIAL_COUNTS or is_augmented:
        return []
    got, official = ("/".join(str(n) for n in each.values()) for each in (counts, OFFICIAL_COUNTS))
    text = f"{got} training/validation/test pairs, where the official ISIC-2017 has {official}"
    return [dataset.problem("counts", text)]


def content_notes(dataset: Dataset, pairs: Sequence[Decoded], size: Size | None) -> list[Problem]:
    """Return notes on unusual images and masks. With `size`, masks are also checked after resizing to it."""
    notes = [note for sample, stats in pairs for note in _pair_notes(sample, stats, size)]
    test = [stats for sample, stats in pairs if sample.split == "test"]
    if test and not any(stats.lesion_share(size) for stats in test):
        text = (
            f"none of the {len(test)} test masks has a lesion{_at(size)}: Dice then only counts false positives, "
            "that is how many images are predicted to be free of lesions"
        )
        notes.append(dataset.problem("no lesion in the test split", text, "test"))
    members: dict[str, list[Sample]] = defaultdict(list)
    for sample, stats in pairs:
        background, *lesion = stats.mask_values
        is_gray = all(value.isdecimal() for value in stats.mask_values)
        if lesion and not (is_gray and background == "0"):
            members[f"lesion is {lesion[0]}, background is {background}"].append(sample)
        # `_pair_notes` already covers full masks of one gray value.
        elif not (lesion or (is_gray and (stats.foreground or background == "0"))):
            members[f"{background} everywhere: {'full' if stats.foreground else 'empty'}"].append(sample)
    for text, samples in members.items():
        n = f"{len(samples)} mask{'s' if len(samples) > 1 else ''}"
        files = tuple(sample.mask for sample in samples)
        notes.append(Problem("mask values", "", files, f"{n}: {text}, such as {files[0]}", samples[0].split))
    return notes


def _pair_notes(sample: Sample, stats: ImageStats, size: Size | None) -> Iterator[Problem]:
    """Yield notes on a mask that is empty or full, as stored or at `size`, and on an image with a single colour."""
    share, share_at_size = stats.lesion_share(), stats.lesion_share(size)
    if share in (0, 1):
        what, pixels = ("full", "skin") if share else ("empty", "lesion")
        yield sample.problem(f"{what} mask", f"{sample.mask} is {what}: no pixel is {pixels}", sample.mask)
    elif share_at_size in (0, 1):
        what = "skin" if share_at_size else "lesion"
        n = stats.height * stats.width - stats.foreground if share_at_size else stats.foreground
        text = f"{sample.id} has {n} {what} pixels at {stats.height}x{stats.width} and none{_at(size)}"
        yield sample.problem(f"vanishing {what}", text, sample.mask)
    if stats.is_constant:
        yield sample.problem("constant image", f"{sample.image} has only one colour after decoding", sample.image)


def lesion_fault(stats: Sequence[ImageStats], size: Size | None) -> str:
    """Return the reason why a network cannot learn from these pairs, or an empty string if it can.

    It cannot learn if all masks are empty or all masks are full. If `size` is given, the masks are checked after
    resizing to it. The result is also empty if there are no pairs.
    """
    shares = {each.lesion_share(size) for each in stats}
    if shares not in ({0}, {1}):
        return ""
    masks = f"{len(stats)} masks of training and validation"
    fault = f"all {masks} contain only lesion" if shares == {1} else f"none of the {masks} has a lesion"
    advice = "check that they are the right masks"
    if n_vanish := sum(each.lesion_share() not in shares for each in stats):
        advice = f"{n_vanish} of them have both lesion and background at their own size. Choose a larger data.size"
    return f"{fault}{_at(size)}, so there is nothing to learn: {advice}"


def describe(problems: Iterable[Problem]) -> list[str]:
    """Return one line per kind of problem with images, and one line per problem with the whole dataset.

    For each kind, the line has the text of the first problem, and the ids of a few others.
    """
    lines = []
    for kind, members in _by_kind(problems).items():
        if not members[0].id:
            lines += [problem.text for problem in members]
            continue
        others = ", ".join(problem.id for problem in members[1:N_NAMED])
        more = f" and {len(members) - N_NAMED} more" if len(members) > N_NAMED else ""
        lines.append(f"{kind} ({len(members)}): {members[0].text}{others and '; also '}{others}{more}")
    return lines


def refusal(problems: Sequence[Problem], flags: str) -> DatasetError:
    """Return a DatasetError that lists the problems. `flags` are the command-line flags that select the dataset."""
    n = len({(problem.split, problem.id) for problem in problems})
    return DatasetError(
        f"{n} image{'s' if n > 1 else ''} cannot be used: {'. '.join(describe(problems))}. "
        f"`hpsearch data check {flags} --json` lists all; --exclude-bad leaves them out"
    )


def _by_kind(problems: Iterable[Problem]) -> dict[str, list[Problem]]:
    by_kind: dict[str, list[Problem]] = defaultdict(list)
    for problem in problems:
        by_kind[problem.kind].append(problem)
    return by_kind


def _at(size: Size | None) -> str:
    return f" at {size[0]}x{size[1]}" if size else ""
