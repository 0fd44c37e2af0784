"""Find near-duplicates: copies of one photograph that are resized, recompressed, recoloured, turned or cropped.

Dermoscopic images look alike, often a dark spot on bright skin inside a round vignette. Two steps are therefore
needed. A fingerprint, the 16 x 16 gray thumbnail without mean and contrast, proposes the nearest images of each image
in all eight orientations. The fine structure at 64 x 64 then decides, after the two images are aligned and the local
contrast is normalised, so that hairs, pores and pigment count more than the spot. The middle must agree as well as
the whole, which separates two lesions under one vignette.

Other photographs of the same lesion are not found. They need a table of patients or lesions (`data.groups`).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from hpsearch.config.data import GRAY_WEIGHTS, DataConfig
from hpsearch.data.build import Progress
from hpsearch.data.cache import Cache, open_cache
from hpsearch.data.dataset import Split
from hpsearch.data.folds import connected_components, require_groups
from hpsearch.data.prepare import Role, locate, prepare_pool, prepare_test
from hpsearch.paths import atomic_write

Images = NDArray[np.uint8] | Cache
"""(N, H, W, 3) uint8, memory-mapped or not, or a cache. They are read in pieces."""

THRESHOLD = 0.65
"""Least similarity of two copies of a photograph. In ISIC-2017 true pairs are above 0.72, others below 0.64."""

_SIDE = 64
_FINGERPRINT_SIDE = 16
_NEIGHBOURS = 10  # proposals per image, so that the work grows with the images and not with their pairs
_MIN_FINGERPRINT = 0.8  # the lowest true pair of ISIC-2017 has 0.95, but a crop by 3 % per side can be lower
_MAX_SHIFT = 8  # largest shift of the frame in pixels of 64
_SLACK = 2  # further shift of a block in pixels of 64, for differences of scale up to 6 %
_BLOCK = 16
_MIN_ALIGNED = 0.3  # no pair with a lower correlation before that shift passed the threshold after it
_FLAT = 4.0  # gray levels of local contrast that count as noise
_CHUNK = 256


@dataclass(frozen=True)
class DuplicatePair:
    """Two copies of one photograph."""

    a: str
    b: str
    split_a: Split
    split_b: Split
    similarity: float
    """Correlation of the fine structure, from `THRESHOLD` to 1."""

    @property
    def across(self) -> bool:
        """Whether one is in the pool and the other in the test split, which is a leak."""
        return (self.split_a == "test") != (self.split_b == "test")


def find_near_duplicates(
    images: Images | Sequence[Images],
    ids: Sequence[str],
    splits: Sequence[Split],
    *,
    threshold: float = THRESHOLD,
) -> tuple[DuplicatePair, ...]:
    """Return pairs within the pool and across pool and test, most similar first; `a` comes before `b` in `ids`.

    `images` is one source, or several in order (pool, test), of whole frames at one size (64 x 64 suffices), in the
    order of `ids` and `splits`. Exact copies have similarity 1 unless they are flat. Pairs within the test split leak
    nothing and are left out. The memory is about 20 KB per image.
    """
    fingerprints, details = _describe(_sources(images))
    if not len(ids) == len(splits) == len(details):
        raise ValueError(f"{len(details)} images, {len(ids)} ids, {len(splits)} splits")
    is_test = np.array([split == "test" for split in splits], dtype=bool)
    pairs = []
    for first, second, orientation in _proposals(fingerprints, is_test):
        for start in range(0, len(first), _CHUNK):
            a, b = first[start : start + _CHUNK], second[start : start + _CHUNK]
            for i, j, value in zip(a, b, _similarity(details[a], _turned(details[b], orientation)), strict=True):
                if value >= threshold:
                    pairs.append(DuplicatePair(ids[i], ids[j], splits[i], splits[j], min(1.0, float(value))))
    return _most_similar_first(pairs)


def find_in_dataset(
    config: DataConfig,
    cache_root: Path,
    *,
    with_test: bool,
    role: Role = "search",
    sheet: Path | None = None,
    progress: Progress | None = None,
) -> tuple[DuplicatePair, ...]:
    """Return the near-duplicates of the dataset that `config` names, and draw them on `sheet` if it is given.

    Byte-identical images are pairs of similarity 1, even if they are flat. The caches of a study are read if
    they hold whole frames of at least 64 x 64; otherwise small ones are built. The search passes `with_test=False`,
    and the test split is then not read. Raises the errors of `prepare_pool`.
    """
    if config.match != "resize" or min(config.cached_size) < _SIDE:
        config = replace(config, match="resize", size=2 * _SIDE, cache_size=0)
    caches = [open_cache(prepare_pool(config, cache_root, role=role, progress=progress).cache_path)]
    if with_test and locate(config, cache_root).split("test"):
        caches.append(open_cache(prepare_test(config, cache_root, progress=progress).cache_path))
    ids = [name for cache in caches for name in cache.ids]
    splits = [split for cache in caches for split in cache.splits]
    equal = _byte_equal(ids, splits, [sha256 for cache in caches for sha256 in cache.sha256])
    known = {(pair.a, pair.b) for pair in equal}
    near = [pair for pair in find_near_duplicates(caches, ids, splits) if (pair.a, pair.b) not in known]
    pairs = _most_similar_first([*equal, *near])
    if sheet is not None and pairs:
        write_contact_sheet(sheet, pairs, caches, ids)
    return pairs


def _most_similar_first(pairs: Iterable[DuplicatePair]) -> tuple[DuplicatePair, ...]:
    return tuple(sorted(pairs, key=lambda pair: (-pair.similarity, pair.a, pair.b)))


def _byte_equal(ids: Sequence[str], splits: Sequence[Split], sha256: Sequence[str]) -> list[DuplicatePair]:
    """Return pairs of equal `sha256` that include every image with a copy.

    Each copy is paired with the first copy in the pool, and each pool image with the first copy in the test split.
    The number of pairs thus grows with the images and not with their square.
    """
    copies: dict[str, list[int]] = defaultdict(list)
    for i, content in enumerate(sha256):
        copies[content].append(i)
    found = set()
    for members in copies.values():
        pool = [i for i in members if splits[i] != "test"]
        test = [i for i in members if splits[i] == "test"]
        found |= {(pool[0], other) for other in [*pool[1:], *test] if pool}
        found |= {(other, test[0]) for other in pool if test}
    pairs = ((min(pair), max(pair)) for pair in sorted(found))
    return [DuplicatePair(ids[i], ids[j], splits[i], splits[j], 1.0) for i, j in pairs]


def groups_of(
    pairs: Iterable[DuplicatePair], ids: Iterable[str], groups: Mapping[str, str] | None = None
) -> dict[str, str]:
    """Return the group of each of `ids`. Images that `pairs` connect, directly or through others, share a group.

    A group has the name of its smallest id. `groups` (the lesion or patient of each id) connects images too: two
    patients that share a duplicate become one group. Raises DatasetError if `groups` lacks an image.
    """
    wanted = sorted(set(ids))
    edges = [(pair.a, pair.b) for pair in pairs]
    if groups is not None:
        require_groups(wanted, groups)
        first: dict[str, str] = {}
        edges += [(name, first.setdefault(groups[name], name)) for name in wanted]
    number = {name: i for i, name in enumerate(dict.fromkeys([*wanted, *(name for edge in edges for name in edge)]))}
    components = connected_components(len(number), [(number[a], number[b]) for a, b in edges])
    # Names are sorted, so the first of a component is its smallest.
    smallest: dict[int, str] = {}
    return {name: smallest.setdefault(components[number[name]], name) for name in wanted}


def write_contact_sheet(
    path: Path,
    pairs: Sequence[DuplicatePair],
    images: Images | Sequence[Images],
    ids: Sequence[str],
    *,
    columns: int = 4,
    side: int = 160,
) -> None:
    """Write `pairs` row by row as one PNG. The two images of a pair touch, and pairs are apart.

    `images` and `ids` are those of `find_near_duplicates`. Each image is drawn with `side` pixels per side. Without
    pairs the PNG is white.
    """
    sources = _sources(images)
    place = dict(zip(ids, ((source, i) for source in sources for i in range(len(source))), strict=True))

    def tile(name: str) -> NDArray[np.uint8]:
        source, index = place[name]
        image = _read(source, np.array([index]))[0]
        rows, cols = (np.arange(side) * n // side for n in image.shape[:2])
        drawn: NDArray[np.uint8] = image[rows][:, cols]
        return drawn

    gap, n_rows, n_columns = 6, max(1, -(-len(pairs) // columns)), max(1, min(columns, len(pairs)))
    sheet = np.full((n_rows * (side + gap) + gap, n_columns * (2 * side + gap) + gap, 3), 255, dtype=np.uint8)
    for number, pair in enumerate(pairs):
        top = gap + number // columns * (side + gap)
        left = gap + number % columns * (2 * side + gap)
        sheet[top : top + side, left : left + 2 * side] = np.concatenate([tile(pair.a), tile(pair.b)], axis=1)
    with atomic_write(path) as temporary:
        Image.fromarray(sheet).save(temporary, "PNG")


def _sources(images: Images | Sequence[Images]) -> list[Images]:
    return [images] if isinstance(images, np.ndarray | Cache) else list(images)


def _read(source: Images, indices: NDArray[np.int64]) -> NDArray[np.uint8]:
    return source.read(indices)[0] if isinstance(source, Cache) else np.asarray(source[indices])


def _describe(sources: Sequence[Images]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Return fingerprints (N, 16, 16) and details (N, 64, 64) of all images."""
    n = sum(len(source) for source in sources)
    fingerprints = np.empty((n, _FINGERPRINT_SIDE, _FINGERPRINT_SIDE), dtype=np.float32)
    details = np.empty((n, _SIDE, _SIDE), dtype=np.float32)
    smooth = _smoothing(_SIDE, radius=2)
    step = _SIDE // _FINGERPRINT_SIDE
    done = 0
    for source in sources:
        for start in range(0, len(source), 16):
            gray = _thumbnails(_read(source, np.arange(start, min(start + 16, len(source)))))
            here = slice(done, done + len(gray))
            boxes = gray.reshape(len(gray), _FINGERPRINT_SIDE, step, _FINGERPRINT_SIDE, step)
            fingerprints[here] = boxes.mean(axis=(2, 4))
            fine = gray - smooth @ gray @ smooth.T
            contrast = np.sqrt(smooth @ (fine * fine) @ smooth.T)
            details[here] = fine / (contrast + _FLAT)
            done += len(gray)
    return fingerprints, details


