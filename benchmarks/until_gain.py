"""Measure how many trials `study.until_gain` saves, and what they would have gained.

    python benchmarks/until_gain.py                  100 simulated searches, about 3 minutes
    python benchmarks/until_gain.py --studies 20

Each search has 50 trials in the space of `experiments/isic2017-64.toml`. Params are suggested by the TPE sampler, as
in a study. The true mean of a configuration is a random function of its params: a parabola in the logarithm of the
learning rate, an effect of each value of the other settings, and small interactions. In a third of the searches each,
these effects are halved, unchanged or doubled. A trial's fold means are its true mean plus the effect of the fold,
run-to-run noise of 0.006 and the noise of 310 images. Before each suggestion, one fold of every trial is known, and
all folds of trial 0 and of the two best trials.

A search ends as soon as the probability of a gain of 0.003 (`racing.probability_of_gain`) is below a limit. The limit
of hpsearch is marked. The columns:

    saved     share of the trials that are not evaluated
    loss      true mean of the trial with the highest score of all 50, minus that of the evaluated ones
    gained    share of the ended searches in which the loss is 0.003 or more
"""

from __future__ import annotations

import argparse
import dataclasses
import math
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from hpsearch import config as configs
from hpsearch.config import StudyConfig
from hpsearch.data.folds import Folds
from hpsearch.search.racing import MATTERS, MIN_LATEST, UNLIKELY, TrialScores, probability_of_gain
from hpsearch.search.suggest import Params, suggest
from hpsearch.store.trials import TrialRecord

N_TRIALS, N_FOLDS, N_IMAGES = 50, 5, 310
IMAGE_SD, RUN_SD, FOLD_SD = 0.07, 0.006, 0.007
LIMITS = (0.05, 0.1, UNLIKELY, 0.3, 0.4)


class Surface:
    """True means of all configurations of a search space."""

    def __init__(self, config: StudyConfig, rng: np.random.Generator, scale: float) -> None:
        self._best, self._width = rng.uniform(-2, -0.8), scale * rng.uniform(0.01, 0.04)
        self._values = {name: list(each.extremes) for name, each in config.search.items() if each.n_values}
        self._values |= {"unet.depth": [2, 3, 4], "unet.stacking": [1, 2, 3]}
        self._effects = {name: scale * 0.006 * rng.standard_normal(len(v)) for name, v in self._values.items()}
        self._interactions = scale * 0.002 * rng.standard_normal([len(each) for each in self._values.values()])

    def mean(self, params: Params) -> float:
        """Return the true mean of a configuration."""
        where = {name: values.index(params[name]) for name, values in self._values.items()}
        effects = sum(self._effects[name][index] for name, index in where.items())
        slope = self._width * (math.log10(params["train.lr"]) - self._best) ** 2
        return float(0.84 - slope + effects + self._interactions[tuple(where.values())])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--studies", type=int, default=100, help="number of simulated searches")
    options = parser.parse_args()
    config = configs.load(Path(__file__).parents[1] / "experiments" / "isic2017-64.toml", [])
    searches = [search(config, seed) for seed in range(options.studies)]
    print(f"{options.studies} searches of {N_TRIALS} trials, gain {MATTERS:g}")
    print(f"{'limit':>7} {'saved':>6} {'loss':>8} {'gained':>7}")
    for limit in LIMITS:
        print_limit(limit, searches)


def search(config: StudyConfig, seed: int) -> tuple[NDArray[np.float64], NDArray[np.float64], list[float]]:
    """Return the true means, scores and, before each suggestion, the probability of a gain; (trials,) each."""
    rng = np.random.default_rng([11, seed])
    surface = Surface(config, rng, (0.5, 1.0, 2.0)[seed % 3])
    config = dataclasses.replace(config, study=dataclasses.replace(config.study, seed=seed))
    fold_effects = FOLD_SD * rng.standard_normal(N_FOLDS)
    history: list[TrialRecord] = []
    truth, scores, p = [], np.zeros((0, N_FOLDS, N_IMAGES), np.float32), []
    for number in range(N_TRIALS):
        p.append(probability_of_gain(known_trials(scores), FOLDS, MATTERS, N_TRIALS - number))
        params = suggest(config, history, number)
        truth.append(surface.mean(params))
        means = truth[-1] + fold_effects + RUN_SD * rng.standard_normal(N_FOLDS)
        images = means[:, None] + IMAGE_SD * rng.standard_normal((N_FOLDS, N_IMAGES))
        scores = np.concatenate([scores, images[None].astype(np.float32)])
        value = float(scores[-1, 0].mean())
        history.append(
            TrialRecord(number=number, params=params, config={}, began_at=0.0, outcome="pruned", value=value)
        )
    return np.array(truth), scores.mean(axis=(1, 2)), p


def known_trials(scores: NDArray[np.float32]) -> list[TrialScores]:
    """Return the trials as the study would know them: all folds of trial 0 and of the two best, one of the others."""
    best = set(np.argsort(-scores[:, 0].mean(axis=1))[:2]) | {0}
    return [
        TrialScores(n, {fold: trial[fold][None] for fold in range(N_FOLDS if n in best else 1)}, 1)
        for n, trial in enumerate(scores)
    ]


FOLDS = Folds(
    ids=tuple(map(str, range(N_FOLDS * N_IMAGES))),
    fold_of=tuple(image // N_IMAGES for image in range(N_FOLDS * N_IMAGES)),
    k=N_FOLDS,
    seed=0,
    method="kfold",
)


def print_limit(limit: float, searches: list[tuple[NDArray[np.float64], NDArray[np.float64], list[float]]]) -> None:
    """Print what this limit saves and loses."""
    saved: list[float] = []
    losses: list[float] = []
    gained: list[bool] = []
    for truth, values, p in searches:
        n = next((n for n in range(MIN_LATEST, N_TRIALS) if p[n] < limit), N_TRIALS)
        saved.append(1 - n / N_TRIALS)
        losses.append(float(truth[values.argmax()] - truth[values[:n].argmax()]))
        gained += [losses[-1] >= MATTERS] if n < N_TRIALS else []
    mark = "  (hpsearch)" if limit == UNLIKELY else ""
    print(f"{limit:7g} {np.mean(saved):6.1%} {np.mean(losses):8.5f} {np.mean(gained or [False]):7.1%}{mark}")


if __name__ == "__main__":
    main()
