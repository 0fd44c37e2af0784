"""Decide which pixels of a decoded mask file are lesion. Imports no torch.

A mask has one or two distinct pixel values. With two values the lesion is

- the larger one of two gray values or palette indices (colours and transparency of the palette are ignored);
- the coloured one of a gray value (black and white included) and a colour;
- the more opaque one where transparency differs and the colours do not contradict it.

A mask of one value means what that value means in the other masks of the dataset. If no other mask has the value, the
mask is empty for 0, black and full transparency, and full otherwise. All other masks are errors.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hpsearch.data.decode_pool import DecodeError
from hpsearch.data.formats import Header

N_SHOWN = 4
"""Values that a message lists at most."""


@dataclass(frozen=True)
class MaskValue:
    """The value of a pixel of a mask. As text it is `255`, `index 1`, `#ff0000` or `#ff0000 with alpha 255`."""

    samples: tuple[int, ...]
    """One sample (gray or palette index) or three."""
    alpha: int | None
    """None where the file has no transparency."""
    palette: bool
    n_digits: int
    """Hexadecimal digits per sample."""

    @classmethod
    def of(cls, pixel: tuple[int, ...], header: Header) -> MaskValue:
        """Return the value of a pixel with these decoded samples."""
        if header.depth < 8 and not header.palette:
            # Decoders stretch 1, 2 and 4 bits to 0..255.
            pixel = tuple(sample * (2**header.depth - 1) // 255 for sample in pixel)
        samples, alpha = (pixel[:-1], pixel[-1]) if len(pixel) in (2, 4) else (pixel, None)
        if header.transparent is not None:
            alpha = 0 if samples == header.transparent else 2**header.depth - 1
        return cls(samples, alpha, header.palette, 4 if header.depth > 8 else 2)

    @property
    def is_gray(self) -> bool:
        return len(set(self.samples)) == 1

    @property
    def is_background_alone(self) -> bool:
        """Whether a mask of this value only is empty: 0, black or fully transparent."""
        return self.alpha == 0 or not any(self.samples)

    def __str__(self) -> str:
        if self.palette:
            return f"index {self.samples[0]}"
        hexadecimal = "".join(f"{sample:0{self.n_digits}x}" for sample in self.samples)
        text = str(self.samples[0]) if self.is_gray else f"#{hexadecimal}"
        return text if self.alpha is None else f"{text} with alpha {self.alpha}"


def find_lesion(
    samples: NDArray[Any], header: Header, *, background: Collection[str] = (), lesion: Collection[str] = ()
) -> tuple[NDArray[np.bool_], tuple[str, ...]]:
    """Return where decoded samples (C, H, W) of 1 to 4 channels are lesion, (H, W), and the mask's values as text.

    The values are background and lesion, or the only one. `background` and `lesion` are the meanings of values in
    the other masks of the dataset. Raises DecodeError, with a text that continues the file's name.
    """
    first = _equal(samples, 0)
    at = int(first.argmin())
    one = _value(samples, 0, header)
    if first.flat[at]:
        return _mask_of_one_value(first, one, background, lesion)
    other = _value(samples, at, header)
    second = _equal(samples, at)
    if np.count_nonzero(first) + np.count_nonzero(second) != first.size:
        raise DecodeError("mask of many values", _too_many_values(samples, first | second, header))
    lesion_value = _lesion_of(one, other)
    background_value = other if lesion_value is one else one
    for value, here, there, others in (
        (lesion_value, "lesion", "background", background),
        (background_value, "background", "lesion", lesion),
    ):
        if str(value) in others:
            raise DecodeError(
                "masks disagree",
                f"has the values {background_value} and {lesion_value}, of which {value} would be {here}; in at "
                f"least as many other masks of the dataset {value} is {there}: save all masks with the same two "
                "values",
            )
    return first if lesion_value is one else second, (str(background_value), str(lesion_value))


def _mask_of_one_value(
    everywhere: NDArray[np.bool_], value: MaskValue, background: Collection[str], lesion: Collection[str]
) -> tuple[NDArray[np.bool_], tuple[str, ...]]:
    name = str(value)
    if name in lesion and name in background:
        raise DecodeError(
            "masks disagree",
            f"has the value {name} only, which is lesion in as many masks of the dataset as it is background in: "
            "save all masks with the same two values",
        )
    is_full = name in lesion or (name not in background and not value.is_background_alone)
    return everywhere if is_full else np.zeros_like(everywhere), (name,)


def _lesion_of(one: MaskValue, other: MaskValue) -> MaskValue:
    """Return the value of the two that is lesion."""
    by_alpha = by_color = None
    if one.alpha != other.alpha:
        by_alpha = max(one, other, key=lambda value: value.alpha or 0)
    if one.samples != other.samples:
        if one.is_gray and other.is_gray:
            by_color = max(one, other, key=lambda value: value.samples)
        elif one.is_gray or other.is_gray:
            by_color = other if one.is_gray else one
    if by_alpha is not None and by_color is not None and by_alpha is not by_color:
        raise DecodeError(
            "ambiguous mask",
            f"has the values {one} and {other}: by its transparency {by_alpha} would be lesion, by its colours "
            f"{by_color}. Save it as gray PNG, 0 and 255",
        )
    if lesion := by_color or by_alpha:
        return lesion
    raise DecodeError(
        "ambiguous mask",
        f"has the colours {one} and {other}, and nothing says which of them is lesion: one must be black, white or "
        "gray. Save it as gray PNG, 0 and 255",
    )


def _equal(samples: NDArray[Any], at: int) -> NDArray[np.bool_]:
    """Return where all channels equal those of pixel number `at`."""
    pixel = samples.reshape(len(samples), -1)[:, at]
    result: NDArray[np.bool_] = samples[0] == pixel[0]
    for channel, sample in zip(samples[1:], pixel[1:], strict=True):
        result &= channel == sample
    return result


def _value(samples: NDArray[Any], at: int, header: Header) -> MaskValue:
    return MaskValue.of(tuple(samples.reshape(len(samples), -1)[:, at].tolist()), header)


def _too_many_values(samples: NDArray[Any], known: NDArray[np.bool_], header: Header) -> str:
    if len(samples) == 1:
        pixels = sorted({int(value) for row in samples[0] for value in np.unique(row)})
        n, is_all = str(len(pixels)), len(pixels) <= N_SHOWN
        values = [MaskValue.of((pixel,), header) for pixel in pixels[:N_SHOWN]]
    else:
        n, is_all = "more than 2", False
        places = (0, int((~_equal(samples, 0)).argmax()), int((~known).argmax()))
        values = [_value(samples, at, header) for at in places]
    shown = ", ".join([*map(str, values), *([] if is_all else ["..."])])
    return (
        f"has {n} values ({shown}), a mask has two: save it as PNG, not as JPEG, and without smooth borders or half "
        "transparent pixels"
    )
