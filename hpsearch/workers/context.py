"""What a worker keeps from job to job: its device, and the images on it."""

from __future__ import annotations

from pathlib import Path

from hpsearch.config import StudyConfig
from hpsearch.data.batches import DeviceData
from hpsearch.data.cache import Cache, open_cache
from hpsearch.training import runtime as runtimes
from hpsearch.training.runtime import Runtime
from hpsearch.workers.jobs import CachePaths
from hpsearch.workers.pool import WorkerSettings


class WorkerContext:
    """Device, threads and loaded images of one worker."""

    def __init__(self, settings: WorkerSettings) -> None:
        self.settings = settings
        self._data: dict[tuple[CachePaths, str], DeviceData] = {}
        self._caches: dict[Path, Cache] = {}

    def runtime(self, config: StudyConfig, threads: int = 0) -> Runtime:
        """Return how this worker computes; `threads` other than its own are for measuring only."""
        return runtimes.make_runtime(
            self.settings.device,
            amp=config.train.amp,
            compile=config.train.compile,
            threads=threads or self.settings.threads,
        )

    def images(self, caches: CachePaths, config: StudyConfig) -> DeviceData:
        """Return the images on the device. Only one size and colour is kept, because each is another copy."""
        key = (caches, config.data.color)
        if key not in self._data:
            self._data.clear()
            self._caches = {
                path: cache for path, cache in self._caches.items() if path in (caches.images, caches.truth)
            }
            self._data[key] = DeviceData(
                self._cache(caches.images),
                runtimes.choose_device(self.settings.device),
                color=config.data.color,
                truth=self._cache(caches.truth) if caches.truth else None,
            )
        return self._data[key]

    def forget_images(self) -> None:
        """Give the memory of the images back."""
        self._data.clear()

    def _cache(self, path: Path) -> Cache:
        if path not in self._caches:
            self._caches[path] = open_cache(path)
        return self._caches[path]
