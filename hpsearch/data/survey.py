"""Survey the files of a pool once and decide how they are read: orientation, full scale, values of masks."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from hpsearch import paths
from hpsearch.config.data import DataConfig
from hpsearch.data.dataset import Dataset, Problem, Sample
from hpsearch.data.decode_pool import Decoders, ImageStats, Job
from hpsearch.data.folds import AUGMENTATION
from hpsearch.data.formats import Header, read_header
from hpsearch.data.keys import files_key
from hpsearch.data.reading import FULL_SCALES, Reading, as_tuples, full_scale
from hpsearch.errors import RecordError, StorageError

logger = logging.getLogger(__name__)

Exif = Literal["apply", "ignore"]
BY_DEFAULT = "by default"
SURVEY_VERSION = 1
"""Changes when the same files give another survey."""


@dataclass(frozen=True)
class Survey:
    """Orientations, bit depths and mask values of a pool's files."""

    n_pairs: int
    n_oriented: int = 0
    """Pairs whose image or mask has an EXIF orientation."""
    n_apply: int = 0
    """Pairs whose sizes are equal only with the orientation applied."""
    n_ignore: int = 0
    """Pairs whose sizes are equal only without it."""
    n_deep: int = 0
    """Images of more than 8 bits per channel."""
    lowest: int = 0
    """Smallest of the largest values of these images."""
    highest: int = 0
    """Largest of them."""
    masks: tuple[tuple[str, str, int], ...] = ()
    """Background, lesion, and the number of masks with these two values."""


@dataclass(frozen=True)
class Decision:
    """Rules for reading a dataset, and notes on them."""

    reading: Reading
    notes: tuple[Problem, ...]


def decide_reading(
    dataset: Dataset, config: DataConfig, cache_root: Path | None = None, decoders: Decoders | None = None
) -> Decision:
    """Decide how the files of `dataset` are read, from its whole pool and from `data.exif` and `data.max_value`.

    All masks of the pool are decoded, and its images of more than 8 bits. `cache_root` keeps the survey until a file
    changes.
    """
    return decide(survey(dataset.split("train", "val"), cache_root, decoders), config, dataset)


def survey(pool: Sequence[Sample], cache_root: Path | None, decoders: Decoders | None = None) -> Survey:
    """Return the survey of a pool, from `cache_root` if it is there."""
    if cache_root is None:
        return _survey(pool, decoders)
    path = cache_root / f"survey-{files_key(['survey', SURVEY_VERSION], pool)}.json"
    if path.is_file():
        try:
            return Survey(**as_tuples(paths.read_json(path)))
        except (RecordError, AttributeError, TypeError) as error:
            logger.warning("%s; the images are surveyed again", error)
    result = _survey(pool, decoders)
    try:
        paths.write_json(path, asdict(result))
    except (OSError, StorageError) as error:
        # A shared cache may be in a folder that this user cannot write.
        logger.info("the survey of the images is not kept: %s", error)
    return result


def decide(found: Survey, config: DataConfig, dataset: Dataset) -> Decision:
    """Decide the rules from a survey and the settings."""
    recorded = _recorded(dataset)
    exif, reason = _decide_exif(found, config, recorded)
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
        # A value with as many votes for either meaning is in both: each mask with it is an error.
        background=tuple(sorted(value for value, n in votes.items() if n <= 0)),
        lesion=tuple(sorted(value for value, n in votes.items() if n >= 0)),
    )
    notes = []
    if found.n_oriented:
        notes.append(dataset.problem("EXIF orientation", _orientation_text(found, reading)))
    if found.n_deep:
        notes.append(dataset.problem("more than 8 bits", _depth_text(found, reading, config)))
    return Decision(reading, tuple(notes))


def _decide_exif(found: Survey, config: DataConfig, recorded: Reading | None) -> tuple[Exif, str]:
    """Return whether orientations are applied, and why."""
    if config.exif != "auto":
        return config.exif, f'as data.exif = "{config.exif}" says'
    if recorded is not None:
        return recorded.exif, "as it was when the dataset was augmented"
    if n_for := max(found.n_apply, found.n_ignore):
        exif: Exif = "apply" if found.n_apply >= found.n_ignore else "ignore"
        return exif, f"as the sizes of {n_for} pair{'s' if n_for > 1 else ''} prove"
    return "apply", BY_DEFAULT


