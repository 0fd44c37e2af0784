"""Ties, selection bias and corrections against formulas, identities and studies whose truth is known."""

from __future__ import annotations

import importlib.util
import math
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy import stats

from hpsearch.errors import StudyError
from hpsearch.stats import mixed_model, selection
from hpsearch.stats.intervals import Floats, bootstrap_mean, paired_difference
from hpsearch.stats.mixed_model import posterior_contrast
from hpsearch.stats.run_variance import S_GUESS, S_GUESS_DF
from hpsearch.stats.selection import (
    Corrected,
    _posterior,
    best_row,
    corrected_estimate,
    corrected_gain,
    predict_test_mean,
    select_for_replication,
    tied_with_best,
)
from hpsearch.stats.study_scores import StudyScores, trial_statistics


def study(
    mu: list[float], *, run: float = 0.0, n_images: int = 400, n_folds: int = 5, n_replicated: int = 0, seed: int = 0
) -> StudyScores:
    """A generated study: sd of images 0.13, of a configuration on an image 0.07, of a fold from run to run `run`."""
    rng = np.random.default_rng(seed)
    fold_of = rng.permutation(np.arange(n_images) % n_folds)
    without_runs = np.array(mu)[:, None] + 0.13 * rng.standard_normal(n_images)
    without_runs = without_runs + 0.07 * rng.standard_normal((len(mu), n_images))
    runs = run * rng.standard_normal((2, len(mu), n_folds))
    first = StudyScores(scores=without_runs + runs[0][:, fold_of], fold_of=fold_of)
    if not n_replicated:
        return first
    rows = select_for_replication(first.scores, n_replicated)
    return replace(first, replicated=rows, replicates=(without_runs + runs[1][:, fold_of])[list(rows)])


# Trials


def test_trial_statistics_hold_the_spread_of_folds_and_of_runs() -> None:
    made = study([0.8, 0.7], run=0.01)
    rows = trial_statistics(made)
    for row, scores in zip(rows, made.scores, strict=True):
        fold_means = [scores[made.fold_of == fold].mean() for fold in range(5)]
        assert row.mean == pytest.approx(scores.mean())
        assert row.sd_folds == pytest.approx(np.std(fold_means, ddof=1))
        images = bootstrap_mean(scores)
        assert images.high - images.low < row.total.high - row.total.low
        assert row.folds is not None


def test_a_replicated_trials_mean_is_over_both_fits() -> None:
    made = study([0.8, 0.8, 0.8], run=0.01, n_replicated=2)
    assert made.replicates is not None
    trial = made.replicated[1]
    both = (made.scores[trial].mean() + made.replicates[1].mean()) / 2
    assert trial_statistics(made)[trial].mean == pytest.approx(both)


def test_one_fold_and_one_trial_have_statistics() -> None:
    single = StudyScores(scores=np.random.default_rng(0).random((1, 30)), fold_of=np.zeros(30, np.int64))
    (row,) = trial_statistics(single)
    assert (row.folds, row.sd_folds) == (None, 0.0)
    assert tied_with_best(single) == (0,)
    assert select_for_replication(single.scores) == (0,)


def test_the_tied_set_is_everything_when_all_are_equal_and_only_the_best_when_it_is_far_ahead() -> None:
    assert set(tied_with_best(study([0.8] * 8, n_images=2000))) == set(range(8))
    assert tied_with_best(study([0.9] + [0.7] * 7, n_images=2000)) == (0,)


def test_image_noise_alone_ties_equal_trials() -> None:
    assert len(tied_with_best(study([0.8] * 30, run=0.0, n_images=200))) >= 20


def test_trials_that_agree_on_every_image_are_told_apart_by_a_small_gap() -> None:
    rng = np.random.default_rng(0)
    hard = 0.8 + 0.1 * rng.standard_normal(4000)
    scores = hard - np.array([[0.0], [0.01], [0.012], [0.013]]) + 0.002 * rng.standard_normal((4, 4000))
    # Taken one by one, each mean is known to 0.0016 only.
    assert tied_with_best(StudyScores(scores=scores, fold_of=np.arange(4000) % 20)) == (0,)


