"""Write an augmented copy of a dataset beside it: `ISIC-2017_Aug`, in the same layout, at original resolution.

Each training image gets `copies` changed versions (`ISIC_0000000_aug1.jpg`). The original images, validation and test
images included, become hard links, or copies where the file system has no links. The set is thus complete and trains
like any other. A folder of own images becomes one folder per split, so the test split stays the same.

`groups.csv` names the original of every image. A study reads it, so that a changed version is never in another fold
than its original.
"""

from __future__ import annotations

import csv
import hashlib
import logging
import shutil
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.io import encode_jpeg, encode_png

from hpsearch.config.data import AugmentConfig, DataConfig
from hpsearch.cores import available_cores
from hpsearch.data.augment import (
    Changes,
    add_noise_,
    as_planes,
    blur,
    draw_changes,
    gray,
    jitter_color_,
    source_positions,
)
from hpsearch.data.dataset import Dataset, Sample
from hpsearch.data.decode import open_pair, read_pair
from hpsearch.data.decode_pool import DecodeError
from hpsearch.data.folds import AUGMENTATION, AUGMENTED_GROUPS
from hpsearch.data.formats import FORMATS
from hpsearch.data.integrity import refusal
from hpsearch.data.layouts import find_samples
from hpsearch.data.memory_gate import MemoryGate
from hpsearch.data.reading import Reading
from hpsearch.data.survey import decide_reading
from hpsearch.errors import ConfigError, DatasetError, RecordError
from hpsearch.paths import atomic_write, read_json, remove_stale_temporaries, write_json
from hpsearch.user_files import name_key

logger = logging.getLogger(__name__)

JPEG_QUALITY = 95
"""Quality of the changed versions. The original's own compression loses more."""
WORKING_BYTES = 2**30
"""Decoded pixels that all threads hold together. A single larger image is changed alone."""
TILE = 256
"""Side in pixels of the parts in which an image is warped."""
BAND_PIXELS = 2**18
"""Pixels whose colours are changed at once."""


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
    placed = list(_places(dataset, copies))
    for sample, image, mask, copy in placed:
        if copy == 0:
            _link(sample.image, partial / image)
            _link(sample.mask, partial / mask)
    jobs = [
        _Job(sample, partial / image, partial / mask, _seed(seed, sample.id, copy))
        for sample, image, mask, copy in placed
        if copy > 0
    ]
    damaged = _write_all(jobs, augment, reading, exclude_bad, progress)
    for sample, image, mask, _ in placed:
        if sample.id in damaged:
            (partial / image).unlink(missing_ok=True)
            (partial / mask).unlink(missing_ok=True)
    _write_groups(partial, {partial / image: sample.id for sample, image, _, _ in placed}, groups or {})
    remove_stale_temporaries(partial)
    partial.rename(target)
    return target


def augment_image(image: Tensor, mask: Tensor, changes: Changes) -> tuple[Tensor, Tensor]:
    """Return an image (H, W, 3) uint8 and its mask (H, W) uint8, changed like a batch of one.

    Only parts of the image are converted to float at a time, so that the memory stays bounded.
    """
    if changes.rotate is not None or changes.scale is not None:
        image, mask = _warp_by_tiles(image, mask, changes)
    else:
        for flags, axis in ((changes.hflip, 1), (changes.vflip, 0)):
            if flags is not None and bool(flags[0]):
                image, mask = image.flip(axis), mask.flip(axis)
    return _change_values_by_bands(image, changes), mask


@dataclass(frozen=True)
class _Job:
    """One changed version to write."""

    sample: Sample
    image: Path
    mask: Path
    seed: int


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
    if record.is_file():
        try:
            same = read_json(record) == settings
        except RecordError:
            same = False
        if not same:
            raise DatasetError(
                f"{partial} holds an unfinished export with other settings: repeat those, or remove the folder"
            )
    else:
        write_json(record, settings)


