"""Says what is wrong with a dataset (errors) and what is worth knowing about it (notes)."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from hpsearch.config.data import DataConfig
from hpsearch.data.cache import Cache
from hpsearch.data.decode_pool import Damage, Decoders, Facts, Job, View
from hpsearch.data.folds import AUGMENTATION
from hpsearch.data.layouts import Dataset, Problem, Sample, Split, file_sha256, same_bytes
from hpsearch.data.survey import decide_reading, reading_notes
from hpsearch.errors import DatasetError
from hpsearch.user_files import printable

OFFICIAL_COUNTS: dict[Split, int] = {"train": 2000, "val": 150, "test": 600}
N_NAMED = 3
"""Images of each kind of problem that a message names."""
SWAPPED = "were --images and --masks swapped? Most pairs can be used only the other way round"


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
    """Decode all of `dataset` in a subprocess and return what is wrong with it and what is worth knowing.

    Files are read as `config` says, and a survey of them is kept in `cache_root`, if any. With `config` the report
    also has the masks that lose their lesion when they are resized to `data.size`.
    """
    size = config.cached_size if config is not None and config.match == "resize" else None
    views: tuple[View, ...] = ("resize",) if size else ()
    height, width = size or (0, 0)
    facts: dict[int, Facts] = {}
    damage: dict[int, Damage] = {}
    with Decoders() as decoders:
        decision = decide_reading(dataset, config or DataConfig(), cache_root, decoders)
        jobs = [
            Job(str(s.image), str(s.mask), views, height, width, send=False, reading=decision.reading)
            for s in dataset.samples
        ]
        for number, result, _ in decoders.decode(jobs):
            if isinstance(result, Damage):
                damage[number] = result
            else:
                facts[number] = result
            if progress is not None:
                progress(len(facts) + len(damage), len(jobs))
    errors = []
    if were_swapped(dataset, [dataset.samples[number] for number in sorted(damage)]):
        errors.append(Problem("swapped folders", "", (dataset.root,), SWAPPED, "train"))
    errors += dataset.problems
    for number, found in sorted(damage.items()):
        sample = dataset.samples[number]
        errors.append(Problem(found.kind, sample.id, (sample.image, sample.mask), found.text, sample.split))
    good = sorted(facts)
    samples = [dataset.samples[i] for i in good]
    pool = [i for i in good if dataset.samples[i].split != "test"]
    test = [facts[i] for i in good if dataset.samples[i].split == "test"]
    if fault := lesion_fault([facts[i] for i in pool], size):
        errors.append(Problem("nothing to learn", "", (dataset.root,), fault, "train"))
    notes = [
        *dataset_notes(dataset),
        *decision.notes,
        *shared_images(dataset.split("train", "val"), dataset.split("test")),
        *duplicates([dataset.samples[i] for i in pool], [facts[i] for i in pool]),
        *mask_notes(samples, [facts[i] for i in good], size),
        *no_lesion_to_find(dataset, test, size),
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


def shared_images(pool: Sequence[Sample], test: Sequence[Sample]) -> list[Problem]:
    """Return a note for each image of the pool that is byte-equal to images of the test split.

    ISIC-2017 as it is published has such a pair, so it is no error: `final` also gives the test mean without them.
    """
    labels = same_bytes([*pool, *test])
    in_test: dict[str, list[Sample]] = defaultdict(list)
    for sample, label in zip(test, labels[len(pool) :], strict=True):
        in_test[label].append(sample)
    found = []
    for sample, label in zip(pool, labels, strict=False):
        if others := in_test.get(label):
            named = ", ".join(other.id for other in others[:N_NAMED]) + (", ..." if len(others) > N_NAMED else "")
            masks = {file_sha256(each.mask) for each in (sample, *others)}
            text = (
                f"{sample.id} of the pool is the same file as {named} of the test split"
                + (", with another mask" if len(masks) > 1 else "")
                + "; `final` also gives the test mean without such images"
            )
            files = (sample.image, *(other.image for other in others))
            found.append(Problem("image in pool and test", sample.id, files, text, sample.split))
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


def mask_notes(
    samples: Sequence[Sample],
    facts: Sequence[Facts],
    size: tuple[int, int] | None = None,
    *,
    is_cropped: bool = False,
) -> list[Problem]:
    """Return a note for each mask without lesion or full of it, in the file or once it is brought to `size`."""
    at = f"{'in its crop of' if is_cropped else 'at'} {size[0]}x{size[1]}" if size else ""
    found = []
    for sample, fact in zip(samples, facts, strict=True):
        has_lesion, has_skin = fact.foreground > 0, fact.foreground < fact.height * fact.width
        if size and fact.view_foreground in (0, size[0] * size[1]) and has_lesion and has_skin:
            kind = "vanishing lesion"
            text = f"{sample.id} has {fact.foreground} lesion pixels at {fact.height}x{fact.width} and none {at}"
            if fact.view_foreground:
                kind = "vanishing skin"
                n_skin = fact.height * fact.width - fact.foreground
                text = (
                    f"{sample.id} has {n_skin} pixels beside the lesion at {fact.height}x{fact.width} and none {at}"
                )
            found.append(Problem(kind, sample.id, (sample.mask,), text, sample.split))
        if fact.foreground in (0, fact.height * fact.width):
            what = "empty" if fact.foreground == 0 else "full"
            text = f"{sample.mask} is {what}: no pixel is {'lesion' if what == 'empty' else 'skin'}"
            found.append(Problem(f"{what} mask", sample.id, (sample.mask,), text, sample.split))
    return found


def lesion_fault(facts: Sequence[Facts], size: tuple[int, int] | None) -> str:
    """Say why a network cannot learn from these pairs: no mask has a lesion, or none has anything else.

    With `size` (height, width) the masks count as they are at that size. Empty if something can be learned, or if
    there are no pairs.
    """
    n, at = len(facts), f" at {size[0]}x{size[1]}" if size else ""
    if n and not any(_shown(fact, size)[0] for fact in facts):
        n_vanish = sum(fact.foreground > 0 for fact in facts)
        if n_vanish:
            others = f", and the other {n - n_vanish} are empty" if n_vanish < n else ""
            return (
                f"none of the {n} masks of training and validation has a lesion{at}: the lesions of {n_vanish} "
                f"vanish at that size{others}. Choose a larger data.size"
            )
        return (
            f"none of the {n} masks of training and validation has a lesion, so there is nothing to learn: check "
            "that they are the right masks"
        )
    if n and not any(_shown(fact, size)[1] for fact in facts):
        return (
            f"all {n} masks of training and validation are nothing but lesion{at}, so there is nothing to learn: "
            "check that they are the right masks"
        )
    return ""


def no_lesion_to_find(dataset: Dataset, facts: Sequence[Facts], size: tuple[int, int] | None) -> list[Problem]:
    """Return a note if not one mask of the test split has a lesion."""
    if not facts or any(_shown(fact, size)[0] for fact in facts):
        return []
    at = f" at {size[0]}x{size[1]}" if size else ""
    text = (
        f"none of the {len(facts)} test masks has a lesion{at}: Dice then only counts false positives, that is how "
        "many images are predicted to be free of lesions"
    )
    return [Problem("no lesion in the test split", "", (dataset.root,), text, "test")]


def _shown(fact: Facts, size: tuple[int, int] | None) -> tuple[bool, bool]:
    """Whether a mask shows lesion, and anything else, at `size` or, without one, as it is stored."""
    if size is None:
        return fact.foreground > 0, fact.foreground < fact.height * fact.width
    return fact.view_foreground > 0, fact.view_foreground < size[0] * size[1]


def were_swapped(dataset: Dataset, damaged: Sequence[Sample]) -> bool:
    """Whether a user's two folders were exchanged: most pairs cannot be used, but some of those can the other way."""
    if dataset.layout != "folders" or 2 * len(damaged) <= len(dataset.samples):
        return False
    some = damaged[:: max(1, len(damaged) // N_NAMED)][:N_NAMED]
    with Decoders() as decoders:
        turned = list(decoders.decode([Job(str(sample.mask), str(sample.image)) for sample in some]))
    return all(isinstance(result, Facts) for _, result, _ in turned)


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


def refusal(problems: Sequence[Problem], flags: str, question: str = "") -> DatasetError:
    """The one error that reports all of them; `flags` is how the command line names the dataset."""
    n = len({(problem.split, problem.id) for problem in problems})
    said = ". ".join([*describe(problems), *([question] if question else [])])
    return DatasetError(
        f"{n} image{'s' if n > 1 else ''} cannot be used: {said}. "
        f"`hpsearch data check {flags} --json` names all; --exclude-bad leaves them out"
    )


def _plain(problem: Problem) -> dict[str, Any]:
    return {
        "kind": problem.kind,
        "id": problem.id,
        "split": problem.split,
        "files": [printable(path) for path in problem.files],
        "text": problem.text,
    }
