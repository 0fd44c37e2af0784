"""Prepare the images for `study` and `final`: find them, check them, and build their cache."""

from __future__ import annotations

import logging
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from hpsearch import subprocesses
from hpsearch.config.data import DataConfig
from hpsearch.data.build import Progress, build_cache
from hpsearch.data.cache import Index, Preparation, open_cache
from hpsearch.data.dataset import Dataset, Problem, Sample, Split
from hpsearch.data.decode_pool import Decoders, View, subprocess_environment
from hpsearch.data.integrity import (
    SWAPPED,
    check_stored,
    content_notes,
    dataset_notes,
    describe,
    duplicates,
    lesion_fault,
    refusal,
    shared_images,
    were_swapped,
)
from hpsearch.data.keys import cache_key
from hpsearch.data.layouts import find_samples
from hpsearch.data.reading import PLAIN_READING, Reading
from hpsearch.data.sample import SAMPLE_VERSION
from hpsearch.data.survey import Decision, decide_reading
from hpsearch.errors import DatasetError
from hpsearch.paths import storage_error

logger = logging.getLogger(__name__)

Role = Literal["search", "final"]


@dataclass(frozen=True)
class Prepared:
    """A cache that is ready, and notes on its images."""

    cache_path: Path
    """Argument for `cache.open_cache`."""
    key: str
    ids: tuple[str, ...]
    splits: tuple[Split, ...]
    notes: tuple[str, ...]
    """Notes on the data, one line each."""
    excluded: tuple[str, ...]
    """Ids of the images that `data.exclude_bad` left out. The log has the reasons."""
    seconds: float
    fault: str = ""
    """Reason why nothing can be learned from these images, such as empty masks. Empty if something can."""
    reading: Reading = PLAIN_READING

    @property
    def n(self) -> int:
        return len(self.ids)


def prepare_pool(
    config: DataConfig,
    cache_root: Path,
    *,
    role: Role = "search",
    seed: int = 0,
    progress: Progress | None = None,
) -> Prepared:
    """Prepare the cache of the pool: training before validation images, each sorted by id.

    `role` selects the limits: `n_search_train` and `n_search_validation`, or `n_final_train`. `seed` is that of the
    random crops of `match = "crop"`. Only names and bytes of the test split are read, to find images in both.

    Raises DatasetError with all errors of the dataset, unless `data.exclude_bad` leaves the images out.
    """
    start = time.monotonic()
    return _prepare(config, _pool(config, cache_root, role, seed), cache_root, progress, start)


def count_pool(config: DataConfig, cache_root: Path) -> int:
    """Return the number of images of the search before any is decoded. DatasetError if there is no dataset."""
    return len(_pool(config, cache_root, "search", 0).samples)


def prepare_test(config: DataConfig, cache_root: Path, *, progress: Progress | None = None) -> Prepared:
    """Prepare the cache of the first `n_final_test` images of the test split, sorted by id, like `prepare_pool`."""
    start = time.monotonic()
    return _prepare(config, _test(config, cache_root), cache_root, progress, start)


def check_contents(config: DataConfig, cache_root: Path, *, seed: int = 0) -> tuple[list[Path], list[Problem]]:
    """Return the existing caches of `config`, and their files and images that have changed since.

    All of each file is read. The key of a cache depends only on both ends.
    """
    requests = [_pool(config, cache_root, "search", seed), _pool(config, cache_root, "final", seed)]
    requests.append(_test(config, cache_root))
    folders = []
    for request in requests:
        if request.samples:
            reading = decide_reading(request.dataset, config, cache_root).reading
            key = cache_key(request.samples, replace(request.preparation, reading=reading))
            # Without limits the pools of both roles are the same.
            folders += [path for path in sorted(cache_root.glob(f"{key}-*")) if path not in folders]
    return folders, [problem for folder in folders for problem in check_stored(open_cache(folder))]


def locate(config: DataConfig, cache_root: Path) -> Dataset:
    """Return the dataset that `config` names. The built-in one is drawn below `cache_root` if it is missing."""
    if config.root != "sample" or config.images:
        return find_samples(config)
    folder = cache_root / f"sample-{SAMPLE_VERSION}" / "ISIC-2017"
    if not folder.is_dir():
        logger.info("drawing the sample dataset in %s", folder)
        # In a subprocess, because drawing needs torch's encoders, which the caller must not load.
        done = subprocess.run(
            subprocesses.command("hpsearch.data.sample", str(folder)),
            env=subprocess_environment(),
            capture_output=True,
            text=True,
            check=False,
        )
        # Another process may have drawn it at the same time. It is then complete.
        if done.returncode != 0 and not folder.is_dir():
            last = (done.stderr.strip().splitlines() or ["no message"])[-1]
            raise DatasetError(f"the sample dataset could not be drawn in {folder}: {last}")
    return find_samples(replace(config, root=str(folder)))


