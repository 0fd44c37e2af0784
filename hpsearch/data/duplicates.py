"""Find near-duplicates: copies of a photograph that were resized, recompressed, recoloured, rotated or cropped.

Dermoscopic images look alike: often a dark spot on bright skin inside a round vignette. The search therefore has two
steps.

1. The fingerprint of an image is its 16 x 16 gray thumbnail, normalised for mean and contrast. The images with the
   most similar fingerprints become candidates. All eight orientations (quarter turns and mirror images) are tried.
2. The fine structure of the two images is compared at 64 x 64. They are aligned and their local contrast is
   normalised first, so that hairs, pores and pigment count more than the spot. The whole image and its middle must
   both agree, because two different lesions can share a vignette.

Different photographs of the same lesion are not found. To group them, give a table of patients or lesions
(`data.groups`).
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from hpsearch.config.data import GRAY_WEIGHTS, DataConfig
from hpsearch.data.cache import Cache, open_cache
from hpsearch.data.dataset import Split
from hpsearch.data.prepare import Role, locate, prepare_pool, prepare_test
from hpsearch.paths import atomic_write

THRESHOLD = 0.65
"""Minimum similarity of near-duplicates. In ISIC-2017, true pairs are above 0.72 and other pairs below 0.64."""

_SIDE = 64
_FINGERPRINT_SIDE = 16
_NEIGHBOURS = 10  # candidates per image; a fixed number keeps the cost of step 2 linear in the number of images
_MIN_FINGERPRINT = 0.8  # true pairs in ISIC-2017 have at least 0.95; images cropped by 3 % per side can have less
_MAX_SHIFT = 8  # largest shift of the whole image, in pixels of the 64 x 64 thumbnail
_SLACK = 2  # additional shift of a block, in the same pixels; allows for scale differences of up to 6 %
_BLOCK = 16
_MIN_ALIGNED = 0.3  # pairs below this correlation before block matching never reached the threshold after it
_FLAT = 4.0  # gray levels, added to the local contrast so that noise in flat regions is not amplified
_CHUNK = 256


@dataclass(frozen=True)
class DuplicatePair:
    """Two images that are copies of one photograph."""

    a: str
    b: str
    split_a: Split
    split_b: Split
    similarity: float
    """Correlation of the fine structure, from `THRESHOLD` to 1."""

    @property
    def across(self) -> bool:
        """Whether one image is in the pool and the other in the test split, which is data leakage."""
        return (self.split_a == "test") != (self.split_b == "test")


def find_near_duplicates(caches: Sequence[Cache]) -> tuple[DuplicatePair, ...]:
    """Return near-duplicates within the pool and between pool and test split, most similar first.

    `caches` contains the cache of the pool (training and validation images) and, if there is a test split, its cache.
    The cached images must be uncropped and at least 64 x 64. In each pair, `a` comes before `b` in the caches. Pairs
    of byte-identical images have a similarity of 1, even if the images have a single colour. Pairs within the test
    split are left out, because they leak nothing into training. The search needs about 20 KB of memory per image.
    """
    samples = [sample for cache in caches for sample in cache.index.samples]
    if len(samples) < 2:
        return ()
    found = dict.fromkeys(_byte_equal(caches), 1.0)
    fingerprints, details = map(np.concatenate, zip(*map(_describe, _batches(caches)), strict=True))
    proposals = _proposals(fingerprints, np.array([sample.split == "test" for sample in samples]))
    for orientation in range(8):
        proposed = sorted(pair for pair, value in proposals.items() if value == orientation)
        for start in range(0, len(proposed), _CHUNK):
            chunk = proposed[start : start + _CHUNK]
            a, b = np.array(chunk).T
            for (i, j), value in zip(chunk, _similarity(details[a], _turned(details[b], orientation)), strict=True):
                if value >= THRESHOLD:
                    found.setdefault((i, j), min(1.0, float(value)))
    pairs = [
        DuplicatePair(samples[i].id, samples[j].id, samples[i].split, samples[j].split, similarity)
        for (i, j), similarity in found.items()
    ]
    return tuple(sorted(pairs, key=lambda pair: (-pair.similarity, pair.a, pair.b)))


def find_in_dataset(
    config: DataConfig, cache_root: Path, *, with_test: bool, role: Role = "search", sheet: Path | None = None
) -> tuple[DuplicatePair, ...]:
    """Return the near-duplicates in the dataset that `config` selects.

    If `sheet` is given, they are also written to this file as a contact sheet. The caches for `config` are used if
    their images are uncropped and at least 64 x 64. Otherwise, small caches are built. With `with_test=False`, the
    images of the test split are not compared. See `prepare_pool` for `role` and for the errors raised.
    """
    if config.match != "resize" or min(config.cached_size) < _SIDE:
        config = replace(config, match="resize", size=2 * _SIDE, cache_size=0)
    caches = [open_cache(prepare_pool(config, cache_root, role=role).cache_path)]
    if with_test and locate(config, cache_root).split("test"):
        caches.append(open_cache(prepare_test(config, cache_root).cache_path))
    pairs = find_near_duplicates(caches)
    if sheet is not None and pairs:
        write_contact_sheet(sheet, pairs, caches)
    return pairs


def _byte_equal(caches: Sequence[Cache]) -> set[tuple[int, int]]:
    """Return pairs (i, j), i < j, of byte-identical images. Copies within the test split are left out.

    Each image is paired only with its first copy in the pool, and each pool image also with its first copy in the
    test split. The number of pairs is therefore linear in the number of images.
    """
    images = [pair for cache in caches for pair in cache.index.pairs]
    sha256 = [stats.image_sha256 for _, stats in images]
    pool = [i for i, (sample, _) in enumerate(images) if sample.split != "test"]
    test = [i for i, (sample, _) in enumerate(images) if sample.split == "test"]
    # Reverse the indices, so that the first image with each hash is kept.
    in_pool, in_test = ({sha256[i]: i for i in reversed(part)} for part in (pool, test))
    found = {(in_pool[sha256[j]], j) for j in [*pool, *test] if in_pool.get(sha256[j], j) != j}
    return found | {(i, in_test[sha256[i]]) for i in pool if sha256[i] in in_test}


def write_contact_sheet(path: Path, pairs: Sequence[DuplicatePair], caches: Sequence[Cache]) -> None:
    """Write the images of `pairs` to one PNG with four pairs per row. The two images of a pair are side by side.

    `caches` are the same as for `find_near_duplicates`. Each image is resized to 160 x 160 pixels.
    """
    place = {id: (cache, i) for cache in caches for i, id in enumerate(cache.ids)}
    side, gap, columns = 160, 6, 4
    width, height = 2 * side + gap, side + gap
    n_rows, n_columns = -(-len(pairs) // columns), min(columns, len(pairs))
    sheet = Image.new("RGB", (n_columns * width + gap, n_rows * height + gap), "white")
    for number, pair in enumerate(pairs):
        row, column = divmod(number, columns)
        for name, left in ((pair.a, gap), (pair.b, gap + side)):
            cache, index = place[name]
            images, _ = cache.read(np.array([index]))
            tile = Image.fromarray(images[0]).resize((side, side), Image.Resampling.NEAREST)
            sheet.paste(tile, (column * width + left, row * height + gap))
    with atomic_write(path) as temporary:
        sheet.save(temporary, "PNG")


def _batches(caches: Sequence[Cache]) -> Iterator[NDArray[np.uint8]]:
    for cache in caches:
        for start in range(0, len(cache), 16):
            yield cache.read(np.arange(start, min(start + 16, len(cache))))[0]


def _describe(images: NDArray[np.uint8]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Return fingerprints (B, 16, 16) and normalised thumbnails (B, 64, 64) of `images` (B, H, W, 3)."""
    gray = _thumbnails(images)
    step = _SIDE // _FINGERPRINT_SIDE
    fingerprints = gray.reshape(-1, _FINGERPRINT_SIDE, step, _FINGERPRINT_SIDE, step).mean(axis=(2, 4))
    # Smooth each axis with a triangular kernel of 9 pixels, truncated at the border.
    distance = np.abs(np.subtract.outer(np.arange(_SIDE), np.arange(_SIDE)))
    smooth = np.maximum(0, 5 - distance).astype(np.float32)
    smooth /= smooth.sum(axis=1, keepdims=True)
    fine = gray - smooth @ gray @ smooth.T
    contrast = np.sqrt(smooth @ (fine * fine) @ smooth.T)
    return fingerprints, fine / (contrast + _FLAT)


