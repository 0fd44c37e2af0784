"""Rules that turn image files into pixels, decided once per dataset.

survey.py decides them from the pool (training and validation images). The cache's index and the weights file keep
them, so that training, `final`, `predict`, the served model and `data augment` read the same pixels.
"""

from dataclasses import dataclass
from typing import Any, Literal

FULL_SCALES = (255, 1023, 4095, 16383, 65535)
"""Largest values of 8, 10, 12, 14 and 16 bits."""


@dataclass(frozen=True)
class Reading:
    """Rules for reading the files of one dataset. The defaults fit a dataset of plain 8-bit images."""

    exif: Literal["apply", "ignore"] = "apply"
    """Whether images and masks are turned upright by their EXIF orientation."""
    exif_reason: str = "by default"
    """Reason for `exif`, for messages."""
    n_oriented: int = 0
    """Pairs of the pool with an EXIF orientation."""
    max_value: int = 0
    """Value that becomes 255 in images of more than 8 bits per channel. 0 if the pool has no such images."""
    background: tuple[str, ...] = ()
    """Values (`MaskValue`) that mean background in the masks of the pool that have two values."""
    lesion: tuple[str, ...] = ()
    """Values that mean lesion in these masks."""

    @property
    def turns(self) -> bool:
        """Whether EXIF orientations are applied."""
        return self.exif == "apply"

    def key(self) -> list[Any]:
        """Return what a cache key depends on. It is empty for plain datasets, whose keys are those of version 0.1."""
        usual_masks = self.background in ((), ("0",)) and self.lesion in ((), ("1",), ("255",))
        if self.turns and not self.n_oriented and not self.max_value and usual_masks:
            return []
        return [self.exif, self.n_oriented > 0, self.max_value, self.background, self.lesion]

    def for_images(self) -> dict[str, Any]:
        """Return the rules for images as plain types, as weights files keep them."""
        return {"exif": self.exif, "max_value": self.max_value}


PLAIN_READING = Reading()
READING_0_1 = Reading("ignore", max_value=FULL_SCALES[-1])
"""Rules of version 0.1, whose weights files do not name them."""
