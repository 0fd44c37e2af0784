"""Prepare images for `study` and `final`: find and check them, and build a cache for each image size needed.

The pool consists of the training and validation images.
"""

import logging
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal

from hpsearch.config import StudyConfig
from hpsearch.config.data import DataConfig
from hpsearch.config.search import Choice
from hpsearch.data import integrity
from hpsearch.data.build import build_cache
from hpsearch.data.cache import INDEX, Index, Preparation, open_cache
from hpsearch.data.dataset import Dataset, Problem, Sample
from hpsearch.data.decode_pool import Decoders, Progress, View
from hpsearch.data.layouts import find_samples
from hpsearch.data.sample import SAMPLE_VERSION, draw_sample
from hpsearch.data.survey import decide_reading
from hpsearch.errors import CacheError, DatasetError, StorageError
from hpsearch.paths import ProjectPaths, refusals_named

logger = logging.getLogger(__name__)

Role = Literal["search", "final", "test"]


@dataclass(frozen=True)
class Prepared:
    """Cache that is ready to use, and notes on its images."""

    cache_path: Path
    """Folder of the cache. Pass it to `cache.open_cache`."""
    index: Index
    """Index of the cache: its key, its images, and how they are decoded."""
    notes: tuple[str, ...]
    """Notes on the data, one line each."""
    excluded: tuple[str, ...]
    """Ids of the images left out because of `data.exclude_bad`. The reasons are in the log."""


def prepare_pool(
    config: DataConfig, cache_root: Path, *, role: Role = "search", seed: int = 0, progress: Progress | None = None
) -> Prepared:
    """Prepare the cache of the pool: the training images, then the validation images, each sorted by id.

    The role `search` applies the limits `data.n_search_train` and `data.n_search_validation`, and the role `final`
    the limit `data.n_final_train`. The role `test` prepares the test split instead of the pool. For the other roles,
    test images are not decoded. They are only compared with the pool to find byte-identical images. `seed` is the
    seed of the random crops (`data.match = "crop"`).

    Raises DatasetError, which summarises all errors, if images are unusable and `data.exclude_bad` is off.
    """
    dataset, samples, preparation = _selected(config, cache_root, role, seed)
    problems = [problem for problem in dataset.problems if (problem.split == "test") == (role == "test")]
    if not samples:
        if problems:
            raise integrity.refusal(problems, dataset.flags)
        what = "test" if role == "test" else "training or validation"
        raise DatasetError(f"{dataset.root} has no {what} images: is a folder of that split missing or empty?")
    with refusals_named(cache_root):
        # Create the folder before the survey decodes files, so that an error is reported at once.
        cache_root.mkdir(parents=True, exist_ok=True)
    with Decoders() as decoders:
        reading, reading_notes = decide_reading(dataset, config, cache_root, decoders)
        preparation = replace(preparation, reading=reading)
        # Decode all images before raising an error, so that it covers all problems. The next run reuses the cache.
        folder = build_cache(samples, preparation, config.cache, cache_root, decoders=decoders, progress=progress)
    index = Index.read(folder)
    problems += index.problems
    if problems and not config.exclude_bad:
        raise integrity.refusal(problems, dataset.flags)
    for problem in problems:
        logger.warning("left out (%s): %s", problem.kind, problem.text)
    notes = integrity.dataset_notes(dataset) if config.root != "sample" else []
    if role != "test":
        # Report errors in the test split as notes, because they prevent only `final`.
        later = [problem for problem in dataset.problems if problem.split == "test"]
        notes += integrity.same_images(samples, dataset.split("test"))
        notes += [replace(problem, kind=f"{problem.kind} in the test split") for problem in later]
    notes += reading_notes + integrity.content_notes(dataset, index.pairs, config.cached_size)
    excluded = dict.fromkeys(problem.id for problem in problems)
    return Prepared(folder, index, notes=tuple(integrity.describe(notes)), excluded=tuple(excluded))


def cache_root(project: ProjectPaths, config: StudyConfig) -> Path:
    """Return the folder in which the caches of a study are stored."""
    return Path(config.data.cache_dir) if config.data.cache_dir else project.cache