def _thumbnails(images: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Return gray thumbnails (B, 64, 64), 0 to 255, of `images` (B, H, W, 3).

    Each thumbnail pixel is the mean of 4 x 4 pixels sampled evenly from the area that it covers.
    """
    n = 4 * _SIDE
    rows, columns = (np.arange(n) * length // n for length in images.shape[1:3])
    boxes = images[:, rows][:, :, columns].reshape(-1, _SIDE, 4, _SIDE, 4, 3)
    gray: NDArray[np.float32] = boxes.sum(axis=(2, 4), dtype=np.float32) @ np.array(GRAY_WEIGHTS, np.float32) / 16
    return gray


def _proposals(fingerprints: NDArray[np.float32], is_test: NDArray[np.bool_]) -> dict[tuple[int, int], int]:
    """Return the candidate pairs (i, j), i < j, each with the orientation (see `_turned`) in which j matches i best.

    `is_test` (n,) says which images are in the test split. Pairs within it are left out.
    """
    n = len(fingerprints)
    units = _unit(fingerprints)
    turned = np.stack([_unit(_turned(fingerprints, orientation)).T for orientation in range(8)])
    earlier_first = np.linspace(0, 1e-3, n, dtype=np.float32)
    n_neighbours = min(_NEIGHBOURS, n)
    found: dict[tuple[int, int], int] = {}
    for start in range(0, n, 64):
        rows = np.arange(start, min(start + 64, n))
        correlations = units[rows] @ turned
        orientations, best = correlations.argmax(axis=0), correlations.max(axis=0)
        best[np.arange(len(rows)), rows] = -1.0
        best[np.ix_(is_test[rows], is_test)] = -1.0
        # If an image has more than `n_neighbours` copies, every copy is linked to the same first copies.
        nearest = np.argpartition(earlier_first - best, n_neighbours - 1, axis=1)[:, :n_neighbours]
        for row, column in zip(*np.nonzero(np.take_along_axis(best, nearest, 1) >= _MIN_FINGERPRINT), strict=True):
            i, j = int(rows[row]), int(nearest[row, column])
            orientation = int(orientations[row, j])
            # Swapping the two images inverts the orientation.
            found[min(i, j), max(i, j)] = orientation if i < j else _INVERSE[orientation]
    return found


_INVERSE = (0, 1, 6, 3, 4, 5, 2, 7)
"""Inverse of each of the eight orientations of `_turned`."""


def _turned(images: NDArray[np.float32], orientation: int) -> NDArray[np.float32]:
    """Rotate `images` (B, S, S) by orientation // 2 quarter turns, and flip them left to right if it is odd."""
    quarters, mirrored = divmod(orientation, 2)
    turned = np.rot90(images, quarters, axes=(1, 2))
    return turned[:, :, ::-1] if mirrored else turned


def _unit(images: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return `images` (B, S, S) as rows (B, S * S) with mean 0 and norm 1, so that dot products are correlations.

    The row of a constant image is all 0.
    """
    rows: NDArray[np.float32] = images.reshape(len(images), -1)
    rows = rows - rows.mean(axis=1, keepdims=True)
    rows /= np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-3)
    return rows


def _similarity(a: NDArray[np.float32], b: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return the correlation (M,) between the fine structures `a` and `b` (M, 64, 64) of M pairs of images.

    `b` is first shifted by at most 8 pixels to match `a` best. Each 16 x 16 block of `a` is then compared with the
    best-matching block of `b` within 2 pixels. The correlation of a pair is the mean over the blocks, weighted by
    their sum of squares in `a`. It is computed for the whole image and for its middle, and the lower value is
    returned. It is 0 for pairs that barely correlate before the blocks are compared.
    """
    result = np.zeros(len(a), dtype=np.float32)
    shifted, correlation = _aligned(a, b)
    promising = np.flatnonzero(correlation >= _MIN_ALIGNED)
    a, shifted = a[promising], shifted[promising]
    energy = _block_sums(a * a)
    best = np.full(energy.shape, -1.0, dtype=np.float32)
    for y, x in np.ndindex(2 * _SLACK + 1, 2 * _SLACK + 1):
        window = shifted[:, y : y + _SIDE, x : x + _SIDE]
        norm = np.sqrt(energy * _block_sums(window * window))
        best = np.maximum(best, _block_sums(a * window) / np.maximum(norm, 1e-3))
    means = []
    for part in (slice(None), slice(1, -1)):
        weights = energy[:, part, part]
        means.append((best[:, part, part] * weights).sum((1, 2)) / np.maximum(weights.sum((1, 2)), 1e-3))
    result[promising] = np.minimum(*means)
    return result


def _aligned(a: NDArray[np.float32], b: NDArray[np.float32]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Shift `b` to match `a`. Return `b` with a margin of 2 pixels per side (M, 68, 68), and the correlation (M,)."""
    products = np.fft.irfft2(np.conj(np.fft.rfft2(a)) * np.fft.rfft2(b), s=a.shape[1:])
    shifts = np.r_[0 : _MAX_SHIFT + 1, -_MAX_SHIFT:0]
    near = products[:, shifts][:, :, shifts].reshape(len(a), -1)
    down, right = (_MAX_SHIFT + shifts[part] for part in np.divmod(near.argmax(axis=1), len(shifts)))
    margin, side = _MAX_SHIFT + _SLACK, _SIDE + 2 * _SLACK
    padded = np.pad(b, ((0, 0), (margin, margin), (margin, margin)))
    shifted = np.stack([p[y : y + side, x : x + side] for p, y, x in zip(padded, down, right, strict=True)])
    norm = np.sqrt((a * a).sum(axis=(1, 2)) * (b * b).sum(axis=(1, 2)))
    return shifted, (near.max(axis=1) / np.maximum(norm, 1e-3)).astype(np.float32)


def _block_sums(images: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return the sum of each 16 x 16 block of `images` (M, 64, 64), as (M, 4, 4)."""
    n = _SIDE // _BLOCK
    sums: NDArray[np.float32] = images.reshape(len(images), n, _BLOCK, n, _BLOCK).sum(axis=(2, 4))
    return sums
