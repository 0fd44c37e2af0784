"""Determine which pixels of a decoded mask are lesion. This module does not import torch.

A mask must have one or two distinct pixel values. If it has two values, the lesion is

- the larger value, if both are gray values or palette indices (the palette's colours and transparency are ignored);
- the colour, if one value is gray (including black and white) and the other is a colour;
- the more opaque value, if their transparency differs and the rules above do not contradict this.

If a mask has a single value, its meaning is taken from the two-valued masks of the dataset. If none of them has this
value, 0, black and fully transparent mean an empty mask, and any other value means a full mask. All other masks are
errors.
"""

from dataclasses import dataclass
from functools import reduce
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from hpsearch.data.decode_pool import DecodeError
from hpsearch.data.formats import Header
from hpsearch.data.reading import Reading


@dataclass(frozen=True)
class MaskValue:
    """Pixel value of a mask."""

    samples: tuple[int, ...]
    """One number (gray value or palette index) or three (R, G, B)."""
    alpha: int | None
    """Opacity; 0 is fully transparent. None if the file has no transparency."""
    text: str
    """Value as text, such as `255`, `index 1`, `#ff0000` or `#ff0000 with alpha 255`."""

    @classmethod
    def of(cls, pixel: tuple[int, ...], header: Header) -> Self:
        """Return the value of a pixel, given its decoded channels and the header of the file."""
        if header.depth < 8 and not header.palette:
            # Decoders scale values of 1, 2 and 4 bits to 0..255.
            pixel = tuple(sample * (2**header.depth - 1) // 255 for sample in pixel)
        samples, alpha = (pixel[:-1], pixel[-1]) if len(pixel) in (2, 4) else (pixel, None)
        if header.transparent is not None:
            alpha = 0 if samples == header.transparent else 2**header.depth - 1
        text = f"index {samples[0]}" if header.palette else str(samples[0])
        if len(set(samples)) > 1:
            text = "#" + "".join(f"{sample:0{4 if header.depth > 8 else 2}x}" for sample in samples)
        return cls(samples, alpha, text if alpha is None else f"{text} with alpha {alpha}")

    @property
    def is_gray(self) -> bool:
        return len(set(self.samples)) == 1


def find_lesion(samples: NDArray[Any], header: Header, reading: Reading) -> tuple[NDArray[np.bool_], tuple[str, ...]]:
    """Return the lesion pixels of a decoded mask as (H, W) bool, and the values of the mask as text.

    `samples` (C, H, W) is the decoded mask, with 1 to 4 channels. The returned values are background and lesion, or a
    single value if all pixels are equal. `reading` says which values mean background and lesion in the masks of the
    dataset. Raises DecodeError if the mask is ambiguous or contradicts `reading`. The caller must put the file's name
    before the message.
    """

    def pixels_like(at: int) -> tuple[MaskValue, NDArray[np.bool_]]:
        """Return the value of the pixel at the flat index `at`, and which pixels (H, W) have this value."""
        pixel = samples.reshape(len(samples), -1)[:, at]
        return MaskValue.of(tuple(pixel.tolist()), header), reduce(np.logical_and, samples == pixel[:, None, None])

    one, first = pixels_like(0)
    at = int(first.argmin())
    if first.flat[at]:
        if one.text in reading.lesion and one.text in reading.background:
            raise _disagreement(f"has only the value {one.text}", one.text, "lesion as well as background")
        # If no two-valued mask has this value, then 0, black and fully transparent mean background.
        is_nonzero = one.alpha != 0 and any(one.samples)
        is_full = one.text in reading.lesion or (one.text not in reading.background and is_nonzero)
        return first if is_full else ~first, (one.text,)
    other, second = pixels_like(at)
    known = first | second
    if not known.all():
        third, _ = pixels_like(int(known.argmin()))
        raise DecodeError(
            "mask of many values",
            f"has more than two values ({one.text}, {other.text}, {third.text}): save it as PNG with two values, "
            "without smooth borders or partly transparent pixels, or check whether --images and --masks are swapped",
        )
    lesion_value = _lesion_of(one, other)
    is_lesion, clear = (first, other.text) if lesion_value is one else (second, one.text)
    values = f"has background {clear} and lesion {lesion_value.text}"
    if clear in reading.lesion:
        raise _disagreement(values, clear, "lesion")
    if lesion_value.text in reading.background:
        raise _disagreement(values, lesion_value.text, "background")
    return is_lesion, (clear, lesion_value.text)


def _disagreement(values: str, value: str, meaning: str) -> DecodeError:
    return DecodeError(
        "masks disagree",
        f"{values}, but in at least as many other masks of the dataset {value} is {meaning}: save all masks with the "
        "same two values",
    )


def _lesion_of(one: MaskValue, other: MaskValue) -> MaskValue:
    """Return the value that marks the lesion, judging by transparency and colour. Raise DecodeError if unclear."""
    lesion = set()
    if one.alpha != other.alpha:
        lesion.add(max(one, other, key=lambda value: value.alpha or 0))
    if one.samples != other.samples:
        if one.is_gray and other.is_gray:
            lesion.add(max(one, other, key=lambda value: value.samples))
        elif one.is_gray or other.is_gray:
            lesion.add(other if one.is_gray else one)
    if len(lesion) != 1:
        raise DecodeError(
            "ambiguous mask",
            f"has the values {one.text} and {other.text}, and colours and transparency do not agree which of them is "
            "lesion: save it as gray PNG, 0 and 255",
        )
    return lesion.pop()
