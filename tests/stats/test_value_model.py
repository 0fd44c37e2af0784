"""The predicted values against dense conditioning of a normal distribution, identities, and simulated studies."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import stats

from hpsearch.stats import value_model as module
from hpsearch.stats.mixed_model import N_GRID, SCALE
from hpsearch.stats.run_variance import NEAR, S_FLOOR, S_GUESS, S_GUESS_DF
from hpsearch.stats.value_model import (
    G_GUESS,
    MAX_NEAR,
    S_GRID,
    ValueModel,
    Values,
    near_rows,
    residual_variance,
    value_model,
)

Floats = NDArray[np.float64]
NAN = math.nan
G2 = 0.07**2


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(7)


def fitted(means: Floats, sizes: list[int], g2: float = G2) -> tuple[ValueModel, Values]:
    model = value_model(means, sizes, g2)
    return model, model.predict(means)


def drawn(rng: np.random.Generator, mu: Floats, sizes: list[int], s: float, g: float = 0.07) -> Floats:
    """Fold means from the model."""
    n = np.array(sizes)
    level = 0.8 + 0.13 * rng.standard_normal(len(n)) / np.sqrt(n)
    return level + mu[:, None] + np.sqrt(g**2 / n + s**2) * rng.standard_normal((len(mu), len(n)))


def without(means: Floats, *folds: tuple[int, int]) -> Floats:
    """The fold means, without those of these trials and folds."""
    result = means.copy()
    for row, fold in folds:
        result[row, fold] = NAN
    return result


SIZES = [20, 40, 60]
PARTLY = np.array(
    [
        [0.82, 0.79, 0.81],
        [0.81, 0.80, NAN],
        [0.80, NAN, NAN],
        [0.83, NAN, NAN],
        [0.79, 0.77, 0.80],
    ]
)


def by_brute_force(means: Floats, sizes: list[int], g2: float) -> tuple[Floats, Floats, Floats]:
    """The weights of the grid of s and tau, and mean and covariance of the trials' values at each of its points.

    All effects and all unseen fold means are put into one normal vector, which is conditioned on those that were
    seen. The flat prior of f is a very wide normal one.
    """
    n_trials, n_folds = means.shape
    n, is_known = np.array(sizes), np.isfinite(means).ravel()
    z = means.ravel()[is_known]
    level_of = np.kron(np.ones((n_trials, 1)), np.eye(n_folds))
    trial_of = np.kron(np.eye(n_trials), np.ones((n_folds, 1)))
    value_of = np.kron(np.eye(n_trials), n / n.sum())
    # The spread of the trials bounds the grid of tau.
    spread = np.ptp(near_rows(means)[1])
    logs, values, covariances = [], [], []
    for s in S_GRID:
        variances = np.tile(g2 / n + s**2, n_trials)
        se = 1 / math.sqrt((is_known / variances).reshape(n_trials, n_folds).sum(axis=1).max())
        tau = (2 * spread + 4 * se) * np.linspace(0, 1, N_GRID) ** 1.5
        prior = np.gradient(tau) * stats.halfcauchy.pdf(tau, scale=SCALE * se)
        prior *= stats.chi2.pdf(S_GUESS_DF * S_GUESS**2 / s**2, S_GUESS_DF) / s**2 / prior.sum()
        for each, weight in zip(tau, prior, strict=True):
            covariance = 10.0 * level_of @ level_of.T + each**2 * trial_of @ trial_of.T + np.diag(variances)
            seen = covariance[np.ix_(is_known, is_known)]
            gain = np.linalg.solve(seen, covariance[is_known]).T
            logs.append(math.log(weight) + stats.multivariate_normal.logpdf(z - 0.8, cov=seen))
            values.append(value_of @ (0.8 + gain @ (z - 0.8)))
            covariances.append(value_of @ (covariance - gain @ covariance[is_known]) @ value_of.T)
    weights = np.exp(np.array(logs) - max(logs))
    return weights / weights.sum(), np.array(values), np.array(covariances)


@pytest.mark.parametrize("sizes", [SIZES, [310, 310, 310], [4, 400, 40]])
@pytest.mark.parametrize(
    "means",
    [PARTLY, PARTLY[:, :2], PARTLY[:2], PARTLY[[1, 2]], PARTLY[2:4], PARTLY[2:3], PARTLY[:, [0]]],
    ids=["partly", "two folds", "two trials", "none complete", "one fold seen", "one trial", "fixed split"],
)
def test_the_posterior_is_that_of_dense_conditioning(
    means: Floats, sizes: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "NEGLIGIBLE", 1e-12)
    sizes = sizes[: means.shape[1]]
    model, found = fitted(means, sizes)
    weights, values, covariances = by_brute_force(means, sizes, G2)
    if np.isfinite(means).any(axis=0).all():
        # The level of a fold that no trial has finished is unknown.
        assert found.expected == pytest.approx(weights @ values, abs=1e-6)
    assert model.run_sd == pytest.approx(float(weights @ np.repeat(S_GRID, N_GRID)), rel=1e-4)
    for other in range(len(means)):
        difference = values - values[:, [other]]
        own = np.diagonal(covariances, axis1=1, axis2=2)
        variance = own + own[:, [other]] - 2 * covariances[:, other]
        with np.errstate(divide="ignore"):
            p = weights @ stats.norm.sf(0.003, difference, np.sqrt(np.maximum(variance, 1e-14)))
        assert found.probability_better(other, 0.003) == pytest.approx(p, abs=1e-4)
        for row in range(len(means)):
            d = float(weights @ -difference[:, row])
            total = weights @ (variance[:, row] + (difference[:, row] + d) ** 2)
            assert found.difference(row, other) == pytest.approx((d, math.sqrt(max(total, 0))), abs=1e-5)


def test_the_estimated_true_mean_and_fold_mean_are_those_of_dense_conditioning(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A copy of a trial without any fold has the same effect, but new noise in every fold."""
    monkeypatch.setattr(module, "NEGLIGIBLE", 1e-12)
    _, found = fitted(PARTLY, SIZES)
    weights, values, _ = by_brute_force(PARTLY, SIZES, G2)
    share = np.array(SIZES) / sum(SIZES)
    for row in range(len(PARTLY)):
        of_folds = [found.fold_mean(row, fold) for fold in range(3)]
        assert share @ of_folds == pytest.approx(found.true_means[row])
    # Trials 2 and 3 have finished only fold 0. Their values differ from their true means by its noise only.
    gap = found.expected - found.true_means
    for row in (2, 3):
        assert gap[row] == pytest.approx(share[0] * (PARTLY[row, 0] - found.fold_mean(row, 0)), abs=1e-9)
    assert np.all(np.abs(found.true_means - np.mean(found.true_means)) < np.abs(values.mean(axis=0)))
    assert weights.sum() == pytest.approx(1)


