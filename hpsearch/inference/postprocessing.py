"""Select the post-processing of a prediction: threshold, test-time augmentation, cleaning of the mask.

Every decision uses out-of-fold predictions only, and an option is used only if its gain exceeds the noise. Imports no
torch.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from hpsearch.errors import RecordError
from hpsearch.stats.intervals import Paired, paired_difference
from hpsearch.typed_json import from_json

Floats = NDArray[np.float64]
Mask = NDArray[np.bool_]

THRESHOLDS = tuple(round(0.1 + 0.05 * step, 2) for step in range(17))
"""Candidates for the probability above which a pixel is lesion: 0.1 to 0.9."""
N_PARTS = 5
"""Number of parts of the images that select the threshold for each other if there is only one fold."""


@dataclass(frozen=True, kw_only=True)
class Postprocessing:
    """How probabilities become a mask. Every trial is scored with the defaults."""

    threshold: float = 0.5
    """Probability above which a pixel is lesion."""
    flips: bool = False
    """Whether the logits are averaged over the image and its three mirror images (test-time augmentation)."""
    clean: bool = False
    """Whether only the largest component is kept, with its holes filled."""
    ensemble: bool = False
    """Whether the ensemble of the fold networks predicts instead of the network that was trained on the whole
    pool."""


@dataclass(frozen=True)
class FoldNetwork:
    """The networks of one fold, which have not seen its held-out images."""

    weights: Path
    other: Path | None
    """A network of the same configuration with other seeds; None if there is none."""
    held_out: tuple[int, ...]
    """Indices of the images in the cache."""


@dataclass(frozen=True)
class Decision:
    """One decision, with the out-of-fold gain of the option."""

    name: str
    """The option: `flips`, `threshold`, `clean` or `ensemble`."""
    value: bool | float
    """The value of the option if it is used."""
    gain: Paired
    taken: bool

    @classmethod
    def make(cls, name: str, value: bool | float, gains: Floats, network_of: NDArray[np.int64]) -> Self:
        """Use the option if the lower end of the 95 % interval of its mean gain is above 0.

        gains: (n,), of the images. network_of: (n,), the network that predicted each image. The interval covers
        images and networks.
        """
        parts = [gains[network_of == network] for network in np.unique(network_of)]
        variance, df = 0.0, 1.0
        if len(parts) > 1 and all(len(part) > 1 for part in parts):
            means = np.array([part.mean() for part in parts])
            by_images = float(np.mean([part.var(ddof=1) / len(part) for part in parts]))
            variance = max(0.0, float(means.var(ddof=1)) - by_images) / len(parts)
            df = len(parts) - 1
        gain = paired_difference(gains, np.zeros_like(gains), run_variance=variance, run_df=df)
        return cls(name, value, gain, gain.low > 0)


@dataclass(frozen=True)
class SelectedPostprocessing:
    """All decisions about one final, and the resulting choices."""

    choices: Postprocessing
    decisions: tuple[Decision, ...]
    """In the order in which they were made, each with the options used so far."""
    n_images: int
    """Number of out-of-fold images that they are based on."""
    source: str
    """The networks that predicted these images: `second fits of trial 7`."""

    @classmethod
    def from_table(cls, table: Mapping[str, Any]) -> Self:
        """Return the decisions in a table. RecordError if it is damaged."""
        try:
            return from_json(cls, table)
        except (KeyError, TypeError, ValueError) as error:
            raise RecordError(f"the choices on record are damaged: {error}") from error


def select_threshold(scores: Floats, network_of: NDArray[np.int64]) -> Decision:
    """Select the best of `THRESHOLDS` from the images' scores (thresholds, n).

    The gain over 0.5 is measured with thresholds that were selected on the other networks' images, so that it has no
    selection bias.
    """
    plain = scores[THRESHOLDS.index(0.5)]
    parts = network_of if len(np.unique(network_of)) > 1 else np.arange(len(network_of)) % N_PARTS
    gains = np.zeros(len(plain))
    for part in np.unique(parts):
        here = parts == part
        gains[here] = scores[_best(scores[:, ~here])][here] - plain[here]
    return Decision.make("threshold", THRESHOLDS[_best(scores)], gains, network_of)


def clean_mask(mask: Mask) -> Mask:
    """Return the largest 8-connected component of a mask (H, W) with its holes filled; of equal ones the first.

    A hole is background that is not 4-connected to the border.
    """
    # scipy.ndimage takes a tenth of a second to import, and few commands need it.
    from scipy import ndimage

    labels, n = ndimage.label(mask, structure=np.ones((3, 3), np.int8))
    if n == 0:
        return mask.copy()
    sizes = np.bincount(labels.ravel())
    sizes[0] = 0
    largest = labels == sizes.argmax()
    outside, _ = ndimage.label(~largest)
    borders = np.concatenate([outside[0], outside[-1], outside[:, 0], outside[:, -1]])
    return np.asarray(~np.isin(outside, borders[borders > 0]))


def _best(scores: Floats) -> int:
    """Return the index of the threshold with the best mean; ties go to the one nearest to 0.5."""
    means = scores.mean(axis=1)
    return max(range(len(means)), key=lambda index: (means[index], -abs(THRESHOLDS[index] - 0.5)))
