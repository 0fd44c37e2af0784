"""Define the post-processing options, and the rule that decides from out-of-fold scores which of them are used.

The options are test-time augmentation, threshold, mask cleaning and ensemble. An option is used only if its gain is
statistically significant. `select_postprocessing` computes the scores. This module does not import PyTorch.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Self

import numpy as np
from numpy.typing import NDArray

from hpsearch.stats.intervals import Paired, paired_difference

Floats = NDArray[np.float64]
Mask = NDArray[np.bool_]

THRESHOLDS = tuple(round(0.1 + 0.05 * step, 2) for step in range(17))
"""Candidate thresholds: 0.1 to 0.9. A pixel is lesion if its probability is above the threshold."""
N_PARTS = 5
"""Number of parts into which the images are split to cross-validate the threshold if there is only one fold."""


@dataclass(frozen=True, kw_only=True)
class Postprocessing:
    """Steps that turn probabilities into a mask. Every trial is scored with the defaults."""

    threshold: float = 0.5
    """Threshold on the probability of a pixel. A pixel above it is lesion."""
    flips: bool = False
    """Whether to average the logits over the image and its three mirror images (test-time augmentation)."""
    clean: bool = False
    """Whether to keep only the largest component of the mask and fill its holes."""
    ensemble: bool = False
    """Whether to predict with the networks of all folds together instead of the network trained on the whole pool."""


@dataclass(frozen=True)
class FoldNetwork:
    """One fold with its trained networks, which were not trained on the fold's held-out images."""

    weights: Path
    other: Path | None
    """Weights file of a second network with the same configuration and another seed; None if there is none."""
    held_out: tuple[int, ...]
    """Indices of the held-out images in the cache."""


@dataclass(frozen=True)
class Decision:
    """Decision whether to use one post-processing option, with its out-of-fold gain."""

    name: str
    """Name of the option: `flips`, `threshold`, `clean` or `ensemble`."""
    value: bool | float
    """Value of the option if it is used."""
    gain: Paired
    """Mean gain in the study's metric over not using the option, with its 95 % interval."""
    taken: bool
    """Whether the option is used."""

    @classmethod
    def make(cls, name: str, value: bool | float, gains: Floats, network_of: NDArray[np.int64]) -> Self:
        """Decide whether to use one option: yes, if the 95 % interval of its mean gain lies above 0.

        gains: gain of each image when the option is used, (n,). network_of: index of the network that predicted each
        image, (n,). The interval accounts for the variance between images and between networks.
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
    """The post-processing that `hpsearch final` selected, and the decisions that led to it."""

    choices: Postprocessing
    decisions: tuple[Decision, ...]
    """Decisions in the order in which they were made. Each one builds on the options that were used before."""
    n_images: int
    """Number of images whose out-of-fold predictions the decisions are based on."""
    source: str
    """Description of the networks that predicted these images, for example `refits of trial 7`."""


def select_threshold(scores: Floats, network_of: NDArray[np.int64]) -> Decision:
    """Select the best of `THRESHOLDS`, and decide whether to use it instead of 0.5.

    scores: score of each image at each threshold, (thresholds, n). network_of: index of the network that predicted
    each image, (n,).

    The gain over 0.5 is cross-validated: the images of each network are scored at a threshold that was selected on
    the images of the other networks. The gain therefore has no selection bias. With a single network, the images are
    split into `N_PARTS` parts instead.
    """
    plain = scores[THRESHOLDS.index(0.5)]
    parts = network_of if len(np.unique(network_of)) > 1 else np.arange(len(network_of)) % N_PARTS
    gains = np.zeros(len(plain))
    for part in np.unique(parts):
        here = parts == part
        gains[here] = scores[_best(scores[:, ~here])][here] - plain[here]
    return Decision.make("threshold", THRESHOLDS[_best(scores)], gains, network_of)


def clean_mask(mask: Mask) -> Mask:
    """Return the largest 8-connected component of a mask (H, W) with its holes filled.

    If several components are equally large, the first one is kept. A hole is a background region that is not
    4-connected to the image border.
    """
    # Importing scipy.ndimage takes 0.1 s, and few commands need it.
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
    """Return the index of the threshold with the best mean score. Ties go to the threshold closest to 0.5."""
    means = scores.mean(axis=1)
    return max(range(len(means)), key=lambda index: (means[index], -abs(THRESHOLDS[index] - 0.5)))
