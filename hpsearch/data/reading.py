"""The decisions about how files become pixels, made once per dataset and applied wherever an image is read.

They are made from the pool (training and validation images; survey.py) and kept in the cache's index and in the
weights file, so that training, `final`, `predict`, the served model and `data augment` all see the same pixels.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal, Self

FULL_SCALES = (255, 1023, 4095, 16383, 65535)
"""Largest values of 8, 10, 12, 14 and 16 bits."""


@dataclass(frozen=True)
class Reading:
    """How the files of one dataset become pixels. The default is that of a dataset without anything special."""

    exif: Literal["apply", "ignore"] = "apply"
    """Whether images and masks are turned upright by their EXIF orientation, or read as they are stored."""
    exif_reason: str = "by default"
    """Why so, for messages."""
    n_oriented: int = 0
    """Pairs of the pool of which a file has an orientation."""
    max_value: int = 0
    """The value that becomes 255 in images of more than 8 bits a channel; 0: the pool has no such images."""
    background: tuple[str, ...] = ()
    """Values (`MaskValue`) that are background in the masks of the pool that have two."""
    lesion: tuple[str, ...] = ()
    """Values that are lesion in them."""

    @property
    def turns(self) -> bool:
        """Whether orientations are applied."""
        return self.exif == "apply"

    def key(self) -> list[Any]:
        """What a cache key depends on: empty for a dataset without anything special, whose key is that of 0.1."""
        usual_masks = self.background in ((), ("0",)) and self.lesion in ((), ("1",), ("255",))
        if self.turns and not self.n_oriented and not self.max_value and usual_masks:
            return []
        return [self.exif, self.n_oriented > 0, self.max_value, self.background, self.lesion]

    def for_images(self) -> dict[str, Any]:
        """The part that concerns images, as plain types: what a weights file keeps."""
        return {"exif": self.exif, "max_value": self.max_value}

    def to_table(self) -> dict[str, Any]:
        """All of it, as plain types."""
        return asdict(self)

    @classmethod
    def from_table(cls, table: Mapping[str, Any]) -> Self:
        """What `to_table` or `for_images` gave."""
        lists = {name: tuple(table[name]) for name in ("background", "lesion") if name in table}
        return cls(**{**table, **lists})


PLAIN_READING = Reading()
READING_0_1 = Reading("ignore", max_value=FULL_SCALES[-1])
"""How version 0.1, whose weights files do not say, read an image."""


def full_scale(largest: int) -> int:
    """The smallest of FULL_SCALES that holds the value `largest`."""
    return next(scale for scale in FULL_SCALES if largest <= scale)
