"""The racing rule against the value model, hand-worked cases, its own limits, and simulated studies."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from hpsearch.data.folds import Folds
from hpsearch.search.racing import (
    ALPHA,
    EXTRA,
    MATTERS,
    MAX_INSIDE,
    MIN_CURVES,
    Race,
    TrialScores,
    _ends,
    compare,
    decide,
    true_means,
)
from hpsearch.stats.run_variance import NEAR
from hpsearch.stats.value_model import near_rows, residual_variance, value_model
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
    verdict = Race().should_prune(candidate, others, folds)
    assert verdict is not None
    return verdict


SIZES = [40, 40, 40, 40, 40]
FOLDS = folds_of(SIZES)


FALLS = np.array([0.6, 1.1, 1.0])
"""A curve whose best epoch is not its last."""


def known(whole: TrialScores, n_folds: int, *, is_pruned: bool = False) -> TrialScores:
    """The trial with its first finished folds."""
    return replace(whole, scores={fold: whole.scores[fold] for fold in range(n_folds)}, is_pruned=is_pruned)


def constant(number: int, *means: float, n_images: int = 100) -> TrialScores:
    """A trial of one epoch that has finished folds with these means."""
    return trial(number, [np.full(n_images, mean) for mean in means])


# After a fold


@pytest.mark.parametrize("sizes", [SIZES, [3] * 5, [10, 80, 40, 30, 20]])
def test_a_decision_is_that_of_the_value_model(sizes: list[int], rng: np.random.Generator) -> None:
    others = [known(trial(number, images_of(rng, sizes)), n) for number, n in ((3, 5), (1, 2), (6, 1), (7, 3))]
    others[3] = replace(others[3], is_pruned=True)
    for k in (1, 2, 4):
        candidate = until(trial(5, images_of(rng, sizes)), k - 1)
        found = judge(candidate, others, folds_of(sizes))
        rows = [*others, candidate]
        means = np.array([[each.curves[f][-1] if f in each.scores else np.nan for f in range(5)] for each in rows])
        near = [each for each, is_near in zip(rows, near_rows(means)[0], strict=True) if is_near]
        finals = [[each.scores[f][-1] for each in near if f in each.scores] for f in range(5)]
        g2 = residual_variance([np.array(final, float) for final in finals if final])
        values = value_model(means, sizes, g2).predict(means)
        leader = int(np.argmax(values.expected[:3]))
        d, se = values.difference(4, leader)
        assert found.against == others[leader].number
        assert (found.d, found.se) == pytest.approx((d, se), abs=1e-6)
        assert found.p == pytest.approx(values.probability_better(leader, MATTERS)[4], abs=1e-5)
        assert found.s == pytest.approx(values.model.run_sd, abs=1e-6)
        assert found.estimate == pytest.approx(values.true_means[4], abs=1e-6)
        assert (found.fold, found.epoch, found.drop) == (k - 1, 1, found.p < ALPHA)


def test_the_images_of_a_fold_may_be_harder_for_all(rng: np.random.Generator) -> None:
    finals = [images_of(rng, SIZES) for _ in range(6)]
    harder = [[final - 0.2 * (fold == 0) for fold, final in enumerate(each)] for each in finals]
    one, other = (
        judge(until(trial(9, each[5]), 0), [trial(n, each[n]) for n in range(5)], FOLDS) for each in (finals, harder)
    )
    assert one.against == other.against
    for name in ("d", "se", "p", "s"):
        assert getattr(one, name) == pytest.approx(getattr(other, name), rel=1e-4)
    assert one.estimate - other.estimate == pytest.approx(0.2 / 5, abs=1e-6)


@pytest.mark.parametrize("k", [1, 2, 4])
def test_the_last_epoch_counts_though_an_earlier_one_was_better(k: int, rng: np.random.Generator) -> None:
    finals = [images_of(rng, SIZES, mean) for mean in (0.78, 0.79, 0.775)]
    falling, level = (
        judge(until(trial(9, finals[2], curve), k - 1), [trial(n, finals[n], curve) for n in (0, 1)], FOLDS)
        for curve in (FALLS, np.ones(3))
    )
    for name in ("estimate", "d", "se", "s", "p"):
        assert getattr(falling, name) == pytest.approx(getattr(level, name), rel=1e-3)


def test_the_leader_is_the_best_after_the_last_epoch() -> None:
    fell = trial(0, [np.full(4, 0.78)] * 2, np.array([0.5, 1.2, 1.0]))
    rose = trial(1, [np.full(4, 0.80)] * 2, np.array([0.5, 0.9, 1.0]))
    found = judge(until(trial(2, [np.full(4, 0.7)] * 2, FALLS), 0), [fell, rose], folds_of([4, 4]))
    assert found.against == 1
    assert fell.value == pytest.approx(0.78)


def test_a_pruned_trial_is_never_the_leader_but_counts() -> None:
    pruned = replace(constant(0, 0.9), is_pruned=True)
    candidate, other = constant(2, 0.80), constant(1, 0.81)
    folds = folds_of([100] * 3)
    found = judge(candidate, [pruned, other], folds)
    assert found.against == 1
    assert found != judge(candidate, [other], folds)
    assert Race().should_prune(candidate, [pruned], folds) is None


def test_an_open_trial_may_be_the_leader() -> None:
    complete, waiting = constant(0, 0.80, 0.80, 0.80), constant(1, 0.84)
    assert judge(constant(2, 0.80), [complete, waiting], folds_of([100] * 3)).against == 1


def test_the_leader_is_judged_beside_the_second_best() -> None:
    found = judge(constant(1, 0.84), [constant(0, 0.80), constant(2, 0.82)], folds_of([100] * 3))
    assert (found.against, found.drop) == (2, False)
    assert found.d is not None
    assert found.d < 0


def test_an_estimate_is_a_score() -> None:
    """Even for a trial that collapsed on an easy fold, or is nearly perfect on a hard one."""
    folds, curve = folds_of([4, 4]), np.ones(2)
    easy_first = [trial(n, [np.full(4, 0.99), np.full(4, 0.2)], curve) for n in range(MIN_CURVES)]
    hard_first = [trial(n, [np.full(4, 0.2), np.full(4, 0.99)], curve) for n in range(MIN_CURVES)]
    for others, score, expected in ((easy_first, 0.05, 0.0), (hard_first, 0.95, 1.0)):
        candidate = TrialScores(9, {0: np.full((1, 4), score, np.float32)}, 2)
        assert judge(candidate, others, folds).estimate == expected
    collapsed = TrialScores(9, {0: np.full((2, 4), 0.05, np.float32)}, 2)
    assert judge(collapsed, easy_first, folds).estimate == 0.0


def test_a_clear_loser_is_dropped_after_its_first_fold_and_an_equal_is_not(rng: np.random.Generator) -> None:
    base = images_of(rng, SIZES)
    other = trial(0, base)
    worse = judge(until(trial(1, [scores - 0.1 for scores in base]), 0), [other], FOLDS)
    assert worse.drop
    assert worse.estimate == pytest.approx(other.value - 0.1, abs=2e-3)
    assert worse.d == pytest.approx(0.1, abs=2e-3)
    for gain in (0.0, 0.1):
        assert not judge(until(trial(1, [scores + gain for scores in base]), 0), [other], FOLDS).drop


def test_more_folds_make_a_small_deficit_certain(rng: np.random.Generator) -> None:
    base = images_of(rng, SIZES)
    others = [trial(number, [scores - 0.001 * number for scores in base]) for number in range(6)]
    candidate = trial(9, [scores - 0.012 for scores in base])
    p = [judge(until(candidate, fold), others, FOLDS).p for fold in range(4)]
    assert p == sorted(p, reverse=True)
    assert p[0] != p[3]


def test_a_tie_is_dropped_once_it_is_known_to_be_one_and_what_is_better_is_not() -> None:
    # The leader is complete, so only the candidate's own folds are unknown.
    folds, leader, tie = folds_of([100] * 10), constant(0, *[0.8] * 10), constant(9, *[0.8] * 10)
    dropped = [judge(known(tie, n), [leader], folds).drop for n in range(1, 10)]
    assert not dropped[0]
    assert dropped[-1]
    better = constant(9, *[0.8 + 2 * MATTERS] * 10)
    assert not any(judge(known(better, n), [leader], folds).drop for n in range(1, 10))


def test_a_waiting_trial_is_dropped_when_another_turns_out_to_be_better() -> None:
    folds, waiting = folds_of([100] * 5), constant(6, 0.80)
    others = [constant(number, 0.79 + 0.003 * number) for number in range(1, 5)]
    assert not judge(waiting, others, folds).drop
    found = judge(waiting, [*others, constant(7, 0.86)], folds)
    assert (found.drop, found.against, found.fold, found.epoch) == (True, 7, 0, 1)


def test_trial_0_is_never_dropped_because_the_gain_over_it_is_reported() -> None:
    others = [constant(number, 0.9) for number in range(1, 5)]
    for number, is_dropped in ((0, False), (5, True)):
        assert judge(constant(number, 0.5), others, folds_of([100] * 5)).drop == is_dropped


def test_nothing_is_said_without_another_trial_nor_about_a_complete_one_nor_inside_a_later_fold(
    rng: np.random.Generator,
) -> None:
    curve = np.array([0.5, 0.9, 1.0])
    whole, *others = (trial(number, images_of(rng, SIZES), curve) for number in range(MIN_CURVES + 1))
    assert Race().should_prune(until(whole, 0), [], FOLDS) is None
    assert Race().should_prune(until(whole, 0), [until(others[0], 0, 2)], FOLDS) is None
    assert Race().should_prune(until(whole, 0), [until(others[0], 0)], FOLDS) is not None
    assert Race().should_prune(until(whole, 0), [replace(each, is_pruned=True) for each in others], FOLDS) is None
    assert Race().should_prune(whole, others, FOLDS) is None
    assert Race().should_prune(until(whole, 1, 2), others, FOLDS) is None
    assert Race().should_prune(until(whole, 0, 2), others, FOLDS) is not None
    assert Race().should_prune(until(whole, 1), others, FOLDS) is not None


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


def test_trials_far_below_change_nothing_and_unfinished_folds_neither(rng: np.random.Generator) -> None:
    base = images_of(rng, SIZES)
    near = [trial(0, base), trial(1, [scores - 0.01 for scores in images_of(rng, SIZES)])]
    candidate = until(trial(9, images_of(rng, SIZES)), 1)
    far = trial(2, [scores - NEAR - 0.1 - 0.3 * rng.random() for scores in base])
    unfinished = until(trial(3, [scores + 0.1 for scores in base], np.ones(2)), 0, 1)
    found, expected = judge(candidate, [*near, far, unfinished], FOLDS), judge(candidate, near, FOLDS)
    for name in ("estimate", "d", "se", "s", "p", "against"):
        assert getattr(found, name) == pytest.approx(getattr(expected, name), rel=1e-9)
    inner = trial(2, [scores - 0.02 for scores in reversed(base)])
    assert judge(candidate, [*near, inner], FOLDS).p != pytest.approx(expected.p, rel=1e-3)


def test_of_two_equal_trials_the_earlier_is_the_leader() -> None:
    same = [np.full(4, 0.5), np.full(4, 0.5)]
    assert judge(until(trial(9, same), 0), [trial(7, same), trial(4, same)], folds_of([4, 4])).against == 4


@pytest.mark.parametrize("sizes", [[310] * 5, [2] * 10, [7, 6], [10, 10, 11]])
def test_equal_constant_trials_are_not_dropped_inside_the_first_fold(sizes: list[int]) -> None:
    same, curve = [np.full(size, 0.7) for size in sizes], np.ones(4)
    others = [known(trial(number, same, curve), 1) for number in range(6)]
    for epoch in range(1, 5):
        assert not judge(until(trial(9, same, curve), 0, epoch), others, folds_of(sizes)).drop


@pytest.mark.parametrize("value", [0.0, 1.0])
def test_scores_that_are_all_equal_break_nothing(value: float) -> None:
    same, curve, folds = [np.full(5, value)] * 2, np.ones(3), folds_of([5, 5])
    others = [known(trial(number, same, curve), 1) for number in range(MIN_CURVES)]
    for epoch in (1, 2, 3):
        verdict = judge(until(trial(9, same, curve), 0, epoch), others, folds)
        assert not verdict.drop
        assert verdict.estimate == pytest.approx(value, abs=1e-6)
    assert sorted(Race().order(others, folds)) == list(range(MIN_CURVES))
    assert true_means(others, folds) == pytest.approx(dict.fromkeys(range(MIN_CURVES), value))


@pytest.mark.parametrize("n_others", [1, 5])
def test_a_fold_of_one_image_is_compared(n_others: int) -> None:
    others = [trial(number, [np.array([0.9])] * 2) for number in range(n_others)]
    folds = folds_of([1, 1])
    found = judge(until(trial(9, [np.array([0.1])] * 2), 0), others, folds)
    assert found.drop
    assert found.se is not None
    assert found.se > 0.01
    assert not judge(until(trial(9, [np.array([0.85])] * 2), 0), others, folds).drop


def test_verdicts_are_json() -> None:
    same = [np.full(4, 0.5), np.full(4, 0.5)]
    verdict = judge(until(trial(9, same), 0), [trial(0, same)], folds_of([4, 4]))
    assert PruneDecision(**json.loads(json.dumps(vars(verdict), allow_nan=False))) == verdict


# Which trials get further folds

FIVE = folds_of([100] * 5)


def test_the_leader_comes_first_and_the_others_by_their_chance_to_win() -> None:
    trials = [constant(0, 0.80), constant(1, 0.86, 0.86), constant(2, 0.83), constant(3, 0.81), constant(4, 0.82)]
    assert Race(alpha=0.0).order(trials, FIVE) == [1, 2, 4, 3, 0]
    assert Race(alpha=0.0).order(trials[::-1], FIVE) == [1, 2, 4, 3, 0]


def test_a_complete_leader_gets_no_folds_and_its_rivals_do() -> None:
    trials = [constant(0, *[0.86] * 5), constant(1, 0.85), constant(2, 0.84)]
    assert Race(alpha=0.0).order(trials, FIVE) == [1, 2]


def test_a_trial_that_would_be_pruned_gets_no_folds_unless_it_is_trial_0() -> None:
    trials = constant(1, 0.86), constant(2, 0.80), constant(3, 0.80)
    p = judge(trials[1], [trials[0], trials[2]], FIVE).p
    assert p is not None
    assert 0 < p < ALPHA
    assert Race().order(trials, FIVE) == [1]
    assert Race(alpha=p / 2).order(trials, FIVE) == [1, 2, 3]
    assert Race().order((constant(0, 0.80), *trials), FIVE) == [1, 0]


def test_complete_and_pruned_trials_get_no_folds_and_a_pruned_one_is_no_leader() -> None:
    complete, pruned = constant(0, *[0.80] * 5), replace(constant(1, 0.90), is_pruned=True)
    waiting = constant(2, 0.80), constant(3, 0.81)
    assert Race().order([complete, pruned, *waiting], FIVE) == [3, 2]
    best = constant(0, *[0.815] * 5)
    assert Race().order([best, pruned, *waiting], FIVE) == [3, 2]
    assert Race().order([pruned], FIVE) == []
    assert Race().order([], FIVE) == []
    assert Race().order([TrialScores(4, {0: np.zeros((1, 100), np.float32)}, 2), waiting[0]], FIVE) == [2]


# Estimates for the sampler


def test_true_means_are_drawn_toward_those_of_the_others_and_far_ones_are_not(rng: np.random.Generator) -> None:
    finals = [images_of(rng, SIZES) for _ in range(9)]
    trials = [known(trial(number, final), 1 + 4 * (number == 3)) for number, final in enumerate(finals)]
    trials.append(trial(9, [scores - 0.5 for scores in finals[0][:1]]))
    found = true_means(trials, FOLDS)
    assert list(found) == list(range(10))
    means = {each.number: each.curves[0][-1] for each in trials}
    near = list(range(9))
    spread, shrunk = np.ptp([means[n] for n in near]), np.ptp([found[n] for n in near])
    assert shrunk < 0.8 * spread
    assert found[9] == pytest.approx(found[0] - 0.5, abs=0.03)


def test_true_means_are_scores_of_trials_with_a_finished_fold() -> None:
    collapsed, easy, unfinished = constant(0, 0.0), constant(1, 0.9, 0.1), trial(2, [np.full(100, 0.5)], np.ones(2))
    found = true_means([collapsed, easy, until(unfinished, 0, 1)], folds_of([100, 100]))
    assert list(found) == [0, 1]
    assert found[0] == 0.0
    assert true_means([], FIVE) == {}


def test_true_means_of_pruned_and_open_trials_are_the_same() -> None:
    trials = [constant(0, 0.80), constant(1, 0.82), constant(2, 0.79, 0.80)]
    pruned = [replace(each, is_pruned=each.number == 1) for each in trials]
    assert true_means(pruned, FIVE) == true_means(trials, FIVE)


# Error rates


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


def drops_of_a_better_one(n_folds: int, size: int, by: float, rng: np.random.Generator) -> int:
    """How many of 200 trials are dropped that are better `by` so much than the best complete one."""
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


def dropped_winners(n_folds: int, size: int, rng: np.random.Generator) -> tuple[int, int]:
    """How many of 150 trials are dropped, and how many of these would have won by a relevant margin.

    Each is judged again and again while it and another trial finish folds, until it is dropped.
    """
    folds, n_dropped, n_wrong = folds_of([size] * n_folds), 0, 0
    for _ in range(150):
        whole = trials_of(simulated(rng, 0.8 + 0.01 * rng.standard_normal(6), [size] * n_folds, 0.006))
        for look in range(2 * n_folds - 2):
            n, m = 1 + look // 2, 1 + look // 2 + look % 2
            others = [known(each, m if each.number == 0 else 1) for each in whole[:5]]
            found = judge(known(whole[5], n), others, folds)
            if found.drop:
                assert found.against is not None
                n_dropped += 1
                n_wrong += whole[5].value > whole[found.against].value + MATTERS
                break
    return n_dropped, n_wrong


@pytest.mark.parametrize(("n_folds", "size"), [*SHAPES, (5, 10)])
def test_over_all_looks_few_of_the_dropped_trials_would_have_won(
    n_folds: int, size: int, rng: np.random.Generator
) -> None:
    n_dropped, n_wrong = dropped_winners(n_folds, size, rng)
    assert n_dropped >= 25
    # Three standard deviations more than the share that is accepted.
    assert n_wrong <= ALPHA * n_dropped + 3 * math.sqrt(ALPHA * n_dropped)


def test_with_twenty_images_each_look_keeps_its_p(rng: np.random.Generator) -> None:
    # The trials within `NEAR` of the best are then picked by noise, so each of the looks may err with that p.
    assert dropped_winners(5, 4, rng)[1] <= 150 * ALPHA * 4


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


def first_folds(*curves: tuple[float, ...], schedule: str = "constant") -> tuple[TrialScores, ...]:
    """Trials that have finished their first fold with these mean scores, which are the same for all images."""
    return tuple(
        TrialScores(n, {0: np.outer(curve, np.ones(4)).astype(np.float32)}, len(curve), schedule)  # type: ignore[arg-type]
        for n, curve in enumerate(curves)
    )


def begun(*scores: float, n_epochs: int = 4) -> TrialScores:
    return TrialScores(9, {0: np.outer(scores, np.ones(4)).astype(np.float32)}, n_epochs, "constant")


@settings(deadline=None, max_examples=60)
@given(
    n_epochs=st.integers(2, 25),
    speed=st.floats(0.01, 30),
    others=st.lists(st.floats(0.01, 30), min_size=MIN_CURVES - 1, max_size=6),
    seed=st.integers(0, 1000),
)
def test_no_trial_is_dropped_for_being_as_slow_as_another(
    n_epochs: int, speed: float, others: list[float], seed: int
) -> None:
    """However fast the others were: a curve like that of one of them is not dropped inside the fold."""
    rng = np.random.default_rng(seed)
    base, w = images_of(rng, [20, 20]), shares(n_epochs)
    full = [trial(n, base, np.expm1(-each * w) / np.expm1(-each)) for n, each in enumerate([speed, *others])]
    slow = replace(full[0], number=99)
    for epoch in range(1, n_epochs):
        assert not judge(until(slow, 0, epoch), full, folds_of([20, 20])).drop


def test_where_all_trials_rise_late_none_is_dropped_for_it(rng: np.random.Generator) -> None:
    curve = np.array([0.01, 0.02, 0.05, 0.2, 0.7, 1.0])
    base = images_of(rng, SIZES)
    others = [trial(number, base, curve) for number in range(MIN_CURVES)]
    for epoch in range(1, 6):
        assert not judge(until(trial(9, base, curve), 0, epoch), others, FOLDS).drop


def test_too_few_curves_say_nothing_inside_the_first_fold(rng: np.random.Generator) -> None:
    base, curve = images_of(rng, SIZES), np.array([0.8, 0.9, 1.0])
    hopeless = trial(9, [0.1 * scores for scores in base], curve)
    others = [known(trial(number, base, curve), 1) for number in range(MIN_CURVES)]
    assert Race().should_prune(until(hopeless, 0, 2), others[1:], FOLDS) is None
    assert judge(until(hopeless, 0, 2), others, FOLDS).drop
    assert judge(until(hopeless, 0, 3), others[:1], FOLDS).drop
    # The curves of pruned trials count too.
    pruned = [replace(each, is_pruned=True) for each in others[1:]]
    assert judge(until(hopeless, 0, 2), [others[0], *pruned], FOLDS).drop


def test_a_flat_start_is_forgiven_until_it_is_too_late(rng: np.random.Generator) -> None:
    base = images_of(rng, SIZES)
    others = [trial(n, images_of(rng, SIZES), 1 - np.exp(-6 * shares(20)) * 0.999) for n in range(MIN_CURVES)]
    flat = trial(9, base, np.append(np.full(19, 1e-4), 1.0))
    dropped = [judge(until(flat, 0, epoch), others, FOLDS).drop for epoch in range(1, 20)]
    assert not any(dropped[:3])
    assert all(dropped[14:])


def test_a_first_fold_may_gain_as_much_as_the_others_did_and_a_little_more() -> None:
    """By hand, at a constant learning rate, after 2 of 4 epochs."""
    others = first_folds((0.3, 0.6, 0.9, 0.8), (0.2, 0.5, 0.7, 0.8), (0.1, 0.1, 0.1, 0.1), (0.4, 0.2, 0.6, 0.7))
    # The best scores so far are 0.6, 0.5, 0.1 and 0.4, and the latest are 0.6, 0.5, 0.1 and 0.2.
    gains, from_latest = [0.2 / 0.4, 0.3 / 0.5, 0.0, 0.3 / 0.6], [0.2 / 0.4, 0.3 / 0.5, 0.0, 0.5 / 0.8]
    largest, largest_from_latest = (max(each) + EXTRA * np.std(each, ddof=1) for each in (gains, from_latest))
    for now in ((0.2, 0.3), (0.3, 0.1)):
        best, typical = _ends(begun(*now), 0, others, 0.8)
        latest = now[-1] + (1 - now[-1]) * largest_from_latest
        assert best == pytest.approx(max(0.3 + 0.7 * largest, latest), abs=1e-6)
        assert typical == pytest.approx(0.3 + 0.7 * 0.5, abs=1e-6)


def test_a_first_fold_may_rise_as_late_as_near_trials_rose_early() -> None:
    """By hand: half of the epochs are left, in which the fastest near trial reached 0.7 of 0.75."""
    others = first_folds((0.3, 0.7, 0.72, 0.75), (0.2, 0.6, 0.72, 0.76), (0.5, 0.6, 0.6, 0.6), (0.6, 0.7, 0.72, 0.74))
    best, typical = _ends(begun(0.1, 0.05), 0, others, 0.76)
    assert best == pytest.approx(0.76 * 0.7 / 0.74, abs=1e-6)
    assert typical < 0.3
    # The third, which began fastest, is more than NEAR below the leader.
    best, _ = _ends(begun(0.1, 0.05), 0, others, 0.64)
    assert best == pytest.approx(0.64, abs=1e-6)
    # A quarter is left: what they reached in one epoch counts.
    best, _ = _ends(begun(0.1, 0.05, 0.02), 0, others, 0.76)
    assert best == pytest.approx(0.76 * 0.6 / 0.74, abs=1e-6)


def test_the_best_case_is_a_score() -> None:
    others = first_folds(*[(0.0, 0.0, 0.0, 1.0)] * 3, (0.0, 0.0, 0.0, 0.1))
    assert _ends(begun(0.5, 0.5), 0, others, 0.9)[0] == 1.0


def test_the_same_part_of_a_trial_with_fewer_epochs_is_rounded_down() -> None:
    """Half of 3 epochs is 1 and not 2, which makes the gain larger."""
    others = first_folds(*[(0.4, 0.8, 0.8)] * 4)
    assert _ends(begun(0.3, 0.3), 0, others, 0.8)[1] == pytest.approx(0.3 + 0.7 * 0.4 / 0.6, abs=1e-6)
    # Before its first epoch a trial has no score.
    assert _ends(begun(0.3), 0, others, 0.8)[1] == pytest.approx(0.3 + 0.7 * 0.8, abs=1e-6)


@pytest.mark.parametrize("best", [0.60, 0.66, 0.70])
def test_inside_the_first_fold_the_best_case_is_judged_as_if_the_fold_had_ended_with_it(best: float) -> None:
    # Level curves: nothing is gained, and in the best case the last fold is as good as the best epoch so far.
    folds = folds_of([4] * 3)
    others = first_folds(*[(end,) * 4 for end in (0.70, 0.69, 0.71, 0.68)])
    found = compare(begun(best, best, best), others, folds)
    assert found is not None
    model = value_model(np.array([[each.value, np.nan, np.nan] for each in others]), [4] * 3, 0.0)
    # The late start: a quarter of the epochs is left, in which the leader reached its end.
    leader = model.predict(np.array([[0.71, np.nan, np.nan]]))
    end = max(best, leader.fold_mean(0, 0))
    values = model.predict(np.array([[0.71, np.nan, np.nan], [end, np.nan, np.nan]]), flat=[1])
    assert (found.d, found.se) == pytest.approx(values.difference(1, 0), abs=1e-5)
    assert found.p == pytest.approx(values.probability_better(0, MATTERS)[1], abs=1e-4)
    assert found.against == 2
    assert found.estimate == pytest.approx(values.true_means[0] + best - leader.fold_mean(0, 0), abs=1e-5)


def test_a_hopeless_trial_ends_inside_its_first_fold_with_a_modest_estimate(rng: np.random.Generator) -> None:
    curve = np.array([0.8, 0.95, 0.98, 0.99, 1.0])
    base = images_of(rng, SIZES)
    others = [trial(number, base, curve) for number in range(MIN_CURVES)]
    hopeless = trial(9, [0.5 * scores for scores in base], curve)
    found = judge(until(hopeless, 0, 4), others, FOLDS)
    assert found.drop
    assert (found.fold, found.epoch) == (0, 4)
    assert found.p is not None
    assert found.p < ALPHA
    assert "in fold 1 at epoch 4, best case" in found.reason
    # The estimate is how such a trial typically ends, not the best that it could have done.
    assert found.estimate == pytest.approx(hopeless.value, abs=0.03)
    assert found.d is not None
    assert found.estimate < trial(0, base).value - found.d


@pytest.mark.parametrize("n_others", [3, 4, 18])
def test_the_limit_for_a_best_case_grows_with_the_number_of_trials(n_others: int) -> None:
    """It is alpha (n + 1), because a best case that n trials have not exceeded has a probability of 1 / (n + 1)."""
    others = first_folds(*[(0.3, 0.4, 0.6, 0.69 + 0.02 * n / n_others) for n in range(n_others)])
    folds, candidate = folds_of([4] * 3), begun(0.3, 0.3)
    p = judge(candidate, others, folds).p
    assert p is not None
    assert 0 < p < MAX_INSIDE
    for factor, drop in ((1.01, True), (0.99, False)):
        found = Race(alpha=p * factor / (n_others + 1)).should_prune(candidate, others, folds)
        assert found is not None
        assert found.drop == drop
    # At the end of the fold, alpha is the limit.
    ended = constant(9, 0.6, n_images=4)
    p = judge(ended, others, folds).p
    assert p is not None
    for factor, drop in ((1.01, True), (0.99, False)):
        verdict = Race(alpha=p * factor).should_prune(ended, others, folds)
        assert verdict is not None
        assert verdict.drop == drop


def test_a_probable_best_case_is_not_pruned_however_many_trials_there_are(monkeypatch: pytest.MonkeyPatch) -> None:
    others = first_folds(*[(0.69,) * 4] * 4)
    folds, candidate = folds_of([4] * 3), begun(0.65, 0.65)
    p = judge(candidate, others, folds).p
    assert p is not None
    for factor, drop in ((1.01, True), (0.99, False)):
        monkeypatch.setattr("hpsearch.search.racing.MAX_INSIDE", p * factor)
        found = Race(alpha=0.5).should_prune(candidate, others, folds)
        assert found is not None
        assert found.drop == drop


def test_the_reason_says_on_which_side_of_the_leader_the_score_is() -> None:
    for score, side in ((0.70, "below"), (0.90, "above")):
        found = judge(constant(2, score), [constant(1, 0.80)], FIVE)
        assert found.d is not None
        assert f": {abs(found.d):.4f} ± " in found.reason
        assert f" {side} trial 1, p = " in found.reason


def test_a_jump_down_is_forgiven_after_a_good_epoch(rng: np.random.Generator) -> None:
    base = images_of(rng, SIZES)
    others = [trial(n, images_of(rng, SIZES), np.array([0.8, 0.9, 0.95, 1.0])) for n in range(MIN_CURVES)]
    jumpy = trial(9, base, np.array([0.8, 0.95, 0.1, 1.0]))
    assert not judge(until(jumpy, 0, 3), others, FOLDS).drop
    low = trial(9, base, np.array([0.1, 0.1, 0.1, 1.0]))
    assert judge(until(low, 0, 3), others, FOLDS).drop


def test_trials_with_other_numbers_of_epochs_are_compared_at_the_same_part(rng: np.random.Generator) -> None:
    base = images_of(rng, SIZES)
    others = [trial(number, base, 1 - 0.9 * np.exp(-5 * shares(4))) for number in range(MIN_CURVES)]
    for n_epochs in (2, 3, 4, 9):
        same = trial(9, base, 1 - 0.9 * np.exp(-5 * shares(n_epochs)))
        worse = trial(9, [scores - 0.7 for scores in base], np.ones(n_epochs))
        assert not any(judge(until(same, 0, epoch), others, FOLDS).drop for epoch in range(1, n_epochs))
        if n_epochs > 3:
            assert judge(until(worse, 0, n_epochs - 1), others, FOLDS).drop


def test_a_fixed_split_races_on_epochs_alone(rng: np.random.Generator) -> None:
    folds = folds_of([60])
    base = images_of(rng, [60])
    curve = np.array([0.7, 0.9, 0.97, 1.0])
    others = [trial(number, base, curve) for number in range(MIN_CURVES)]
    hopeless = trial(9, [0.3 * scores for scores in base], curve)
    assert judge(until(hopeless, 0, 3), others, folds).drop
    assert Race().should_prune(hopeless, others, folds) is None
    assert Race().order(others, folds) == []


def test_a_trial_that_is_stopped_before_any_comparison_is_worth_its_last_epoch() -> None:
    candidate = trial(3, [np.full(4, 0.6), np.full(4, 0.8)], FALLS)
    verdict = decide(True, candidate, [], folds_of([4] * 3), "stopped on request")
    assert (verdict.drop, verdict.fold, verdict.epoch, verdict.reason) == (True, 1, 3, "stopped on request")
    assert verdict.estimate == pytest.approx(0.7, abs=1e-6)
    beside = decide(
        True, candidate, [constant(0, 0.9, 0.9, 0.9, n_images=4)], folds_of([4] * 3), "stopped on request"
    )
    assert (beside.drop, beside.against, beside.reason) == (True, 0, "stopped on request")
