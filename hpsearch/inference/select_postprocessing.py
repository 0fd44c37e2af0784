"""Predict the held-out images with the fold networks to select the post-processing. Requires PyTorch.

The options and the decision rule are defined in `postprocessing`. This module also counts the pixels of
post-processed masks.
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hpsearch.data.batches import DeviceData, eval_batches
from hpsearch.inference.postprocessing import (
    THRESHOLDS,
    Decision,
    FoldNetwork,
    Postprocessing,
    SelectedPostprocessing,
    clean_mask,
    select_threshold,
)
from hpsearch.training.checkpoint import WeightsInfo, load_weights, save_weights
from hpsearch.training.evaluation import Forward, predict_logits
from hpsearch.training.metrics import SCORES, PixelCounts, count_pixels
from hpsearch.training.runtime import Runtime


def select(
    folds: Sequence[FoldNetwork], data: DeviceData, runtime: Runtime, *, metric: str, source: str, ensemble: bool
) -> SelectedPostprocessing:
    """Select flips, threshold, cleaning and, if `ensemble` is set, prediction with the ensemble of all networks.

    The decisions are made in this order, and each one builds on the options selected before it. `metric` is the
    study's metric, and `source` describes the networks in reports. The ensemble is considered only if every fold has
    a second network.
    """
    network_of = np.concatenate([np.full(len(fold.held_out), number) for number, fold in enumerate(folds)])

    def scores(options: Sequence[Postprocessing], first: int = 0, last: int = 1) -> NDArray[np.float64]:
        """Return the out-of-fold score of every image for each option, (options, n).

        `first` and `last` select the networks of each fold: 0 to 1 the first, 1 to 2 the second, 0 to 2 both.
        """
        counts = []
        for fold in folds:
            weights = [path for path in (fold.weights, fold.other)[first:last] if path is not None]
            networks = [load_weights(path, runtime.device) for path in weights]
            held_out = np.asarray(fold.held_out, np.int64)
            counts.append(count_pixels_of(networks, held_out, options, data, runtime))
        columns = PixelCounts.from_columns(np.concatenate(counts, axis=1))
        return np.asarray(SCORES[metric](columns), np.float64)

    options = [Postprocessing(threshold=threshold) for threshold in THRESHOLDS]
    by_threshold = scores(options)
    flipped = scores([dataclasses.replace(option, flips=True) for option in options])
    middle = THRESHOLDS.index(0.5)
    flips = Decision.make("flips", True, flipped[middle] - by_threshold[middle], network_of)
    threshold = select_threshold(flipped if flips.taken else by_threshold, network_of)
    choices = Postprocessing(threshold=float(threshold.value) if threshold.taken else 0.5, flips=flips.taken)
    plain, cleaned = scores([choices, dataclasses.replace(choices, clean=True)])
    clean = Decision.make("clean", True, cleaned - plain, network_of)
    choices = dataclasses.replace(choices, clean=clean.taken)
    decisions = [flips, threshold, clean]
    if ensemble and all(fold.other for fold in folds):
        alone = (scores([choices])[0] + scores([choices], 1, 2)[0]) / 2
        together = scores([choices], 0, 2)[0]
        decisions.append(Decision.make("ensemble", True, together - alone, network_of))
        choices = dataclasses.replace(choices, ensemble=decisions[-1].taken)
    return SelectedPostprocessing(choices, tuple(decisions), len(plain), source)


def keep_model(source: Path, target: Path, choices: Postprocessing) -> None:
    """Copy a weights file and add the selected post-processing to its metadata."""
    model, info = load_weights(source, torch.device("cpu"))
    # With the default post-processing, the copy stays byte-identical to the file that training wrote.
    selected = {} if choices == Postprocessing() else dataclasses.asdict(choices)
    save_weights(target, model, dataclasses.replace(info, extra={**info.extra, **selected}))


def count_pixels_of(
    networks: Sequence[tuple[Forward, WeightsInfo]],
    images: NDArray[np.int64],
    options: Sequence[Postprocessing],
    data: DeviceData,
    runtime: Runtime,
) -> NDArray[np.int64]:
    """Return tp, fp, fn, tn of each image for each option, (options, n, 4), from the mean logits of the networks.

    `images` are indices into `data`. The options may differ only in threshold and cleaning.
    """
    predictions = []
    for model, info in networks:
        batches = eval_batches(data, images, batch_size=16, normalization=info.normalization, size=info.size)
        predictions.append(predict_logits(model, batches, runtime, flips=options[0].flips))
    counts = []
    for by_network in zip(*predictions, strict=True):
        logits, masks = zip(*by_network, strict=True)
        mean = sum(logits, start=torch.zeros((), device=logits[0].device)) / len(networks)
        counts.append(np.stack([_count(mean, masks[0], choices) for choices in options]))
    return np.concatenate(counts, axis=1)


def _count(logits: Tensor, masks: Tensor, choices: Postprocessing) -> NDArray[np.int64]:
    """Return tp, fp, fn, tn of each image after thresholding and cleaning, (n, 4)."""
    preds = logits > float(torch.tensor(choices.threshold).logit())
    if choices.clean:
        # SciPy cleans one mask at a time, on the CPU.
        cleaned = np.stack([clean_mask(mask) for mask in preds[:, 0].cpu().numpy()])
        preds = torch.from_numpy(cleaned)[:, None]
    counts = torch.stack(count_pixels(preds, masks.to(preds.device)), dim=1)
    return np.asarray(counts.cpu().numpy(), np.int64)