@pytest.mark.parametrize(("gap", "tied"), [(0.016, (0, 1)), (0.020, (0,))])
def test_a_gap_that_ties_grows_with_the_uncertainty_about_runs(gap: float, tied: tuple[int, ...]) -> None:
    # One fold: s is the guess with 4 degrees of freedom. The one-sided 95 % point is 2.13 times sqrt(2) s = 0.0181,
    # where a normal distribution would give 0.0140.
    scores = np.random.default_rng(0).random(50) / 2 + np.array([[gap], [0.0]])
    assert tied_with_best(StudyScores(scores=scores, fold_of=np.zeros(50, np.int64))) == tied


def test_the_tied_set_begins_with_the_best_mean() -> None:
    made = study([0.80, 0.81, 0.80, 0.79], run=0.01)
    tied = tied_with_best(made)
    means = made.scores.mean(axis=1)
    assert tied[0] == means.argmax()
    assert [means[trial] for trial in tied] == sorted((means[trial] for trial in tied), reverse=True)


def test_collapsed_trials_do_not_tie_the_good_ones() -> None:
    made = study([0.84, 0.81], run=0.003, n_images=1000)
    collapsed = np.random.default_rng(1).choice([0.0, 0.9], (20, 1000), p=[0.6, 0.4])
    assert tied_with_best(made) == (0,)
    assert tied_with_best(replace(made, scores=np.concatenate([made.scores, collapsed]))) == (0,)


def test_identical_trials_are_tied() -> None:
    scores = np.tile(np.random.default_rng(0).random(100), (4, 1))
    assert tied_with_best(StudyScores(scores=scores, fold_of=np.arange(100) % 5)) == (0, 1, 2, 3)


def test_more_run_variance_ties_more_trials() -> None:
    mu = list(np.linspace(0.78, 0.80, 12))
    sizes = [len(tied_with_best(study(mu, run=run, n_images=4000))) for run in (0.0, 0.01, 0.02)]
    assert sizes == sorted(sizes)
    assert sizes[0] < sizes[2]


# The winner


def test_bootstrap_selection_replicateds_the_best_and_at_most_five() -> None:
    made = study([0.8] * 12, n_images=300)
    picked = select_for_replication(made.scores)
    assert len(picked) == len(set(picked)) == 5
    assert int(made.scores.mean(axis=1).argmax()) == picked[0]
    assert select_for_replication(study([0.9] + [0.7] * 11).scores) == (0,)


def test_the_winner_is_the_replicated_trial_that_is_best_by_both_fits() -> None:
    scores = np.array([[0.9, 0.9], [0.8, 0.8], [0.7, 0.7]])
    fold_of = np.array([0, 1])
    assert best_row(StudyScores(scores=scores, fold_of=fold_of)) == 0
    second = np.array([[0.5, 0.5], [0.8, 0.8]])
    assert best_row(StudyScores(scores=scores, fold_of=fold_of, replicated=(0, 1), replicates=second)) == 1


def test_a_single_trial_needs_no_correction() -> None:
    made = study([0.8])
    ours = corrected_estimate(made)
    assert (ours.method, ours.mean) == ("single", pytest.approx(made.scores.mean()))
    twice = StudyScores(scores=made.scores, fold_of=made.fold_of, replicated=(0,), replicates=made.scores + 0.02)
    assert corrected_estimate(twice).mean == pytest.approx(made.scores.mean() + 0.01)


@pytest.mark.parametrize("n_replicated", [0, 5])
def test_a_winner_far_ahead_keeps_its_mean(n_replicated: int) -> None:
    made = study([0.9, 0.7, 0.71, 0.69, 0.72], run=0.01, n_images=2000, n_replicated=n_replicated)
    ours, gain = corrected_estimate(made), corrected_gain(made, 0, 1)
    assert (ours.trial, ours.method) == (0, "confirmed" if n_replicated else "first")
    assert ours.mean == pytest.approx(made.joint[0].mean(), abs=0.001)
    assert ours.naive == pytest.approx(made.scores[0].mean())
    assert gain.difference == pytest.approx((made.joint[0] - made.joint[1]).mean(), abs=0.001)
    assert gain.p < 1e-6


def test_the_best_of_equal_trials_is_pulled_to_their_mean() -> None:
    made = study([0.8] * 40, run=0.006, n_images=2000)
    ours, means = corrected_estimate(made), made.scores.mean(axis=1)
    assert ours.naive == means.max()
    # On generated studies with equal trials about four fifths of the lead go.
    assert means.mean() < ours.mean < means.mean() + 0.4 * (means.max() - means.mean())


