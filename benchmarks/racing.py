"""What racing saves and what it loses: replays whole studies, trial by trial, through the real code of every rule.

    python benchmarks/racing.py                             recorded study and generated ones
    python benchmarks/racing.py --study OUT/studies/NAME    also a study recorded by `hpsearch study --pruner none`

A study that was run without any pruning knows every score of every trial after every epoch. So any rule can be tried
on it in any order of the trials: the rule sees what it would have seen, and what it stops is not spent. Printed for
each rule, as means over orders (recorded) or studies (generated):

    spent     share of the fold-epochs of the whole study
    regret    value of the best trial less that of the chosen one; both values are means over all folds
    lost      share of replays that did not choose the best trial
    full      trials evaluated on all folds

Generated studies follow a per-image model: y[c, i] = m[c] + a[i] + b[c, i] + r[c, fold(i)], with the spread of the
configurations and the run-to-run noise of a fold as printed, sd of a 0.13 and of b 0.07, and 1550 images. Curves over
epochs rise fast or slowly, unrelated to their end; a fifth lies flat at first; scores jump while the learning rate is
high (`learning_curves`). They also tell how often a trial is dropped that is truly better than the incumbent.

The Wilcoxon rules take Optuna seconds a replay, so they see fewer replays: the column says how many.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from optuna.pruners import HyperbandPruner, MedianPruner, SuccessiveHalvingPruner, WilcoxonPruner

from hpsearch.data.folds import Folds
from hpsearch.paths import StudyPaths
from hpsearch.tuning.pruners import NoPruner, OptunaPruner, Pruner, epochs_of_first_fold, fold_means, images
from hpsearch.tuning.racing import Race, TrialScores
from hpsearch.tuning.record import StudyRecord

BETTER = 0.003
"""A trial is truly better than the incumbent if it is so by this much."""


@dataclass(frozen=True)
class Study:
    """Every score of a study that was run without pruning."""

    name: str
    trials: tuple[TrialScores, ...]
    """All of them full."""
    folds: Folds
    truth: NDArray[np.float64] | None = None
    """What each trial is truly worth, where the study was generated."""


@dataclass
class Tally:
    """What a rule did over many replays."""

    spent: list[float] = field(default_factory=list)
    regret: list[float] = field(default_factory=list)
    true_regret: list[float] = field(default_factory=list)
    """Truth of the truly best trial less that of the chosen one."""
    full: list[int] = field(default_factory=list)
    judged: int = 0
    """Trials that met an incumbent."""
    better: int = 0
    """Those that were truly better than it by BETTER."""
    dropped_better: int = 0
    """Those of them that were dropped."""
    costly: int = 0
    """Those of them whose mean over all folds would have beaten the incumbent's."""


def replay(study: Study, order: Sequence[int], pruner: Pruner, tally: Tally) -> None:
    """Run the study's trials one after another in this order, under fresh numbers, and add up what happens."""
    k = study.folds.k
    values = [trial.value for trial in study.trials]
    ended: list[TrialScores] = []
    spent, incumbent = 0, None
    for number, index in enumerate(order):
        whole = study.trials[index]
        seen: dict[int, NDArray[np.float32]] = {}
        dropped = False
        for fold, epoch in ((fold, epoch) for fold in range(k) for epoch in range(1, whole.n_epochs + 1)):
            seen = {**seen, fold: whole.scores[fold][:epoch]}
            candidate = TrialScores(number, seen, whole.n_epochs, whole.schedule)
            spent += 1
            verdict = pruner.judge(candidate, ended, study.folds)
            if dropped := verdict is not None and verdict.drop:
                break
        ended.append(candidate)
        if incumbent is not None and study.truth is not None:
            better = study.truth[index] >= study.truth[incumbent] + BETTER
            tally.judged += 1
            tally.better += bool(better)
            tally.dropped_better += bool(better and dropped)
            tally.costly += bool(better and dropped and values[index] > values[incumbent])
        if not dropped and (incumbent is None or values[index] > values[incumbent]):
            incumbent = index
    assert incumbent is not None, "the first trial meets no full trial, so every rule lets it end"
    tally.spent.append(spent / sum(k * trial.n_epochs for trial in study.trials))
    tally.regret.append(max(values) - values[incumbent])
    tally.full.append(sum(trial.is_full(k) for trial in ended))
    if study.truth is not None:
        tally.true_regret.append(float(study.truth.max() - study.truth[incumbent]))


