"""Define the metrics of MLflow runs in the table `METRICS`.

A refit trains the configuration of a trial again on all folds, with new seeds. A `final` run has the test scores
of a configuration that `hpsearch final` has retrained on the whole pool.
"""

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
    """Unix time in milliseconds as stored in the study folder, so that logging a point twice has no effect."""

    @property
    def place(self) -> tuple[str, int, int]:
        """Key, step and time, which identify a point within its run. MLflow shows the latest point of each step."""
        return self.key, self.step, self.time_ms


def _of_interval(name: str, path: str) -> dict[str, str]:
    """Return the metrics for the mean and the bounds of the interval at a dotted path (see `METRICS`)."""
    return {name: f"{path}.mean", f"{name}_low": f"{path}.low", f"{name}_high": f"{path}.high"}


METRICS: dict[str, dict[str, str | Callable[[Any], float | None]]] = {
    # From a row of epochs.jsonl. The names get the prefix of the fit: `fold0/`, or `seed0/` in a `final` run.
    "epoch": {
        **{f"train_{score}": f"train.{score}" for score in CURVES},
        **{score: f"held_out.{score}" for score in CURVES},
    },
    # From all epoch rows of a trial, a refit or a `final` run.
    "training": {
        "cost/seconds": lambda rows: sum(row.train_s for row in rows) + sum(row.eval_s for row in rows),
        "cost/images_per_s": lambda rows: (
            sum(row.images_per_s * row.train_s for row in rows) / sum(row.train_s for row in rows)
        ),
        "cost/peak_memory_mib": lambda rows: max(row.peak_bytes for row in rows) / 2**20,
    },
    # From the `cross_validation` of a complete trial. In the study's metric, the last entry overrides the mean by the
    # value that ranks the trial.
    "cross-validation": {
        **{f"cv/{score}_mean": f"mean.{score}" for score in SCORES},
        **{f"cv/{score}_std": f"std.{score}" for score in ("dice", "jaccard")},
        "cv/{metric}_mean": "value",
    },
    # From the `cross_validation` of the first fits of a trial that was refitted.
    "first fits": {**{f"cv/{score}_first": f"mean.{score}" for score in SCORES}, "cv/{metric}_first": "value"},
    # From the record of a trial that was not evaluated on all folds. Its estimate is not a mean over all images, so
    # it has a name of its own.
    "estimate": {"cv/estimate": "value"},
    # From final.json.
    "final": {
        "cv/{metric}_mean": "cv.mean",
        "cv/{metric}_std": "cv_fold_std",
        **{f"test/{score}": f"test.{score}.mean" for score in SCORES},
        **_of_interval("test/{metric}", "test.{metric}"),
        **{f"test/official/{score}": f"official.{score}.mean" for score in SCORES},
        **_of_interval("cv/{metric}_corrected", "corrected"),
        **_of_interval("cv/{metric}_predicted", "predicted"),
        "test/chosen/{metric}": "chosen_test.{metric}.mean",
        "test/ensemble/{metric}": "ensemble.test.{metric}.mean",
    },
    # From the state of the study each time a trial ends: the best value and the number of trials by outcome.
    "study": {
        "study/best_{metric}": "best",
        **{f"study/n_{outcome}": f"n.{outcome}" for outcome in get_args(Outcome)},
    },
}
"""Metrics, grouped by the kind of source from which they are computed.

Each name is mapped to a dotted path in the source or to a function of the source. `{metric}` is replaced by the
study's metric. A metric is not logged if its value is missing or None.
"""


def points_of(kind: str, source: Any, at: float, metric: str = "", *, step: int = 0, prefix: str = "") -> list[Point]:
    """Return the metrics of one `kind` in `METRICS`, computed from `source`.

    All points have the Unix time `at` in seconds and the step `step`, and `prefix` is put before their keys. `metric`
    is the study's metric.
    """
    values: dict[str, float] = {}
    for name, value in METRICS[kind].items():
        found = value(source) if callable(value) else _look_up(source, value.format(metric=metric))
        if found is not None:
            values[prefix + name.format(metric=metric)] = float(found)
    return [Point(key, value, step, milliseconds(at)) for key, value in values.items()]


def cross_validation(fits: Sequence[Sequence[FitRecord]], value: float | None) -> dict[str, Any]:
    """Return the out-of-fold scores of one configuration: `mean` and `std` by score name, and `value` unchanged.

    `mean` is taken over all held-out images. `std` is the standard deviation of the fold means; it is empty if there
    is only one fold.

    fits: the first fits of all folds, and optionally the refits of all folds.
    value: mean of the study's metric by which the search ranked the trial, as stored in the study folder. It was
    computed from float32 scores.
    """
    scores = scores_by_fold(fits)
    mean = {name: np.mean(np.concatenate(folds)) for name, folds in scores.items()}
    fold_means = {name: list(map(np.mean, folds)) for name, folds in scores.items()}
    std = {name: np.std(means, ddof=1) for name, means in fold_means.items() if len(means) > 1}
    return {"mean": mean, "std": std, "value": value}


def _look_up(source: Any, path: str) -> Any:
    """Return the value at a dotted path of keys and attributes; None if any part is missing or None."""
    for part in path.split("."):
        source = source.get(part) if isinstance(source, Mapping) else getattr(source, part, None)
        if source is None:
            return None
    return source


def milliseconds(seconds: float) -> int:
    """Convert a Unix time in seconds to milliseconds, the unit of MLflow."""
    return round(seconds * 1000)
