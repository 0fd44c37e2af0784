"""Owns what is decided about a prediction after training: threshold, flips at test time, cleaning of the mask.

Each choice is made on out-of-fold predictions alone and taken only if its gain is more than noise. Imports no torch.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hpsearch.errors import RecordError
from hpsearch.paths import read_json
from hpsearch.stats.intervals import Paired, paired_difference

Floats = NDArray[np.float64]
Mask = NDArray[np.bool_]

THRESHOLDS = tuple(round(0.1 + 0.05 * step, 2) for step in range(17))
"""Probabilities above which a pixel may be taken for lesion: 0.1 to 0.9."""
N_PARTS = 5
"""Parts of the images that choose for each other where there is only one fold."""


@dataclass(frozen=True, kw_only=True)
class Choices:
    """How probabilities become a mask. The defaults are what every trial is scored by."""

    threshold: float = 0.5
    """Probability above which a pixel is lesion."""
    flips: bool = False
    """Whether logits are the mean over the image and its three mirror images."""
    clean: bool = False
    """Whether only the largest component is kept, with its holes filled."""
    ensemble: bool = False
    """Whether the networks of the folds predict together, instead of the one that was trained on the whole pool."""

    @classmethod
    def from_table(cls, table: Mapping[str, Any]) -> Choices:
        """From whatever else a weights file says of itself; what it does not say stays at its default."""
        names = [each.name for each in dataclasses.fields(cls)]
        return cls(**{name: table[name] for name in names if name in table})

    def to_table(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


@dataclass(frozen=True)
class Decision:
    """One choice, with what it gains out of fold over going without it."""

    name: str
    """What was considered: `flips`, `threshold`, `clean` or `ensemble`."""
    value: bool | float
    """What it would be set to."""
    gain: Paired
    taken: bool

    @classmethod
    def make(cls, name: str, value: bool | float, gains: Floats, network_of: NDArray[np.int64]) -> Decision:
        """Taken if the mean of `gains` (n,) of the images, by the networks `network_of` (n,), is surely above 0.

        Surely: the lower end of the 95 % interval, which holds the luck of the images and the networks'.
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

    def to_table(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


@dataclass(frozen=True)
class Chosen:
    """All decisions about one final, and what follows from them."""

    choices: Choices
    decisions: tuple[Decision, ...]
    """In the order in which they were made, each on top of those taken before."""
    n_images: int
    """Out-of-fold images that they rest on."""
    source: str
    """The networks that predicted them: `second fits of trial 7`."""

    @classmethod
    def read(cls, path: Path) -> Chosen:
        """What a worker decided. RecordError if the file is damaged."""
        return cls.from_table(read_json(path))

    @classmethod
    def from_table(cls, table: Mapping[str, Any]) -> Chosen:
        try:
            decisions = tuple(Decision(**{**each, "gain": Paired(**each["gain"])}) for each in table["decisions"])
            return cls(Choices(**table["choices"]), decisions, table["n_images"], table["source"])
        except (KeyError, TypeError) as error:
            raise RecordError(f"the choices on record are damaged: {error}") from error

    def to_table(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


def choose_flips(plain: Floats, flipped: Floats, network_of: NDArray[np.int64]) -> Decision:
    """Whether to predict with flips, from the images' scores (n,) at a threshold of 0.5 without and with them."""
    return Decision.make("flips", True, flipped - plain, network_of)


def choose_threshold(scores: Floats, network_of: NDArray[np.int64]) -> Decision:
    """The best of THRESHOLDS, from the images' scores (thresholds, n).

    Its gain over 0.5 is measured by thresholds that the other networks' images chose, so that having picked the best
    of many costs nothing.
    """
    plain = scores[THRESHOLDS.index(0.5)]
    parts = network_of if len(np.unique(network_of)) > 1 else np.arange(len(network_of)) % N_PARTS
    gains = np.zeros(len(plain))
    for part in np.unique(parts):
        here = parts == part
        gains[here] = scores[_best(scores[:, ~here])][here] - plain[here]
    return Decision.make("threshold", THRESHOLDS[_best(scores)], gains, network_of)


def choose_cleaning(plain: Floats, cleaned: Floats, network_of: NDArray[np.int64]) -> Decision:
    """Whether to keep the largest component only, from the images' scores (n,) without and with that."""
    return Decision.make("clean", True, cleaned - plain, network_of)


def clean_mask(mask: Mask) -> Mask:
    """The largest of the 8-connected components of a mask (H, W), the first of equal ones, with its holes filled.

    A hole is background from which no path of neighbours in rows and columns leads to the border.
    """
    # A tenth of a second to import, which few commands need.
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
    """Index of the threshold with the best mean; of equal ones that nearest to a half."""
    means = scores.mean(axis=1)
    return max(range(len(means)), key=lambda index: (means[index], -abs(THRESHOLDS[index] - 0.5)))