def test_the_value_of_a_complete_trial_is_its_mean_over_all_images(rng: np.random.Generator) -> None:
    sizes = [10, 30, 20, 25]
    means = without(drawn(rng, 0.01 * rng.standard_normal(8), sizes, 0.006), (3, 1), (4, 2), (4, 3))
    _, found = fitted(means, sizes)
    complete = [row for row in range(8) if np.isfinite(means[row]).all()]
    assert found.expected[complete] == pytest.approx(means[complete] @ sizes / sum(sizes))
    for row in complete:
        d, se = found.difference(row, complete[0])
        assert d == pytest.approx(found.expected[complete[0]] - found.expected[row], abs=1e-12)
        assert se == pytest.approx(0, abs=1e-6)


def test_the_comparison_is_paired() -> None:
    """Images of a fold that are harder for all trials change no difference and no probability."""
    _, found = fitted(PARTLY, SIZES)
    _, shifted = fitted(PARTLY + np.array([0.03, -0.06, 0.11]), SIZES)
    for other in range(len(PARTLY)):
        assert shifted.probability_better(other, 0.003) == pytest.approx(found.probability_better(other, 0.003))
        for row in range(len(PARTLY)):
            assert shifted.difference(row, other) == pytest.approx(found.difference(row, other))
    assert shifted.model.run_sd == pytest.approx(found.model.run_sd)


def test_a_difference_has_the_opposite_sign_the_other_way_round() -> None:
    _, found = fitted(PARTLY, SIZES)
    for row in range(len(PARTLY)):
        for other in range(len(PARTLY)):
            d, se = found.difference(row, other)
            assert found.difference(other, row) == pytest.approx((-d, se))
            assert d == pytest.approx(found.expected[other] - found.expected[row])
            both = found.probability_better(other, 0.0)[row] + found.probability_better(row, 0.0)[other]
            assert both == pytest.approx(1.0)


def test_a_lead_from_one_fold_is_shrunk_and_one_of_all_folds_is_not(rng: np.random.Generator) -> None:
    means = drawn(rng, np.zeros(12), SIZES, 0.006, g=0.0)
    means[0] = means[1:].mean(axis=0) + 0.02
    _, complete = fitted(means, SIZES, 0.0)
    _, single = fitted(without(means, (0, 1), (0, 2)), SIZES, 0.0)
    others = (means[1:] @ SIZES / sum(SIZES)).mean()
    assert complete.expected[0] == pytest.approx(others + 0.02)
    assert 0.002 < single.expected[0] - others < 0.012