@pytest.mark.parametrize(("n_folds", "n_replicated"), [(1, 0), (5, 0), (5, 5)])
def test_selection_bias_is_taken_off_the_winners_mean_and_off_its_gain(n_folds: int, n_replicated: int) -> None:
    # One fold does not tell the spread of runs, so that it has to be as guessed.
    run = 0.012 if n_folds > 1 else S_GUESS
    plain, mean, gain = [], [], []
    for seed in range(25):
        made = study([0.8] * 20, run=run, n_folds=n_folds, n_replicated=n_replicated, seed=seed, n_images=300)
        ours = corrected_estimate(made)
        plain.append(ours.naive - 0.8)
        mean.append(ours.mean - 0.8)
        if ours.trial != 0:
            gain.append(corrected_gain(made, ours.trial).difference)
    assert np.mean(plain) > 0.01
    assert abs(np.mean(mean)) < 0.4 * np.mean(plain)
    assert abs(np.mean(gain)) < 0.4 * np.mean(plain)


def test_the_bias_of_trials_that_survived_racing_is_corrected() -> None:
    # Of 60 equal trials, the eight that were luckiest in their first fold ran the others.
    biases: dict[str, list[float]] = {"with": [], "without": []}
    for seed in range(25):
        made = study([0.8] * 60, run=0.012, n_images=300, seed=seed)
        order = made.scores[:, made.folds[0]].mean(axis=1).argsort()
        raced = replace(made, scores=made.scores[order[-8:]])
        dropped = np.where(made.fold_of == made.fold_of[made.folds[0][0]], made.scores[order[:-8]], np.nan)
        biases["without"].append(corrected_estimate(raced).mean - 0.8)
        biases["with"].append(corrected_estimate(replace(raced, pruned=dropped)).mean - 0.8)
    assert np.mean(biases["without"]) > np.mean(biases["with"]) + 0.002
    assert abs(np.mean(biases["with"])) < 0.0045


def test_the_posterior_is_that_of_the_normal_model_when_the_spread_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    means = 0.8 + 0.01 * rng.standard_normal((6, 3))
    precision = 1 / rng.uniform(0.004, 0.01, (6, 3)) ** 2
    precision[4, 1:] = 0
    share, tau = np.array([0.5, 0.3, 0.2]), 0.007
    everyone = np.arange(6)

    def only_tau(means: Floats, precision: Floats, guides: NDArray[np.bool_], *, top: float, se: float) -> Any:
        fits = fit(means, precision, guides, top=tau / (20 / (mixed_model.N_GRID - 1)) ** 1.5, se=se)
        return fits._replace(share=np.eye(mixed_model.N_GRID)[20])

    fit = mixed_model.fit
    monkeypatch.setattr(mixed_model, "fit", only_tau)
    monkeypatch.setattr(mixed_model, "NOISE", math.inf)
    for reference in (None, 2):
        # By hand: (f, mu) of all but the reference are normal, with f flat.
        others = everyone[everyone != reference] if reference is not None else everyone
        design = np.array([[*(np.arange(3) == k), *(everyone == c)] for c in others for k in range(3)], float)
        prior = np.diag([0.0] * 3 + [tau**-2] * 6)
        posterior = np.linalg.inv(design.T @ (precision[others].ravel()[:, None] * design) + prior)
        found = posterior @ design.T @ (precision[others] * means[others]).ravel()
        of_reference = share if reference is None else precision[reference] / precision[reference].sum()
        target = np.concatenate([of_reference, everyone == 1])
        expected, variance = target @ found, target @ posterior @ target
        if reference is not None:
            expected -= of_reference @ means[reference]
            variance += 1 / precision[reference].sum()
        weights, choice_variance = posterior_contrast(means, precision, share, 1, reference)
        assert (weights * means).sum() == pytest.approx(expected, abs=1e-9)
        noise = (weights[precision > 0] ** 2 / precision[precision > 0]).sum()
        assert choice_variance + noise == pytest.approx(variance, rel=1e-6)
        # Moving a fold's level moves the estimate by the fold's share, and no gain at all.
        assert weights.sum(axis=0) == pytest.approx(share if reference is None else np.zeros(3), abs=1e-9)