def _places(dataset: Dataset, copies: int) -> Iterator[tuple[Sample, Path, Path, int]]:
    """Yield each image with the new paths of image and mask, relative to the new root. Copy 0 is the original.

    Raises DatasetError if two files would have the same name.
    """
    taken: set[str] = set()
    for sample in dataset.samples:
        image, mask = _place(dataset, sample)
        for copy in range(copies + 1 if sample.split == "train" else 1):
            places = (image, mask)
            if copy:
                # A mask has the name of its image plus a suffix.
                suffix = mask.stem[len(image.stem) :]
                ending = image.suffix if _is_jpeg(image) else ".png"
                places = (
                    image.with_name(f"{image.stem}_aug{copy}{ending}"),
                    mask.with_name(f"{image.stem}_aug{copy}{suffix}.png"),
                )
            for place in places:
                key = name_key(str(place.with_suffix("")))
                if key in taken:
                    raise DatasetError(f"there would be two files {place}: an original has the name of a copy")
                taken.add(key)
            yield sample, *places, copy


def _place(dataset: Dataset, sample: Sample) -> tuple[Path, Path]:
    """Return the new paths of an original and its mask."""
    if dataset.layout == "folders":
        return Path(sample.split, "images", sample.image.name), Path(sample.split, "masks", sample.mask.name)
    return sample.image.relative_to(dataset.root), sample.mask.relative_to(dataset.root)


def _is_jpeg(path: Path) -> bool:
    return path.suffix.lower() in FORMATS["jpeg"].suffixes


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


def _seed(seed: int, id: str, copy: int) -> int:
    return int.from_bytes(hashlib.sha256(f"{seed}:{id}:{copy}".encode()).digest()[:8])


def _write_all(
    jobs: list[_Job],
    augment: AugmentConfig,
    reading: Reading,
    exclude_bad: bool,
    progress: Callable[[int, int], None] | None,
) -> set[str]:
    """Run the jobs on all cores. Return the ids of unusable images, which `exclude_bad` leaves out."""
    damaged: set[str] = set()
    gate = MemoryGate(WORKING_BYTES)
    n_threads = torch.get_num_threads()
    # One thread per image, because decoding and encoding, half of the work, cannot be divided.
    pool = ThreadPoolExecutor(available_cores(), initializer=torch.set_num_threads, initargs=(1,))
    try:
        futures: list[tuple[_Job, Future[None]]] = [
            (job, pool.submit(_write, job, augment, reading, gate)) for job in jobs
        ]
        for done, (job, future) in enumerate(futures, start=1):
            try:
                future.result()
            except DatasetError as error:
                if not exclude_bad:
                    raise
                logger.warning("left out %s: %s", job.sample.id, error)
                damaged.add(job.sample.id)
            if progress is not None:
                progress(done, len(jobs))
    finally:
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(n_threads)
    return damaged


def _write(job: _Job, augment: AugmentConfig, reading: Reading, gate: MemoryGate) -> None:
    """Write one changed version, its mask first, so that an existing image is complete."""
    if job.image.exists():
        return
    try:
        height, width = open_pair(job.sample.image, job.sample.mask, reading).size
    except DecodeError as error:
        raise DatasetError(error.text) from error
    # Three copies: decoded, as rows of pixels, and changed.
    with gate.admitted(3 * 4 * height * width):
        pixels, mask = read_pair(job.sample.image, job.sample.mask, reading)
        changes = draw_changes(
            augment, 1, np.random.default_rng(job.seed), from_size=(height, width), to_size=(height, width)
        )
        image, mask = augment_image(pixels.permute(1, 2, 0).contiguous(), mask, changes)
        del pixels
        _save(job.mask, encode_png((mask * 255).unsqueeze(0)))
        planes = image.permute(2, 0, 1)
        _save(job.image, encode_jpeg(planes, quality=JPEG_QUALITY) if _is_jpeg(job.image) else encode_png(planes))


