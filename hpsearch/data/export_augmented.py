"""Write an augmented copy of a dataset to a new folder, at the original resolution.

The copy of `ISIC-2017` is `ISIC-2017_Aug`, with the same layout. Each training image gets `copies` augmented versions
(`ISIC_0000000_aug1.jpg`). The original images of all splits are hard-linked, or copied if the file system has no hard
links, so the new dataset is complete. If the dataset consists of a folder of images and a folder of masks, the copy
has one folder per split, which keeps the test split the same.

`groups.csv` lists the original of every training and validation image, or its group if `data.groups` is set. A study
reads this file, so that an augmented version is always in the same fold as its original.
"""

import csv
import hashlib
import logging
import shutil
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torchvision.io import encode_jpeg, encode_png

from hpsearch.config import StudyConfig
from hpsearch.config.data import AugmentConfig
from hpsearch.cores import available_cores
from hpsearch.data.augment import augment_batch, draw_changes
from hpsearch.data.dataset import Dataset, Sample
from hpsearch.data.decode import MemoryGate, open_pair, read_pair
from hpsearch.data.decode_pool import DecodeError, Progress
from hpsearch.data.folds import AUGMENTATION, AUGMENTED_GROUPS, load_groups
from hpsearch.data.formats import FORMATS
from hpsearch.data.integrity import refusal
from hpsearch.data.reading import Reading
from hpsearch.data.survey import decide_reading
from hpsearch.errors import ConfigError, DatasetError
from hpsearch.paths import refusals_named, write_json
from hpsearch.user_files import name_key

logger = logging.getLogger(__name__)

JPEG_QUALITY = 95
"""JPEG quality of the augmented versions. It is high enough that the compression of the originals loses more
detail."""
PIXEL_BYTES = 110
"""Memory per pixel that augmentation needs for float32 copies of the image, positions and hues, in bytes."""
WORKING_BYTES = 2**30
"""Maximum memory for augmentation in all threads together. An image that needs more is augmented alone."""


