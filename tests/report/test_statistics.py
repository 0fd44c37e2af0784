"""Intervals, ties and corrections against formulas, identities and studies whose truth is known."""

from __future__ import annotations

import importlib.util
import math
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from hpsearch.errors import StudyError
from hpsearch.report.statistics import (
    Corrected,
    Floats,
    Interval,
    StudyScores,
    bootstrap_mean,
    cheapest,
    chosen,
    compare_trials,
    corrected_estimate,
    corrected_t,
    explain_test_mean,
    paired_difference,
    predict_test_mean,
    select_for_confirmation,
    tied_with_best,
    trial_statistics,
)
from hpsearch.tuning.racing import S_FLOOR


def study(
    mu: list[float], *, run: float = 0.0, n_images: int = 400, n_folds: int = 5, n_confirm: int = 0, seed: int = 0
) -> StudyScores:
    """A generated study: sd of images 0.13, of a configuration on an image 0.07, of a fold from run to run `run`."""
    rng = np.random.default_rng(seed)
    fold_of = rng.permutation(np.arange(n_images) % n_folds)
    without_luck = np.array(mu)[:, None] + 0.13 * rng.standard_normal(n_images)
    without_luck = without_luck + 0.07 * rng.standard_normal((len(mu), n_images))
    luck = run * rng.standard_normal((2, len(mu), n_folds))
    first = StudyScores(scores=without_luck + luck[0][:, fold_of], fold_of=fold_of)
    if not n_confirm:
        return first
    rows = select_for_confirmation(first.scores, n_confirm)
    return replace(first, confirmed=rows, second=(without_luck + luck[1][:, fold_of])[list(rows)])


# One mean, two means


def test_bootstrap_interval_is_that_of_student_for_many_images() -> None:
    scores = np.random.default_rng(0).normal(0.8, 0.13, 2000)
    ours = bootstrap_mean(scores)
    low, high = stats.t.interval(0.95, 1999, scores.mean(), stats.sem(scores))
    assert ours.mean == pytest.approx(scores.mean())
    assert ours.low == pytest.approx(low, abs=4e-4)
    assert ours.high == pytest.approx(high, abs=4e-4)


def test_run_luck_widens_an_interval_as_variances_add() -> None:
    scores = np.random.default_rng(0).normal(0.8, 0.13, 2000)
    alone, with_luck = bootstrap_mean(scores), bootstrap_mean(scores, run_variance=0.004**2)
    expected = math.sqrt(scores.var(ddof=1) / 2000 + 0.004**2)
    assert with_luck.high - with_luck.low == pytest.approx(2 * 1.96 * expected, rel=0.05)
    assert with_luck.high - with_luck.low > 1.3 * (alone.high - alone.low)


def test_the_same_seed_gives_the_same_interval_and_another_seed_another() -> None:
    scores = np.random.default_rng(0).random(50)
    assert bootstrap_mean(scores, seed=3) == bootstrap_mean(scores, seed=3)
    assert bootstrap_mean(scores, seed=3) != bootstrap_mean(scores, seed=4)


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


# Trials


def test_trial_statistics_name_both_kinds_of_spread() -> None:
    made = study([0.8, 0.7], run=0.01)
    rows = trial_statistics(made)
    for row, scores in zip(rows, made.scores, strict=True):
        fold_means = [scores[made.fold_of == fold].mean() for fold in range(5)]
        assert row.mean == pytest.approx(scores.mean())
        assert row.sd_images == pytest.approx(scores.std(ddof=1))
        assert row.sd_folds == pytest.approx(np.std(fold_means, ddof=1))
        assert row.images.high - row.images.low < row.total.high - row.total.low
        assert row.folds is not None


def test_a_confirmed_trials_mean_is_over_both_fits() -> None:
    made = study([0.8, 0.8, 0.8], run=0.01, n_confirm=2)
    assert made.second is not None
    trial = made.confirmed[1]
    both = (made.scores[trial].mean() + made.second[1].mean()) / 2
    assert trial_statistics(made)[trial].mean == pytest.approx(both)


def test_comparing_trials_takes_run_luck_into_account() -> None:
    made = study([0.8, 0.8, 0.8, 0.8, 0.8, 0.8], run=0.02, n_images=2000)
    with_luck = compare_trials(made, 0, 1)
    without = paired_difference(made.scores[0], made.scores[1])
    assert with_luck.difference == without.difference
    assert with_luck.high - with_luck.low > 2 * (without.high - without.low)


def test_one_fold_and_one_trial_have_statistics() -> None:
    single = StudyScores(scores=np.random.default_rng(0).random((1, 30)), fold_of=np.zeros(30, np.int64))
    (row,) = trial_statistics(single)
    assert (row.folds, row.sd_folds) == (None, 0.0)
    assert tied_with_best(single) == (0,)
    assert select_for_confirmation(single.scores) == (0,)


def test_the_tied_set_is_everything_when_all_are_equal_and_only_the_best_when_it_is_far_ahead() -> None:
    assert set(tied_with_best(study([0.8] * 8, n_images=2000))) == set(range(8))
    assert tied_with_best(study([0.9] + [0.7] * 7, n_images=2000)) == (0,)


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


