"""Select post-processing by out-of-fold predictions, and count pixels after it. Needs torch: workers import it."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hpsearch.data.batches import DeviceData
from hpsearch.inference.postprocessing import (
    THRESHOLDS,
    Decision,
    FoldNetwork,
    Postprocessing,
    SelectedPostprocessing,
    clean_mask,
    select_cleaning,
    select_flips,
    select_threshold,
)
from hpsearch.inference.predictor import mean_over_flips
from hpsearch.training.checkpoint import WeightsInfo, load_weights, save_weights
from hpsearch.training.evaluation import Forward, predict_logits
from hpsearch.training.metrics import SCORES, PixelCounts, count_pixels
from hpsearch.training.runtime import Runtime

CHUNK = 32
"""Images whose logits an ensemble sums up at a time."""

Floats = NDArray[np.float64]
Counts = NDArray[np.int64]


def select(
    folds: Sequence[FoldNetwork], data: DeviceData, runtime: Runtime, *, metric: str, source: str, ensemble: bool
) -> SelectedPostprocessing:
    """Decide on flips, threshold, cleaning and, where `ensemble` is set, on predicting with all networks together.

    Each decision is made on top of those taken before. `source` says which networks these are, for people.
    """
    chooser = _Chooser(data, runtime, metric, folds)
    choices = Postprocessing()
    by_flips = {flips: chooser.scores_by_threshold(flips=flips) for flips in (False, True)}
    middle = THRESHOLDS.index(0.5)
    flips = select_flips(by_flips[False][middle], by_flips[True][middle], chooser.network_of)
    choices = dataclasses.replace(choices, flips=flips.taken)
    threshold = select_threshold(by_flips[choices.flips], chooser.network_of)
    choices = dataclasses.replace(choices, threshold=float(threshold.value) if threshold.taken else 0.5)
    plain, cleaned = chooser.scores_without_and_with_cleaning(choices)
    clean = select_cleaning(plain, cleaned, chooser.network_of)
    choices = dataclasses.replace(choices, clean=clean.taken)
    decisions = [flips, threshold, clean]
    if ensemble and all(fold.other for fold in folds):
        alone, together = chooser.scores_alone_and_together(choices)
        both = Decision.make("ensemble", True, together - alone, chooser.network_of)
        choices = dataclasses.replace(choices, ensemble=both.taken)
        decisions.append(both)
    return SelectedPostprocessing(choices, tuple(decisions), len(plain), source)


def keep_model(source: Path, target: Path, choices: Postprocessing) -> None:
    """Copy weights, with the post-processing selected for them entered."""
    model, info = load_weights(source, torch.device("cpu"))
    table = {**info.extra, **choices.to_table()}
    if choices == Postprocessing():
        # As training left it, to the byte.
        table = dict(info.extra)
    save_weights(target, model, dataclasses.replace(info, extra=table))


def count_pixels_of(
    weights: Sequence[Path], images: NDArray[np.int64], choices: Postprocessing, data: DeviceData, runtime: Runtime
) -> Counts:
    """Return tp, fp, fn, tn of these images, (n, 4) int64, by the mean logits of the networks in `weights`."""
    networks = [load_weights(path, runtime.device) for path in weights]
    return _counts(networks, images, choices, data, runtime)


class _Chooser:
    """Scores of every held-out image by the network that had not seen it, under different choices."""

    def __init__(self, data: DeviceData, runtime: Runtime, metric: str, folds: Sequence[FoldNetwork]) -> None:
        self._data = data
        self._runtime = runtime
        self._metric = metric
        self._folds = folds
        self.network_of = np.concatenate([np.full(len(fold.held_out), number) for number, fold in enumerate(folds)])

    def scores_by_threshold(self, *, flips: bool) -> Floats:
        """(thresholds, n)."""
        counts = [
            np.stack([_count(logits > _logit(threshold), masks) for threshold in THRESHOLDS])
            for logits, masks in self._predictions(flips=flips)
        ]
        return self._score(np.concatenate(counts, axis=1))

    def scores_without_and_with_cleaning(self, choices: Postprocessing) -> tuple[Floats, Floats]:
        """(n,) each."""
        counts: tuple[list[Counts], list[Counts]] = ([], [])
        for logits, masks in self._predictions(flips=choices.flips):
            preds = logits > _logit(choices.threshold)
            counts[0].append(_count(preds, masks))
            counts[1].append(_count(_clean(preds), masks))
        return self._score(np.concatenate(counts[0])), self._score(np.concatenate(counts[1]))

    def scores_alone_and_together(self, choices: Postprocessing) -> tuple[Floats, Floats]:
        """The mean of two networks' scores, and the score of their mean logits, (n,) each."""
        alone, together = [], []
        for fold in self._folds:
            networks = [
                load_weights(path, self._runtime.device) for path in (fold.weights, fold.other) if path is not None
            ]
            held_out = np.asarray(fold.held_out, np.int64)
            first, second, both = (
                self._score(_counts(chosen, held_out, choices, self._data, self._runtime))
                for chosen in (networks[:1], networks[1:], networks)
            )
            alone.append((first + second) / 2)
            together.append(both)
        return np.concatenate(alone), np.concatenate(together)

    def _predictions(self, *, flips: bool) -> Iterator[tuple[Tensor, Tensor]]:
        for fold in self._folds:
            network = load_weights(fold.weights, self._runtime.device)
            held_out = np.asarray(fold.held_out, np.int64)
            yield from _logits(network, self._data, held_out, self._runtime, flips=flips)

    def _score(self, counts: Counts) -> Floats:
        return np.asarray(SCORES[self._metric](PixelCounts.from_columns(counts)), np.float64)


