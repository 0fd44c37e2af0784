"""Says what is wrong with a dataset (errors) and what is worth knowing about it (notes)."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from hpsearch.data.cache import Cache
from hpsearch.data.config import DataConfig
from hpsearch.data.decoding import Damage, Decoders, Facts, Job
from hpsearch.data.folds import AUGMENTATION
from hpsearch.data.layouts import Dataset, Problem, Sample, Split, file_sha256, same_bytes
from hpsearch.data.survey import decide_reading, reading_notes
from hpsearch.errors import DatasetError

OFFICIAL_COUNTS: dict[Split, int] = {"train": 2000, "val": 150, "test": 600}
N_NAMED = 3
"""Images of each kind of problem that a message names."""


@dataclass(frozen=True)
class CheckReport:
    """What a whole dataset is like."""

    counts: dict[Split, int]
    """Pairs that can be used."""
    errors: tuple[Problem, ...]
    notes: tuple[Problem, ...]
    sizes: tuple[tuple[int, int], ...]
    """Height and width of each usable pair, in the dataset's order."""

    def summary(self) -> list[str]:
        """Lines to print."""
        lines = [*self.overview(), *(f"error: {line}" for line in describe(self.errors))]
        return lines + ([] if self.errors else ["no errors"]) + [f"note: {line}" for line in describe(self.notes)]

    def overview(self) -> list[str]:
        """What can be used, in a line or two."""
        usable = ", ".join(f"{n} {split}" for split, n in self.counts.items())
        lines = [f"{sum(self.counts.values())} pairs can be used: {usable}"]
        if self.sizes:
            low, high = min(self.sizes, key=lambda s: s[0] * s[1]), max(self.sizes, key=lambda s: s[0] * s[1])
            lines.append(f"sizes (height x width) from {low[0]}x{low[1]} to {high[0]}x{high[1]}")
        return lines

    def rows(self) -> list[tuple[str, str, int, list[str]]]:
        """Of every kind of problem: `error` or `note`, the kind, how many, and the texts of the first few."""
        return [
            (level, kind, len(members), [problem.text for problem in members[:N_NAMED]])
            for level, problems in (("error", self.errors), ("note", self.notes))
            for kind, members in _by_kind(problems).items()
        ]

    def to_dict(self) -> dict[str, Any]:
        """Plain types."""
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
    """Everything that is wrong with `dataset` or worth knowing, after decoding all of it in a subprocess.

    Files are read as `config` says, and a survey of them is kept in `cache_root`, if any.
    """
    facts: dict[int, Facts] = {}
    damage: dict[int, Damage] = {}
    with Decoders() as decoders:
        decision = decide_reading(dataset, config or DataConfig(), cache_root, decoders)
        jobs = [Job(str(s.image), str(s.mask), reading=decision.reading) for s in dataset.samples]
        for number, result, _ in decoders.decode(jobs):
            if isinstance(result, Damage):
                damage[number] = result
            else:
                facts[number] = result
            if progress is not None:
                progress(len(facts) + len(damage), len(jobs))
    errors = list(dataset.problems)
    for number, found in sorted(damage.items()):
        sample = dataset.samples[number]
        errors.append(Problem(found.kind, sample.id, (sample.image, sample.mask), found.text, sample.split))
    errors += leaks(dataset.split("train", "val"), dataset.split("test"))
    good = sorted(facts)
    samples = [dataset.samples[i] for i in good]
    pool = [i for i in good if dataset.samples[i].split != "test"]
    notes = [
        *dataset_notes(dataset),
        *decision.notes,
        *duplicates([dataset.samples[i] for i in pool], [facts[i] for i in pool]),
        *mask_notes(samples, [facts[i] for i in good]),
        *reading_notes(samples, [facts[i] for i in good], decision.reading),
    ]
    counts = {split: sum(sample.split == split for sample in samples) for split in get_args(Split)}
    return CheckReport(counts, tuple(errors), tuple(notes), tuple((facts[i].height, facts[i].width) for i in good))


def check_stored(cache: Cache) -> list[Problem]:
    """Files whose content is no more what it was when `cache` was made, and cached pixels that are not."""
    changed = []
    for sample, facts in zip(cache.index.samples, cache.index.facts, strict=True):
        for path, sha256 in ((sample.image, facts.image_sha256), (sample.mask, facts.mask_sha256)):
            if file_sha256(path) != sha256:
                text = f"{path} is not what it was when the cache was made"
                changed.append(Problem("changed file", sample.id, (path,), text, sample.split))
    damaged = set(cache.damaged())
    return changed + [
        Problem(
            "damaged cache", s.id, (cache.path,), f"{cache.path} is damaged at {s.id}: remove the folder", s.split
        )
        for s in cache.index.samples
        if s.id in damaged
    ]