@dataclass(frozen=True)
class _Request:
    """Samples to cache."""

    dataset: Dataset
    samples: tuple[Sample, ...]
    problems: tuple[Problem, ...]
    """Errors that are known before decoding. Their images are not among `samples`."""
    notes: tuple[Problem, ...]
    preparation: Preparation
    what: str
    """`training or validation`, or `test`."""


def _pool(config: DataConfig, cache_root: Path, role: Role, seed: int) -> _Request:
    dataset = locate(config, cache_root)
    train, val = dataset.split("train"), dataset.split("val")
    if role == "search":
        samples = (*_first(train, config.n_search_train), *_first(val, config.n_search_validation))
    else:
        samples = _first((*train, *val), config.n_final_train)
    views: tuple[View, ...] = ("resize",)
    if config.match == "crop":
        views = ("random crop", "centre crop")
    preparation = Preparation(*config.cached_size, views, seed if config.match == "crop" else 0)
    in_pool, in_test = _by_split(dataset.problems)
    # Errors of the test split do not stop the study, but `final` will refuse them.
    later = [replace(problem, kind=f"{problem.kind} in the test split") for problem in in_test]
    notes = (*shared_images(samples, dataset.split("test")), *later)
    return _Request(dataset, samples, in_pool, notes, preparation, "training or validation")


def _test(config: DataConfig, cache_root: Path) -> _Request:
    dataset = locate(config, cache_root)
    view: View = "centre crop" if config.match == "crop" else "resize"
    preparation = Preparation(*config.cached_size, (view,))
    _, problems = _by_split(dataset.problems)
    return _Request(dataset, _first(dataset.split("test"), config.n_final_test), problems, (), preparation, "test")


def _by_split(problems: Sequence[Problem]) -> tuple[tuple[Problem, ...], tuple[Problem, ...]]:
    """Return the problems of the pool and those of the test split."""
    pool = tuple(problem for problem in problems if problem.split != "test")
    return pool, tuple(problem for problem in problems if problem.split == "test")


def _prepare(
    config: DataConfig, request: _Request, cache_root: Path, progress: Progress | None, start: float
) -> Prepared:
    if not request.samples:
        if request.problems:
            raise refusal(request.problems, request.dataset.flags)
        raise DatasetError(
            f"{request.dataset.root} has no {request.what} images: is a folder of that split missing or empty?"
        )
    try:
        # Before decoding, so that a folder that cannot be created ends the command at once.
        cache_root.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise storage_error(cache_root, error) from error
    with Decoders() as decoders:
        decision = decide_reading(request.dataset, config, cache_root, decoders)
        folder = _build(config, request, decision, cache_root, decoders, progress)
    index = Index.read(folder)
    problems = [*request.problems, *index.problems]
    if problems and not config.exclude_bad:
        damaged = {problem.id for problem in index.problems}
        swapped = were_swapped(request.dataset, [sample for sample in request.samples if sample.id in damaged])
        raise refusal(problems, request.dataset.flags, SWAPPED if swapped else "")
    for problem in problems:
        logger.warning("left out (%s): %s", problem.kind, problem.text)
    size, is_cropped = config.cached_size, config.match == "crop"
    notes = [
        *(dataset_notes(request.dataset) if config.root != "sample" else []),
        *request.notes,
        *duplicates(index.pairs),
        *content_notes(request.dataset, index.pairs, decision, size, is_cropped=is_cropped),
    ]
    return Prepared(
        cache_path=folder,
        key=index.key,
        ids=tuple(sample.id for sample in index.samples),
        splits=tuple(sample.split for sample in index.samples),
        notes=tuple(describe(notes)),
        excluded=tuple(dict.fromkeys(problem.id for problem in problems)),
        seconds=time.monotonic() - start,
        fault=lesion_fault(index.stats, size) if request.what != "test" else "",
        reading=decision.reading,
    )


def _build(
    config: DataConfig,
    request: _Request,
    decision: Decision,
    cache_root: Path,
    decoders: Decoders,
    progress: Progress | None,
) -> Path:
    """Return the folder of an intact cache. All images are decoded before any is refused, so that one error has all.

    With --exclude-bad the next start finds this cache.
    """
    preparation = replace(request.preparation, reading=decision.reading)
    try:
        return build_cache(
            request.samples, preparation, config.cache, cache_root, decoders=decoders, progress=progress
        )
    except DatasetError as error:
        if were_swapped(request.dataset, request.samples):
            raise DatasetError(f"{error}. {SWAPPED}") from error
        raise


def _first(samples: tuple[Sample, ...], n: int) -> tuple[Sample, ...]:
    """Return the first n samples, or all for n = 0."""
    return samples[:n] if n else samples