def _counts(
    networks: Sequence[tuple[Forward, WeightsInfo]],
    images: NDArray[np.int64],
    choices: Postprocessing,
    data: DeviceData,
    runtime: Runtime,
) -> Counts:
    counts = []
    for start in range(0, len(images), CHUNK):
        here = images[start : start + CHUNK]
        total, masks = _mean_logits(networks, data, here, runtime, flips=choices.flips)
        preds = total > _logit(choices.threshold)
        counts.append(_count(_clean(preds) if choices.clean else preds, masks))
    return np.concatenate(counts)


def _logits(
    network: tuple[Forward, WeightsInfo],
    data: DeviceData,
    images: NDArray[np.int64],
    runtime: Runtime,
    *,
    flips: bool,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Logits and masks (B, 1, H, W) of `images` in order."""
    model, info = network
    forward: Forward = partial(mean_over_flips, model) if flips else model
    return predict_logits(forward, data, images, normalization=info.normalization, size=info.size, runtime=runtime)


def _mean_logits(
    networks: Sequence[tuple[Forward, WeightsInfo]],
    data: DeviceData,
    images: NDArray[np.int64],
    runtime: Runtime,
    *,
    flips: bool,
) -> tuple[Tensor, Tensor]:
    """Return the logits of `images`, averaged over the networks, (n, 1, H, W), and the masks."""
    total: Tensor | None = None
    masks = torch.empty(0)
    for network in networks:
        parts = list(_logits(network, data, images, runtime, flips=flips))
        logits, masks = (torch.cat(each) for each in zip(*parts, strict=True))
        total = logits if total is None else total + logits
    assert total is not None
    return total / len(networks), masks


def _logit(threshold: float) -> float:
    return float(torch.tensor(threshold).logit())


def _clean(preds: Tensor) -> Tensor:
    """Every mask of (B, 1, H, W) cleaned, on the CPU."""
    masks = preds[:, 0].cpu().numpy()
    return torch.from_numpy(np.stack([clean_mask(mask) for mask in masks]))[:, None]


def _count(preds: Tensor, masks: Tensor) -> Counts:
    counts = torch.stack(count_pixels(preds, masks.to(preds.device)), dim=1)
    return np.asarray(counts.cpu().numpy(), np.int64)