def _save(path: Path, encoded: Tensor) -> None:
    with atomic_write(path, sync=False) as temporary:
        encoded.numpy().tofile(temporary)


def _write_groups(partial: Path, original: Mapping[Path, str], groups: Mapping[str, str]) -> None:
    """Write groups.csv with the original, or its group, of every image that can be in a fold."""
    found = find_samples(DataConfig(root=str(partial)))
    with (
        atomic_write(partial / AUGMENTED_GROUPS) as temporary,
        temporary.open("w", newline="", encoding="utf-8") as file,
    ):
        table = csv.writer(file)
        table.writerow(["image", "original"])
        for sample in found.split("train", "val"):
            id = original[sample.image]
            table.writerow([sample.id, groups.get(id, id)])


def _warp_by_tiles(image: Tensor, mask: Tensor, changes: Changes) -> tuple[Tensor, Tensor]:
    """Return image and mask warped like a batch of one. Only the source of one tile is in float at a time."""
    height, width = mask.shape
    out, truth = torch.empty_like(image), torch.empty_like(mask)
    for top in range(0, height, TILE):
        for left in range(0, width, TILE):
            rows, columns = slice(top, min(top + TILE, height)), slice(left, min(left + TILE, width))
            x, y = source_positions(changes, (height, width), (height, width), image.device, (rows, columns))
            x, x_first, x_end = _within(x, width)
            y, y_first, y_end = _within(y, height)
            grid = torch.stack(
                ((x - x_first) * (2 / (x_end - x_first)) - 1, (y - y_first) * (2 / (y_end - y_first)) - 1), dim=-1
            )
            source = image[None, y_first:y_end, x_first:x_end]
            planes = F.grid_sample(as_planes(source), grid, padding_mode="border", align_corners=False)
            out[rows, columns] = planes[0].permute(1, 2, 0).round_().to(torch.uint8)
            source = mask[None, None, y_first:y_end, x_first:x_end].to(torch.float32)
            nearest = F.grid_sample(source, grid, mode="nearest", padding_mode="border", align_corners=False)
            truth[rows, columns] = nearest[0, 0].to(torch.uint8)
    return out, truth


def _within(position: Tensor, length: int) -> tuple[Tensor, int, int]:
    """Return positions mirrored into 0..length, and the first and end of the pixels that they need."""
    position = position.abs() % (2 * length)
    position = torch.minimum(position, 2 * length - position)
    first = max(0, int(position.min().item()) - 1)
    return position, first, min(length, int(position.max().item()) + 2)


def _change_values_by_bands(image: Tensor, changes: Changes) -> Tensor:
    """Return an image (H, W, 3) uint8 with changed colours, blur and noise. Some rows are changed at a time."""
    if not changes.changes_values:
        return image
    height, width = image.shape[:2]
    n_rows = max(1, BAND_PIXELS // width)
    bands = [(top, min(top + n_rows, height)) for top in range(0, height, n_rows)]
    mean = None
    if changes.contrast is not None:
        brightened = Changes(brightness=changes.brightness)
        sums = [
            gray(jitter_color_(as_planes(image[None, top:end]), brightened)).sum(dtype=torch.float64).item()
            for top, end in bands
        ]
        mean = torch.tensor([sum(sums) / (height * width)], dtype=torch.float32)
    out = torch.empty_like(image)
    for top, end in bands:
        first, last = max(0, top - changes.blur_radius), min(height, end + changes.blur_radius)
        planes = jitter_color_(as_planes(image[None, first:last]), changes, mean)
        if changes.blur is not None:
            planes = blur(planes, changes.blur, changes.blur_radius)
        planes = planes[:, :, top - first : end - first]
        if changes.noise is not None:
            planes = planes.contiguous()
            add_noise_(planes, changes.noise, changes.noise_seed + top)
        out[top:end] = planes[0].permute(1, 2, 0).round().to(torch.uint8)
    return out
