"""The racing rule against hand-worked cases, its own limits, and simulated studies whose truth is known."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy import stats

from hpsearch.data.folds import Folds
from hpsearch.search.racing import (
    ALPHA,
    INSIDE,
    MATTERS,
    Race,
    TrialScores,
    compare,
    decide,
)
from hpsearch.stats.run_variance import NEAR, S_GUESS, S_GUESS_DF
from hpsearch.store.trials import PruneDecision


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(7)


def folds_of(sizes: list[int]) -> Folds:
    fold_of = tuple(fold for fold, size in enumerate(sizes) for _ in range(size))
    ids = tuple(f"image{index}" for index in range(len(fold_of)))
    return Folds(ids=ids, fold_of=fold_of, k=len(sizes), seed=0, method="kfold")


def trial(number: int, finals: list[NDArray[np.float64]], curve: NDArray[np.float64] | None = None) -> TrialScores:
    """A trial with these final scores in its folds; over the epochs each image follows `curve`, which ends in 1."""
    curve = np.ones(1) if curve is None else curve
    scores = {fold: (curve[:, None] * final).astype(np.float32) for fold, final in enumerate(finals)}
    return TrialScores(number, scores, len(curve))


def until(whole: TrialScores, fold: int, epoch: int | None = None) -> TrialScores:
    """The trial as it stood after this epoch (None: the last) of this fold."""
    scores = {f: whole.scores[f] for f in range(fold)}
    return TrialScores(whole.number, {**scores, fold: whole.scores[fold][:epoch]}, whole.n_epochs, whole.schedule)


def images_of(rng: np.random.Generator, sizes: list[int], mean: float = 0.8) -> list[NDArray[np.float64]]:
    return [mean + 0.05 * rng.standard_normal(size) for size in sizes]


def judge(candidate: TrialScores, others: list[TrialScores], folds: Folds) -> PruneDecision:
    verdict = Race().judge(candidate, others, folds)
    assert verdict is not None
    return verdict


SIZES = [40, 40, 40, 40, 40]
FOLDS = folds_of(SIZES)


@pytest.mark.parametrize("sizes", [SIZES, [3] * 5])
def test_beside_a_single_full_trial_the_test_is_the_paired_one(sizes: list[int], rng: np.random.Generator) -> None:
    incumbent, candidate = (trial(number, images_of(rng, sizes)) for number in (3, 5))
    for k in (1, 2, 4):
        found = judge(until(candidate, k - 1), [incumbent], folds_of(sizes))
        d = np.concatenate([incumbent.scores[f][-1] - candidate.scores[f][-1] for f in range(k)]).astype(float)
        images, runs = d.var(ddof=1) / d.size, 2 * S_GUESS**2 / k
        df = (images + runs) ** 2 / (images**2 / (d.size - 1) + runs**2 / S_GUESS_DF)
        assert found.d == pytest.approx(d.mean(), abs=1e-7)
        assert found.se == pytest.approx(math.sqrt(images + runs), rel=1e-5)
        assert found.p == pytest.approx(stats.t.sf((d.mean() + MATTERS) / math.sqrt(images + runs), df), rel=1e-4)
        assert found.estimate == pytest.approx(incumbent.value - d.mean(), abs=1e-7)
        assert (found.s, found.against, found.fold, found.epoch) == (S_GUESS, 3, k - 1, 1)


def test_near_trials_tell_how_hard_the_images_are() -> None:
    # The incumbent scores 0.04 higher in fold 0 than elsewhere; the other near trial does not.
    incumbent = trial(0, [np.full(10, 0.84), np.full(10, 0.80)])
    near = trial(1, [np.full(10, 0.80), np.full(10, 0.80)])
    found = judge(until(trial(2, [np.full(10, 0.81), np.full(10, 0.81)]), 0), [incumbent, near], folds_of([10, 10]))
    assert found.d == pytest.approx(0.82 + (0.02 + 0.0) / 2 - 0.81)


def test_se_counts_the_error_of_candidate_incumbent_and_near_trials() -> None:
    near = [trial(number, [np.full(10, 0.8) for _ in range(4)]) for number in range(3)]
    candidate = trial(9, [np.full(10, 0.8) for _ in range(4)])
    for k in (1, 2, 3):
        found = compare(until(candidate, k - 1), near, 4)
        assert found is not None
        # Constant scores leave no image noise, so only the runs' part remains.
        assert found.se == pytest.approx(found.s * math.sqrt(1 / k + 1 / 4 + (1 / k - 1 / 4) / 3), rel=1e-6)


def test_se_counts_the_images_of_candidate_incumbent_and_near_trials(rng: np.random.Generator) -> None:
    sizes = [5, 8, 20]
    near = [trial(number, images_of(rng, sizes)) for number in range(3)]
    candidate = trial(9, images_of(rng, sizes))
    for k, n in ((1, 5), (2, 13)):
        found = compare(until(candidate, k - 1), near, 3)
        assert found is not None
        offsets = [np.mean([each.scores[f][-1] - each.value for each in near], axis=0) for f in range(k)]
        best = max(each.value for each in near)
        d = best + np.concatenate(offsets) - np.concatenate([candidate.scores[f][-1] for f in range(k)])
        images = d.var(ddof=1) * 3 / 4 * (1 / n + 1 / 33 + (1 / n - 1 / 33) / 3)
        runs = found.s**2 * (1 / k + 1 / 3 + (1 / k - 1 / 3) / 3)
        assert found.d == pytest.approx(d.mean(), abs=1e-6)
        assert found.se == pytest.approx(math.sqrt(images + runs), rel=1e-5)


FALLS = np.array([0.6, 1.1, 1.0])
"""A curve whose best epoch is not its last."""


def test_the_last_epoch_counts_though_an_earlier_one_was_better(rng: np.random.Generator) -> None:
    finals = [images_of(rng, SIZES, mean) for mean in (0.78, 0.79, 0.775)]
    for fold in range(4):
        falling, level = (
            compare(until(trial(9, finals[2], curve), fold), [trial(n, finals[n], curve) for n in (0, 1)], 5)
            for curve in (FALLS, np.ones(3))
        )
        assert falling is not None
        assert level is not None
        for name in ("estimate", "d", "se", "s", "p"):
            assert getattr(falling, name) == pytest.approx(getattr(level, name), rel=1e-3)


def test_the_incumbent_is_the_best_after_the_last_epoch() -> None:
    sizes = [4, 4]
    fell = trial(0, [np.full(4, 0.78)] * 2, np.array([0.5, 1.2, 1.0]))
    rose = trial(1, [np.full(4, 0.80)] * 2, np.array([0.5, 0.9, 1.0]))
    found = compare(until(trial(2, [np.full(4, 0.7)] * 2, FALLS), 0), [fell, rose], 2)
    assert found is not None
    assert found.against == 1
    assert found.d == pytest.approx(0.1, abs=1e-6)
    assert fell.value == pytest.approx(0.78)
    assert judge(until(fell, 0, 1), [rose], folds_of(sizes)).epoch == 1


def test_full_trials_that_are_worse_by_more_than_a_twentieth_are_ignored(rng: np.random.Generator) -> None:
    base = images_of(rng, SIZES)
    full = [trial(0, base), trial(1, [scores - 0.01 for scores in images_of(rng, SIZES)])]
    candidate = until(trial(9, images_of(rng, SIZES)), 1)
    near, far = (trial(2, [scores - by for scores in reversed(base)]) for by in (0.04, 0.06))
    assert judge(candidate, [*full, far], FOLDS) == judge(candidate, full, FOLDS)
    assert judge(candidate, [*full, near], FOLDS) != judge(candidate, full, FOLDS)


def test_an_estimate_is_a_score() -> None:
    """Even for a trial that collapsed on an easy fold, or was nearly perfect on a hard one."""
    incumbent = trial(0, [np.full(4, 0.99), np.full(4, 0.2)])
    for fold, score, expected in ((0, 0.05, 0.0), (1, 0.95, 1.0)):
        found = compare(TrialScores(1, {fold: np.full((1, 4), score, np.float32)}, 1), [incumbent], 2)
        assert found is not None
        assert found.estimate == expected


def test_se_is_the_spread_of_mean_d(rng: np.random.Generator) -> None:
    """Over many studies of 5 folds, 4 full trials and 2 seen folds, with images' and runs' part of equal size."""
    folds, noise = folds_of([36] * 5), 0.012
    ds, ses = [], []
    for _ in range(600):
        finals = simulated(rng, np.array([0.8, 0.77, 0.77, 0.77, 0.8]), [36] * 5, noise)
        *full, candidate = trials_of(finals)
        found = compare(until(candidate, 1), full, folds.k)
        assert found is not None
        if found.against == 0:
            ds.append(found.d)
            ses.append(found.se**2 + (noise**2 - found.s**2) * (1 / 2 + 1 / 5 + (1 / 2 - 1 / 5) / 4))
    assert np.mean(ses) == pytest.approx(np.var(ds), rel=0.15)


def test_a_clear_loser_is_dropped_after_its_first_fold_and_an_equal_is_not(rng: np.random.Generator) -> None:
    base = images_of(rng, SIZES)
    incumbent = trial(0, base)
    worse = judge(until(trial(1, [scores - 0.1 for scores in base]), 0), [incumbent], FOLDS)
    assert worse.drop
    assert worse.estimate == pytest.approx(incumbent.value - 0.1, abs=1e-6)
    for gain in (0.0, 0.1):
        assert not judge(until(trial(1, [scores + gain for scores in base]), 0), [incumbent], FOLDS).drop


def test_more_folds_make_a_small_deficit_certain(rng: np.random.Generator) -> None:
    base = images_of(rng, SIZES)
    others = [trial(number, [scores - 0.001 * number for scores in base]) for number in range(6)]
    candidate = trial(9, [scores - 0.012 for scores in base])
    p = [judge(until(candidate, fold), others, FOLDS).p for fold in range(4)]
    assert p == sorted(p, reverse=True)


def test_nothing_is_said_without_a_full_trial_nor_about_one_nor_inside_a_later_fold(rng: np.random.Generator) -> None:
    curve = np.array([0.5, 0.9, 1.0])
    whole, other = (trial(number, images_of(rng, SIZES), curve) for number in (0, 1))
    assert Race().judge(until(whole, 0), [], FOLDS) is None
    assert Race().judge(until(whole, 0), [until(other, 3)], FOLDS) is None
    assert Race().judge(whole, [other], FOLDS) is None
    assert Race().judge(until(whole, 1, 2), [other], FOLDS) is None
    assert Race().judge(until(whole, 0, 2), [other], FOLDS) is not None
    assert Race().judge(until(whole, 1), [other], FOLDS) is not None


def test_the_verdict_is_on_the_latest_fold_and_the_same_whatever_order_the_folds_ended_in(
    rng: np.random.Generator,
) -> None:
    whole, other = (trial(number, images_of(rng, SIZES)) for number in (0, 1))
    last_2, last_0 = (
        judge(TrialScores(0, {fold: whole.scores[fold] for fold in order}, 1), [other], FOLDS)
        for order in ((0, 3, 2), (2, 3, 0))
    )
    assert (last_2.fold, last_0.fold) == (2, 0)
    assert (last_2.d, last_2.se, last_2.p, last_2.estimate) == (last_0.d, last_0.se, last_0.p, last_0.estimate)


def test_the_verdict_depends_on_neither_order_nor_identity_of_the_others(rng: np.random.Generator) -> None:
    curve = np.array([0.6, 0.8, 1.0])
    finals = [images_of(rng, SIZES) for _ in range(6)]
    for candidate in (until(trial(9, finals[5], curve), 0, 1), until(trial(9, finals[5], curve), 2)):
        first = judge(candidate, [trial(number, finals[number], curve) for number in range(5)], FOLDS)
        again = judge(candidate, [trial(number, finals[number], curve) for number in (3, 1, 4, 0, 2)], FOLDS)
        assert first == again


def test_unfinished_and_far_trials_change_nothing(rng: np.random.Generator) -> None:
    base = images_of(rng, SIZES)
    full = [trial(0, base), trial(1, [scores - 0.01 for scores in images_of(rng, SIZES)])]
    candidate = until(trial(9, images_of(rng, SIZES)), 1)
    far = trial(2, [scores - NEAR - 0.02 - 0.3 * rng.random() for scores in base])
    unfinished = until(trial(3, [scores + 0.1 for scores in base]), 3)
    assert judge(candidate, [*full, far, unfinished], FOLDS) == judge(candidate, full, FOLDS)


def test_of_two_equal_full_trials_the_earlier_is_the_incumbent() -> None:
    same = [np.full(4, 0.5), np.full(4, 0.5)]
    found = judge(until(trial(9, same), 0), [trial(7, same), trial(4, same)], folds_of([4, 4]))
    assert found.against == 4


@pytest.mark.parametrize("sizes", [[310] * 5, [2] * 10, [7, 6], [10, 10, 11]])
def test_equal_constant_trials_are_not_dropped_inside_the_first_fold(sizes: list[int]) -> None:
    curve = np.array([1.0, 1.0, 1.0, 1.0])
    same = [np.full(size, 0.7) for size in sizes]
    others = [trial(number, same, curve) for number in range(6)]
    candidate = trial(9, same, curve)
    for others_seen in (others[:1], others):
        for epoch in range(1, 5):
            verdict = judge(until(candidate, 0, epoch), others_seen, folds_of(sizes))
            assert not verdict.drop
            assert verdict.p is not None
            assert verdict.se is not None
            assert verdict.p >= stats.norm.sf(MATTERS / verdict.se) - 1e-6


def test_a_tie_is_dropped_once_it_is_known_to_be_one_and_what_is_better_is_not() -> None:
    # Six equal full trials: the spread from run to run is known to be small.
    sizes = [400] * 10
    same = [np.full(size, 0.7) for size in sizes]
    full = [trial(number, same) for number in range(6)]
    tie = [judge(until(trial(9, same), fold), full, folds_of(sizes)).drop for fold in range(9)]
    assert not tie[0]
    assert tie[-1]
    better = trial(9, [scores + 2 * MATTERS for scores in same])
    assert not any(judge(until(better, fold), full, folds_of(sizes)).drop for fold in range(9))


def test_scores_that_are_all_zero_break_nothing() -> None:
    nothing = [np.zeros(5), np.zeros(5)]
    curve = np.ones(3)
    others = [trial(0, nothing, curve), trial(1, nothing, curve)]
    for fold, epoch in ((0, 1), (0, 2), (0, 3)):
        assert not judge(until(trial(2, nothing, curve), fold, epoch), others, folds_of([5, 5])).drop


def test_a_fold_of_one_image_says_nothing() -> None:
    scores = [np.array([0.9]), np.array([0.9])]
    assert Race().judge(until(trial(1, [np.array([0.1])] * 2), 0), [trial(0, scores)], folds_of([1, 1])) is None


def test_verdicts_are_json() -> None:
    same = [np.full(4, 0.5), np.full(4, 0.5)]
    verdict = judge(until(trial(9, same), 0), [trial(0, same)], folds_of([4, 4]))
    assert PruneDecision(**json.loads(json.dumps(vars(verdict), allow_nan=False))) == verdict


# The estimate of s


def simulated(
    rng: np.random.Generator, means: NDArray[np.float64], sizes: list[int], noise: float
) -> list[NDArray[np.float64]]:
    """Final scores, a (trials, images) array for each fold, from the per-image model."""
    finals = []
    for size in sizes:
        images = 0.13 * rng.standard_normal(size) + 0.07 * rng.standard_normal((len(means), size))
        finals.append(means[:, None] + noise * rng.standard_normal((len(means), 1)) + images)
    return finals


def trials_of(finals: list[NDArray[np.float64]]) -> list[TrialScores]:
    return [trial(number, [final[number] for final in finals]) for number in range(len(finals[0]))]


def test_near_trials_alone_decide_s(rng: np.random.Generator) -> None:
    near = simulated(rng, np.full(6, 0.8), [60] * 5, 0.004)
    collapsed = simulated(rng, np.full(6, 0.4), [60] * 5, 0.1)
    joined = trials_of([np.concatenate(pair) for pair in zip(near, collapsed, strict=True)])
    candidate = until(trial(50, [final[0] for final in near]), 0)
    folds = folds_of([60] * 5)
    assert judge(candidate, joined, folds).s == judge(candidate, trials_of(near), folds).s


def drops_of_a_better_one(n_folds: int, size: int, by: float, rng: np.random.Generator) -> int:
    """How many of 200 trials are dropped that are better `by` so much than an incumbent that is the best by merit."""
    folds, dropped = folds_of([size] * n_folds), 0
    for _ in range(200):
        means = np.array([0.80, 0.77, 0.765, 0.76, 0.755, 0.80 + by])
        *others, better = trials_of(simulated(rng, means, [size] * n_folds, 0.006))
        dropped += any(judge(until(better, fold), others, folds).drop for fold in range(n_folds - 1))
    return dropped


SHAPES = [(5, 60), (2, 150), (3, 100), (10, 30)]


@pytest.mark.parametrize(("n_folds", "size"), SHAPES)
def test_a_trial_that_is_better_by_much_is_dropped_at_most_twice_in_a_hundred(
    n_folds: int, size: int, rng: np.random.Generator
) -> None:
    # Of 200, 4 are 2 %; 10 are three standard deviations more.
    assert drops_of_a_better_one(n_folds, size, 0.02, rng) <= 10


@pytest.mark.parametrize(("n_folds", "size"), SHAPES)
def test_all_looks_together_err_less_than_three_times_as_often_as_one_may(
    n_folds: int, size: int, rng: np.random.Generator
) -> None:
    assert drops_of_a_better_one(n_folds, size, 0.003, rng) <= 200 * 3 * ALPHA


@pytest.mark.parametrize(("n_folds", "size"), [(5, 4), (10, 2)])
def test_with_twenty_images_each_look_keeps_its_p(n_folds: int, size: int, rng: np.random.Generator) -> None:
    # So few images cannot tell 0.003 from nothing, so each of the n_folds - 1 evaluations may err with that p.
    assert drops_of_a_better_one(n_folds, size, 0.003, rng) <= 200 * ALPHA * (n_folds - 1)


# Inside the first fold


def shares(n_epochs: int, schedule: str = "cosine") -> NDArray[np.float64]:
    t = np.arange(1, n_epochs + 1) / n_epochs
    return t + np.sin(np.pi * t) / np.pi if schedule == "cosine" else t


@pytest.mark.parametrize("schedule", ["cosine", "constant"])
def test_the_share_spent_is_the_summed_learning_rate(schedule: str) -> None:
    each = TrialScores(0, {0: np.ones((1, 1), np.float32)}, 8, schedule)  # type: ignore[arg-type]
    steps = (np.arange(80000) + 0.5) / 80000
    rate = (1 + np.cos(np.pi * steps)) / 2 if schedule == "cosine" else np.ones_like(steps)
    for epoch in range(9):
        assert each.spent(epoch) == pytest.approx(rate[: epoch * 10000].sum() / rate.sum(), abs=1e-6)


@settings(deadline=None, max_examples=60)
@given(
    n_epochs=st.integers(2, 25),
    speed=st.floats(0.01, 30),
    incumbents=st.floats(0.01, 30),
    seed=st.integers(0, 1000),
)
def test_no_trial_is_dropped_for_being_slow(n_epochs: int, speed: float, incumbents: float, seed: int) -> None:
    """However fast the incumbent was: a curve that rises ever less and ends level is not dropped inside the fold."""
    rng = np.random.default_rng(seed)
    base = images_of(rng, [20, 20])
    w = shares(n_epochs)
    fast = trial(0, base, np.expm1(-incumbents * w) / np.expm1(-incumbents))
    slow = trial(1, base, np.expm1(-speed * w) / np.expm1(-speed))
    for epoch in range(1, n_epochs):
        verdict = Race().judge(until(slow, 0, epoch), [fast], folds_of([20, 20]))
        assert verdict is None or not verdict.drop


def test_where_all_trials_rise_late_none_is_dropped_for_it(rng: np.random.Generator) -> None:
    curve = np.array([0.01, 0.02, 0.05, 0.2, 0.7, 1.0])
    base = images_of(rng, SIZES)
    for epoch in range(1, 6):
        assert not judge(until(trial(1, base, curve), 0, epoch), [trial(0, base, curve)], FOLDS).drop


def test_a_near_trial_that_had_not_begun_leaves_everything_open(rng: np.random.Generator) -> None:
    base = images_of(rng, SIZES)
    curve = np.array([0.0, 0.9, 1.0])
    assert Race().judge(until(trial(1, base, curve), 0, 1), [trial(0, base, curve)], FOLDS) is None


def test_a_flat_start_is_forgiven_until_it_is_too_late(rng: np.random.Generator) -> None:
    base = images_of(rng, SIZES)
    incumbent = trial(0, base, 1 - np.exp(-6 * shares(20)) * 0.999)
    flat = trial(1, base, np.append(np.full(19, 1e-4), 1.0))
    dropped = [judge(until(flat, 0, epoch), [incumbent], FOLDS).drop for epoch in range(1, 20)]
    assert not any(dropped[:4])
    assert all(dropped[12:])


@pytest.mark.parametrize(
    ("now", "curves", "at_best", "typically"),
    [
        # Half of the learning rate is spent: 0.3 / 0.5. The near trials had reached 0.75 and 0.625 of their ends.
        ((0.2, 0.3), ((0.3, 0.6, 0.9, 0.8), (0.2, 0.5, 0.7, 0.8)), 0.6, 0.3 / 0.6875),
        # One near trial had reached only 0.4 of its end: 0.3 / 0.4. Its best epoch so far counts, not its latest.
        ((0.2, 0.3), ((0.32, 0.1, 0.9, 0.8), (0.2, 0.7, 0.7, 0.8)), 0.75, 0.3 / 0.6375),
        # Flat so far: the fastest near trial made 0.875 of its end (0.8) in half of the epochs.
        ((0.1, 0.05), ((0.3, 0.6, 0.9, 0.8), (0.2, 0.7, 0.7, 0.8)), 0.7, 0.1 / 0.8125),
    ],
)
def test_a_first_fold_may_go_on_as_slowly_or_as_late_as_near_trials_did(
    now: tuple[float, ...], curves: tuple[tuple[float, ...], ...], at_best: float, typically: float
) -> None:
    """By hand, at a constant learning rate, after 2 of 4 epochs; scores are the same for all images."""
    near = [
        TrialScores(n, {f: np.outer(curve, np.ones(4)).astype(np.float32) for f in (0, 1)}, 4, "constant")
        for n, curve in enumerate(curves)
    ]
    candidate = TrialScores(9, {0: np.outer(now, np.ones(4)).astype(np.float32)}, 4, "constant")
    found = compare(candidate, near, 2)
    assert found is not None
    assert found.d == pytest.approx(0.8 - at_best, abs=1e-6)
    assert found.estimate == pytest.approx(typically, abs=1e-6)


def test_the_same_part_of_a_near_trial_with_fewer_epochs_is_rounded_down() -> None:
    """Half of 3 epochs is 1 and not 2."""
    near = TrialScores(
        0, {f: np.outer((0.4, 0.8, 0.8), np.ones(4)).astype(np.float32) for f in (0, 1)}, 3, "constant"
    )
    candidate = TrialScores(9, {0: np.full((2, 4), 0.3, np.float32)}, 4, "constant")
    found = compare(candidate, [near], 2)
    assert found is not None
    assert found.estimate == pytest.approx(0.3 / 0.5, abs=1e-6)


def test_a_hopeless_trial_ends_inside_its_first_fold_with_a_modest_estimate(rng: np.random.Generator) -> None:
    curve = np.array([0.8, 0.95, 0.98, 0.99, 1.0])
    base = images_of(rng, SIZES)
    hopeless = trial(1, [0.5 * scores for scores in base], curve)
    found = judge(until(hopeless, 0, 2), [trial(0, base, curve)], FOLDS)
    assert found.drop
    assert (found.fold, found.epoch) == (0, 2)
    assert found.p is not None
    assert found.p < ALPHA * INSIDE
    # What is told is how such a trial typically ends, not the best it could have done.
    assert found.estimate == pytest.approx(hopeless.value, abs=0.03)
    assert found.d is not None
    assert found.estimate < trial(0, base).value - found.d


def test_a_jump_down_is_forgiven_after_a_good_epoch(rng: np.random.Generator) -> None:
    base = images_of(rng, SIZES)
    incumbent = trial(0, base, np.array([0.8, 0.9, 0.95, 1.0]))
    jumpy = trial(1, base, np.array([0.8, 0.9, 0.1, 1.0]))
    assert not judge(until(jumpy, 0, 3), [incumbent], FOLDS).drop


def test_trials_with_other_numbers_of_epochs_are_compared_at_the_same_part(rng: np.random.Generator) -> None:
    base = images_of(rng, SIZES)
    incumbent = trial(0, base, 1 - 0.9 * np.exp(-5 * shares(4)))
    for n_epochs in (2, 3, 4, 9):
        same = trial(1, base, 1 - 0.9 * np.exp(-5 * shares(n_epochs)))
        worse = trial(1, [scores - 0.6 for scores in base], np.ones(n_epochs))
        assert not any(judge(until(same, 0, epoch), [incumbent], FOLDS).drop for epoch in range(1, n_epochs))
        assert judge(until(worse, 0, n_epochs - 1), [incumbent], FOLDS).drop


def test_a_fixed_split_races_on_epochs_alone(rng: np.random.Generator) -> None:
    folds = folds_of([60])
    base = images_of(rng, [60])
    curve = np.array([0.7, 0.9, 0.97, 1.0])
    incumbent = trial(0, base, curve)
    hopeless = trial(1, [0.3 * scores for scores in base], curve)
    assert judge(until(hopeless, 0, 2), [incumbent], folds).drop
    assert Race().judge(hopeless, [incumbent], folds) is None


def test_a_trial_that_is_stopped_before_any_is_full_is_worth_its_last_epoch() -> None:
    candidate = trial(3, [np.full(4, 0.6), np.full(4, 0.8)], FALLS)
    verdict = decide(True, candidate, [], 3, "stopped on request")
    assert (verdict.drop, verdict.fold, verdict.epoch) == (True, 1, 3)
    assert verdict.estimate == pytest.approx(0.7, abs=1e-6)