def leaks(pool: Sequence[Sample], test: Sequence[Sample]) -> list[Problem]:
    """An error for each image of the pool that is byte-equal to one of the test split: its score would be no test."""
    both = [*pool, *test]
    labels = same_bytes(both)
    in_test = dict(zip(labels[len(pool) :], test, strict=True))
    found = []
    for sample, label in zip(pool, labels, strict=False):
        if label in in_test:
            other = in_test[label]
            text = f"{sample.image} of the pool and {other.image} of the test split are one image"
            found.append(
                Problem("image in pool and test", sample.id, (sample.image, other.image), text, sample.split)
            )
    return found


def dataset_notes(dataset: Dataset) -> list[Problem]:
    """Notes on the whole: an ISIC-2017 that is not the official one, or how one's own images were divided."""
    counts = {split: len(dataset.split(split)) for split in get_args(Split)}
    if dataset.layout == "folders":
        text = (
            f"set aside as the test split: {counts['test']} of these {sum(counts.values())} images, which the search "
            "does not see and `final` is scored on (data.test_share, data.test_list)"
        )
        return [Problem("test split", "", (dataset.root,), text, "test")]
    is_augmented = (dataset.root / AUGMENTATION).is_file()
    if dataset.layout != "archive" or counts == OFFICIAL_COUNTS or is_augmented:
        return []
    got, official = ("/".join(str(n) for n in each.values()) for each in (counts, OFFICIAL_COUNTS))
    text = f"{got} training/validation/test pairs, where the official ISIC-2017 has {official}"
    return [Problem("counts", "", (dataset.root,), text, "train")]


def duplicates(samples: Sequence[Sample], facts: Sequence[Facts]) -> list[Problem]:
    """A note for each image that is there more than once."""
    same: dict[str, list[int]] = defaultdict(list)
    for i, fact in enumerate(facts):
        same[fact.image_sha256].append(i)
    found = []
    for members in same.values():
        if len(members) > 1:
            ids = " and ".join(samples[i].id for i in members)
            n_masks = len({facts[i].mask_sha256 for i in members})
            text = f"{ids} are one image with {f'{n_masks} masks' if n_masks > 1 else 'one mask'}"
            files = tuple(samples[i].image for i in members)
            first = samples[members[0]]
            found.append(Problem("duplicate image", first.id, files, text, first.split))
    return found


def mask_notes(samples: Sequence[Sample], facts: Sequence[Facts]) -> list[Problem]:
    """A note for each mask without lesion or full of it."""
    found = []
    for sample, fact in zip(samples, facts, strict=True):
        if fact.foreground in (0, fact.height * fact.width):
            what = "empty" if fact.foreground == 0 else "full"
            text = f"{sample.mask} is {what}: no pixel is {'lesion' if what == 'empty' else 'skin'}"
            found.append(Problem(f"{what} mask", sample.id, (sample.mask,), text, sample.split))
    return found


def describe(problems: Iterable[Problem]) -> list[str]:
    """One line for each kind, which names the first few; what concerns no single image is a line by itself."""
    lines = []
    for kind, members in _by_kind(problems).items():
        if not members[0].id:
            lines += [problem.text for problem in members]
            continue
        named = "; ".join(problem.text for problem in members[:N_NAMED])
        more = f"; and {len(members) - N_NAMED} more" if len(members) > N_NAMED else ""
        lines.append(f"{kind} ({len(members)}): {named}{more}")
    return lines


def _by_kind(problems: Iterable[Problem]) -> dict[str, list[Problem]]:
    by_kind: dict[str, list[Problem]] = defaultdict(list)
    for problem in problems:
        by_kind[problem.kind].append(problem)
    return by_kind


def refusal(problems: Sequence[Problem], flags: str) -> DatasetError:
    """The one error that reports all of them; `flags` is how the command line names the dataset."""
    n = len({(problem.split, problem.id) for problem in problems})
    return DatasetError(
        f"{n} image{'s' if n > 1 else ''} cannot be used: {'. '.join(describe(problems))}. "
        f"`hpsearch data check {flags} --json` names all; --exclude-bad leaves them out"
    )


def _plain(problem: Problem) -> dict[str, Any]:
    return {
        "kind": problem.kind,
        "id": problem.id,
        "split": problem.split,
        "files": [str(path) for path in problem.files],
        "text": problem.text,
    }
