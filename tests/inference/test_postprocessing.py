from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from hpsearch.errors import RecordError
from hpsearch.inference.postprocessing import (
    THRESHOLDS,
    Decision,
    Postprocessing,
    SelectedPostprocessing,
    clean_mask,
    select_threshold,
)
from hpsearch.paths import write_json
from hpsearch.stats.intervals import paired_difference
from hpsearch.store.trials import read_record
from hpsearch.typed_json import from_json

NETWORKS = np.repeat(np.arange(5), 60)


def scores(seed: int, mean: float = 0.85) -> np.ndarray:
    return np.random.default_rng(seed).normal(mean, 0.1, len(NETWORKS))


def test_a_gain_that_every_image_has_is_taken_and_measured() -> None:
    found = Decision.make("flips", True, 0.004 + scores(1, 0.0) * 0.05, NETWORKS)
    assert found.taken
    assert found.gain.difference == pytest.approx(0.004, abs=0.002)


def test_what_gains_nothing_is_seldom_taken() -> None:
    taken = [Decision.make("clean", True, scores(2 * i + 1, 0.0) * 0.1, NETWORKS) for i in range(80)]
    # One-sided 2.5 % of 80 is 2.
    assert sum(each.taken for each in taken) <= 6


def test_cleaning_is_taken_if_it_helps_and_not_if_it_harms() -> None:
    gains = 0.004 + scores(1, 0.0) * 0.05
    assert Decision.make("clean", True, gains, NETWORKS).taken
    assert not Decision.make("clean", True, -gains, NETWORKS).taken


def test_how_sure_a_gain_is_counts_the_spread_between_networks_beyond_that_of_their_images() -> None:
    gains = np.array([0.1, 0.2, 0.3, 0.0, 0.1, 0.2, 0.1, 0.4, 0.7])
    network_of = np.repeat(np.arange(3), 3)
    # Means 0.2, 0.1, 0.4 have the variance 0.07 / 3; those of their images are 0.01, 0.01 and 0.09, by three each.
    between = 0.07 / 3 - (0.01 + 0.01 + 0.09) / 3 / 3
    expected = paired_difference(gains, np.zeros(9), run_variance=between / 3, run_df=2)
    found = Decision.make("flips", True, gains, network_of).gain
    assert dataclasses.astuple(found) == pytest.approx(dataclasses.astuple(expected))
    # Networks that differ by less than their images explain add nothing.
    alike = np.array([0.1, 0.7, 0.0, 0.4, 0.2, 0.1, 0.3, 0.1, 0.2])
    found = Decision.make("flips", True, alike, network_of).gain
    assert found == paired_difference(alike, np.zeros(9), run_variance=0.0, run_df=2)


def test_a_gain_of_one_network_alone_is_not_taken() -> None:
    gains = np.where(NETWORKS == 0, 0.02, 0.0) + scores(1, 0.0) * 0.01
    assert gains.mean() > 0.003
    assert not Decision.make("flips", True, gains, NETWORKS).taken


def test_the_threshold_with_the_best_mean_is_found_and_its_gain_is_not_that_of_the_best_of_many() -> None:
    base, rng = scores(0), np.random.default_rng(1)
    better = np.array([0.02 - abs(threshold - 0.4) * 0.2 for threshold in THRESHOLDS])
    found = select_threshold(base + better[:, None] + rng.normal(0, 0.01, (len(THRESHOLDS), len(base))), NETWORKS)
    assert (found.value, found.taken) == (0.4, True)
    assert found.gain.difference == pytest.approx(0.02, abs=0.004)
    noise = [
        select_threshold(base + np.random.default_rng(i).normal(0, 0.05, (len(THRESHOLDS), len(base))), NETWORKS)
        for i in range(60)
    ]
    assert np.mean([each.gain.difference for each in noise]) == pytest.approx(0, abs=0.002)
    assert sum(each.taken for each in noise) <= 5


def test_one_fold_is_split_for_the_threshold() -> None:
    """Each part is scored by the threshold that the other parts choose, so noise gains nothing."""
    one = np.zeros(40, np.int64)
    flat = np.tile(scores(0)[:40], (len(THRESHOLDS), 1))
    found = select_threshold(flat, one)
    assert (found.value, found.taken, found.gain.difference) == (0.5, False, 0.0)
    noise = [np.random.default_rng(seed).normal(0.8, 0.05, (len(THRESHOLDS), len(one))) for seed in range(60)]
    honest = np.mean([select_threshold(each, one).gain.difference for each in noise])
    naive = np.mean([each.mean(1).max() - each[THRESHOLDS.index(0.5)].mean() for each in noise])
    assert abs(honest) < 0.004 < 0.01 < naive


def test_cleaning_keeps_the_largest_component_and_fills_its_holes() -> None:
    mask = np.array(
        [
            [1, 1, 1, 1, 0, 0],
            [1, 0, 0, 1, 0, 1],
            [1, 0, 0, 1, 0, 1],
            [1, 1, 1, 1, 0, 0],
            [0, 0, 0, 0, 1, 0],
        ],
        bool,
    )
    expected = np.zeros_like(mask)
    expected[:4, :4] = True
    # Joined at a corner.
    expected[4, 4] = True
    # A corner is no way out of a hole, and none into it.
    assert np.array_equal(clean_mask(mask), expected)


def test_a_hole_that_touches_the_outside_at_corners_alone_is_filled() -> None:
    ring = np.array([[0, 1, 1, 0], [1, 0, 0, 1], [1, 0, 0, 1], [0, 1, 1, 0]], bool)
    filled = np.array([[0, 1, 1, 0], [1, 1, 1, 1], [1, 1, 1, 1], [0, 1, 1, 0]], bool)
    assert np.array_equal(clean_mask(ring), filled)


def test_the_first_of_two_largest_components_is_kept() -> None:
    mask = np.array([[0, 1, 1, 0, 1], [0, 0, 0, 0, 1], [1, 0, 0, 0, 0]], bool)
    expected = np.zeros_like(mask)
    expected[0, 1:3] = True
    assert np.array_equal(clean_mask(mask), expected)


def test_a_bay_is_no_hole_and_empty_and_full_masks_stay() -> None:
    bay = np.array([[1, 1, 1], [1, 0, 1], [1, 0, 1]], bool)
    assert np.array_equal(clean_mask(bay), bay)
    for mask in (np.zeros((3, 4), bool), np.ones((3, 4), bool), np.ones((1, 1), bool)):
        assert np.array_equal(clean_mask(mask), mask)


def test_decisions_survive_the_record_and_damage_is_named(tmp_path: Path) -> None:
    path, plain = tmp_path / "choices.json", scores(0)
    decision = Decision.make("threshold", 0.45, scores(1) - plain, NETWORKS)
    chosen = SelectedPostprocessing(Postprocessing(threshold=0.45), (decision,), 300, "second fits of trial 7")
    write_json(path, dataclasses.asdict(chosen))
    assert read_record(SelectedPostprocessing, path) == chosen
    assert from_json(Postprocessing, {"threshold": 0.4, "color": "rgb"}) == Postprocessing(threshold=0.4)
    write_json(path, {"choices": {}})
    with pytest.raises(RecordError, match=r"choices\.json is damaged"):
        read_record(SelectedPostprocessing, path)
