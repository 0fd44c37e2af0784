"""The rule that says which pixels of a mask file are lesion, whatever its format. No torch.

A mask has one or two distinct pixel values. Of two the lesion is

- the larger one, of gray values and of indices into a palette (the palette's colours and transparency play no part);
- the coloured one, of a gray (black, white) and a colour;
- the more opaque one, where transparency differs and the colours do not contradict it.

A mask of one value is what that value is in the other masks of the dataset. If they do not have it, it is empty when
the value is 0, black, or fully transparent, and full otherwise. Everything else is an error.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hpsearch.data.headers import Header

N_SHOWN = 4
"""Values that an error about too many names."""


class MaskError(Exception):
    """A mask without a clear meaning, with the kind of problem."""

    def __init__(self, kind: str, text: str) -> None:
        super().__init__(text)
        self.kind = kind


@dataclass(frozen=True)
class MaskValue:
    """The value of a pixel of a mask. As text it is `255`, `index 1`, `#ff0000`, `#ff0000 with alpha 255`."""

    samples: tuple[int, ...]
    """One (gray or an index) or three."""
    alpha: int | None
    """None where the file has no transparency."""
    palette: bool
    n_digits: int
    """Hexadecimal digits of a sample."""

    @classmethod
    def of(cls, pixel: tuple[int, ...], header: Header) -> MaskValue:
        """The value of one pixel's samples as they were decoded."""
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
    def is_nothing(self) -> bool:
        """Whether it is 0, black, or fully transparent."""
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
    """Where samples (C, H, W), 1 to 4 channels of a mask file as they were decoded, are lesion: (H, W).

    Also gives the mask's values as text: background and lesion, or the only one. `background` and `lesion` are what
    values mean in the other masks of the dataset. Raises MaskError.
    """
    first = _equal(samples, 0)
    at = int(first.argmin())
    one = _value(samples, 0, header)
    if first.flat[at]:
        if str(one) in lesion and str(one) in background:
            text = f"has the value {one} only, which is lesion in as many masks of the dataset as it is background in"
            raise MaskError("masks disagree", f"{text}: save all masks with the same two values")
        if str(one) in lesion or (str(one) not in background and not one.is_nothing):
            return first, (str(one),)
        return np.zeros_like(first), (str(one),)
    other = _value(samples, at, header)
    second = _equal(samples, at)
    if np.count_nonzero(first) + np.count_nonzero(second) != first.size:
        raise MaskError("mask of many values", _many(samples, first | second, header))
    lesion_value = _lesion_of(one, other)
    background_value = other if lesion_value is one else one
    if str(background_value) in lesion or str(lesion_value) in background:
        value, here, there = (
            (lesion_value, "lesion", "background")
            if str(lesion_value) in background
            else (background_value, "background", "lesion")
        )
        raise MaskError(
            "masks disagree",
            f"has the values {background_value} and {lesion_value}, of which {value} would be {here}; in at least as "
            f"many other masks of the dataset {value} is {there}: save all masks with the same two values",
        )
    return first if lesion_value is one else second, (str(background_value), str(lesion_value))


def _lesion_of(one: MaskValue, other: MaskValue) -> MaskValue:
    """Which of two values is lesion."""
    by_alpha = by_color = None
    if one.alpha != other.alpha:
        by_alpha = max(one, other, key=lambda value: value.alpha or 0)
    if one.samples != other.samples:
        if one.is_gray and other.is_gray:
            by_color = max(one, other, key=lambda value: value.samples)
        elif one.is_gray or other.is_gray:
            by_color = other if one.is_gray else one
    if by_alpha is not None and by_color is not None and by_alpha is not by_color:
        raise MaskError(
            "ambiguous mask",
            f"has the values {one} and {other}: by its transparency {by_alpha} would be lesion, by its colours "
            f"{by_color}. Save it as gray PNG, 0 and 255",
        )
    lesion = by_color or by_alpha
    if lesion is None:
        raise MaskError(
            "ambiguous mask",
            f"has the colours {one} and {other}, and nothing says which of them is lesion: one must be black, white "
            "or gray. Save it as gray PNG, 0 and 255",
        )
    return lesion


def _equal(samples: NDArray[Any], at: int) -> NDArray[np.bool_]:
    """Where all channels are as in pixel number `at`."""
    channels = samples.reshape(len(samples), -1)
    result: NDArray[np.bool_] = samples[0] == channels[0, at]
    for number in range(1, len(samples)):
        result &= samples[number] == channels[number, at]
    return result


def _value(samples: NDArray[Any], at: int, header: Header) -> MaskValue:
    return MaskValue.of(tuple(int(sample) for sample in samples.reshape(len(samples), -1)[:, at]), header)


def _many(samples: NDArray[Any], known: NDArray[np.bool_], header: Header) -> str:
    if len(samples) == 1:
        pixels = sorted({int(value) for row in samples[0] for value in np.unique(row)})
        n = str(len(pixels))
        values = [MaskValue.of((pixel,), header) for pixel in pixels[:N_SHOWN]]
        is_all = len(pixels) <= N_SHOWN
    else:
        n, is_all = "more than 2", False
        values = [_value(samples, at, header) for at in (0, int((~_equal(samples, 0)).argmax()))]
        values.append(_value(samples, int((~known).argmax()), header))
    shown = ", ".join([*map(str, values), *([] if is_all else ["..."])])
    return (
        f"has {n} values ({shown}), a mask has two: save it as PNG, not as JPEG, and without smooth borders or half "
        "transparent pixels"
    )
