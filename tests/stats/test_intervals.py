"""Intervals against Student's t, hand-worked cases and identities."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from hpsearch.errors import StudyError
from hpsearch.stats.intervals import Interval, bootstrap_mean, corrected_t, paired_difference
from hpsearch.stats.selection import corrected_estimate, predict_test_mean
from hpsearch.stats.study_scores import StudyScores


def test_bootstrap_interval_is_that_of_student_for_many_images() -> None:
    scores = np.random.default_rng(0).normal(0.8, 0.13, 2000)
    ours = bootstrap_mean(scores)
    low, high = stats.t.interval(0.95, 1999, scores.mean(), stats.sem(scores))
    assert ours.mean == pytest.approx(scores.mean())
    assert ours.low == pytest.approx(low, abs=4e-4)
    assert ours.high == pytest.approx(high, abs=4e-4)


def test_run_variance_widens_an_interval_as_variances_add() -> None:
    scores = np.random.default_rng(0).normal(0.8, 0.13, 2000)
    alone, with_runs = bootstrap_mean(scores), bootstrap_mean(scores, run_variance=0.004**2)
    expected = math.sqrt(scores.var(ddof=1) / 2000 + 0.004**2)
    assert with_runs.high - with_runs.low == pytest.approx(2 * 1.96 * expected, rel=0.05)
    assert with_runs.high - with_runs.low > 1.3 * (alone.high - alone.low)


def test_a_run_variance_that_is_hardly_known_widens_an_interval_by_students_t() -> None:
    scores = np.linspace(0.5, 0.5001, 50)
    known, hardly = (bootstrap_mean(scores, run_variance=0.01**2, run_df=df) for df in (math.inf, 4.0))
    assert (known.high - known.low) / 2 == pytest.approx(0.0196, rel=0.05)
    assert (hardly.high - hardly.low) / 2 == pytest.approx(0.0278, rel=0.1)


def test_the_same_scores_give_the_same_interval() -> None:
    scores = np.random.default_rng(0).random(50)
    assert bootstrap_mean(scores) == bootstrap_mean(scores)
    assert bootstrap_mean(scores, run_variance=1e-4) == bootstrap_mean(scores, run_variance=1e-4)


def test_constant_scores_have_an_interval_of_no_width() -> None:
    assert bootstrap_mean(np.full(30, 0.75)) == Interval(0.75, 0.75, 0.75)


def test_no_interval_leaves_what_scores_can_be() -> None:
    low, high = bootstrap_mean(np.array([0.0, 0.0, 0.0, 0.06])), bootstrap_mean(np.array([1.0, 1.0, 0.97]))
    # Without the cut they would go on: the spread of few images is made as wide as its coverage needs.
    assert (low.low, high.high) == (0.0, 1.0)
    assert low.low <= low.mean <= low.high < 0.1
    folds = corrected_t(np.array([0.1, 0.5]))
    assert folds == Interval(0.3, 0.0, 1.0)
    apart = paired_difference(np.array([1.0, 1.0, 0.4]), np.zeros(3))
    assert (apart.high, apart.low > 0) == (1.0, True)
    few = StudyScores(scores=np.array([[0.1, 0.0, 0.2, 0.0], [0.0, 0.1, 0.0, 0.1]]), fold_of=np.arange(4) % 2)
    ours = corrected_estimate(few)
    predicted = predict_test_mean(few, ours, n_test=2)
    assert (ours.low, predicted.low) == (0.0, 0.0)
    assert 0 < ours.mean < ours.high < predicted.high < 1


def test_cutting_takes_away_only_what_scores_cannot_be() -> None:
    rng = np.random.default_rng(0)
    n_cut = 0
    for _ in range(30):
        scores = rng.beta(1, rng.choice([0.2, 5]), 6)
        ours = bootstrap_mean(scores)
        # Half as wide and about the middle, the same interval stays whole.
        whole = bootstrap_mean(scores / 2 + 0.25)
        low, high = 2 * (whole.low - 0.25), 2 * (whole.high - 0.25)
        assert (ours.low, ours.high) == pytest.approx((max(0, low), min(1, high)), abs=1e-5)
        n_cut += low < 0 or high > 1
    assert n_cut > 2


def test_an_interval_needs_two_images() -> None:
    with pytest.raises(StudyError, match="at least 2 images, got 1"):
        bootstrap_mean(np.array([0.5]))


def test_corrected_t_is_wider_than_students_by_the_overlap_of_training_sets() -> None:
    fold_means = np.array([0.80, 0.82, 0.79, 0.83, 0.81])
    ours = corrected_t(fold_means)
    # By hand: sd 0.0158114, variance times 1/5 + 1/4, t(4) = 2.776445.
    assert ours is not None
    assert ours.mean == pytest.approx(0.81)
    assert ours.high - ours.mean == pytest.approx(2.776445 * 0.0158114 * math.sqrt(0.45), rel=1e-5)
    plain = stats.t.interval(0.95, 4, 0.81, stats.sem(fold_means))
    assert (ours.high - ours.low) / (plain[1] - plain[0]) == pytest.approx(1.5)


def test_corrected_t_works_with_two_folds_and_not_with_one() -> None:
    two = corrected_t(np.array([0.74, 0.75]))
    assert two is not None
    assert two.high - two.mean == pytest.approx(12.7062 * math.sqrt(1.5 * 0.00005), rel=1e-4)
    assert corrected_t(np.array([0.7])) is None


def test_paired_p_is_that_of_the_t_test_for_many_images() -> None:
    rng = np.random.default_rng(1)
    first = rng.normal(0.80, 0.13, 1500)
    second = first - rng.normal(0.004, 0.07, 1500)
    ours = paired_difference(first, second)
    assert ours.difference == pytest.approx((first - second).mean())
    assert ours.p == pytest.approx(stats.ttest_rel(first, second).pvalue, abs=0.01)
    assert ours.low < ours.difference < ours.high


def test_swapping_the_two_changes_the_sign_only() -> None:
    rng = np.random.default_rng(2)
    first, second = rng.random((2, 200))
    there, back = paired_difference(first, second), paired_difference(second, first)
    assert there.difference == pytest.approx(-back.difference)
    assert there.low == pytest.approx(-back.high)
    assert there.p == back.p


def test_equal_scores_differ_with_p_one_and_a_constant_gain_is_certain() -> None:
    scores = np.random.default_rng(0).random(40)
    same = paired_difference(scores, scores)
    assert (same.difference, same.low, same.high, same.p) == (0, 0, 0, 1)
    shifted = paired_difference(scores + 0.125, scores)
    assert shifted.low == pytest.approx(0.125)
    assert shifted.p < 0.002