def export_augmented(
    dataset: Dataset,
    config: StudyConfig,
    cache_root: Path | None = None,
    *,
    copies: int = 1,
    target: Path | None = None,
    progress: Progress | None = None,
) -> Path:
    """Write `dataset` with `copies` augmented versions of every training image, and return the new folder.

    The new folder is `target`. By default it is next to the dataset and has the same name followed by `_Aug`. Files
    are written to a hidden folder, which is renamed at the end. The next call replaces an unfinished hidden folder.

    The settings `augment.*` of `config` define the changes. `augment.crop` is ignored, and `augment.blur` is in
    pixels of the original image. The augmentation of an image depends only on these settings, `study.seed`, the
    image's id and the number of the copy.

    The files are decoded by the rules that `survey.decide_reading` determines; `cache_root` is described there. The
    rules for images are stored in the new dataset, because its original images must be decoded in the same way.
    `progress` is called with the number of augmented versions (done, total).

    Raises ConfigError if the settings change nothing or `copies` is less than 1, DatasetError if the folder exists or
    images are unusable (unless `data.exclude_bad` leaves them out), and StorageError if the files cannot be written.
    """
    augment = replace(config.augment, crop=False)
    root = dataset.root.resolve()
    target = target or root.with_name(f"{root.name}_Aug")
    if augment == AugmentConfig(hflip=0):
        raise ConfigError("[augment] changes nothing: enable an operation, such as --set augment.hflip=0.5")
    if copies < 1:
        raise ConfigError(f"copies must be at least 1, got {copies}")
    if dataset.problems and not config.data.exclude_bad:
        raise refusal(dataset.problems, dataset.flags)
    if target.exists():
        raise DatasetError(f"{target} already exists: remove it, or choose another folder")
    partial = target.with_name(f".{target.name}.partial")
    pairs = _pairs(dataset, partial, copies)
    groups = load_groups(config.data) or {}
    reading, _ = decide_reading(dataset, config.data, cache_root)
    settings = {"of": root.name, "copies": copies, "seed": config.study.seed, "augment": asdict(augment)}
    if reading.key():
        settings["reading"] = reading.for_images()
    with refusals_named(partial):
        shutil.rmtree(partial, ignore_errors=True)
        for folder in {path.parent for pair in pairs for path in (pair.image, pair.mask)}:
            folder.mkdir(parents=True)
        write_json(partial / AUGMENTATION, settings)
        damaged = _write_all(pairs, augment, config, reading, progress)
        rows = [("image", "original")]
        for pair in pairs:
            original = pair.sample.id
            if pair.copy == 0 and original not in damaged:
                _link(pair.sample.image, pair.image)
                _link(pair.sample.mask, pair.mask)
            if pair.sample.split != "test" and original not in damaged:
                rows.append((pair.id, groups.get(name_key(original), original)))
        with (partial / AUGMENTED_GROUPS).open("w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows(rows)
        partial.rename(target)
    return target


@dataclass(frozen=True)
class _Pair:
    """Original (copy 0) or augmented version (copy 1, 2, ...) of a sample, with its paths in the new dataset."""

    sample: Sample
    copy: int
    id: str
    image: Path
    mask: Path


def _pairs(dataset: Dataset, folder: Path, copies: int) -> list[_Pair]:
    """Return all pairs of the new dataset in `folder`. Raise DatasetError if two files would have the same path."""
    pairs: list[_Pair] = []
    for sample in dataset.samples:
        if dataset.layout == "folders":
            image, mask = (folder / sample.split / name for name in ("images", "masks"))
            image, mask = image / sample.image.name, mask / sample.mask.name
        else:
            image, mask = (folder / path.relative_to(dataset.root) for path in (sample.image, sample.mask))
        pairs.append(_Pair(sample, 0, sample.id, image, mask))
        ending = image.suffix if image.suffix.lower() in FORMATS["jpeg"].suffixes else ".png"
        for number in range(1, copies + 1 if sample.split == "train" else 1):
            copy = image.with_name(f"{image.stem}_aug{number}{ending}")
            # The mask's name is the image's name plus a suffix.
            mask_copy = mask.with_name(f"{copy.stem}{mask.stem[len(image.stem) :]}.png")
            pairs.append(_Pair(sample, number, f"{sample.id}_aug{number}", copy, mask_copy))
    names = Counter(name_key(str(path.with_suffix(""))) for pair in pairs for path in (pair.image, pair.mask))
    if twice := [name for name, n in names.items() if n > 1]:
        raise DatasetError(f"two files would be called {twice[0]}: an original has the name of an augmented version")
    return pairs


def _write_all(
    pairs: list[_Pair], augment: AugmentConfig, config: StudyConfig, reading: Reading, progress: Progress | None
) -> set[str]:
    """Write all augmented versions, using all cores. Return the ids of the images left out as unusable."""
    gate, damaged = MemoryGate(WORKING_BYTES), set()
    changed = [pair for pair in pairs if pair.copy > 0]

    def write(pair: _Pair) -> None:
        try:
            _write(pair, augment, config.study.seed, reading, gate)
        except DecodeError as error:
            if not config.data.exclude_bad:
                raise
            logger.warning("left out %s: %s", pair.sample.id, error)
            damaged.add(pair.sample.id)

    n_threads = torch.get_num_threads()
    # Use one torch thread per image, because decoding and encoding are single-threaded and take half of the time.
    try:
        with ThreadPoolExecutor(available_cores(), initializer=torch.set_num_threads, initargs=(1,)) as threads:
            for done, _ in enumerate(threads.map(write, changed), start=1):
                if progress is not None:
                    progress(done, len(changed))
    finally:
        torch.set_num_threads(n_threads)
    return damaged


def _link(source: Path, target: Path) -> None:
    try:
        target.hardlink_to(source)
    except OSError:
        # The target is on another disk, or the file system has no hard links.
        shutil.copyfile(source, target)


def _write(pair: _Pair, augment: AugmentConfig, seed: int, reading: Reading, gate: MemoryGate) -> None:
    """Write the image and the mask of one augmented version."""
    sample = pair.sample
    _, size = open_pair(sample.image, sample.mask, reading)
    digest = hashlib.sha256(f"{seed}:{sample.id}:{pair.copy}".encode()).digest()
    rng = np.random.default_rng(int.from_bytes(digest[:8]))
    with gate.admitted(PIXEL_BYTES * size[0] * size[1]):
        image, mask = read_pair(sample.image, sample.mask, reading)
        changes = draw_changes(augment, 1, rng, from_size=size, to_size=size)
        images, masks = augment_batch(image.permute(1, 2, 0)[None], mask[None], changes, size)
        planes = images[0].permute(2, 0, 1) if images.dtype == torch.uint8 else images[0].round().to(torch.uint8)
        is_png = pair.image.suffix == ".png"
        encoded = encode_png(planes) if is_png else encode_jpeg(planes.contiguous(), quality=JPEG_QUALITY)
        encoded.numpy().tofile(pair.image)
        encode_png(masks * 255).numpy().tofile(pair.mask)
