"""Makes ready what `study` and `final` read: finds the images, checks them, and has them cached."""

from __future__ import annotations

import logging
import subprocess
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from hpsearch import subprocesses
from hpsearch.config.data import DataConfig
from hpsearch.data.build import Progress, build_cache, discard_cache, is_damaged
from hpsearch.data.cache import Index, Preparation, cache_key, open_cache
from hpsearch.data.decode_pool import Decoders, subprocess_environment
from hpsearch.data.integrity import (
    SWAPPED,
    check_stored,
    dataset_notes,
    describe,
    duplicates,
    lesion_fault,
    mask_notes,
    no_lesion_to_find,
    refusal,
    shared_images,
    were_swapped,
)
from hpsearch.data.layouts import Dataset, Problem, Sample, Split, find_samples
from hpsearch.data.reading import PLAIN_READING, Reading
from hpsearch.data.sample import SAMPLE_VERSION
from hpsearch.data.survey import decide_reading, reading_notes
from hpsearch.errors import DatasetError
from hpsearch.paths import storage_error

logger = logging.getLogger(__name__)

Role = Literal["search", "final"]


@dataclass(frozen=True)
class Prepared:
    """A cache that is ready, and what was found on the way."""

    cache_path: Path
    """For `cache.open_cache`."""
    key: str
    ids: tuple[str, ...]
    splits: tuple[Split, ...]
    notes: tuple[str, ...]
    """What is worth knowing about the data, one line each."""
    excluded: tuple[str, ...]
    """Ids of the images that `data.exclude_bad` left out; the log says why."""
    seconds: float
    fault: str = ""
    """Why nothing can be learned from these images, such as masks that are all empty; empty if something can."""
    reading: Reading = PLAIN_READING
    """How the files become pixels."""

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
    """The cache of the pool, training before validation images, each sorted by id.

    `role` decides which limits hold: `n_search_train` and `n_search_validation`, or `n_final_train`. `seed` decides
    where `match = "crop"` cuts. Of the test split only names and bytes are looked at, for images that are in both.

    Raises DatasetError, reporting everything that is wrong, unless `data.exclude_bad` leaves it out.
    """
    start = time.monotonic()
    return _prepare(config, _pool(config, cache_root, role, seed), cache_root, progress, start)


def count_pool(config: DataConfig, cache_root: Path) -> int:
    """How many images the search will have, before any is decoded. DatasetError if there is no dataset."""
    return len(_pool(config, cache_root, "search", 0).samples)


def prepare_test(config: DataConfig, cache_root: Path, *, progress: Progress | None = None) -> Prepared:
    """The cache of the test split, sorted by id, the first `n_final_test` of it; errors as in `prepare_pool`."""
    start = time.monotonic()
    return _prepare(config, _test(config, cache_root), cache_root, progress, start)


def check_contents(config: DataConfig, cache_root: Path, *, seed: int = 0) -> tuple[list[Path], list[Problem]]:
    """The caches of `config` that are there, and what in files or caches is no more as it was when they were made.

    All of every file is read, where the key of a cache looks at both ends only.
    """
    wanted = [_pool(config, cache_root, "search", seed), _pool(config, cache_root, "final", seed)]
    wanted.append(_test(config, cache_root))
    folders = []
    for each in wanted:
        if each.samples:
            reading = decide_reading(each.dataset, config, cache_root).reading
            key = cache_key(each.samples, replace(each.preparation, reading=reading))
            # The pools of both roles are one where nothing limits them.
            folders += [path for path in sorted(cache_root.glob(f"{key}-*")) if path not in folders]
    return folders, [problem for folder in folders for problem in check_stored(open_cache(folder))]


def locate(config: DataConfig, cache_root: Path) -> Dataset:
    """The dataset that `config` names; the built-in one is drawn below `cache_root` if it is not there yet."""
    if config.root != "sample" or config.images:
        return find_samples(config)
    folder = cache_root / f"sample-{SAMPLE_VERSION}" / "ISIC-2017"
    if not folder.is_dir():
        logger.info("drawing the sample dataset in %s", folder)
        # In a process of its own: drawing needs torch's encoders, which the caller must not load.
        done = subprocess.run(
            subprocesses.command("hpsearch.data.sample", str(folder)),
            env=subprocess_environment(),
            capture_output=True,
            text=True,
            check=False,
        )
        # Another process may have drawn it at the same moment: then it is there, whole.
        if done.returncode != 0 and not folder.is_dir():
            last = (done.stderr.strip().splitlines() or ["no message"])[-1]
            raise DatasetError(f"the sample dataset could not be drawn in {folder}: {last}")
    return find_samples(replace(config, root=str(folder)))