class PoolCaches:
    """Caches of the pool, one per image size, each built on first use. If the size is fixed, there is only one."""

    def __init__(
        self, config: StudyConfig, root: Path, *, role: Role = "search", progress: Progress | None = None
    ) -> None:
        """Prepare the cache on which trials are scored.

        Raises DatasetError if nothing can be learned from its masks. Errors of `prepare_pool` are raised here and by
        `prepare_listed` and `paths`.
        """
        self._data = config.data
        self._prepare = partial(prepare_pool, cache_root=root, role=role, seed=config.study.seed, progress=progress)
        self.made: dict[tuple[int, int], Prepared] = {}
        """Maps height and width to the prepared cache, in the order of first use."""
        self.scored = self._prepared(config.scored_data)
        """Cache with the image size at which trials are scored."""
        if fault := integrity.lesion_fault(self.scored.index.stats, config.scored_data.cached_size):
            raise DatasetError(fault)

    def prepare_listed(self, config: StudyConfig) -> None:
        """Prepare a cache for each image size that the search space lists, or for `data.size` if it lists none.

        The sizes in a range are not prepared in advance, because there may be too many.
        """
        sizes = config.search.get("data.size")
        for size in sizes.values if isinstance(sizes, Choice) else (config.data.size,):
            self._prepared(replace(config.data, size=size))

    @property
    def notes(self) -> list[str]:
        """Notes on all prepared caches, without duplicates."""
        return list(dict.fromkeys(note for prepared in self.made.values() for note in prepared.notes))

    def paths(self, config: StudyConfig) -> tuple[Path, Path | None]:
        """Return the paths of the cache to train on with `config` and of the cache to score on.

        The second path is None if both are the same cache.
        """
        cache, scored = self._prepared(config.data).cache_path, self.scored.cache_path
        return cache, scored if cache != scored else None

    def _prepared(self, data: DataConfig) -> Prepared:
        if data.cached_size not in self.made:
            # Use the current image paths, because the config of a trial has the paths from the trial's start.
            found = self._prepare(data.located_as(self._data))
            if self.made and found.index.ids != self.scored.index.ids:
                raise CacheError("the images changed while they were decoded: start again")
            self.made[data.cached_size] = found
        return self.made[data.cached_size]


def prepare_test(config: DataConfig, cache_root: Path, *, progress: Progress | None = None) -> Prepared:
    """Prepare the cache of the test split: the first `data.n_final_test` images by id, or all if this is 0."""
    return prepare_pool(config, cache_root, role="test", progress=progress)


def count_pool(config: DataConfig, cache_root: Path) -> int:
    """Return the number of pool images that the search uses, without decoding them.

    Raises DatasetError if there is no dataset.
    """
    return len(_selected(config, cache_root, "search")[1])


def check_contents(config: DataConfig, cache_root: Path) -> tuple[list[Path], list[Problem]]:
    """Return the folders of the dataset's caches, and a problem for each changed file and each damaged cached image.

    Every file is read completely, because the key of a cache depends only on the start and the end of each file.
    """
    samples = set(locate(config, cache_root).samples)
    folders: list[Path] = []
    for path in sorted(cache_root.glob(f"*/{INDEX}")):
        # Skip caches whose index cannot be read, for example an index of another version. The next study rebuilds
        # them.
        with suppress(CacheError):
            folders += [path.parent] if samples.issuperset(Index.read(path.parent).samples) else []
    return folders, [problem for folder in folders for problem in integrity.check_stored(open_cache(folder))]


def locate(config: DataConfig, cache_root: Path) -> Dataset:
    """Return the dataset that `config` selects. The built-in one is generated in `cache_root` if it is missing."""
    if config.root != "sample" or config.images:
        return find_samples(config)
    folder = cache_root / f"sample-{SAMPLE_VERSION}" / "ISIC-2017"
    if not folder.is_dir():
        logger.info("generating the sample dataset in %s", folder)
        try:
            draw_sample(folder)
        except (DatasetError, StorageError):
            # Ignore the error if another process has written the dataset in the meantime.
            if not folder.is_dir():
                raise
    return find_samples(replace(config, root=str(folder)))


def _selected(
    config: DataConfig, cache_root: Path, role: Role, seed: int = 0
) -> tuple[Dataset, tuple[Sample, ...], Preparation]:
    """Return the dataset, the samples for `role` within its limits, and the settings for preparing them."""
    dataset = locate(config, cache_root)
    train, val, test = dataset.split("train"), dataset.split("val"), dataset.split("test")
    # A limit of 0 means no limit.
    samples = {
        "search": train[: config.n_search_train or None] + val[: config.n_search_validation or None],
        "final": (train + val)[: config.n_final_train or None],
        "test": test[: config.n_final_test or None],
    }[role]
    views: tuple[View, ...] = ("resize",)
    if config.match == "crop":
        views = ("centre crop",) if role == "test" else ("random crop", "centre crop")
    return dataset, samples, Preparation(*config.cached_size, views, seed if "random crop" in views else 0)