def reading_notes(pairs: Sequence[tuple[Sample, ImageStats]], reading: Reading) -> list[Problem]:
    """Return notes on constant images, oriented test images, and masks that are not gray with background 0."""
    notes = [
        s.problem("constant image", f"{s.image} has one colour only, once decoded", s.image)
        for s, stats in pairs
        if stats.is_constant
    ]
    # The decision has a note on those of the pool.
    if oriented := [s for s, stats in pairs if stats.is_oriented and s.split == "test"]:
        text = (
            f"{len(oriented)} test pair{'s have' if len(oriented) > 1 else ' has'} an EXIF orientation (the first is "
            f"{oriented[0].image}); it is {'applied' if reading.turns else 'ignored'} {reading.exif_reason}"
        )
        notes.append(Problem("EXIF orientation", "", tuple(s.image for s in oriented), text, "test"))
    members: dict[tuple[str, ...], list[Sample]] = {}
    for sample, stats in pairs:
        values = stats.mask_values
        is_usual = all(value.isdecimal() for value in values) and values[0] == "0"
        # Full masks of one gray value have a note already.
        if not is_usual and not (len(values) == 1 and stats.foreground and values[0].isdecimal()):
            what = "lesion" if len(values) == 2 else "full" if stats.foreground else "empty"
            members.setdefault((what, *values), []).append(sample)
    for (what, *values_of_all), masks in members.items():
        files = tuple(s.mask for s in masks)
        notes.append(Problem("mask values", "", files, _values_text(what, values_of_all, masks), masks[0].split))
    return notes


def _values_text(what: str, values: Sequence[str], masks: Sequence[Sample]) -> str:
    n = f"{len(masks)} mask{'s' if len(masks) > 1 else ''}"
    if what == "lesion":
        text = f"{n}: lesion is {values[1]}, background is {values[0]}"
    else:
        text = f"{n} of the one value {values[0]}: {what}"
    if values[0].startswith("index"):
        text += " (of the palette, whose colours are ignored)"
    return f"{text}, such as {masks[0].mask}"


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
    # Values are read as stored: 16 bits hold them all.
    reading = Reading("ignore", max_value=FULL_SCALES[-1])
    deep = [s for s, header in zip(pool, images, strict=True) if header is not None and header.depth > 8]
    jobs = [Job(s.image, None, measure=False, reading=reading) for s in deep]
    jobs += [Job(None, s.mask, measure=False, reading=reading) for s in pool]
    largest, values = [], Counter[tuple[str, ...]]()
    with nullcontext(decoders) if decoders is not None else Decoders() as decoding:
        for _, result, _ in decoding.decode(jobs):
            # Unreadable files are reported later, when their pixels are needed.
            if isinstance(result, ImageStats):
                largest += [result.largest] if result.largest else []
                values[result.mask_values] += 1
    return Survey(
        n_pairs=len(pool),
        n_oriented=n_oriented,
        n_apply=n_apply,
        n_ignore=n_ignore,
        n_deep=len(deep),
        lowest=min(largest, default=0),
        highest=max(largest, default=0),
        masks=tuple((*pair, n) for pair, n in sorted(values.items()) if len(pair) == 2),
    )


def _header(path: Path) -> Header | None:
    try:
        with path.open("rb") as file:
            return read_header(file)
    except (OSError, ValueError):
        # Decoding the file reports the reason.
        return None


def _recorded(dataset: Dataset) -> Reading | None:
    """Return the rules by which the original of an augmented dataset was read."""
    path = dataset.root / AUGMENTATION
    if not path.is_file():
        return None
    try:
        table = paths.read_json(path)
        return Reading.from_table(table["reading"]) if "reading" in table else None
    except (RecordError, AttributeError, TypeError):
        return None


def _orientation_text(found: Survey, reading: Reading) -> str:
    done = "applied" if reading.turns else "ignored"
    other = '"ignore" reads the pixels as they are stored' if reading.turns else '"apply" turns them upright'
    text = (
        f"{found.n_oriented} of {found.n_pairs} training and validation pairs have an EXIF orientation; it is {done} "
        f"{reading.exif_reason}"
    )
    if reading.exif_reason == BY_DEFAULT:
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
