"""Determine how to decode the files of a dataset: EXIF orientation, full scale and mask values.

The rules follow from the settings and from a survey of the pool (training and validation images).
"""

from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from hpsearch import paths
from hpsearch.config.data import DataConfig
from hpsearch.data.dataset import Dataset, Problem, Sample, files_key
from hpsearch.data.decode_pool import Decoders, ImageStats, Job
from hpsearch.data.folds import AUGMENTATION
from hpsearch.data.formats import Header, read_header
from hpsearch.data.reading import FULL_SCALES, READING_0_1, Reading
from hpsearch.errors import RecordError, StorageError
from hpsearch.typed_json import from_json

Exif = Literal["apply", "ignore"]
SURVEY_VERSION = 2
"""Version of the survey. It changes whenever the same files would give a different survey."""


@dataclass(frozen=True)
class Survey:
    """Summary of the EXIF orientations, bit depths and mask values in a pool."""

    n_pairs: int
    n_oriented: int = 0
    """Number of pairs whose image or mask has an EXIF orientation other than upright."""
    n_apply: int = 0
    """Number of pairs whose image and mask have the same size only if the EXIF orientation is applied."""
    n_ignore: int = 0
    """Number of pairs whose image and mask have the same size only if the EXIF orientation is ignored."""
    n_deep: int = 0
    """Number of images with more than 8 bits per channel."""
    highest: int = 0
    """Largest pixel value in images with more than 8 bits per channel."""
    masks: tuple[tuple[str, str, int], ...] = ()
    """Background value, lesion value and number of masks, for each combination of values in masks with two values."""


def decide_reading(
    dataset: Dataset, config: DataConfig, cache_root: Path | None = None, decoders: Decoders | None = None
) -> tuple[Reading, list[Problem]]:
    """Return the rules for decoding the files of `dataset`, and notes about these rules.

    The rules follow from `data.exif`, `data.max_value` and a survey of the pool. The survey decodes all masks of the
    pool and all images with more than 8 bits per channel. If `cache_root` is given, the survey is stored there and
    reused until a file changes. `decoders` is an existing subprocess to decode with.
    """
    return decide(survey(dataset.split("train", "val"), cache_root, decoders), config, dataset)


def survey(pool: Sequence[Sample], cache_root: Path | None, decoders: Decoders | None = None) -> Survey:
    """Return the survey of a pool. If `cache_root` is given, reuse the survey stored there, or store a new one."""
    if cache_root is None:
        return _survey(pool, decoders)
    path = cache_root / f"survey-{files_key(['survey', SURVEY_VERSION], pool)}.json"
    with suppress(RecordError, AttributeError, TypeError):
        return from_json(Survey, paths.read_json(path))
    # The stored survey is missing or damaged.
    result = _survey(pool, decoders)
    # A shared cache may be in a folder that this user cannot write to.
    with suppress(OSError, StorageError):
        paths.write_json(path, asdict(result))
    return result


def decide(found: Survey, config: DataConfig, dataset: Dataset) -> tuple[Reading, list[Problem]]:
    """Return the decoding rules that follow from the survey `found` and from `config`, and notes about them.

    If `dataset` is an augmented dataset, the rules stored in it take precedence over the survey.
    """
    recorded = _recorded(dataset)
    exif, reason = _decide_exif(found, config, recorded)
    max_value = config.max_value or (recorded.max_value if recorded is not None else 0)
    if not max_value and found.n_deep:
        max_value = next(scale for scale in FULL_SCALES if found.highest <= scale)
    votes: Counter[str] = Counter()
    for background, lesion, n in found.masks:
        votes.update({background: -n, lesion: n})
    # A value with as many votes for background as for lesion is in both lists, so every mask with it is an error.
    in_background = tuple(sorted(value for value, n in votes.items() if n <= 0))
    in_lesion = tuple(sorted(value for value, n in votes.items() if n >= 0))
    reading = Reading(exif, reason, found.n_oriented, max_value, in_background, in_lesion)
    done, of_pool = "applied" if reading.turns else "ignored", f"of {found.n_pairs} training and validation"
    notes = []
    if found.n_oriented:
        text = f"{found.n_oriented} {of_pool} pairs have an EXIF orientation; it is {done} {reason} (data.exif)"
        notes.append(dataset.problem("EXIF orientation", text))
    if found.n_deep:
        text = f"{found.n_deep} {of_pool} images have more than 8 bits per channel and values up to {found.highest}: "
        notes.append(dataset.problem("more than 8 bits", f"{text}full scale is {max_value} (data.max_value)"))
    return reading, notes


def _decide_exif(found: Survey, config: DataConfig, recorded: Reading | None) -> tuple[Exif, str]:
    """Return whether EXIF orientations are applied, and the reason. `recorded` is described in `_recorded`."""
    if config.exif != "auto":
        return config.exif, f'because data.exif = "{config.exif}"'
    if recorded is not None:
        return recorded.exif, "as when the dataset was augmented"
    if n_for := max(found.n_apply, found.n_ignore):
        exif: Exif = "apply" if found.n_apply >= found.n_ignore else "ignore"
        return exif, f"because the sizes of {n_for} pair{'s' if n_for > 1 else ''} match only then"
    return "apply", "by default"


def _survey(pool: Sequence[Sample], decoders: Decoders | None) -> Survey:
    with ThreadPoolExecutor(16) as threads:
        images = list(threads.map(_header, [sample.image for sample in pool]))
        masks = list(threads.map(_header, [sample.mask for sample in pool]))
    n_oriented = n_apply = n_ignore = 0
    for image, mask in zip(images, masks, strict=True):
        if image is not None and mask is not None and max(image.orientation, mask.orientation) > 1:
            applied, ignored = (image.size(upright=turns) == mask.size(upright=turns) for turns in (True, False))
            n_oriented += 1
            n_apply += applied and not ignored
            n_ignore += ignored and not applied
    deep = [s for s, header in zip(pool, images, strict=True) if header is not None and header.depth > 8]
    # Use the rules of version 0.1, because they accept all values and ignore orientations.
    jobs = [Job(s.image, None, measure=False, reading=READING_0_1) for s in deep]
    jobs += [Job(None, s.mask, measure=False, reading=READING_0_1) for s in pool]
    highest, values = 0, Counter[tuple[str, ...]]()
    with nullcontext(decoders) if decoders is not None else Decoders() as decoding:
        for result, _ in decoding.decode(jobs):
            # Unreadable files are reported later, when they are decoded for the cache.
            if isinstance(result, ImageStats):
                highest = max(highest, result.largest)
                values[result.mask_values] += 1
    pairs = tuple((*pair, n) for pair, n in sorted(values.items()) if len(pair) == 2)
    return Survey(len(pool), n_oriented, n_apply, n_ignore, n_deep=len(deep), highest=highest, masks=pairs)


def _header(path: Path) -> Header | None:
    try:
        with path.open("rb") as file:
            return read_header(file)
    except (OSError, ValueError):
        # The error is reported when the file is decoded.
        return None


def _recorded(dataset: Dataset) -> Reading | None:
    """Return the image-decoding rules stored in an augmented dataset, or None if there are none."""
    with suppress(RecordError, KeyError, AttributeError, TypeError):
        return from_json(Reading, paths.read_json(dataset.root / AUGMENTATION)["reading"])
    return None