def test_more_run_luck_ties_more_trials() -> None:
    mu = list(np.linspace(0.78, 0.80, 12))
    sizes = [len(tied_with_best(study(mu, run=run, n_images=4000))) for run in (0.0, 0.01, 0.02)]
    assert sizes == sorted(sizes)
    assert sizes[0] < sizes[2]


def test_the_cheapest_tied_trial_is_the_better_of_two_that_cost_the_same() -> None:
    assert cheapest((4, 2, 7), {4: 10.0, 2: 3.0, 7: 3.0, 1: 0.5}) == 2


# The winner


def test_bootstrap_selection_confirms_the_best_and_at_most_five() -> None:
    made = study([0.8] * 12, n_images=300)
    picked = select_for_confirmation(made.scores)
    assert len(picked) == len(set(picked)) == 5
    assert int(made.scores.mean(axis=1).argmax()) == picked[0]
    assert select_for_confirmation(study([0.9] + [0.7] * 11).scores) == (0,)


def test_the_winner_is_the_confirmed_trial_that_is_best_by_both_fits() -> None:
    scores = np.array([[0.9, 0.9], [0.8, 0.8], [0.7, 0.7]])
    fold_of = np.array([0, 1])
    assert chosen(StudyScores(scores=scores, fold_of=fold_of)) == 0
    second = np.array([[0.5, 0.5], [0.8, 0.8]])
    assert chosen(StudyScores(scores=scores, fold_of=fold_of, confirmed=(0, 1), second=second)) == 1


def test_a_single_trial_needs_no_correction() -> None:
    made = study([0.8])
    ours = corrected_estimate(made)
    assert (ours.method, ours.mean) == ("single", pytest.approx(made.scores.mean()))
    twice = StudyScores(scores=made.scores, fold_of=made.fold_of, confirmed=(0,), second=made.scores + 0.02)
    assert corrected_estimate(twice).mean == pytest.approx(made.scores.mean() + 0.01)


def test_a_winner_far_ahead_is_worth_its_second_fit() -> None:
    made = study([0.9, 0.7, 0.7], run=0.01, n_confirm=5)
    ours = corrected_estimate(made)
    assert made.second is not None
    assert (ours.trial, ours.method) == (0, "confirmed")
    assert ours.mean == pytest.approx(made.second[0].mean())
    assert ours.naive == pytest.approx(made.scores[0].mean())


def test_a_winner_far_ahead_keeps_its_mean_without_second_fits() -> None:
    made = study([0.9, 0.7, 0.7])
    ours = corrected_estimate(made)
    assert (ours.method, ours.mean) == ("folds", pytest.approx(made.scores[0].mean()))


def test_one_fold_gives_plain_bbc_cv() -> None:
    made = study([0.8] * 6, n_folds=1)
    ours = corrected_estimate(made, n_bags=500)
    assert ours.method == "images"
    # Bag by bag, as the paper has it: choose in the bag, score out of it.
    rng, means = np.random.default_rng(5), []
    for _ in range(500):
        bag = rng.integers(0, made.n_images, made.n_images)
        out = np.setdiff1d(np.arange(made.n_images), bag)
        means.append(made.scores[made.scores[:, bag].mean(axis=1).argmax()][out].mean())
    assert ours.mean == pytest.approx(np.mean(means), abs=0.001)
    assert ours.mean < ours.naive


def test_run_luck_that_bags_of_images_cannot_see_is_taken_off() -> None:
    errors: dict[str, list[float]] = {"naive": [], "images": [], "folds": [], "confirmed": []}
    for seed in range(20):
        made = study([0.8] * 15, run=0.02, n_confirm=5, seed=seed)
        once = replace(made, confirmed=(), second=None)
        plain = replace(once, fold_of=np.zeros_like(made.fold_of))
        errors["naive"].append(corrected_estimate(plain, n_bags=100).naive - 0.8)
        for which in (plain, once, made):
            ours = corrected_estimate(which, n_bags=100)
            errors[ours.method].append(ours.mean - 0.8)
    bias = {method: float(np.mean(values)) for method, values in errors.items()}
    assert bias["naive"] > 0.013
    assert bias["images"] > 0.010
    assert abs(bias["folds"]) < 0.006
    assert abs(bias["confirmed"]) < 0.006


def test_identical_trials_and_few_images_give_finite_numbers() -> None:
    tied = StudyScores(
        scores=np.full((4, 6), 0.75), fold_of=np.arange(6) % 2, confirmed=(2, 0), second=np.full((2, 6), 0.75)
    )
    ours = corrected_estimate(tied)
    assert ours.mean == pytest.approx(0.75)
    assert ours.low < 0.75 < ours.high


