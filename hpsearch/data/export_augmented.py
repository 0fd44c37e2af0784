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
from hpsearch.data.decode import open_pair, read_pair
from hpsearch.data.folds import AUGMENTATION, AUGMENTED_GROUPS
from hpsearch.data.formats import FORMATS
from hpsearch.data.integrity import refusal
from hpsearch.data.memory_gate import MemoryGate
from hpsearch.data.reading import Reading
from hpsearch.data.survey import decide_reading
from hpsearch.errors import ConfigError, DatasetError, RecordError
from hpsearch.paths import atomic_write, read_json, remove_stale_temporaries, write_json
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
    complete. Until then the files are in a hidden folder beside it, and the same call continues there. The changes of
    an image depend only on `seed`, its id and the number of the copy. `augment.crop` is ignored, and the unit of blur
    is a pixel of the original. `groups` (id to patient or lesion) goes into groups.csv. `reading` (by default decided
    with the defaults of DataConfig) is kept in the new dataset, whose originals are read by it too.
    `progress(done, total)` counts changed versions.

    Raises ConfigError if `augment` changes nothing, DatasetError if the folder exists, an unfinished export has other
    settings, or images are unusable (`exclude_bad` leaves them out), and StorageError.
    """
    augment = replace(augment, crop=False)
    root = dataset.root.resolve()
    target = target or root.with_name(f"{root.name}_Aug")
    _check_request(dataset, augment, copies, target, exclude_bad=exclude_bad)
    partial = target.with_name(f".{target.name}.partial")
    reading = reading or decide_reading(dataset, DataConfig()).reading
    settings = {"of": root.name, "copies": copies, "seed": seed, "augment": asdict(augment)}
    if reading.key():
        settings["reading"] = reading.for_images()
    _begin(partial, settings)
    pairs = _pairs(dataset, partial, copies)
    damaged = _write_all(pairs, augment, reading, seed, progress, exclude_bad=exclude_bad)
    with (
        atomic_write(partial / AUGMENTED_GROUPS) as temporary,
        temporary.open("w", newline="", encoding="utf-8") as file,
    ):
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
    remove_stale_temporaries(partial)
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


def _check_request(dataset: Dataset, augment: AugmentConfig, copies: int, target: Path, *, exclude_bad: bool) -> None:
    """Raise ConfigError or DatasetError if the export cannot be written."""
    if augment == AugmentConfig(hflip=0):
        raise ConfigError("augment changes nothing: switch something on, such as --set augment.hflip=0.5")
    if copies < 1:
        raise ConfigError(f"copies must be at least 1, got {copies}")
    if dataset.problems and not exclude_bad:
        raise refusal(dataset.problems, dataset.flags)
    if target.exists():
        raise DatasetError(f"{target} exists already: remove it, or name another folder, to have it written again")


def _begin(partial: Path, settings: dict[str, object]) -> None:
    """Create the folder, or check that an unfinished export has the same settings."""
    record = partial / AUGMENTATION
    if not record.is_file():
        write_json(record, settings)
    try:
        same = read_json(record) == settings
    except RecordError:
        same = False
    if not same:
        raise DatasetError(
            f"{partial} holds an unfinished export with other settings: repeat those, or remove the folder"
        )


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
        except DatasetError as error:
            if not exclude_bad:
                raise
            logger.warning("left out %s: %s", pair.sample.id, error)
            damaged.add(pair.sample.id)

    n_threads = torch.get_num_threads()
    # One thread per image, because decoding and encoding, half of the work, cannot be divided.
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
    if target.exists():
        return
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        target.hardlink_to(source)
    except OSError:
        # The target is on another disk, or the file system has no links.
        with atomic_write(target, sync=False) as temporary:
            shutil.copyfile(source, temporary)


def _write(pair: _Pair, augment: AugmentConfig, reading: Reading, seed: int, gate: MemoryGate) -> None:
    """Write one changed version, its mask first, so that an existing image is complete."""
    if pair.image.exists():
        return
    sample = pair.sample
    size = open_pair(sample.image, sample.mask, reading).size
    digest = hashlib.sha256(f"{seed}:{sample.id}:{pair.copy}".encode()).digest()
    rng = np.random.default_rng(int.from_bytes(digest[:8]))
    with gate.admitted(PIXEL_BYTES * size[0] * size[1]):
        image, mask = read_pair(sample.image, sample.mask, reading)
        changes = draw_changes(augment, 1, rng, from_size=size, to_size=size)
        images, masks = augment_batch(image.permute(1, 2, 0)[None], mask[None], changes, size)
        del image, mask
        planes = images[0].permute(2, 0, 1) if images.dtype == torch.uint8 else images[0].round().to(torch.uint8)
        encoded = (
            encode_jpeg(planes.contiguous(), quality=JPEG_QUALITY) if _is_jpeg(pair.image) else encode_png(planes)
        )
        for path, content in ((pair.mask, encode_png(masks * 255)), (pair.image, encoded)):
            with atomic_write(path, sync=False) as temporary:
                content.numpy().tofile(temporary)
