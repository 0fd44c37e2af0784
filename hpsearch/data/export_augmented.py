"""Write an augmented copy of a dataset beside it: `ISIC-2017_Aug`, in the same layout, at original resolution.

Each training image gets `copies` changed versions (`ISIC_0000000_aug1.jpg`). The original images, validation and test
images included, become hard links, or copies where the file system has no links. The set is thus complete and trains
like any other. A folder of own images becomes one folder per split, so the test split stays the same.

`groups.csv` names the original of every image. A study reads it, so that a changed version is never in another fold
than its original.
"""

import csv
import hashlib
import logging
import shutil
from collections import Counter
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torchvision.io import encode_jpeg, encode_png

from hpsearch.config.data import AugmentConfig, DataConfig
from hpsearch.cores import available_cores
from hpsearch.data.augment import augment_batch, draw_changes
from hpsearch.data.dataset import Dataset, Sample
from hpsearch.data.decode import MemoryGate, open_pair, read_pair
from hpsearch.data.decode_pool import DecodeError
from hpsearch.data.folds import AUGMENTATION, AUGMENTED_GROUPS
from hpsearch.data.formats import FORMATS
from hpsearch.data.integrity import refusal
from hpsearch.data.reading import Reading
from hpsearch.data.survey import decide_reading
from hpsearch.errors import ConfigError, DatasetError
from hpsearch.paths import refusals_named, write_json
from hpsearch.user_files import name_key

logger = logging.getLogger(__name__)

JPEG_QUALITY = 95
"""Quality of the changed versions. The original's own compression loses more."""
PIXEL_BYTES = 110
"""Memory that a pixel takes while an image is changed: copies of three channels as float32, positions, hues."""
WORKING_BYTES = 2**30
"""Memory that all threads hold together. A single larger image is changed alone."""


