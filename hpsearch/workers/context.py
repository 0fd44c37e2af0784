"""What a worker keeps from job to job: its device, and the images on it."""

from hpsearch.config import StudyConfig
from hpsearch.data.batches import DeviceData
from hpsearch.data.cache import open_cache
from hpsearch.training import runtime as runtimes
from hpsearch.training.runtime import Runtime
from hpsearch.workers.jobs import CachePaths
from hpsearch.workers.pool import WorkerSettings


class WorkerContext:
    """Device, threads and loaded images of one worker."""

    def __init__(self, settings: WorkerSettings) -> None:
        self.settings = settings
        self._data: dict[tuple[CachePaths, str], DeviceData] = {}

    def runtime(self, config: StudyConfig, threads: int = 0) -> Runtime:
        """Return how this worker computes; `threads` other than its own are for measuring only."""
        train, threads = config.train, threads or self.settings.threads
        return runtimes.make_runtime(self.settings.device, amp=train.amp, compile=train.compile, threads=threads)

    def images(self, caches: CachePaths, config: StudyConfig) -> DeviceData:
        """Return the images on the device. Only one size and colour is kept, because each is another copy."""
        key = (caches, config.data.color)
        if key not in self._data:
            self._data.clear()
            truth = open_cache(caches.truth) if caches.truth else None
            device = runtimes.choose_device(self.settings.device)
            self._data[key] = DeviceData(open_cache(caches.images), device, color=config.data.color, truth=truth)
        return self._data[key]

    def forget_images(self) -> None:
        """Give the memory of the images back."""
        self._data.clear()
