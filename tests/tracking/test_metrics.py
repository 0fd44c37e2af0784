"""The table of metrics and what a metric is computed from."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from hpsearch.tracking import metrics
from hpsearch.tracking.metrics import METRICS, Point, cross_validation, points_of


def test_an_entry_of_the_table_is_a_metric(monkeypatch: pytest.MonkeyPatch) -> None:
    table = {**METRICS, "final": {"test/{metric}_twice": lambda result: 2 * result["x"], "test/y": "a.{metric}"}}
    monkeypatch.setattr(metrics, "METRICS", table)
    points = points_of("final", {"x": 0.25, "a": {"dice": 1}}, 3.5, "dice")
    assert points == [Point("test/dice_twice", 0.5, 0, 3500), Point("test/y", 1.0, 0, 3500)]


@pytest.mark.parametrize("source", [{}, {"cv": None}, {"cv": {}}, {"cv": {"mean": None}}])
def test_a_metric_that_is_missing_in_its_source_is_not_logged(source: dict[str, Any]) -> None:
    assert points_of("final", source, 0.0, "dice") == []


def counted(counts: list[list[int]]) -> Any:
    """A fit with these counts tp, fp, fn, tn of each image."""
    return SimpleNamespace(counts=lambda: np.array(counts))


def test_cross_validation_weighs_every_image_equally_and_spreads_over_folds() -> None:
    # Accuracy is the share of correct pixels: tp and tn of 10.
    folds = [counted([[2, 0, 8, 0], [4, 0, 6, 0], [0, 4, 0, 6]]), counted([[1, 0, 0, 9]])]
    scores = cross_validation([folds], None)
    assert scores["mean"]["accuracy"] == pytest.approx(0.55)
    assert scores["std"]["accuracy"] == pytest.approx(np.std([0.4, 1.0], ddof=1))
    assert cross_validation([folds[:1]], None)["std"] == {}
    refits = [counted([[4, 0, 6, 0], [4, 0, 6, 0], [0, 4, 0, 6]]), counted([[1, 4, 0, 5]])]
    assert cross_validation([folds, refits], None)["mean"]["accuracy"] == pytest.approx((0.3 + 0.4 + 0.6 + 0.8) / 4)


def test_the_recorded_value_replaces_the_mean_of_its_metric() -> None:
    scores = cross_validation([[counted([[1, 1, 1, 0]])]], 0.123)
    points = points_of("cross-validation", scores, 0.0, "jaccard")
    values = {point.key: point.value for point in points}
    assert (values["cv/jaccard_mean"], values["cv/dice_mean"]) == (0.123, 0.5)
    assert len(values) == len(points)


def test_the_speed_of_training_is_weighted_by_time() -> None:
    rows = [
        SimpleNamespace(train_s=1.0, eval_s=0.5, images_per_s=100.0, peak_bytes=2**20),
        SimpleNamespace(train_s=3.0, eval_s=0.5, images_per_s=200.0, peak_bytes=3 * 2**20),
    ]
    values = {point.key: point.value for point in points_of("training", rows, 0.0)}
    assert values == {"cost/seconds": 5.0, "cost/images_per_s": 175.0, "cost/peak_memory_mib": 3.0}