def _thumbnails(images: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Return gray thumbnails (B, 64, 64), 0 to 255, of (B, H, W, 3): means of 4 x 4 pixels spread over each cell."""
    n = 4 * _SIDE
    rows, columns = (np.arange(n) * length // n for length in images.shape[1:3])
    lines = images[:, rows].reshape(len(images), _SIDE, 4, -1)
    sums = lines[:, :, 0].astype(np.uint16) + lines[:, :, 1] + lines[:, :, 2] + lines[:, :, 3]
    boxes = sums.reshape(len(images), _SIDE, -1, 3)[:, :, columns].reshape(len(images), _SIDE, _SIDE, 4, 3)
    sums = boxes[:, :, :, 0] + boxes[:, :, :, 1] + boxes[:, :, :, 2] + boxes[:, :, :, 3]
    gray: NDArray[np.float32] = sums.astype(np.float32) @ np.array(GRAY_WEIGHTS, dtype=np.float32) / 16
    return gray


def _smoothing(side: int, *, radius: int) -> NDArray[np.float32]:
    """Return the (side, side) matrix that smooths an axis by a triangle of twice `radius`, cut off at the border."""
    distance = np.abs(np.arange(side)[:, None] - np.arange(side)[None, :])
    weights: NDArray[np.float32] = np.maximum(0, 2 * radius + 1 - distance).astype(np.float32)
    weights /= weights.sum(axis=1, keepdims=True)
    return weights


def _proposals(
    fingerprints: NDArray[np.float32], is_test: NDArray[np.bool_]
) -> Iterator[tuple[NDArray[np.int64], NDArray[np.int64], int]]:
    """Yield the proposed pairs (first, second) with first < second, and the orientation of second."""
    n = len(fingerprints)
    units = _unit(fingerprints)
    turned = [_unit(_turned(fingerprints, orientation)) for orientation in range(8)]
    earlier_first = np.linspace(0, 1e-3, n, dtype=np.float32)
    found: dict[tuple[int, int], int] = {}
    for start in range(0, n, _CHUNK):
        rows = np.arange(start, min(start + _CHUNK, n))
        best = np.full((len(rows), n), -1.0, dtype=np.float32)
        orientation_of = np.zeros((len(rows), n), dtype=np.int8)
        for orientation in range(8):
            correlation = units[rows] @ turned[orientation].T
            better = correlation > best
            best[better] = correlation[better]
            orientation_of[better] = orientation
        best[np.arange(len(rows)), rows] = -1.0
        best[np.ix_(is_test[rows], is_test)] = -1.0
        n_neighbours = min(_NEIGHBOURS, n)
        # If there are more copies, all prefer the first ones and thus stay connected.
        nearest = np.argpartition(earlier_first - best, n_neighbours - 1, axis=1)[:, :n_neighbours]
        for row, columns in zip(range(len(rows)), nearest, strict=True):
            for column in columns[best[row, columns] >= _MIN_FINGERPRINT]:
                i, j, orientation = int(rows[row]), int(column), int(orientation_of[row, column])
                # An exchanged pair is turned the other way.
                found[(i, j) if i < j else (j, i)] = orientation if i < j else _INVERSE[orientation]
    for orientation in range(8):
        pairs = sorted(pair for pair, value in found.items() if value == orientation)
        if pairs:
            first, second = np.array(pairs, dtype=np.int64).T
            yield first, second, orientation


_INVERSE = (0, 1, 6, 3, 4, 5, 2, 7)
"""Inverse of each of the eight orientations."""


def _turned(images: NDArray[np.float32], orientation: int) -> NDArray[np.float32]:
    """Return (B, S, S) turned by orientation // 2 quarters, then mirrored left to right if `orientation` is odd."""
    quarters, mirrored = divmod(orientation, 2)
    turned = np.rot90(images, quarters, axes=(1, 2))
    return turned[:, :, ::-1] if mirrored else turned


def _unit(images: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return (B, S, S) as rows (B, S * S) of mean 0 and length 1, 0 where constant. Products are correlations."""
    rows: NDArray[np.float32] = images.reshape(len(images), images.shape[1] * images.shape[2])
    rows = rows - rows.mean(axis=1, keepdims=True)
    rows /= np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-3)
    return rows


def _similarity(a: NDArray[np.float32], b: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return the correlation (M,) of details `a` and `b` (M, 64, 64), the lower of whole and middle.

    `b` is shifted by at most 8 pixels to fit `a` best. Each 16 x 16 block of `a` is then matched with the best block
    of `b` up to 2 pixels away. Blocks are weighted by the energy of their structure.
    """
    result = np.zeros(len(a), dtype=np.float32)
    shifted, correlation = _aligned(a, b)
    promising = np.flatnonzero(correlation >= _MIN_ALIGNED)
    a, shifted = a[promising], shifted[promising]
    energy = _block_sums(a * a)
    best = np.full(energy.shape, -1.0, dtype=np.float32)
    for y in range(2 * _SLACK + 1):
        for x in range(2 * _SLACK + 1):
            window = shifted[:, y : y + _SIDE, x : x + _SIDE]
            norm = np.sqrt(energy * _block_sums(window * window))
            best = np.maximum(best, _block_sums(a * window) / np.maximum(norm, 1e-3))
    n = _SIDE // _BLOCK
    middle = slice(n // 4, -n // 4)
    whole = _weighted_mean(best, energy)
    result[promising] = np.minimum(whole, _weighted_mean(best[:, middle, middle], energy[:, middle, middle]))
    return result


def _aligned(a: NDArray[np.float32], b: NDArray[np.float32]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Return `b` shifted to fit `a`, with a margin of 2 pixels per side (M, 68, 68), and the correlation (M,)."""
    spectrum = np.conj(np.fft.rfft2(a)) * np.fft.rfft2(b)
    products = np.fft.irfft2(spectrum, s=a.shape[1:])
    shifts = np.r_[0 : _MAX_SHIFT + 1, -_MAX_SHIFT:0]
    near = products[:, shifts][:, :, shifts].reshape(len(a), -1)
    down, right = (shifts[part] for part in np.divmod(near.argmax(axis=1), len(shifts)))
    margin = _MAX_SHIFT + _SLACK
    padded = np.pad(b, ((0, 0), (margin, margin), (margin, margin)))
    side = np.arange(_SIDE + 2 * _SLACK)
    rows, columns = (_MAX_SHIFT + down)[:, None] + side, (_MAX_SHIFT + right)[:, None] + side
    shifted = padded[np.arange(len(a))[:, None, None], rows[:, :, None], columns[:, None, :]]
    norm = np.sqrt((a * a).sum(axis=(1, 2)) * (b * b).sum(axis=(1, 2)))
    return shifted, (near.max(axis=1) / np.maximum(norm, 1e-3)).astype(np.float32)


def _block_sums(images: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return the sums (M, 4, 4) over the blocks of (M, 64, 64)."""
    n = _SIDE // _BLOCK
    sums: NDArray[np.float32] = images.reshape(len(images), n, _BLOCK, n, _BLOCK).sum(axis=(2, 4))
    return sums


def _weighted_mean(values: NDArray[np.float32], weights: NDArray[np.float32]) -> NDArray[np.float32]:
    mean: NDArray[np.float32] = (values * weights).sum(axis=(1, 2)) / np.maximum(weights.sum(axis=(1, 2)), 1e-3)
    return mean
