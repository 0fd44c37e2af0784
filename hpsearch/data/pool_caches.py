"""Caches of the pool at every size of a study's trials, and at the size at which all trials are scored."""

import dataclasses
from functools import partial
from pathlib import Path

from hpsearch.config import StudyConfig
from hpsearch.config.data import DataConfig
from hpsearch.config.search import Choice
from hpsearch.data.build import Progress
from hpsearch.data.prepare import Prepared, Role, prepare_pool
from hpsearch.errors import CacheError, DatasetError
from hpsearch.paths import ProjectPaths


def cache_root(project: ProjectPaths, config: StudyConfig) -> Path:
    """Return the folder of a study's decoded images."""
    return Path(config.data.cache_dir) if config.data.cache_dir else project.cache


class PoolCaches:
    """One cache per image size, built on first use. A study with a fixed size has one."""

    def __init__(
        self, config: StudyConfig, root: Path, *, role: Role = "search", progress: Progress | None = None
    ) -> None:
        """Prepare the cache on which trials are scored. This and later calls raise the errors of `prepare_pool`.

        Also raises DatasetError if nothing can be learned from its masks.
        """
        self._data = config.data
        self._prepare = partial(prepare_pool, cache_root=root, role=role, seed=config.study.seed, progress=progress)
        self.made: dict[tuple[int, int], Prepared] = {}
        """Prepared caches by height and width, in the order of first use."""
        self.scored = self._prepared(config.scored_data)
        """The pool at the size at which trials are scored."""
        if self.scored.fault:
            raise DatasetError(self.scored.fault)

    def prepare_listed(self, config: StudyConfig) -> None:
        """Prepare all sizes that the search lists. A range of sizes can have too many to prepare now."""
        sizes = config.search.get("data.size")
        for size in sizes.values if isinstance(sizes, Choice) else (config.data.size,):
            self._prepared(dataclasses.replace(config.data, size=size))

    @property
    def notes(self) -> list[str]:
        """Notes on all prepared caches, without repetitions."""
        return list(dict.fromkeys(note for prepared in self.made.values() for note in prepared.notes))

    def paths(self, config: StudyConfig) -> tuple[Path, Path | None]:
        """Return the cache that `config` trains on, and the one that it is scored on if that has another size."""
        cache = self._prepared(config.data)
        return cache.cache_path, self.scored.cache_path if cache.key != self.scored.key else None

    def _prepared(self, data: DataConfig) -> Prepared:
        if data.cached_size not in self.made:
            # A trial's settings have the paths of the images at its beginning.
            found = self._prepare(data.located_as(self._data))
            if self.made and found.ids != self.scored.ids:
                raise CacheError("the images changed while they were decoded: start again")
            self.made[data.cached_size] = found
        return self.made[data.cached_size]
