"""Define the metrics of the runs in MLflow: one entry in `METRICS` is one metric."""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, get_args

import numpy as np

from hpsearch.report.trial_rows import CURVES, scores_by_fold
from hpsearch.store.fits import FitRecord
from hpsearch.store.trials import Outcome
from hpsearch.training.metrics import SCORES


@dataclass(frozen=True)
class Point:
    """One value of a metric."""

    key: str
    value: float
    step: int
    time_ms: int
    """Recorded Unix time in milliseconds, so that logging a point again changes nothing."""

    @property
    def place(self) -> tuple[str, int, int]:
        """Key, step and time, which identify a point within its run. MLflow shows the latest point of a step."""
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
"""Metrics by the kind of source that they are computed from.

Each metric has a name and either a dotted path into the source or a function of it.
`{metric}` stands for the metric of the study. A metric that is missing in its source (None) is not logged.
"""


def points_of(kind: str, source: Any, at: float, metric: str = "", *, step: int = 0, prefix: str = "") -> list[Point]:
    """Return the metrics of one kind in `METRICS`, recorded at the Unix time `at` in seconds."""
    values: dict[str, float] = {}
    for name, value in METRICS[kind].items():
        found = value(source) if callable(value) else _look_up(source, value.format(metric=metric))
        if found is not None:
            values[prefix + name.format(metric=metric)] = float(found)
    return [Point(key, value, step, milliseconds(at)) for key, value in values.items()]


def is_metric(key: str) -> bool:
    """Return whether hpsearch writes the metric `key`; people may add their own."""
    return re.fullmatch(r"(fold\d+|seed\d+|cv|cost|test|study)/.*", key) is not None


def cross_validation(fits: Sequence[Sequence[FitRecord]], value: float | None) -> dict[str, Any]:
    """Return the out-of-fold scores of one configuration: `mean` and `std` by score, and `value`.

    fits: as in `scores_by_fold`.
    value: the recorded mean of the study's metric, which the search used: a mean of float32 scores. The mean is over
    all held-out images, the standard deviation over the means of the folds; a single fold has none.
    """
    scores = scores_by_fold(fits)
    std = {
        name: np.std([np.mean(fold) for fold in folds], ddof=1) for name, folds in scores.items() if len(folds) > 1
    }
    return {
        "mean": {name: np.mean(np.concatenate(folds)) for name, folds in scores.items()},
        "std": std,
        "value": value,
    }


def _look_up(source: Any, path: str) -> Any:
    """Return the value at a dotted path of keys and attributes; None if a part of it is missing or None."""
    for part in path.split("."):
        source = source.get(part) if isinstance(source, Mapping) else getattr(source, part, None)
        if source is None:
            return None
    return source


def milliseconds(seconds: float) -> int:
    """Convert a Unix time in seconds to milliseconds, the unit of MLflow."""
    return round(seconds * 1000)