def test_a_fixed_split_has_one_fold_and_no_unknown_value() -> None:
    means = np.array([[0.80], [0.81], [0.79]])
    _, found = fitted(means, [50])
    assert found.expected == pytest.approx(means[:, 0])
    assert found.probability_better(1, 0.003).tolist() == [0, 0, 0]
    assert found.probability_better(0, 0.003) == pytest.approx([0, 1, 0])


def test_a_single_trial_is_worth_its_mean() -> None:
    model, found = fitted(np.array([[0.7, NAN, 0.8]]), [10, 10, 20])
    assert found.expected == pytest.approx([(0.7 * 10 + 0.8 * 20) / 30], abs=1e-9)
    assert found.true_means == pytest.approx([(0.7 * 10 + 0.8 * 20) / 30], abs=1e-9)
    assert found.probability_better(0, 0.003).tolist() == [0]
    # The mean of the prior is above its guess.
    assert model.run_sd == pytest.approx(0.0075, rel=0.05)


def test_a_copy_without_the_unfinished_folds_of_others_is_predicted_alike() -> None:
    """`predict` knows trials that are not part of the model."""
    model, found = fitted(PARTLY, SIZES)
    some = model.predict(PARTLY[[3, 0]])
    assert some.expected == pytest.approx(found.expected[[3, 0]])
    assert some.difference(0, 1) == pytest.approx(found.difference(3, 0))


def far_below(rng: np.random.Generator, n: int) -> Floats:
    return np.asarray(0.8 - NEAR - 0.1 - 0.4 * rng.random((n, 3)))


@pytest.mark.parametrize("n", [1, 4, 30])
def test_trials_far_below_change_nothing_of_the_others(n: int, rng: np.random.Generator) -> None:
    near = drawn(rng, 0.005 * rng.standard_normal(8), SIZES, 0.006)
    near = without(near, (3, 1), (3, 2), (4, 2))
    _, alone = fitted(near, SIZES)
    model, beside = fitted(np.concatenate([near, far_below(rng, n)]), SIZES)
    assert model.run_sd == pytest.approx(alone.model.run_sd, rel=1e-9)
    assert model.share @ model.tau == pytest.approx(alone.model.share @ alone.model.tau, rel=1e-9)
    assert beside.expected[:8] == pytest.approx(alone.expected)
    for other in range(8):
        expected = alone.probability_better(other, 0.003)
        assert beside.probability_better(other, 0.003)[:8] == pytest.approx(expected, abs=1e-9)


def test_a_trial_far_below_is_not_drawn_toward_the_near_ones(rng: np.random.Generator) -> None:
    near = drawn(rng, np.zeros(8), [300] * 3, 0.003)
    collapsed = np.array([[0.2, NAN, NAN]])
    _, found = fitted(np.concatenate([near, collapsed]), [300] * 3)
    level = near.mean(axis=0)
    assert found.true_means[8] == pytest.approx(level.mean() + 0.2 - level[0], abs=0.002)
    assert found.probability_better(0, 0.003)[8] < 1e-9


def test_the_worst_near_trial_is_drawn_toward_the_others(rng: np.random.Generator) -> None:
    means = np.full((12, 3), 0.80) + 0.001 * rng.standard_normal((12, 3))
    means[11] = [0.78, NAN, NAN]
    _, found = fitted(means, SIZES)
    assert found.true_means[11] > 0.79


def test_only_the_best_near_trials_are_used(rng: np.random.Generator) -> None:
    mu = -np.sort(rng.uniform(0, 0.02, 3 * MAX_NEAR))
    means = 0.8 + np.repeat(mu[:, None], 3, axis=1)[::-1]
    is_near, height = near_rows(means)
    assert is_near.sum() == MAX_NEAR
    assert is_near[-MAX_NEAR:].all()
    assert height == pytest.approx(means[:, 0] - means[is_near, 0].mean())
    model, found = fitted(means, SIZES)
    assert model.level == pytest.approx(np.broadcast_to(means[is_near].mean(axis=0), model.level.shape), abs=1e-9)
    assert found.expected == pytest.approx(means[:, 0])


def test_trials_are_near_by_their_distance_from_the_levels_of_their_folds() -> None:
    """Not by their plain mean: the one that finished only the hard fold is near."""
    hard = np.array([0.80, 0.80, 0.60])
    means = without(hard + np.zeros((5, 3)), (4, 0), (4, 1))
    assert near_rows(means)[0].all()
    means[4, 2] -= NEAR + 0.01
    assert near_rows(means)[0].tolist() == [True] * 4 + [False]


