"""All pixels of a cache, for comparisons."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from hpsearch.data.cache import Cache


def images_of(cache: Cache) -> NDArray[Any]:
    """(N, H, W, 3) uint8."""
    return cache.read(np.arange(len(cache)))[0]


def masks_of(cache: Cache) -> NDArray[Any]:
    """(N, H, W) uint8."""
    return cache.read(np.arange(len(cache)))[1]
