"""The run-to-run variance against the spread of generated runs."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from hpsearch.stats.run_variance import (
    MEDIAN_EFFICIENCY,
    S_FLOOR,
    S_GUESS,
    S_GUESS_DF,
    Floats,
    fold_mean_squares,
    run_variance,
)


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(7)


def simulated(rng: np.random.Generator, means: Floats, sizes: list[int], noise: float) -> list[Floats]:
    """Final scores, a (trials, images) array for each fold, from the per-image model."""
    finals = []
    for size in sizes:
        images = 0.13 * rng.standard_normal(size) + 0.07 * rng.standard_normal((len(means), size))
        finals.append(means[:, None] + noise * rng.standard_normal((len(means), 1)) + images)
    return finals


@pytest.mark.parametrize("noise", [0.006, 0.012])
def test_s_is_the_run_noise_beyond_what_the_images_explain(noise: float, rng: np.random.Generator) -> None:
    found = [run_variance(simulated(rng, np.full(12, 0.8), [150] * 5, noise)) for _ in range(150)]
    weight = S_GUESS_DF / found[0].df
    assert np.mean([each.variance for each in found]) == pytest.approx(
        weight * S_GUESS**2 + (1 - weight) * noise**2, rel=0.1
    )


def test_the_efficiency_of_the_median_is_that_of_chi_squares_of_4_degrees_of_freedom() -> None:
    # Relative variance of n values: 2 / (4 n) for the mean, 1 / (4 n median^2 density^2) for the median.
    median = stats.chi2.median(4)
    assert pytest.approx(2 * (median * stats.chi2.pdf(median, 4)) ** 2, abs=0.005) == MEDIAN_EFFICIENCY


@pytest.mark.parametrize(("n_trials", "n_folds"), [(2, 2), (3, 5), (8, 3)])
def test_the_guess_weighs_4_degrees_of_freedom_beside_those_of_the_residuals(n_trials: int, n_folds: int) -> None:
    # Trials that differ in nothing else than their mean leave no residual.
    values = np.linspace(0.7, 0.8, n_trials)[:, None]
    found = run_variance([np.repeat(values, 6, axis=1)] * n_folds)
    evidence = MEDIAN_EFFICIENCY * (n_trials - 1) * (n_folds - 1)
    assert found.df == pytest.approx(4 + evidence)
    assert found.sd == pytest.approx(0.006 * math.sqrt(4 / (4 + evidence)))


@pytest.mark.parametrize("n_trials", [2, 3, 4, 6])
def test_run_noise_is_not_underestimated_from_few_trials(n_trials: int, rng: np.random.Generator) -> None:
    """The median of two to six mean squares is 7 to 21 % too large, never too small."""
    noise, squares = 0.02, []
    for _ in range(1500):
        means = 0.8 + noise * rng.standard_normal((5, n_trials, 1))
        found = run_variance(list(np.repeat(means, 2, axis=2)))
        squares.append((found.variance * found.df - S_GUESS_DF * S_GUESS**2) / (found.df - S_GUESS_DF))
    assert 1.0 < np.mean(squares) / noise**2 < 1.3


def test_the_image_part_is_unbiased_for_few_images(rng: np.random.Generator) -> None:
    finals = [[0.1 * rng.standard_normal((3, 3)) for _ in range(4)] for _ in range(2000)]
    assert np.mean([fold_mean_squares(each)[1] for each in finals]) == pytest.approx(0.1**2 / 3, rel=0.05)


def test_s_without_evidence_is_the_guess_and_has_a_floor(rng: np.random.Generator) -> None:
    for finals in ([np.ones((1, 5))] * 3, [np.ones((4, 5))]):
        found = run_variance(finals)
        assert (found.sd, found.df) == (S_GUESS, S_GUESS_DF)
    assert run_variance([np.full((40, 5), 0.8)] * 10).sd == S_FLOOR


def test_one_collapsed_fold_does_not_decide_s(rng: np.random.Generator) -> None:
    finals = simulated(rng, np.full(9, 0.8), [150] * 5, 0.006)
    clean = run_variance(finals)
    finals[2][4] -= 0.2
    assert run_variance(finals).sd < 2.5 * clean.sd