def test_a_trial_in_a_fold_of_its_own_is_predicted_like_one_without_scores() -> None:
    means = np.array([[0.80, NAN], [0.81, NAN], [0.80, NAN], [0.81, NAN], [0.60, 0.40]])
    assert near_rows(means)[0].tolist() == [True] * 4 + [False]
    model, found = fitted(means, [20, 20])
    assert model.folds.tolist() == [0]
    assert np.isfinite(found.expected).all()
    lone = model.predict(np.array([[NAN, 0.40], [NAN, NAN], [0.60, 0.40], [0.60, NAN]]))
    assert lone.expected[0] == lone.expected[1] == pytest.approx(found.expected[:4].mean(), abs=1e-3)
    assert lone.expected[2] == lone.expected[3]
    assert found.fold_mean(0, 1) == pytest.approx(found.true_means[0])


def test_a_large_fold_counts_for_more() -> None:
    means = np.array([[0.80, 0.80], [0.80, 0.84], [0.84, 0.80]])
    _, found = fitted(means, [100, 300])
    assert found.expected == pytest.approx([0.80, 0.83, 0.81])
    # A score on more images says more about the rest.
    first, second = (fitted(without(means, (row, fold)), [20, 300])[1] for row, fold in ((1, 0), (1, 1)))
    assert second.difference(1, 0)[1] > 2 * first.difference(1, 0)[1]


def test_the_run_noise_is_found_and_has_a_floor(rng: np.random.Generator) -> None:
    sizes = [300] * 5
    for s in (0.004, 0.012):
        found = [fitted(drawn(rng, np.zeros(12), sizes, s), sizes)[0].run_sd for _ in range(20)]
        assert np.mean(found) == pytest.approx(s, rel=0.1)
    assert fitted(np.full((40, 10), 0.8), [300] * 10, 0.0)[0].run_sd == pytest.approx(S_FLOOR, rel=0.01)


def test_the_image_part_is_measured_in_folds_that_two_trials_share(rng: np.random.Generator) -> None:
    images = 0.13 * rng.standard_normal((1, 4000)) + 0.03 * rng.standard_normal((3, 4000))
    assert residual_variance([images, images[:1] * 9]) == pytest.approx(0.03**2, rel=0.1)
    assert residual_variance([images[:1]]) == residual_variance([]) == G_GUESS**2
    # In a fold of one image nothing remains after the effects of trial and fold.
    assert residual_variance([images[:, :1]]) == G_GUESS**2


def study_from_prior(rng: np.random.Generator, n_finished: Sequence[int], sizes: list[int]) -> tuple[Floats, Floats]:
    """Fold means of a study whose s and tau are drawn from their priors: all, and those of the finished folds."""
    while True:
        s = S_GUESS / math.sqrt(rng.chisquare(S_GUESS_DF) / S_GUESS_DF)
        se = 1 / math.sqrt((1 / (G2 / np.array(sizes) + s**2))[: max(n_finished)].sum())
        tau = SCALE * se * abs(rng.standard_cauchy())
        means = drawn(rng, tau * rng.standard_normal(len(n_finished)), sizes, s)
        seen = np.where(np.arange(len(sizes)) < np.array(n_finished)[:, None], means, NAN)
        if S_GRID[0] < s < S_GRID[-1] and near_rows(seen)[0].all():
            return np.asarray(means), np.asarray(seen)


@pytest.mark.parametrize(
    "n_finished",
    [(1,) * 10, (5, 4, 2, 2, 1, 1, 1, 1, 1, 1), (5, 5, 5, 3, 3, 2, 2, 1, 1, 1), (1, 1), (5, 2, 1)],
    ids=["first folds", "few folds", "many folds", "two trials", "three trials"],
)
def test_differences_and_probabilities_are_calibrated(n_finished: tuple[int, ...]) -> None:
    rng = np.random.default_rng(len(n_finished))
    sizes = [60, 80, 100, 60, 100]
    found_p, found_better, found_z = [], [], []
    for _ in range(300):
        means, seen = study_from_prior(rng, n_finished, sizes)
        _, found = fitted(seen, sizes)
        values = means @ sizes / sum(sizes)
        leader = int(np.argmax(found.expected))
        rest = [row for row, n in enumerate(n_finished) if row != leader and n < 5]
        row = int(rng.choice(rest))
        d, se = found.difference(row, leader)
        found_z.append((values[leader] - values[row] - d) / se)
        found_p.append(found.probability_better(leader, 0.003)[row])
        found_better.append(values[row] - values[leader] > 0.003)
    p, is_better, z = np.array(found_p), np.array(found_better), np.array(found_z)
    # Three standard errors of 300 normal numbers.
    assert np.mean(z) == pytest.approx(0, abs=0.18)
    assert np.var(z) == pytest.approx(1, abs=0.25)
    for low, high in ((0, 0.05), (0.05, 0.2), (0.2, 1)):
        chosen = (p >= low) & (p < high)
        tolerance = 3 * math.sqrt((p * (1 - p))[chosen].sum()) + 1
        assert is_better[chosen].sum() == pytest.approx(p[chosen].sum(), abs=tolerance)