@given(
    n_trials=st.integers(1, 5),
    n_images=st.integers(2, 12),
    n_folds=st.integers(1, 4),
    n_confirm=st.integers(0, 5),
    seed=st.integers(0, 1000),
)
@settings(max_examples=40, deadline=None)
def test_every_small_study_has_ordered_finite_intervals(
    n_trials: int, n_images: int, n_folds: int, n_confirm: int, seed: int
) -> None:
    made = study(
        [0.5] * n_trials, run=0.01, n_images=n_images, n_folds=min(n_folds, n_images), n_confirm=n_confirm, seed=seed
    )
    ours = corrected_estimate(made, n_bags=20)
    predicted = predict_test_mean(made, ours, n_test=5)
    for interval in (ours, predicted, *(row.total for row in trial_statistics(made))):
        assert math.isfinite(interval.low)
        assert interval.low <= interval.mean <= interval.high
    assert chosen(made) in tied_with_best(made) or made.confirmed


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


def test_prediction_adds_the_luck_of_test_images_and_of_retraining() -> None:
    made = study([0.8] * 30, run=0.01, n_images=4000)
    s = made.run_luck.sd
    assert s == pytest.approx(0.01, rel=0.2)
    known = corrected(0.003**2, 0.002**2)
    variance = 0.003**2 + 0.002**2 + made.scores[0].var(ddof=1) / 600 + s**2 / 2
    predicted = predict_test_mean(made, known, n_test=600, n_runs=2)
    assert predicted.mean == 0.84
    assert predicted.high - 0.84 == pytest.approx(1.97 * math.sqrt(variance), rel=0.01)


@pytest.mark.parametrize("run", [0.006, 0.02])
def test_second_fits_tell_of_the_luck_ahead_what_first_fits_tell(run: float) -> None:
    found = [
        study([0.8] * 12, run=run, n_images=3000, n_folds=10, n_confirm=10, seed=seed).run_luck_ahead.sd
        for seed in range(4)
    ]
    assert np.mean(found) == pytest.approx(run, rel=0.15)


def test_luck_ahead_has_no_floor() -> None:
    made = study([0.8] * 40, run=0.0, n_images=4000, n_confirm=5)
    assert made.run_luck.sd == S_FLOOR
    assert made.run_luck_ahead.sd < 0.6 * S_FLOOR


def test_more_test_images_and_more_runs_narrow_the_prediction() -> None:
    made, known = study([0.8] * 6, run=0.01), corrected(0.003**2, 0.002**2)

    def width(n_test: int, n_runs: int) -> float:
        interval = predict_test_mean(made, known, n_test=n_test, n_runs=n_runs)
        return interval.high - interval.low

    assert width(600, 1) < width(100, 1)
    assert width(600, 3) < width(600, 1)


@pytest.mark.parametrize(
    ("result", "words"),
    [(0.84, "within .*: the search kept its promise"), (0.90, "above .* easier"), (0.80, "below .* harder")],
)
def test_a_result_is_put_in_words(result: float, words: str) -> None:
    assert re.search(words, explain_test_mean(Interval(0.84, 0.82, 0.86), result))


# What cannot be


def test_shapes_that_do_not_fit_are_refused() -> None:
    scores: Floats = np.random.default_rng(0).random((3, 10))
    fold_of = np.arange(10) % 2
    with pytest.raises(ValueError, match="do not go with folds"):
        StudyScores(scores=scores, fold_of=fold_of[:9])
    with pytest.raises(ValueError, match="are not those of"):
        StudyScores(scores=scores, fold_of=fold_of, confirmed=(0, 1), second=scores[:1])
    with pytest.raises(ValueError, match="finite score for every image"):
        StudyScores(scores=np.where(scores > 0.9, np.nan, scores), fold_of=fold_of)
    with pytest.raises(StudyError, match="at least 2 images"):
        StudyScores(scores=scores[:, :1], fold_of=fold_of[:1])


def test_statistics_load_no_torch() -> None:
    code = "import sys, hpsearch.report.statistics; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# The claims, on studies whose truth is known


@pytest.fixture(scope="module")
def benchmark_module() -> ModuleType:
    path = Path(__file__).parents[2] / "benchmarks" / "study_statistics.py"
    spec = importlib.util.spec_from_file_location("benchmark_statistics", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
@pytest.mark.parametrize("spread", [0.0, 0.01])
@pytest.mark.parametrize("run", [0.0, 0.010])
def test_corrected_estimate_is_unbiased_covers_and_the_tied_set_holds_the_best(
    benchmark_module: ModuleType, spread: float, run: float
) -> None:
    n = 150
    found = benchmark_module.summarise(benchmark_module.Setting(spread=spread, run=run, n_trials=30), n)
    # Three standard errors of a mean, and of a share of 95 %, beyond the targets.
    assert abs(found.bias[2]) <= 0.001 + 3 * found.bias_error[2]
    assert found.covered[0] >= 0.93 - 3 * math.sqrt(0.95 * 0.05 / n)
    assert found.covered[2] >= 0.93 - 3 * math.sqrt(0.95 * 0.05 / n)
    assert found.contains >= 0.95 - 3 * math.sqrt(0.95 * 0.05 / n)
    assert found.sizes[0] <= 1.5 * found.sizes[1] + 0.5
    if run == 0.010:
        assert found.bias[1] > 0.002
        assert found.bias[0] > found.bias[1]
