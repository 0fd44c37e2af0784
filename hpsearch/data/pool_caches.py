"""The decoded pool at every size that a study's trials see, and at the one size at which all of them are scored."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path

from hpsearch.config import StudyConfig
from hpsearch.config.data import DataConfig
from hpsearch.config.search import Choice
from hpsearch.data.build import Progress
from hpsearch.data.prepare import Prepared, Role, prepare_pool
from hpsearch.errors import CacheError, DatasetError


class PoolCaches:
    """One cache where the size is fixed; where it is searched, one for each size, made when it is first wanted."""

    def __init__(
        self, config: StudyConfig, root: Path, *, role: Role = "search", progress: Progress | None = None
    ) -> None:
        """Prepare the cache that trials are scored by. Raises as `prepare_pool` does, then and later.

        DatasetError too if nothing can be learned from its masks.
        """
        self._root = root
        self._data = config.data
        self._role = role
        self._seed = config.study.seed
        self._progress = progress
        self._by_size: dict[tuple[int, int], Prepared] = {}
        self.scored = self._prepared(config.scored_data)
        """The pool at the size at which it is scored: its images, its notes, the masks of every evaluation."""
        if self.scored.fault:
            raise DatasetError(self.scored.fault)

    def prepare_listed(self, config: StudyConfig) -> None:
        """Make those of all sizes that the search of `config` lists; of a range there may be too many to make now."""
        sizes = config.search.dimensions.get("data.size")
        for size in sizes.values if isinstance(sizes, Choice) else (config.data.size,):
            self._prepared(dataclasses.replace(config.data, size=size))

    @property
    def made(self) -> Mapping[tuple[int, int], Prepared]:
        """Those that are ready, by height and width, in the order in which they were wanted."""
        return self._by_size

    @property
    def notes(self) -> list[str]:
        """Notes on the data at all sizes that are ready, each once."""
        return list(dict.fromkeys(note for prepared in self._by_size.values() for note in prepared.notes))

    def job(self, config: StudyConfig) -> dict[str, str]:
        """What a worker has to be told to train `config`: `cache`, and `truth` where scores have another size."""
        cache = self._prepared(config.data)
        job = {"cache": str(cache.cache_path.absolute())}
        if cache.key != self.scored.key:
            job["truth"] = str(self.scored.cache_path.absolute())
        return job

    def _prepared(self, data: DataConfig) -> Prepared:
        if data.cached_size not in self._by_size:
            # A trial remembers where the images were when it began.
            found = prepare_pool(
                data.located_as(self._data), self._root, role=self._role, seed=self._seed, progress=self._progress
            )
            if self._by_size and found.ids != self.scored.ids:
                raise CacheError("the images changed while they were decoded: start again")
            self._by_size[data.cached_size] = found
        return self._by_size[data.cached_size]