def test_the_choice_variance_holds_that_the_spread_of_trials_is_not_known(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    means = 0.8 + 0.01 * rng.standard_normal((6, 3))
    precision, share, fit = np.full((6, 3), 1 / 0.006**2), np.full(3, 1 / 3), mixed_model.fit
    found = []
    for at in ([5], [25], [5, 25]):

        def evenly_at(*given: Any, at: list[int] = at, **more: Any) -> Any:
            return fit(*given, **more)._replace(share=np.isin(np.arange(mixed_model.N_GRID), at) / len(at))

        monkeypatch.setattr(mixed_model, "fit", evenly_at)
        monkeypatch.setattr(mixed_model, "MAX_ROUNDS", 1)
        found.append(posterior_contrast(means, precision, share, int(means.mean(axis=1).argmax())))
    (narrow, narrow_variance), (wide, wide_variance), (either, either_variance) = found
    assert np.allclose(either, (narrow + wide) / 2)
    apart = ((narrow - wide) * means).sum()
    assert either_variance == pytest.approx((narrow_variance + wide_variance) / 2 + (apart / 2) ** 2)
    assert abs(apart) > 0.001


def test_a_long_tail_of_bad_trials_does_not_hide_that_the_good_ones_are_equal() -> None:
    good = study([0.8] * 30, run=0.006, n_images=1000)
    bad = study([0.76, 0.7, 0.6, 0.4, 0.1, 0.74, 0.3, 0.5], run=0.006, n_images=1000, seed=1)
    with_bad = replace(good, scores=np.concatenate([good.scores, bad.scores]))
    assert corrected_estimate(with_bad).mean == pytest.approx(corrected_estimate(good).mean, abs=1e-3)


def test_a_trial_far_below_the_others_is_not_pulled_up_to_them() -> None:
    made = study([0.8] * 20 + [0.3], run=0.006, n_images=1000)
    expected = (made.scores[20] - made.scores[0]).mean()
    assert corrected_gain(made, 20).difference == pytest.approx(expected, abs=0.002)


def test_the_gain_of_the_winner_of_equal_trials_is_seldom_taken_for_real() -> None:
    n_sure, n_plain = 0, 0
    for seed in range(60):
        made = study([0.8] * 30, run=0.006, n_replicated=5, seed=seed)
        winner = best_row(made)
        gain = corrected_gain(made, winner)
        n_sure += gain.low > 0
        difference = made.joint[winner] - made.joint[0]
        variance = difference.var(ddof=1) / made.n_images + made.run_variances[[0, winner]].sum()
        n_plain += difference.mean() > 1.96 * math.sqrt(variance)
    assert n_sure <= 5  # 2.5 % of 60 are 1.5
    assert n_plain >= 10


# What the variances hold


def test_each_part_of_a_gains_variance_is_what_it_says() -> None:
    made = study([0.8, 0.86, *np.linspace(0.74, 0.84, 10)], run=0.01, n_images=1000, n_replicated=3, seed=1)
    n, winner = made.n_images, 1
    assert best_row(made) == winner
    found = _posterior(made, winner, 0)
    # A winner this far ahead is hardly pulled, so its own scores less the reference's count.
    difference = made.joint[winner] - made.joint[0]
    assert found.image_variance == pytest.approx(difference.var(ddof=1) / n, rel=0.1)
    expected = made.runs.variance / 5 * (1 / made.n_fits[winner] + 1 / made.n_fits[0])
    assert found.run_variance == pytest.approx(expected, rel=0.1)
    gain = corrected_gain(made, winner)
    total = found.image_variance + found.run_variance + found.choice_variance
    assert (gain.high - gain.low) / 2 > 1.96 * math.sqrt(total)
    df = total**2 / (
        (found.image_variance + found.choice_variance) ** 2 / (n - 1) + found.run_variance**2 / made.runs.df
    )
    assert (gain.high - gain.low) / 2 == pytest.approx(stats.t.ppf(0.975, df) * math.sqrt(total))
    assert gain.p == pytest.approx(2 * stats.t.sf(gain.difference / math.sqrt(total), df))


def test_the_corrected_interval_holds_the_images_the_runs_and_the_choice() -> None:
    made = study([0.8] * 12, run=0.01, n_images=500)
    ours = corrected_estimate(made)
    parts = (ours.image_variance, ours.run_variance, ours.choice_variance)
    assert min(parts) > 1e-7
    total, images = sum(parts), ours.image_variance + ours.choice_variance
    df = total**2 / (images**2 / (made.n_images - 1) + ours.run_variance**2 / made.runs.df)
    assert (ours.high - ours.low) / 2 == pytest.approx(stats.t.ppf(0.975, df) * math.sqrt(total))


def test_few_runs_widen_an_interval_by_students_t() -> None:
    # Nearly all variance is of runs, known from the guess alone with 4 degrees of freedom: t is 2.78, not 1.96.
    scores = np.tile([0.8, 0.8 + 1e-6], (1, 50))
    single = StudyScores(scores=scores, fold_of=np.arange(100) % 5)
    assert single.runs.df == pytest.approx(S_GUESS_DF)
    ours = corrected_estimate(single)
    assert (ours.high - ours.low) / 2 == pytest.approx(2.7764 * S_GUESS / math.sqrt(5), rel=1e-3)


def test_the_choice_adds_variance_only_where_trials_are_alike() -> None:
    alike, apart = study([0.8, *[0.799] * 11], run=0.006), study([0.9, *[0.7] * 11], run=0.006)
    assert corrected_estimate(alike).choice_variance > 4 * corrected_estimate(apart).choice_variance


def test_a_second_fit_halves_the_run_variance() -> None:
    made = study([0.9, 0.7, 0.7, 0.7], run=0.01, n_images=1000)
    assert made.run_variances == pytest.approx(np.full(4, made.runs.variance / 5))
    twice = replace(made, replicated=(0,), replicates=made.scores[:1])
    assert twice.run_variances == pytest.approx(twice.runs.variance / 5 / np.array([2, 1, 1, 1]))
    ratio = corrected_estimate(twice).run_variance / twice.runs.variance
    assert ratio == pytest.approx(corrected_estimate(made).run_variance / made.runs.variance / 2, rel=0.1)


def test_the_model_weighs_a_fold_mean_by_its_images_and_its_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    made = replace(study([0.8] * 6, run=0.01, n_images=500), replicated=(1,), replicates=np.full((1, 500), 0.8))
    made = replace(made, pruned=np.where(made.fold_of == 2, made.scores[:1], np.nan))
    given = []

    def spy(means: Floats, precision: Floats, *more: Any) -> Any:
        given.append(precision)
        return posterior_contrast(means, precision, *more)

    monkeypatch.setattr(selection, "posterior_contrast", spy)
    corrected_estimate(made)
    once = 1 / (made.image_variance / 100 + made.runs.variance)
    twice = 1 / (made.image_variance / 100 + made.runs.variance / 2)
    expected = np.full((7, 5), once)
    expected[1], expected[6] = twice, [0, 0, once, 0, 0]
    assert np.allclose(given, [expected])
    # The generated sd of a configuration on an image.
    assert made.image_variance == pytest.approx(0.07**2, rel=0.1)


def test_no_p_is_zero() -> None:
    rng = np.random.default_rng(0)
    first = rng.random(50)
    # 2000 draws cannot tell less than 2 / 2001.
    assert paired_difference(first + 1e-3, first).p == pytest.approx(2 / 2001)
    # 300 standard errors.
    assert corrected_gain(study([0.1, *[0.9] * 40], n_images=4000), 1).p > 0
    constant = StudyScores(scores=np.array([[0.5] * 10, [0.9] * 10, [0.9] * 10]), fold_of=np.arange(10) % 2)
    assert 0 < corrected_gain(constant, 1).p < 0.05


def test_identical_trials_and_few_images_give_finite_numbers() -> None:
    tied = StudyScores(
        scores=np.full((4, 6), 0.75), fold_of=np.arange(6) % 2, replicated=(2, 0), replicates=np.full((2, 6), 0.75)
    )
    ours = corrected_estimate(tied)
    assert ours.mean == pytest.approx(0.75)
    assert ours.low < 0.75 < ours.high


@given(
    n_trials=st.integers(1, 5),
    n_images=st.integers(2, 12),
    n_folds=st.integers(1, 4),
    n_replicated=st.integers(0, 5),
    seed=st.integers(0, 1000),
)
@settings(max_examples=40, deadline=None)
def test_every_small_study_has_ordered_finite_intervals(
    n_trials: int, n_images: int, n_folds: int, n_replicated: int, seed: int
) -> None:
    made = study(
        [0.5] * n_trials,
        run=0.01,
        n_images=n_images,
        n_folds=min(n_folds, n_images),
        n_replicated=n_replicated,
        seed=seed,
    )
    dropped = np.where(made.fold_of == made.fold_of[0], made.scores - 0.1, np.nan)
    made = replace(made, pruned=dropped if seed % 2 else None)
    ours = corrected_estimate(made)
    predicted = predict_test_mean(made, ours, n_test=5)
    if ours.trial != 0:
        gain = corrected_gain(made, ours.trial)
        assert -1 <= gain.low <= gain.difference <= gain.high <= 1
        assert 0 < gain.p <= 1
    for interval in (ours, predicted, *(row.total for row in trial_statistics(made))):
        assert math.isfinite(interval.low)
        assert interval.low <= interval.mean <= interval.high
    tied = tied_with_best(made)
    assert tied[0] == made.joint.mean(axis=1).argmax()
    assert set(tied) <= set(range(made.n_trials))


# Prediction


def corrected(image_variance: float, run_variance: float) -> Corrected:
    return Corrected(
        trial=0,
        naive=0.85,
        mean=0.84,
        low=0.83,
        high=0.85,
        image_variance=image_variance,
        run_variance=run_variance,
        choice_variance=0.0,
        method="confirmed",
    )


@pytest.mark.parametrize("n_test", [50, 600])
def test_prediction_adds_the_variance_of_test_images_and_of_retraining(n_test: int) -> None:
    made = study([0.8] * 30, run=0.01, n_images=4000)
    s = math.sqrt(made.runs.variance)
    assert s == pytest.approx(0.01, rel=0.2)
    known = replace(corrected(0.003**2, 0.002**2), choice_variance=0.001**2)
    images = 0.003**2 + 0.001**2 + made.scores[0].var(ddof=1) / n_test
    variance = images + 0.002**2 + s**2 / 2
    df = variance**2 / (images**2 / 3999 + (0.002**2 + s**2 / 2) ** 2 / made.runs.df)
    predicted = predict_test_mean(made, known, n_test=n_test, n_runs=2)
    assert predicted.mean == 0.84
    assert predicted.high - 0.84 == pytest.approx(stats.t.ppf(0.975, df) * math.sqrt(variance), rel=1e-6)


@pytest.mark.parametrize("run", [0.0, 0.006, 0.02])
@pytest.mark.parametrize("n_trials", [3, 15])
def test_the_run_variance_is_found_from_first_and_second_fits(run: float, n_trials: int) -> None:
    # With three trials most of it comes from the second fits.
    found = [
        study([0.8] * n_trials, run=run, n_images=3000, n_folds=10, n_replicated=10, seed=seed).runs
        for seed in range(8)
    ]
    assert found[0].df >= 4 + 9 * (n_trials - 1)
    guess = 4 / found[0].df
    expected = guess * S_GUESS**2 + (1 - guess) * run**2
    assert np.mean([each.variance for each in found]) == pytest.approx(expected, rel=0.25, abs=4e-6)


def test_second_fits_alone_tell_the_run_variance_of_an_only_trial() -> None:
    rng = np.random.default_rng(0)
    fold_of, first = np.arange(2000) % 20, rng.random((1, 2000))
    second = first + 0.02 * math.sqrt(2) * rng.standard_normal(20)[fold_of]
    made = StudyScores(scores=first, fold_of=fold_of, replicated=(0,), replicates=second)
    assert made.runs.df == 4 + 19
    assert math.sqrt(made.runs.variance) == pytest.approx(0.02, rel=0.3)
    # That all folds moved alike is selection, not run-to-run variance.
    moved = replace(made, replicates=second - 0.3)
    assert moved.runs.variance == pytest.approx(made.runs.variance)


def test_what_images_do_to_a_second_fit_is_not_taken_for_runs() -> None:
    rng = np.random.default_rng(0)
    first = rng.random((1, 2000))
    second = first + 0.1 * rng.standard_normal((1, 2000))
    made = StudyScores(scores=first, fold_of=np.arange(2000) % 20, replicated=(0,), replicates=second)
    # The moves of a fold's mean have a variance of 0.1^2 / 100; half of it would be an s of 0.0071.
    assert math.sqrt(made.runs.variance) < 0.005


def test_a_fold_that_collapsed_does_not_decide_the_run_variance() -> None:
    made = study([0.8] * 12, run=0.006, n_images=1000)
    scores = made.scores.copy()
    scores[3, made.folds[2]] -= 0.2
    assert math.sqrt(replace(made, scores=scores).runs.variance) < 2.5 * math.sqrt(made.runs.variance)


def test_more_test_images_and_more_runs_narrow_the_prediction() -> None:
    made, known = study([0.8] * 6, run=0.01), corrected(0.003**2, 0.002**2)

    def width(n_test: int, n_runs: int) -> float:
        interval = predict_test_mean(made, known, n_test=n_test, n_runs=n_runs)
        return interval.high - interval.low

    assert width(600, 1) < width(100, 1)
    assert width(600, 3) < width(600, 1)


# What cannot be


def test_shapes_that_do_not_fit_are_refused() -> None:
    scores: Floats = np.random.default_rng(0).random((3, 10))
    fold_of = np.arange(10) % 2
    with pytest.raises(ValueError, match="shape"):
        StudyScores(scores=scores, fold_of=fold_of[:9])
    with pytest.raises(ValueError, match="finite score for every image"):
        StudyScores(scores=np.where(scores > 0.9, np.nan, scores), fold_of=fold_of)
    with pytest.raises(StudyError, match="at least 2 images"):
        StudyScores(scores=scores[:, :1], fold_of=fold_of[:1])


def test_statistics_load_no_torch() -> None:
    code = "import sys, hpsearch.stats.selection; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# The claims, on studies whose truth is known


@pytest.fixture(scope="module")
def benchmark_module() -> Iterator[ModuleType]:
    path = Path(__file__).parents[2] / "benchmarks" / "study_statistics.py"
    spec = importlib.util.spec_from_file_location("benchmark_statistics", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        # As for a script, whose folder comes first.
        patch.syspath_prepend(str(path.parent))
        patch.setitem(sys.modules, spec.name, module)
        spec.loader.exec_module(module)
        yield module


def test_the_benchmark_races_and_prints_every_setting(
    benchmark_module: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    options = "--studies 2 --images 60 --trials 6 --spreads 0.01 --shape skewed"
    monkeypatch.setattr(sys, "argv", ["study_statistics.py", *options.split()])
    benchmark_module.main()
    printed = capsys.readouterr().out
    rows = [line.split() for line in printed.splitlines() if re.match(r"(normal|t3) +60 ", line)]
    assert [(row[0], row[4]) for row in rows] == [("normal", "no"), ("t3", "no"), ("normal", "yes"), ("t3", "yes")]
    assert [float(row[5]) for row in rows[:2]] == [6, 6]
    assert all(float(row[5]) < 6 for row in rows[2:])


@pytest.mark.slow
@pytest.mark.parametrize("spread", [0.0, 0.01])
@pytest.mark.parametrize("noise", ["normal", "t3"])
@pytest.mark.parametrize("race", [False, True])
def test_estimates_cover_and_gains_are_seldom_false(
    benchmark_module: ModuleType, spread: float, noise: str, race: bool
) -> None:
    n = 60 if race else 200
    setting = benchmark_module.Setting(spread=spread, noise=noise, race=race)
    found = benchmark_module.summarise(setting, n)
    mean, error = found.mean, found.error
    # Three standard errors of a mean, and of a share of 95 %, beyond the targets.
    three = 3 * math.sqrt(0.95 * 0.05 / n)
    assert abs(mean.mean) <= 0.001 + 3 * error.mean
    assert min(mean.covered, mean.predicted) >= 0.93 - three
    assert mean.holds_best >= 0.95 - three
    if spread == 0:
        assert mean.naive > 0.003
    if race:
        # The race prunes trial 0 in nearly all studies, so that few claim a gain.
        return
    assert abs(mean.gain) <= 0.001 + 3 * error.gain
    assert mean.gain_covered >= 0.93 - three
    assert mean.false <= 0.04 + three
    if spread == 0:
        assert mean.plain_covered < 0.9
