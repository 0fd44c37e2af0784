"""All pixels of a cache, and the splits and hashes of its images, for comparisons."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from hpsearch.data.cache import Cache
from hpsearch.data.dataset import Split


def images_of(cache: Cache) -> NDArray[Any]:
    """(N, H, W, 3) uint8."""
    return cache.read(np.arange(len(cache)))[0]


def masks_of(cache: Cache) -> NDArray[Any]:
    """(N, H, W) uint8."""
    return cache.read(np.arange(len(cache)))[1]


def splits_of(cache: Cache) -> tuple[Split, ...]:
    """The split of each image."""
    return tuple(sample.split for sample in cache.index.samples)


def sha256_of(cache: Cache) -> tuple[str, ...]:
    """The SHA-256 of each image file."""
    return tuple(stats.image_sha256 for stats in cache.index.stats)
