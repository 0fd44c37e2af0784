"""Compute the keys that name caches and surveys from the files of their images."""

import hashlib
import json
import zlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path

from hpsearch.data.cache import Preparation
from hpsearch.data.dataset import Sample

KEY_VERSION = 1
"""Changes when the same files and preparation give other pixels. Studies cannot continue across such a change."""
END_BYTES = 64 * 2**10
"""Bytes of each end of a file that the key depends on."""


def cache_key(samples: Sequence[Sample], preparation: Preparation) -> str:
    """Return 24 hexadecimal digits that depend on the preparation and the files, but not on where the files are."""
    table = asdict(preparation)
    del table["reading"]
    return files_key([KEY_VERSION, table, *preparation.reading.key()], samples)


def files_key(head: object, samples: Sequence[Sample]) -> str:
    """Return 24 hexadecimal digits that depend on `head` (plain types) and on every image and mask.

    The length and both ends of each file are read. A replaced image is thus noticed at every start, without reading
    the whole dataset.
    """
    digest = hashlib.sha256(json.dumps(head).encode())
    with ThreadPoolExecutor(16) as threads:
        images = threads.map(_fingerprint, [sample.image for sample in samples])
        masks = threads.map(_fingerprint, [sample.mask for sample in samples])
        for sample, image, mask in zip(samples, images, masks, strict=True):
            digest.update(json.dumps([sample.id, sample.split, image, mask]).encode())
    return digest.hexdigest()[:24]


def _fingerprint(path: Path) -> tuple[int, int, int]:
    """Return the length of a file and the CRC-32 of its first and last 64 KiB."""
    try:
        with path.open("rb") as file:
            first = file.read(END_BYTES)
            length = file.seek(0, 2)
            file.seek(max(0, length - END_BYTES))
            return length, zlib.crc32(first), zlib.crc32(file.read(END_BYTES))
    except OSError:
        # Decoding the file reports the reason.
        return -1, 0, 0
