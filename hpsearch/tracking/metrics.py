"""Define the metrics of the runs in MLflow: one entry in `METRICS` is one metric."""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, get_args

import numpy as np
import numpy.typing as npt

from hpsearch.report.trial_rows import CURVES
from hpsearch.store.fits import FitRecord
from hpsearch.store.trials import Outcome
from hpsearch.training.metrics import SCORES, PixelCounts


@dataclass(frozen=True)
class Point:
    """One value of a metric."""

    key: str
    value: float
    step: int
    time_ms: int
    """Recorded Unix time in milliseconds, so that logging a point again changes nothing."""
    is_revision: bool = False
    """Whether it replaces an earlier point of its key and step. MLflow shows the latest of them."""

    @property
    def place(self) -> tuple[str, int, int]:
        """Key, step and time, which identify a point within its run."""
        return self.key, self.step, self.time_ms


METRICS: dict[str, dict[str, str | Callable[[Any], float | None]]] = {
    # From a row of epochs.jsonl, with the prefix of its fit: `fold0/`, or `seed0/` in a final.
    "epoch": {
        **{f"train_{score}": f"train.{score}" for score in CURVES},
        **{score: f"held_out.{score}" for score in CURVES},
    },
    # From all rows of a trial, a refit or a final.
    "training": {
        "cost/seconds": lambda rows: sum(row.train_s for row in rows) + sum(row.eval_s for row in rows),
        "cost/images_per_s": lambda rows: (
            sum(row.images_per_s * row.train_s for row in rows) / sum(row.train_s for row in rows)
        ),
        "cost/peak_memory_mib": lambda rows: max(row.peak_bytes for row in rows) / 2**20,
    },
    # From the `cross_validation` of a complete trial. The last entry replaces one of the first.
    "cross-validation": {
        **{f"cv/{score}_mean": f"mean.{score}" for score in SCORES},
        **{f"cv/{score}_std": f"std.{score}" for score in ("dice", "jaccard")},
        "cv/{metric}_mean": "value",
    },
    # From the `cross_validation` of the first fits of a trial that was refitted.
    "first fits": {**{f"cv/{score}_first": f"mean.{score}" for score in SCORES}, "cv/{metric}_first": "value"},
    # From the record of a trial that was not evaluated on all folds: an estimate is never logged as a mean.
    "estimate": {"cv/estimate": "value"},
    # From final.json.
    "final": {
        "cv/{metric}_mean": "cv.mean",
        "cv/{metric}_std": "cv_fold_std",
        **{f"test/{score}": f"test.{score}.mean" for score in SCORES},
        "test/{metric}_low": "test.{metric}.low",
        "test/{metric}_high": "test.{metric}.high",
        **{f"test/official/{score}": f"official.{score}.mean" for score in SCORES},
        "cv/{metric}_corrected": "corrected.mean",
        "cv/{metric}_corrected_low": "corrected.low",
        "cv/{metric}_corrected_high": "corrected.high",
        "cv/{metric}_predicted": "predicted.mean",
        "cv/{metric}_predicted_low": "predicted.low",
        "cv/{metric}_predicted_high": "predicted.high",
        "test/chosen/{metric}": "chosen_test.{metric}.mean",
        "test/ensemble/{metric}": "ensemble.test.{metric}.mean",
    },
    # From the state of the study after each ended trial: the best value and the counts of the outcomes.
    "study": {
        "study/best_{metric}": "best",
        **{f"study/n_{outcome}": f"n.{outcome}" for outcome in get_args(Outcome)},
    },
}
"""What a metric is computed from, to the metrics: name to a dotted path into the source, or to a function of it.

`{metric}` stands for the metric of the study. A metric that is missing in its source (None) is not logged.
"""


def points_of(
    kind: str, source: Any, at: float, metric: str = "", *, step: int = 0, prefix: str = "", is_revision: bool = False
) -> list[Point]:
    """Return the metrics of one kind in `METRICS`, recorded at the Unix time `at` in seconds."""
    values: dict[str, float] = {}
    for name, value in METRICS[kind].items():
        found = value(source) if callable(value) else _look_up(source, value.format(metric=metric))
        if found is not None:
            values[prefix + name.format(metric=metric)] = float(found)
    return [Point(key, value, step, milliseconds(at), is_revision) for key, value in values.items()]


def is_metric(key: str) -> bool:
    """Return whether hpsearch writes the metric `key`; people may add their own."""
    return re.fullmatch(r"(fold\d+|seed\d+|cv|cost|test|study)/.*", key) is not None


def cross_validation(fits: Sequence[Sequence[FitRecord]], value: float | None) -> dict[str, Any]:
    """Return the out-of-fold scores of one configuration: `mean` and `std` by score, and `value`.

    fits: the folds of the first fits, followed by those of the refits, if any; their scores are averaged per image.
    value: the recorded mean of the study's metric, which the search used: a mean of float32 scores. The mean is over
    all held-out images, the standard deviation over the means of the folds; a single fold has none.
    """
    counts = [[image_scores(fit.counts()) for fit in of_fold] for of_fold in zip(*fits, strict=True)]
    scores = {name: [np.mean([each[name] for each in of_fold], axis=0) for of_fold in counts] for name in SCORES}
    std = {
        name: np.std([np.mean(fold) for fold in folds], ddof=1) for name, folds in scores.items() if len(folds) > 1
    }
    return {
        "mean": {name: np.mean(np.concatenate(folds)) for name, folds in scores.items()},
        "std": std,
        "value": value,
    }


def image_scores(counts: npt.NDArray[np.int64]) -> dict[str, npt.NDArray[np.float64]]:
    """Return every score of every image by name, each (n,). `counts` has the columns tp, fp, fn, tn: (n, 4)."""
    columns = PixelCounts.from_columns(counts)
    return {name: np.asarray(score(columns), np.float64) for name, score in SCORES.items()}


def _look_up(source: Any, path: str) -> Any:
    """Return the value at a dotted path of keys and attributes; None if a part of it is missing or None."""
    for part in path.split("."):
        source = source.get(part) if isinstance(source, Mapping) else getattr(source, part, None)
        if source is None:
            return None
    return source


def milliseconds(seconds: float) -> int:
    """Return a Unix time in the unit of MLflow."""
    return round(seconds * 1000)
