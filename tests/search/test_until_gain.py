"""Tests of `study.until_gain`: when a search ends because further trials are unlikely to improve the score."""

from pathlib import Path

import numpy as np
import pytest

from hpsearch.data.folds import Folds
from hpsearch.search.racing import MIN_LATEST, UNLIKELY, TrialScores, probability_of_gain
from hpsearch.stats.value_model import value_model
from tests.search.simulated import simulate

N_IMAGES = 40


def folds_of(k: int = 3) -> Folds:
    ids = tuple(str(image) for image in range(k * N_IMAGES))
    return Folds(ids, tuple(image // N_IMAGES for image in range(len(ids))), k, 0, "kfold")


def trial(number: int, mean: float, *, is_pruned: bool = False) -> TrialScores:
    """A trial that has finished its first fold."""
    images = np.random.default_rng(number).standard_normal(N_IMAGES)
    scores = mean + 0.07 * (images - images.mean())
    return TrialScores(number, {0: scores[None].astype(np.float32)}, 1, is_pruned=is_pruned)


def means_like(spread: float, n: int = 30) -> list[float]:
    return list(0.8 + spread * np.random.default_rng(0).standard_normal(n))


def test_the_probability_of_a_gain_is_that_of_simulated_trials() -> None:
    rng = np.random.default_rng(0)
    means = np.full((20, 2), np.nan)
    means[:, 0] = 0.8 + 0.01 * rng.standard_normal(20)
    means[0, 1] = means[0, 0]
    model = value_model(means, [200, 200], 0.005)
    values, like = model.predict(means), np.arange(20) > 5
    row = int(values.expected.argmax())
    found = values.probability_of_gain(row, like, 0.8, 7, 0.004)
    grid = rng.choice(len(model.share), (50_000, 1), p=model.share)
    noise = rng.standard_normal((3, len(grid), 7))
    leader = values.effect[grid, row] + np.sqrt(values.effect_variance[grid, row]) * noise[0]
    centre = values.effect[:, like].mean(axis=1)[grid] + model.tau[grid] / 14**0.5 * noise[1]
    gains = centre + model.tau[grid] * noise[2] - leader
    gains[rng.random(gains.shape) > 0.8] = -np.inf
    assert found == pytest.approx((gains.max(axis=1) > 0.004).mean(), abs=0.01)


def test_more_trials_and_smaller_gains_are_more_probable() -> None:
    trials = [trial(number, mean) for number, mean in enumerate(means_like(0.01))]
    p = [probability_of_gain(trials, folds_of(), gain, n) for gain, n in ((0.01, 1), (0.01, 20), (0.001, 20))]
    assert 0 < p[0] < p[1] < p[2] < 1


def test_equal_trials_promise_no_gain_and_few_trials_everything() -> None:
    equal = [trial(number, 0.8 + 1e-5 * number) for number in range(30)]
    assert probability_of_gain(equal, folds_of(), 0.03, 20) < UNLIKELY
    assert probability_of_gain(equal[: MIN_LATEST - 1], folds_of(), 0.01, 20) == 1.0
    assert probability_of_gain([trial(n, 0.8, is_pruned=True) for n in range(30)], folds_of(), 0.01, 20) == 1.0


def test_the_latest_trials_predict_further_ones() -> None:
    good, bad = [0.80 + 0.002 * n for n in range(10)], [0.70] * 20
    falling = [trial(number, mean) for number, mean in enumerate([*good, *bad])]
    rising = [trial(number, mean) for number, mean in enumerate([*bad, *good])]
    assert probability_of_gain(falling, folds_of(), 0.003, 20) == 0.0
    assert probability_of_gain(rising, folds_of(), 0.003, 20) > 0.5


def test_trials_without_a_finished_fold_cannot_gain() -> None:
    begun = [trial(number, mean) for number, mean in enumerate(means_like(0.01))]
    without = [TrialScores(each.number, {0: each.scores[0]}, 2, is_pruned=True) for each in begun[-8:]]
    few, many = ([*begun[:-8], *some] for some in (without, begun[-8:]))
    assert 0 < probability_of_gain(few, folds_of(), 0.003, 20) < probability_of_gain(many, folds_of(), 0.003, 20)


@pytest.mark.parametrize(("gain", "n_trials"), [(0.5, MIN_LATEST), (0.0, 30)])
def test_a_search_ends_when_no_gain_is_likely(tmp_path: Path, gain: float, n_trials: int) -> None:
    study, _ = simulate(tmp_path, "study.trials=30", f"study.until_gain={gain}")
    record = study.record
    assert len(record.trials()) == n_trials
    # It is finished for all that read its settings.
    again = type(record).open(record.paths)
    assert again.config.study.trials == n_trials
    assert again.is_searched(again.trials())
    assert again.best() is not None


def test_a_deterministic_search_ends_after_the_same_trial_for_any_number_of_workers(tmp_path: Path) -> None:
    settings = ("study.trials=40", "study.until_gain=0.05", "study.lookahead=4")
    ended = []
    for n_workers in (1, 2, 4):
        interruptions = (17, 20) if n_workers > 1 else ()
        study, _ = simulate(
            tmp_path / str(n_workers), *settings, n_workers=n_workers, seed=n_workers, interrupt_after=interruptions
        )
        ended.append([(each.params, each.outcome, each.value) for each in study.record.trials()])
    assert MIN_LATEST < len(ended[0]) < 40
    assert ended[0] == ended[1] == ended[2]