def rules(n_epochs: int) -> dict[str, tuple[Callable[[], Pruner], float]]:
    """Name to a fresh rule, and the share of replays that it is given."""
    return {
        "none": (NoPruner, 1),
        "race": (Race, 1),
        "race with p < 0.1": (lambda: Race(0.1), 1),
        "race with p < 0.3": (lambda: Race(0.3), 1),
        "Median, epochs": (lambda: OptunaPruner(MedianPruner, epochs_of_first_fold), 1),
        "SuccessiveHalving, epochs": (lambda: OptunaPruner(SuccessiveHalvingPruner, epochs_of_first_fold), 1),
        "Hyperband, epochs": (
            lambda: OptunaPruner(lambda: HyperbandPruner(max_resource=n_epochs), epochs_of_first_fold),
            1,
        ),
        "Wilcoxon, folds": (lambda: OptunaPruner(WilcoxonPruner, fold_means), 0.2),
        "Wilcoxon, images": (lambda: OptunaPruner(WilcoxonPruner, images), 0.1),
    }


def compare_rules(studies: Callable[[int], Study], n: int, n_epochs: int, only: Sequence[str]) -> dict[str, Tally]:
    """Replay n studies in an order of their own under every rule; rule i of replay j sees the same as all others."""
    tallies = {}
    for name, (fresh, share) in rules(n_epochs).items():
        if only and name not in only:
            continue
        tallies[name] = Tally()
        for index in range(max(1, round(n * share))):
            study = studies(index)
            order = np.random.default_rng([1, index]).permutation(len(study.trials))
            replay(study, order.tolist(), fresh(), tallies[name])
    return tallies


def recorded(path: Path) -> Study:
    """A study from an archive whose `dice` is (trial, fold, epoch, image of the fold)."""
    scores = np.load(path)["dice"]
    return _study(path.name, scores)


def from_folder(path: Path) -> Study:
    """A study that `hpsearch study --pruner none` recorded: its full trials."""
    record = StudyRecord.open(StudyPaths(path.resolve()))
    trials = []
    for trial in record.full_trials():
        train = trial.study_config.train
        scores = {fold: record.fit(trial.number, fold).scores() for fold in range(record.n_folds)}
        trials.append(TrialScores(trial.number, scores, train.epochs, train.schedule))
    return Study(record.name, tuple(trials), record.folds)


def generated(
    seed: Sequence[int],
    *,
    spread: float,
    noise: float,
    n_trials: int = 40,
    n_folds: int = 5,
    n_epochs: int = 8,
    n_images: int = 1550,
) -> Study:
    """A study from the per-image model. Folds have n_images / n_folds images each."""
    rng = np.random.default_rng(seed)
    truth = 0.83 + spread * rng.standard_normal(n_trials)
    curves = learning_curves(rng, truth, n_folds, n_epochs)
    curves += noise * rng.standard_normal((n_trials, n_folds, 1))
    shape = (n_trials, n_folds, 1, n_images // n_folds)
    images = 0.13 * rng.standard_normal((1, *shape[1:])) + 0.07 * rng.standard_normal(shape)
    scores = (curves[..., None] + images).astype(np.float32)
    return _study(f"spread {spread:g}, noise {noise:g}", scores, truth)


def learning_curves(
    rng: np.random.Generator, ends: NDArray[np.float64], n_folds: int, n_epochs: int
) -> NDArray[np.float64]:
    """Mean scores of every epoch, (trials, folds, epochs), that end in `ends`.

    Over x, the share of a cosine schedule's learning rate that is spent, a curve is end (1 - exp(-c x)) / (1 - exp(-c))
    with c from 0.5 (nearly a straight line) to 12 (all but done in the first tenth), whatever the end. One trial in
    five begins to rise only at x up to 0.3. Scores jump with a standard deviation of 0.05 that falls to 0 with the
    learning rate.
    """
    n = len(ends)
    t = np.arange(1, n_epochs + 1) / n_epochs
    speed = np.exp(rng.uniform(np.log(0.5), np.log(12), (n, 1)))
    delay = np.where(rng.random((n, 1)) < 0.2, rng.uniform(0, 0.3, (n, 1)), 0)
    x = np.clip((t + np.sin(np.pi * t) / np.pi - delay) / (1 - delay), 0, 1)
    rise = np.expm1(-speed * x) / np.expm1(-speed)
    jumps = 0.05 * np.sqrt((1 + np.cos(np.pi * t)) / 2) * rng.standard_normal((n, n_folds, n_epochs))
    return np.asarray(ends[:, None, None] * rise[:, None, :] + jumps)


def _study(name: str, scores: NDArray[np.float32], truth: NDArray[np.float64] | None = None) -> Study:
    n_trials, n_folds, n_epochs, n_images = scores.shape
    folds = Folds(
        ids=tuple(str(image) for image in range(n_folds * n_images)),
        fold_of=tuple(fold for fold in range(n_folds) for _ in range(n_images)),
        k=n_folds,
        seed=0,
        method="kfold",
    )
    trials = tuple(
        TrialScores(number, {fold: scores[number, fold] for fold in range(n_folds)}, n_epochs)
        for number in range(n_trials)
    )
    return Study(name, trials, folds, truth)
