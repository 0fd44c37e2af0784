"""Decodes an image and its mask, checks them, and brings them to the cached size.

As a module (`python -m hpsearch.data.decode N`) it does so with N threads for the process that started it, see
decoding.py. Threads suffice: the decoders and the resize release Python's lock, and the libraries are loaded once.
"""

from __future__ import annotations

import hashlib
import json
import os
import queue
import re
import signal
import sys
import threading
import zlib
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import interpolate
from torchvision.io import ImageReadMode, decode_jpeg, decode_png

from hpsearch.data.decoding import Damage, Facts, Job, Pixels
from hpsearch.data.headers import MAX_PIXELS, Header, read_header
from hpsearch.errors import DatasetError
from hpsearch.user_files import file_fault

BYTES_IN_FLIGHT = 400 * 2**20
"""Decoded pixels that all threads hold together, unless a single image has more."""
HEAD_BYTES = 64 * 2**10
"""What is read of a file to learn its size."""
LONG_HEAD_BYTES = 16 * 2**20
"""What is read more where that was not enough."""
BAND_BYTES = 16 * 2**20
"""Pixels that are resized at once."""


class BadImageError(Exception):
    """A pair that cannot be used, with the kind of damage."""

    def __init__(self, kind: str, text: str) -> None:
        super().__init__(text)
        self.kind = kind


def read_image(path: Path) -> Tensor:
    """The image as RGB (3, H, W) uint8, as its pixels are stored: an EXIF orientation is passed over.

    DatasetError if it cannot be decoded.
    """
    try:
        header, _ = _header(path)
        return _decode_image(path, _content(path), header, turned=False)
    except BadImageError as error:
        raise DatasetError(str(error)) from error


def read_pair(image_path: Path, mask_path: Path) -> tuple[Tensor, Tensor]:
    """The image (3, H, W) uint8 and its mask (H, W) uint8 of 0 and 1, at their original size.

    An EXIF orientation that lays the image on its side is applied where only the turned image has the mask's size:
    the mask was then drawn on the upright image. DatasetError, naming the file, for damage.
    """
    try:
        pair = open_pair(image_path, mask_path)
        image = _decode_image(image_path, _content(image_path), pair.image, turned=pair.turned)
        return image, _decode_mask(mask_path, _content(mask_path), pair.mask)
    except BadImageError as error:
        raise DatasetError(str(error)) from error