@dataclass(frozen=True)
class _Wanted:
    """What shall be cached."""

    dataset: Dataset
    samples: tuple[Sample, ...]
    problems: tuple[Problem, ...]
    """What is known to be wrong before anything is decoded; such images are not among `samples`."""
    notes: tuple[Problem, ...]
    preparation: Preparation
    what: str
    """`training or validation`, or `test`."""


def _pool(config: DataConfig, cache_root: Path, role: Role, seed: int) -> _Wanted:
    dataset = locate(config, cache_root)
    train, val = dataset.split("train"), dataset.split("val")
    if role == "search":
        samples = (*_first(train, config.n_search_train), *_first(val, config.n_search_validation))
    else:
        samples = _first((*train, *val), config.n_final_train)
    unpaired = tuple(problem for problem in dataset.problems if problem.split != "test")
    height, width = config.cached_size
    preparation = Preparation(height, width, ("resize",))
    if config.match == "crop":
        preparation = Preparation(height, width, ("random crop", "centre crop"), seed)
    # The study can do without them, but `final` will refuse them: better said before the search than after it.
    later = tuple(
        replace(problem, kind=f"{problem.kind} in the test split")
        for problem in dataset.problems
        if problem.split == "test"
    )
    notes = (*shared_images(samples, dataset.split("test")), *later)
    return _Wanted(dataset, samples, unpaired, notes, preparation, "training or validation")


def _test(config: DataConfig, cache_root: Path) -> _Wanted:
    dataset = locate(config, cache_root)
    unpaired = tuple(problem for problem in dataset.problems if problem.split == "test")
    height, width = config.cached_size
    preparation = Preparation(height, width, ("centre crop" if config.match == "crop" else "resize",))
    return _Wanted(dataset, _first(dataset.split("test"), config.n_final_test), unpaired, (), preparation, "test")


def _prepare(
    config: DataConfig, wanted: _Wanted, cache_root: Path, progress: Progress | None, start: float
) -> Prepared:
    if not wanted.samples:
        if wanted.problems:
            raise refusal(wanted.problems, wanted.dataset.flags)
        raise DatasetError(
            f"{wanted.dataset.root} has no {wanted.what} images: is a folder of that split missing or empty?"
        )
    try:
        # Before any image is decoded: a folder that cannot be made ends the command at once.
        cache_root.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise storage_error(cache_root, error) from error
    with Decoders() as decoders:
        decision = decide_reading(wanted.dataset, config, cache_root, decoders)
        preparation = replace(wanted.preparation, reading=decision.reading)

        def build() -> Path:
            return build_cache(
                wanted.samples, preparation, config.cache, cache_root, decoders=decoders, progress=progress
            )

        # Everything is decoded before anything is refused, so that one message can report all of it; with
        # --exclude-bad the next start finds this cache.
        try:
            folder = build()
        except DatasetError as error:
            if were_swapped(wanted.dataset, wanted.samples):
                raise DatasetError(f"{error}. {SWAPPED}") from error
            raise
        if is_damaged(folder):
            logger.warning("%s is damaged; it is built again", folder)
            discard_cache(folder)
            folder = build()
    index = Index.read(folder)
    problems = [*wanted.problems, *index.problems]
    if problems and not config.exclude_bad:
        damaged = {problem.id for problem in index.problems}
        swapped = were_swapped(wanted.dataset, [sample for sample in wanted.samples if sample.id in damaged])
        raise refusal(problems, wanted.dataset.flags, SWAPPED if swapped else "")
    for problem in problems:
        logger.warning("left out (%s): %s", problem.kind, problem.text)
    size = config.cached_size
    notes = [*wanted.notes, *duplicates(index.samples, index.facts)]
    notes += mask_notes(index.samples, index.facts, size, is_cropped=config.match == "crop")
    notes += [*decision.notes, *reading_notes(index.samples, index.facts, decision.reading)]
    fault = lesion_fault(index.facts, size) if wanted.what != "test" else ""
    if wanted.what == "test":
        notes += no_lesion_to_find(wanted.dataset, index.facts, size)
    if config.root != "sample":
        notes = [*dataset_notes(wanted.dataset), *notes]
    return Prepared(
        cache_path=folder,
        key=index.key,
        ids=tuple(sample.id for sample in index.samples),
        splits=tuple(sample.split for sample in index.samples),
        notes=tuple(describe(notes)),
        excluded=tuple(dict.fromkeys(problem.id for problem in problems)),
        seconds=time.monotonic() - start,
        fault=fault,
        reading=decision.reading,
    )


def _first(samples: tuple[Sample, ...], n: int) -> tuple[Sample, ...]:
    """The first n, or all for n = 0."""
    return samples[:n] if n else samples