def export_augmented(
    dataset: Dataset,
    augment: AugmentConfig,
    *,
    copies: int = 1,
    seed: int = 0,
    target: Path | None = None,
    groups: Mapping[str, str] | None = None,
    reading: Reading | None = None,
    exclude_bad: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> Path:
    """Write `dataset` with `copies` changed versions of every training image, and return the new folder.

    The folder is `target`, or by default that of the dataset with `_Aug` added to its name. It appears when it is
    complete. Until then the files are in a hidden folder beside it, which the next call replaces. The changes of an
    image depend only on `seed`, its id and the number of the copy. `augment.crop` is ignored, and the unit of blur is
    a pixel of the original. `groups` (id to patient or lesion) goes into groups.csv. `reading` (by default decided
    with the defaults of DataConfig) is kept in the new dataset, whose originals are read by it too.
    `progress(done, total)` counts changed versions.

    Raises ConfigError if `augment` changes nothing, DatasetError if the folder exists or images are unusable
    (`exclude_bad` leaves them out), and StorageError.
    """
    augment = replace(augment, crop=False)
    root = dataset.root.resolve()
    target = target or root.with_name(f"{root.name}_Aug")
    if augment == AugmentConfig(hflip=0):
        raise ConfigError("augment changes nothing: switch something on, such as --set augment.hflip=0.5")
    if copies < 1:
        raise ConfigError(f"copies must be at least 1, got {copies}")
    if dataset.problems and not exclude_bad:
        raise refusal(dataset.problems, dataset.flags)
    if target.exists():
        raise DatasetError(f"{target} exists already: remove it, or name another folder, to have it written again")
    partial = target.with_name(f".{target.name}.partial")
    pairs = _pairs(dataset, partial, copies)
    reading = reading or decide_reading(dataset, DataConfig()).reading
    settings = {"of": root.name, "copies": copies, "seed": seed, "augment": asdict(augment)}
    if reading.key():
        settings["reading"] = reading.for_images()
    with refusals_named(partial):
        shutil.rmtree(partial, ignore_errors=True)
        for folder in {path.parent for pair in pairs for path in (pair.image, pair.mask)}:
            folder.mkdir(parents=True)
        write_json(partial / AUGMENTATION, settings)
        damaged = _write_all(pairs, augment, reading, seed, progress, exclude_bad=exclude_bad)
        with (partial / AUGMENTED_GROUPS).open("w", newline="", encoding="utf-8") as file:
            table = csv.writer(file)
            table.writerow(["image", "original"])
            for pair in pairs:
                original = pair.sample.id
                if original in damaged:
                    continue
                if pair.copy == 0:
                    _link(pair.sample.image, pair.image)
                    _link(pair.sample.mask, pair.mask)
                if pair.sample.split != "test":
                    table.writerow([pair.id, (groups or {}).get(original, original)])
        partial.rename(target)
    return target


@dataclass(frozen=True)
class _Pair:
    """An original (copy 0) or a changed version, and the files that it becomes."""

    sample: Sample
    copy: int
    image: Path
    mask: Path

    @property
    def id(self) -> str:
        return f"{self.sample.id}_aug{self.copy}" if self.copy else self.sample.id


def _pairs(dataset: Dataset, folder: Path, copies: int) -> list[_Pair]:
    """Return all pairs of the new dataset in `folder`. Raise DatasetError if two files would have the same name."""
    pairs: list[_Pair] = []
    for sample in dataset.samples:
        if dataset.layout == "folders":
            image, mask = (folder / sample.split / name for name in ("images", "masks"))
            image, mask = image / sample.image.name, mask / sample.mask.name
        else:
            image, mask = (folder / path.relative_to(dataset.root) for path in (sample.image, sample.mask))
        pairs.append(_Pair(sample, 0, image, mask))
        for copy in range(1, copies + 1 if sample.split == "train" else 1):
            stem, ending = f"{image.stem}_aug{copy}", image.suffix if _is_jpeg(image) else ".png"
            # A mask has the name of its image plus a suffix.
            mask_name = f"{stem}{mask.stem[len(image.stem) :]}.png"
            pairs.append(_Pair(sample, copy, image.with_name(stem + ending), mask.with_name(mask_name)))
    names = Counter(name_key(str(path.with_suffix(""))) for pair in pairs for path in (pair.image, pair.mask))
    if twice := [name for name, n in names.items() if n > 1]:
        raise DatasetError(f"there would be two files {twice[0]}: an original has the name of a copy")
    return pairs


def _is_jpeg(path: Path) -> bool:
    return path.suffix.lower() in FORMATS["jpeg"].suffixes


def _write_all(
    pairs: list[_Pair],
    augment: AugmentConfig,
    reading: Reading,
    seed: int,
    progress: Callable[[int, int], None] | None,
    *,
    exclude_bad: bool,
) -> set[str]:
    """Write all changed versions on all cores. Return the ids of unusable images, which `exclude_bad` leaves out."""
    gate, damaged = MemoryGate(WORKING_BYTES), set()
    changed = [pair for pair in pairs if pair.copy > 0]

    def write(pair: _Pair) -> None:
        try:
            _write(pair, augment, reading, seed, gate)
        except DecodeError as error:
            if not exclude_bad:
                raise
            logger.warning("left out %s: %s", pair.sample.id, error)
            damaged.add(pair.sample.id)

    n_threads = torch.get_num_threads()
    # One thread per image: decoding and encoding are half of the work and cannot use several threads.
    pool = ThreadPoolExecutor(available_cores(), initializer=torch.set_num_threads, initargs=(1,))
    try:
        for done, _ in enumerate(pool.map(write, changed), start=1):
            if progress is not None:
                progress(done, len(changed))
    finally:
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(n_threads)
    return damaged


def _link(source: Path, target: Path) -> None:
    try:
        target.hardlink_to(source)
    except OSError:
        # The target is on another disk, or the file system has no links.
        shutil.copyfile(source, target)


def _write(pair: _Pair, augment: AugmentConfig, reading: Reading, seed: int, gate: MemoryGate) -> None:
    """Write one changed version."""
    sample = pair.sample
    _, size = open_pair(sample.image, sample.mask, reading)
    digest = hashlib.sha256(f"{seed}:{sample.id}:{pair.copy}".encode()).digest()
    rng = np.random.default_rng(int.from_bytes(digest[:8]))
    with gate.admitted(PIXEL_BYTES * size[0] * size[1]):
        image, mask = read_pair(sample.image, sample.mask, reading)
        changes = draw_changes(augment, 1, rng, from_size=size, to_size=size)
        images, masks = augment_batch(image.permute(1, 2, 0)[None], mask[None], changes, size)
        planes = images[0].permute(2, 0, 1) if images.dtype == torch.uint8 else images[0].round().to(torch.uint8)
        is_jpeg = _is_jpeg(pair.image)
        encoded = encode_jpeg(planes.contiguous(), quality=JPEG_QUALITY) if is_jpeg else encode_png(planes)
        encoded.numpy().tofile(pair.image)
        encode_png(masks * 255).numpy().tofile(pair.mask)
