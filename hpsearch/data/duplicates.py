"""Find near-duplicates: one photograph that was resized, recompressed, recoloured, turned or slightly cropped.

Dermoscopic images look alike: a dark spot in the middle of bright skin, often inside the same round vignette. So two
steps: a fingerprint, the image's 16 x 16 gray thumbnail without mean and contrast, proposes each image's nearest
ones in all eight orientations; then fine structure decides, at 64 x 64, after local contrast has been normalised (so
that hairs, pores and pigment count, not the spot), and after the two were laid on each other. The middle must agree
as well as the whole: that tells two lesions under one vignette apart.

Another photograph of the same lesion is *not* found: that takes a table of patients or lesions (`data.groups`).
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
from hpsearch.data.folds import connected_components
from hpsearch.data.prepare import Role, locate, prepare_pool, prepare_test
from hpsearch.errors import DatasetError
from hpsearch.paths import atomic_write

Images = NDArray[np.uint8] | Cache
"""(N, H, W, 3) uint8, memory-mapped or not, or a cache of them; read piece by piece."""

THRESHOLD = 0.65
"""Similarity from which two are one photograph: in ISIC-2017 true pairs lie above 0.72, others below 0.64."""

_SIDE = 64
_FINGERPRINT_SIDE = 16
_NEIGHBOURS = 10  # proposals an image at most, so that the work grows with the images, not with their pairs
_MIN_FINGERPRINT = 0.8  # of the true pairs of ISIC-2017 the lowest is 0.95; a crop by 3 % a side can cost more
_MAX_SHIFT = 8  # pixels of 64 by which the frame may differ
_SLACK = 2  # pixels of 64 by which a block may move besides: differences of scale up to 6 %
_BLOCK = 16
_MIN_ALIGNED = 0.3  # correlation before that slack below which no pair passed the threshold after it
_FLAT = 4.0  # gray levels of local contrast that count as noise
_CHUNK = 256


@dataclass(frozen=True)
class DuplicatePair:
    """Two images that show one photograph."""

    a: str
    b: str
    split_a: Split
    split_b: Split
    similarity: float
    """Correlation of the fine structure, from `THRESHOLD` to 1."""

    @property
    def across(self) -> bool:
        """Whether one is of the pool and the other of the test split: a leak."""
        return (self.split_a == "test") != (self.split_b == "test")


def find_near_duplicates(
    images: Images | Sequence[Images],
    ids: Sequence[str],
    splits: Sequence[Split],
    *,
    threshold: float = THRESHOLD,
) -> tuple[DuplicatePair, ...]:
    """Pairs within the pool and across pool and test, most similar first; `a` comes before `b` in `ids`.

    `images` is one source or several one after another (pool, test), whole frames at one size (64 x 64 is enough), in
    the order of `ids` and `splits`. Copies have a similarity of 1 unless they are flat. Pairs within the test split
    leak nothing and are left out. Takes about 20 KB of memory an image.
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
    """`find_near_duplicates` of the dataset that `config` names; `write_contact_sheet` of them to `sheet`, if any.

    Byte-equal images are pairs of similarity 1, also where they have no fine structure to be compared by.
    Reads the caches that a study of `config` reads, if they hold whole frames of 64 x 64 or more, else small ones
    made for this. The search says `with_test=False`: the test split is then not read. Errors as in `prepare_pool`.
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
    """Return pairs of equal `sha256`, enough of them that each image which has a copy is in one.

    Every copy is paired with the first copy in the pool, and every pool image with the first copy in the test split,
    so that the number of pairs grows with the images and not with their square.
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

    A group is named after the smallest id in it. `groups` (a lesion or patient for each id) connects images too:
    two patients that share a duplicate become one group. Raises DatasetError if `groups` lacks an image.
    """
    wanted = sorted(set(ids))
    edges = [(pair.a, pair.b) for pair in pairs]
    if groups is not None:
        if missing := [name for name in wanted if name not in groups]:
            raise DatasetError(f"the groups name no group for image {missing[0]}")
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
    """Write `pairs`, in their order row by row, as one PNG: the two images of a pair touch, pairs stand apart.

    `images` and `ids` as for `find_near_duplicates`; each image is drawn `side` pixels wide and high. Without pairs
    the picture is white.
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
    """Fingerprints (N, 16, 16) and details (N, 64, 64) of all images."""
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
    """Gray (B, 64, 64), 0 to 255, of (B, H, W, 3): each value the mean of 4 x 4 pixels spread over its part."""
    n = 4 * _SIDE
    rows, columns = (np.arange(n) * length // n for length in images.shape[1:3])
    lines = images[:, rows].reshape(len(images), _SIDE, 4, -1)
    sums = lines[:, :, 0].astype(np.uint16) + lines[:, :, 1] + lines[:, :, 2] + lines[:, :, 3]
    boxes = sums.reshape(len(images), _SIDE, -1, 3)[:, :, columns].reshape(len(images), _SIDE, _SIDE, 4, 3)
    sums = boxes[:, :, :, 0] + boxes[:, :, :, 1] + boxes[:, :, :, 2] + boxes[:, :, :, 3]
    gray: NDArray[np.float32] = sums.astype(np.float32) @ np.array(GRAY_WEIGHTS, dtype=np.float32) / 16
    return gray


def _smoothing(side: int, *, radius: int) -> NDArray[np.float32]:
    """(side, side) matrix that smooths along one axis: a triangle of twice `radius`, cut off at the border."""
    distance = np.abs(np.arange(side)[:, None] - np.arange(side)[None, :])
    weights: NDArray[np.float32] = np.maximum(0, 2 * radius + 1 - distance).astype(np.float32)
    weights /= weights.sum(axis=1, keepdims=True)
    return weights


def _proposals(
    fingerprints: NDArray[np.float32], is_test: NDArray[np.bool_]
) -> Iterator[tuple[NDArray[np.int64], NDArray[np.int64], int]]:
    """For each orientation 0..7 the pairs (first, second) to look at, first < second, in which second is turned."""
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
        # Of more equal copies than that all prefer the first ones: so they stay connected.
        nearest = np.argpartition(earlier_first - best, n_neighbours - 1, axis=1)[:, :n_neighbours]
        for row, columns in zip(range(len(rows)), nearest, strict=True):
            for column in columns[best[row, columns] >= _MIN_FINGERPRINT]:
                i, j, orientation = int(rows[row]), int(column), int(orientation_of[row, column])
                # Turned the other way where the roles are exchanged: quarter turns change places, the rest are
                # their own inverses.
                found[(i, j) if i < j else (j, i)] = orientation if i < j else _INVERSE[orientation]
    for orientation in range(8):
        pairs = sorted(pair for pair, value in found.items() if value == orientation)
        if pairs:
            first, second = np.array(pairs, dtype=np.int64).T
            yield first, second, orientation


_INVERSE = (0, 1, 6, 3, 4, 5, 2, 7)
"""Orientation that undoes each of the eight."""


def _turned(images: NDArray[np.float32], orientation: int) -> NDArray[np.float32]:
    """(B, S, S) turned by orientation // 2 quarters, then, if `orientation` is odd, mirrored left to right."""
    quarters, mirrored = divmod(orientation, 2)
    turned = np.rot90(images, quarters, axes=(1, 2))
    return turned[:, :, ::-1] if mirrored else turned


def _unit(images: NDArray[np.float32]) -> NDArray[np.float32]:
    """(B, S, S) as rows (B, S * S) of mean 0 and length 1, so that products are correlations; 0 where constant."""
    rows: NDArray[np.float32] = images.reshape(len(images), images.shape[1] * images.shape[2])
    rows = rows - rows.mean(axis=1, keepdims=True)
    rows /= np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-3)
    return rows


def _similarity(a: NDArray[np.float32], b: NDArray[np.float32]) -> NDArray[np.float32]:
    """Correlation (M,) of details `a` and `b` (M, 64, 64): of the whole or of the middle, whichever is lower.

    `b` is first shifted to where it fits `a` best (at most 8 pixels), then each 16 x 16 block of `a` may look for its
    counterpart up to 2 pixels away. Blocks weigh by their structure.
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
    """`b` shifted to fit `a`, with a margin of 2 pixels on each side (M, 68, 68), and the correlation there (M,)."""
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
    """(M, 64, 64) -> (M, 4, 4)."""
    n = _SIDE // _BLOCK
    sums: NDArray[np.float32] = images.reshape(len(images), n, _BLOCK, n, _BLOCK).sum(axis=(2, 4))
    return sums


def _weighted_mean(values: NDArray[np.float32], weights: NDArray[np.float32]) -> NDArray[np.float32]:
    mean: NDArray[np.float32] = (values * weights).sum(axis=(1, 2)) / np.maximum(weights.sum(axis=(1, 2)), 1e-3)
    return mean