def resize(image: Tensor, height: int, width: int) -> Tensor:
    """`image` (C, H, W) uint8 at (C, height, width): bilinear, antialiased, rounded to uint8.

    First along the rows, a band of them at a time, then along the columns: the working memory of torch's own resize
    is that of a band and not of the image.
    """
    n_channels, from_height, from_width = image.shape
    if from_width != width:
        squeezed = torch.empty((n_channels, from_height, width), dtype=torch.uint8)
        n_rows = max(1, BAND_BYTES // (4 * max(from_width, width)))
        for top in range(0, from_height, n_rows):
            band = image[:, top : top + n_rows]
            squeezed[:, top : top + n_rows] = interpolate(
                band[None], size=[band.shape[1], width], mode="bilinear", antialias=True
            )[0]
        image = squeezed
    if from_height != height:
        image = interpolate(image[None], size=[height, width], mode="bilinear", antialias=True)[0]
    return image


def resize_mask(mask: Tensor, height: int, width: int) -> Tensor:
    """`mask` (H, W) of 0 and 1 at (height, width), 1 where at least half of what a pixel averages was 1.

    The average is the same antialiased one as the image's, over the same grid, so the border stays where it is in the
    image, without the steps of up to half an original pixel that the nearest neighbour makes.
    """
    return (resize(mask[None] * 255, height, width)[0] >= 128).to(torch.uint8)


def crop(pixels: Tensor, top: int, left: int, height: int, width: int) -> Tensor:
    """The window (..., height, width) of `pixels` (..., H, W); outside of it the image goes on reflected."""
    rows = _reflected(top, height, pixels.shape[-2])
    columns = _reflected(left, width, pixels.shape[-1])
    return pixels.index_select(-2, rows).index_select(-1, columns)


def crop_corner(size: tuple[int, int], wanted: tuple[int, int], rng: np.random.Generator | None) -> tuple[int, int]:
    """Top and left of a crop of `wanted` (height, width) from `size`: drawn from `rng`, or in the centre without one.

    Where the image is smaller it lies in the middle of the crop, so a corner can be negative.
    """
    spare = [have - want for have, want in zip(size, wanted, strict=True)]
    corner = [n // 2 if rng is None or n <= 0 else int(rng.integers(n + 1)) for n in spare]
    return corner[0], corner[1]


def open_pair(image_path: Path, mask_path: Path) -> OpenPair:
    """What the two headers say, checked before anything is decoded. BadImageError if the pair cannot be used."""
    image, image_bytes = _header(image_path)
    mask, mask_bytes = _header(mask_path)
    size = mask.height, mask.width
    turned = size != (image.height, image.width)
    if turned and size != image.turned_size:
        raise BadImageError(
            "sizes differ", f"{mask_path} is {mask.height}x{mask.width}, its image is {image.height}x{image.width}"
        )
    return OpenPair(image_path, mask_path, image, mask, turned, max(image_bytes, mask_bytes))


@dataclass(frozen=True)
class OpenPair:
    """A pair whose headers fit together."""

    image_path: Path
    mask_path: Path
    image: Header
    mask: Header
    turned: bool
    """Whether the mask belongs to the image with its EXIF orientation applied."""
    file_bytes: int
    """Length of the larger file."""

    def working_bytes(self, job: Job) -> int:
        """Memory that `decode_job` takes, about: one file, its pixels, those at the new width, and the views."""
        pixels = max(self.image.decode_bytes(3), self.mask.decode_bytes(3))
        squeezed = 3 * max(self.mask.height, self.mask.width) * job.width
        return self.file_bytes + pixels + squeezed + 2 * len(job.views) * job.height * job.width * 4


def decode_job(pair: OpenPair, job: Job) -> tuple[Facts, list[Pixels]]:
    """What `job` asks for. BadImageError if the pair cannot be used."""
    data = _content(pair.image_path)
    image_sha256 = hashlib.sha256(data).hexdigest() if job.measure else ""
    image = _decode_image(pair.image_path, data, pair.image, turned=pair.turned)
    images = _views(image, job, is_mask=False) if job.send else []
    # The mask is decoded when the image's pixels are gone.
    del data, image
    data = _content(pair.mask_path)
    mask_sha256 = hashlib.sha256(data).hexdigest() if job.measure else ""
    mask = _decode_mask(pair.mask_path, data, pair.mask)
    masks = _views(mask, job, is_mask=True)
    foreground = int(mask.count_nonzero())
    view_foreground = int(masks[0].count_nonzero()) if masks else -1
    del data, mask
    pixels = [
        (np.ascontiguousarray(image.permute(1, 2, 0).numpy()), np.ascontiguousarray(mask.numpy()))
        for image, mask in zip(images, masks if job.send else [], strict=True)
    ]
    crc = 0
    for arrays in pixels:
        for array in arrays:
            crc = zlib.crc32(array.data, crc)
    facts = Facts(
        height=pair.mask.height,
        width=pair.mask.width,
        image_sha256=image_sha256,
        mask_sha256=mask_sha256,
        foreground=foreground,
        orientation=1 if pair.turned else pair.image.orientation,
        moments=_moments(pixels[0][0]) if pixels and job.measure else (),
        crc=crc,
        view_foreground=view_foreground,
    )
    return facts, pixels


class MemoryGate:
    """Lets threads in as long as what they hold together stays within a limit; one alone always gets in."""

    def __init__(self, limit_bytes: int) -> None:
        self.limit_bytes = limit_bytes
        self._held_bytes = 0
        self._changed = threading.Condition()

    def admitted(self, n_bytes: int) -> _Admission:
        """A context within which `n_bytes` count as held."""
        return _Admission(self, n_bytes)

    def change(self, n_bytes: int) -> None:
        """Hold `n_bytes` more, once there is room, or release them if negative."""
        with self._changed:
            if n_bytes > 0:
                self._changed.wait_for(lambda: not self._held_bytes or self._held_bytes + n_bytes <= self.limit_bytes)
            self._held_bytes += n_bytes
            self._changed.notify_all()


class _Admission:
    def __init__(self, gate: MemoryGate, n_bytes: int) -> None:
        self._gate = gate
        self._n_bytes = n_bytes

    def __enter__(self) -> None:
        self._gate.change(self._n_bytes)

    def __exit__(self, *_: object) -> None:
        self._gate.change(-self._n_bytes)


def _header(path: Path) -> tuple[Header, int]:
    """Header and length of a file whose decoding is affordable."""
    try:
        with path.open("rb") as file:
            length = os.fstat(file.fileno()).st_size
            head = file.read(HEAD_BYTES)
            try:
                header = read_header(head)
            except ValueError:
                # Long EXIF and colour profiles can come before the size.
                header = read_header(head + file.read(LONG_HEAD_BYTES))
    except OSError as error:
        text = file_fault(path) or f"{path} cannot be read: {error.strerror or error}"
        raise BadImageError("unreadable file", text) from error
    except ValueError as error:
        raise BadImageError("undecodable file", f"{path} cannot be decoded: {error}") from error
    if header.height * header.width > MAX_PIXELS:
        raise BadImageError(
            "absurd size",
            f"{path} says it is {header.height}x{header.width} pixels: more than {MAX_PIXELS // 10**6} million are "
            "taken for damage and not decoded",
        )
    return header, length


def _content(path: Path) -> bytearray:
    """The whole file, in memory that torch may call its own."""
    try:
        with path.open("rb") as file:
            data = bytearray(os.fstat(file.fileno()).st_size)
            del data[file.readinto(data) :]
    except OSError as error:
        raise BadImageError("unreadable file", f"{path} cannot be read: {error.strerror or error}") from error
    return data


def _decode_image(path: Path, data: bytearray, header: Header, *, turned: bool) -> Tensor:
    """RGB (3, H, W) uint8: grey is repeated, CMYK converted, transparency dropped, 16 bits cut to 8."""
    image = _decode(path, data, header, ImageReadMode.RGB, turned=turned)
    if image.dtype == torch.uint16:
        deep = image.numpy()
        # In place: `Header.decode_bytes` counts on no second copy of all 16 bits.
        deep >>= 8
        image = torch.from_numpy(deep.astype(np.uint8))
    return image


def _decode_mask(path: Path, data: bytearray, header: Header) -> Tensor:
    """(H, W) uint8 of 0 and 1: of two values the larger is 1; a single one is 1 unless it is 0."""
    mask = _decode(path, data, header, ImageReadMode.GRAY, turned=False)[0].numpy()
    low, high = mask.min(), mask.max()
    n_other = mask.size - np.count_nonzero(mask == low) - (np.count_nonzero(mask == high) if low < high else 0)
    if n_other:
        values = sorted({int(value) for row in mask for value in np.unique(row)})
        shown = ", ".join([*map(str, values[:4]), *(["..."] if len(values) > 4 else [])])
        raise BadImageError(
            "mask of many values",
            f"{path} has {len(values)} values ({shown}), a mask has two: save it as PNG, not as JPEG, and without "
            "smooth borders",
        )
    return torch.from_numpy((mask == high).view(np.uint8) if high > 0 else np.zeros(mask.shape, np.uint8))


def _decode(path: Path, data: bytearray, header: Header, mode: ImageReadMode, *, turned: bool) -> Tensor:
    try:
        encoded = torch.frombuffer(data, dtype=torch.uint8)
        pixels: Tensor
        if header.format == "jpeg":
            pixels = decode_jpeg(encoded, mode, apply_exif_orientation=turned)
        else:
            pixels = decode_png(encoded, mode)
    except RuntimeError as error:
        # The decoders say first where in their own sources they are.
        reason = re.sub(r"^\w+, \S+:\d+, ", "", str(error).splitlines()[0])
        if "allocate" in reason:
            # Too little memory is no damage of the image.
            raise
        raise BadImageError("undecodable file", f"{path} cannot be decoded: {reason}") from error
    size = header.turned_size if turned else (header.height, header.width)
    if pixels.shape[1:] != size:
        raise BadImageError("undecodable file", f"{path} changed while it was read")
    return pixels


def _views(pixels: Tensor, job: Job, *, is_mask: bool) -> list[Tensor]:
    wanted = (job.height, job.width)
    size = (pixels.shape[-2], pixels.shape[-1])
    made = []
    for view in job.views:
        if view == "resize":
            made.append(resize_mask(pixels, *wanted) if is_mask else resize(pixels, *wanted))
            continue
        # Made anew for image and mask, so that both get the same crop.
        seed = int.from_bytes(hashlib.sha256(job.crop_seed.encode()).digest()[:8])
        rng = np.random.default_rng(seed) if view == "random crop" else None
        made.append(crop(pixels, *crop_corner(size, wanted, rng), *wanted))
    return made


def _reflected(start: int, n: int, length: int) -> Tensor:
    """Indices into an axis of `length` for `n` positions from `start`; beyond both ends it is mirrored."""
    positions = torch.arange(start, start + n)
    if length == 1:
        return torch.zeros_like(positions)
    period = 2 * (length - 1)
    positions = positions.remainder(period)
    return torch.minimum(positions, period - positions)


def _moments(image: NDArray[np.uint8]) -> tuple[int, ...]:
    """Sums over the pixels of (H, W, 3): R, G, B, RR, GG, BB, RG, RB, GB; exact, as float64 is below 2^53."""
    sums = np.zeros(3)
    products = np.zeros((3, 3))
    for row in np.array_split(image.reshape(-1, 3), max(1, image.size // 2**18)):
        values = row.astype(np.float64)
        sums += values.sum(0)
        products += values.T @ values
    return tuple(int(n) for n in (*sums, *products.diagonal(), products[0, 1], products[0, 2], products[1, 2]))


def _serve(n_threads: int) -> None:
    """Answer the jobs on standard input until it ends."""
    # Ctrl-C reaches the whole process group; the parent decides what becomes of this process.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(1)
    # What a library prints must not come between the answers.
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    jobs: queue.SimpleQueue[dict[str, Any] | None] = queue.SimpleQueue()
    gate, lock = MemoryGate(BYTES_IN_FLIGHT), threading.Lock()
    threads = [threading.Thread(target=_work, args=(jobs, answers, gate, lock)) for _ in range(n_threads)]
    for thread in threads:
        thread.start()
    for line in sys.stdin.buffer:
        jobs.put(json.loads(line))
    for _ in threads:
        jobs.put(None)
    for thread in threads:
        thread.join()


def _work(
    jobs: queue.SimpleQueue[dict[str, Any] | None], answers: IO[bytes], gate: MemoryGate, lock: threading.Lock
) -> None:
    try:
        while (message := jobs.get()) is not None:
            number = message.pop("number")
            _answer(answers, lock, {"number": number, "begun": True}, [])
            job = Job(**message)
            try:
                pair = open_pair(Path(job.image), Path(job.mask))
                # Until the answer is out: a parent that is slow to take it shall not let answers pile up here.
                with gate.admitted(pair.working_bytes(job)):
                    facts, pixels = decode_job(pair, job)
                    _answer(answers, lock, {"number": number, "facts": asdict(facts)}, pixels)
                    del pixels
            except BadImageError as error:
                _answer(answers, lock, {"number": number, "damage": asdict(Damage(error.kind, str(error)))}, [])
    except BrokenPipeError:
        # Whoever asked is gone.
        os._exit(1)
    except BaseException:
        # A thread that dies alone would leave the parent waiting for ever.
        sys.excepthook(*sys.exc_info())
        sys.stderr.flush()
        os._exit(70)


def _answer(answers: IO[bytes], lock: threading.Lock, answer: dict[str, Any], pixels: list[Pixels]) -> None:
    with lock:
        answers.write(json.dumps(answer).encode() + b"\n")
        for arrays in pixels:
            for array in arrays:
                answers.write(array.data)
        answers.flush()


if __name__ == "__main__":
    _serve(int(sys.argv[1]))
