"""Look through a dataset's pool once and decide how its files are read: orientation, full scale, values of masks."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

from hpsearch import paths
from hpsearch.config.data import DataConfig
from hpsearch.data.cache import files_key
from hpsearch.data.decode_pool import Decoders, Facts, Job
from hpsearch.data.folds import AUGMENTATION
from hpsearch.data.headers import Header, read_header
from hpsearch.data.layouts import Dataset, Problem, Sample
from hpsearch.data.reading import FULL_SCALES, Reading, full_scale
from hpsearch.errors import RecordError, StorageError

logger = logging.getLogger(__name__)

SURVEY_VERSION = 1
"""Changes when the same files would give another survey."""


@dataclass(frozen=True)
class Survey:
    """What the files of a pool show."""

    n_pairs: int = 0
    n_oriented: int = 0
    """Pairs of which image or mask has an EXIF orientation."""
    n_apply: int = 0
    """Pairs whose sizes are equal only with the orientation applied."""
    n_ignore: int = 0
    """Pairs whose sizes are equal only without."""
    n_deep: int = 0
    """Images of more than 8 bits a channel."""
    lowest: int = 0
    """The smallest of their largest values."""
    highest: int = 0
    """The largest of them."""
    masks: tuple[tuple[str, str, int], ...] = ()
    """Background, lesion, and how many masks have these two values."""

    @classmethod
    def from_table(cls, table: dict[str, Any]) -> Self:
        """A survey that was written as JSON."""
        return cls(**{**table, "masks": tuple(tuple(each) for each in table["masks"])})


@dataclass(frozen=True)
class Decision:
    """How the files of a dataset are read, and what is worth saying about it."""

    reading: Reading
    notes: tuple[Problem, ...]


def decide_reading(
    dataset: Dataset, config: DataConfig, cache_root: Path | None = None, decoders: Decoders | None = None
) -> Decision:
    """How the files of `dataset` are read, decided by its whole pool and by `data.exif` and `data.max_value`.

    All masks of the pool are decoded, and its images of more than 8 bits; in `cache_root` the result is kept until a
    file changes.
    """
    return decide(survey(dataset.split("train", "val"), cache_root, decoders), config, dataset)


def survey(pool: Sequence[Sample], cache_root: Path | None, decoders: Decoders | None = None) -> Survey:
    """The survey of a pool, from `cache_root` if it is there."""
    if cache_root is None:
        return _survey(pool, decoders)
    known = cache_root / f"survey-{files_key(['survey', SURVEY_VERSION], pool)}.json"
    if known.is_file():
        try:
            return Survey.from_table(paths.read_json(known))
        except (RecordError, KeyError, TypeError, ValueError) as error:
            logger.warning("%s; the images are surveyed again", error)
    result = _survey(pool, decoders)
    try:
        paths.write_json(known, asdict(result))
    except (OSError, StorageError) as error:
        # A shared cache may lie where this user cannot write.
        logger.info("the survey of the images is not kept: %s", error)
    return result


def decide(found: Survey, config: DataConfig, dataset: Dataset) -> Decision:
    """What a survey and the settings make of it."""
    recorded = _recorded(dataset)
    n_proofs = found.n_apply + found.n_ignore
    exif, reason = config.exif, f'as data.exif = "{config.exif}" says'
    if exif == "auto" and recorded is not None:
        exif, reason = recorded.exif, "as it was when the dataset was augmented"
    elif exif == "auto" and n_proofs:
        exif = "apply" if found.n_apply >= found.n_ignore else "ignore"
        n_for = max(found.n_apply, found.n_ignore)
        reason = f"as the sizes of {n_for} pair{'s' if n_for > 1 else ''} prove"
    elif exif == "auto":
        exif, reason = "apply", "by default"
    max_value = config.max_value or (recorded.max_value if recorded is not None else 0)
    if not max_value and found.n_deep:
        max_value = full_scale(found.highest)
    votes: Counter[str] = Counter()
    for background, lesion, n in found.masks:
        votes[background] -= n
        votes[lesion] += n
    reading = Reading(
        exif=exif,
        exif_reason=reason,
        n_oriented=found.n_oriented,
        max_value=max_value,
        # A value of which as many masks say one as the other is in both: each of these masks is an error.
        background=tuple(sorted(value for value, n in votes.items() if n <= 0)),
        lesion=tuple(sorted(value for value, n in votes.items() if n >= 0)),
    )
    texts = []
    if found.n_oriented:
        texts.append(("EXIF orientation", _orientation_text(found, reading, is_default=reason == "by default")))
    if found.n_deep:
        texts.append(("more than 8 bits", _depth_text(found, reading, config)))
    return Decision(reading, tuple(Problem(kind, "", (dataset.root,), text, "train") for kind, text in texts))


def reading_notes(samples: Sequence[Sample], facts: Sequence[Facts], reading: Reading) -> list[Problem]:
    """What decoding showed: constant images, oriented test images, and masks other than gray with background 0."""
    notes = [
        Problem("constant image", s.id, (s.image,), f"{s.image} has one colour only, once decoded", s.split)
        for s, fact in zip(samples, facts, strict=True)
        if fact.is_constant
    ]
    # Those of the pool are in the notes of the decision.
    oriented = [s for s, fact in zip(samples, facts, strict=True) if fact.is_oriented and s.split == "test"]
    if oriented:
        text = (
            f"{len(oriented)} test pair{'s have' if len(oriented) > 1 else ' has'} an EXIF orientation (the first is "
            f"{oriented[0].image}); it is {'applied' if reading.turns else 'ignored'} {reading.exif_reason}"
        )
        notes.append(Problem("EXIF orientation", "", tuple(s.image for s in oriented), text, "test"))
    members: dict[tuple[str, ...], list[Sample]] = {}
    for sample, fact in zip(samples, facts, strict=True):
        is_usual = all(value.isdecimal() for value in fact.mask_values) and fact.mask_values[0] == "0"
        # Of one gray value it is said already that the mask is full.
        if not is_usual and not (len(fact.mask_values) == 1 and fact.foreground and fact.mask_values[0].isdecimal()):
            what = "lesion" if len(fact.mask_values) == 2 else "full" if fact.foreground else "empty"
            members.setdefault((what, *fact.mask_values), []).append(sample)
    for (what, *values), masks in members.items():
        n = f"{len(masks)} mask{'s' if len(masks) > 1 else ''}"
        if what == "lesion":
            text = f"{n}: lesion is {values[1]}, background is {values[0]}"
        else:
            text = f"{n} of the one value {values[0]}: {what}"
        if values[0].startswith("index"):
            text += " (of the palette, whose colours play no part)"
        text += f", such as {masks[0].mask}"
        notes.append(Problem("mask values", "", tuple(s.mask for s in masks), text, masks[0].split))
    return notes


def _survey(pool: Sequence[Sample], decoders: Decoders | None) -> Survey:
    with ThreadPoolExecutor(16) as threads:
        images = list(threads.map(_header, [sample.image for sample in pool]))
        masks = list(threads.map(_header, [sample.mask for sample in pool]))
    n_oriented = n_apply = n_ignore = 0
    for image, mask in zip(images, masks, strict=True):
        if image is None or mask is None or image.orientation == mask.orientation == 1:
            continue
        n_oriented += 1
        if_applied = image.size(upright=True) == mask.size(upright=True)
        if_ignored = image.size(upright=False) == mask.size(upright=False)
        n_apply += if_applied and not if_ignored
        n_ignore += if_ignored and not if_applied
    # As they are, whatever will be decided: no value is above 16 bits.
    reading = Reading("ignore", max_value=FULL_SCALES[-1])
    deep = [s for s, header in zip(pool, images, strict=True) if header is not None and header.depth > 8]
    jobs = [Job(str(s.image), "", measure=False, reading=reading, parts="image") for s in deep]
    jobs += [Job("", str(s.mask), measure=False, reading=reading, parts="mask") for s in pool]
    largest, pairs = [], Counter[tuple[str, ...]]()
    for facts in _decoded(jobs, decoders):
        if facts.largest:
            largest.append(facts.largest)
        pairs[facts.mask_values] += 1
    return Survey(
        n_pairs=len(pool),
        n_oriented=n_oriented,
        n_apply=n_apply,
        n_ignore=n_ignore,
        n_deep=len(deep),
        lowest=min(largest, default=0),
        highest=max(largest, default=0),
        masks=tuple((*values, n) for values, n in sorted(pairs.items()) if len(values) == 2),
    )


def _decoded(jobs: list[Job], decoders: Decoders | None) -> Iterable[Facts]:
    """The facts of the jobs whose files are sound; the others are reported when they are used."""
    if not jobs:
        return
    if decoders is None:
        with Decoders() as own:
            yield from _decoded(jobs, own)
        return
    for _, result, _ in decoders.decode(jobs):
        if isinstance(result, Facts):
            yield result


def _header(path: Path) -> Header | None:
    try:
        with path.open("rb") as file:
            return read_header(file)
    except (OSError, ValueError):
        # Decoding it says why.
        return None


def _recorded(dataset: Dataset) -> Reading | None:
    """How the original of an augmented dataset was read: its changed versions were made so."""
    path = dataset.root / AUGMENTATION
    if not path.is_file():
        return None
    try:
        table = paths.read_json(path)
        return Reading.from_table(table["reading"]) if "reading" in table else None
    except (RecordError, TypeError):
        return None


def _orientation_text(found: Survey, reading: Reading, *, is_default: bool) -> str:
    done = "applied" if reading.turns else "ignored"
    other = '"ignore" reads the pixels as they are stored' if reading.turns else '"apply" turns them upright'
    text = (
        f"{found.n_oriented} of {found.n_pairs} training and validation pairs have an EXIF orientation; it is {done} "
        f"{reading.exif_reason}"
    )
    if is_default:
        text += ", as no size tells whether the masks are drawn on the upright pictures"
    against = found.n_ignore if reading.turns else found.n_apply
    if against:
        text += f"; {against} fit only otherwise, which is an error for each of them"
    return f"{text} (data.exif: {other})"


def _depth_text(found: Survey, reading: Reading, config: DataConfig) -> str:
    return (
        f"{found.n_deep} of {found.n_pairs} training and validation images have more than 8 bits a channel, with "
        f"largest values from {found.lowest} to {found.highest}: full scale is {reading.max_value}"
        + (", as data.max_value says" if config.max_value else " (data.max_value)")
    )
