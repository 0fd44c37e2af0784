"""Define the rules for decoding the image and mask files of a dataset.

survey.py determines the rules for a dataset from its pool (training and validation images). The cache index, the
weights file and an augmented dataset store them, so that all later steps decode files in the same way.
"""

from dataclasses import dataclass
from typing import Any, Literal

FULL_SCALES = (255, 1023, 4095, 16383, 65535)
"""Largest values of images with 8, 10, 12, 14 and 16 bits per channel."""


@dataclass(frozen=True)
class Reading:
    """Rules for decoding the files of a dataset. The defaults suit 8-bit images without EXIF orientation."""

    exif: Literal["apply", "ignore"] = "apply"
    """Whether the EXIF orientation of images and masks is applied."""
    exif_reason: str = "by default"
    """Reason for the value of `exif`, used in messages."""
    n_oriented: int = 0
    """Number of pairs in the pool whose image or mask has an EXIF orientation other than upright."""
    max_value: int = 0
    """Value that is scaled to 255 in images with more than 8 bits per channel. 0 if the pool has no such images."""
    background: tuple[str, ...] = ()
    """Values (`MaskValue.text`) that mean background, by a majority vote of the pool's masks with two values."""
    lesion: tuple[str, ...] = ()
    """Values (`MaskValue.text`) that mean lesion, by a majority vote of the pool's masks with two values."""

    @property
    def turns(self) -> bool:
        """Whether EXIF orientations are applied."""
        return self.exif == "apply"

    def key(self) -> list[Any]:
        """Return the rules that are part of the cache key.

        The list is empty if images have 8 bits and no EXIF orientation, and masks have the values 0 and 1 or 0 and
        255. The cache keys of such datasets are therefore the same as in version 0.1.
        """
        usual_masks = self.background in ((), ("0",)) and self.lesion in ((), ("1",), ("255",))
        if self.turns and not self.n_oriented and not self.max_value and usual_masks:
            return []
        return [self.exif, self.n_oriented > 0, self.max_value, self.background, self.lesion]

    def for_images(self) -> dict[str, Any]:
        """Return the rules for images as plain types, as stored in weights files."""
        return {"exif": self.exif, "max_value": self.max_value}


PLAIN_READING = Reading()
READING_0_1 = Reading("ignore", max_value=FULL_SCALES[-1])
"""Rules of version 0.1. They apply to the weights files of version 0.1, which contain no rules."""
