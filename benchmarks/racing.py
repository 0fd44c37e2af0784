"""Measure how much training time racing saves and what it costs: replay whole studies with every pruning rule.

    python benchmarks/racing.py                            recorded_study.npz, recorded-study.npz beside the
                                                           folder HPSEARCH_ISIC_ROOT, and simulated studies; about
                                                           20 minutes
    python benchmarks/racing.py --quick                    the same with a tenth of the replays
    python benchmarks/racing.py --study OUT/studies/NAME   also a study recorded by `hpsearch study --pruner none`
    python benchmarks/racing.py --study ... --save FILE    only save its scores and params as a recorded study

A study without pruning has the scores of every trial after every epoch. Every rule can therefore be replayed on it,
with the trials in any order. The rule sees only the scores that it would have seen, and the epochs that it prunes do
not count as spent.

Simulated studies follow a per-image model: y[c, i] = m[c] + a[i] + b[c, i] + r[c, fold(i)]. The standard deviations
(sd) of m and r (run-to-run variation) are printed; those of a and b are 0.13 and 0.07. The curves rise fast or
slowly, regardless of their final score, and some are flat at first (`learning_curves`). They show how often a trial
is pruned that is truly better than the trial that it was compared with.

The columns:

    spent        share of the fold-epochs of the whole study
    regret       value of the best trial minus that of the selected one, both over all folds
    lost         share of replays that did not select the best trial
    complete     number of trials that are evaluated on all folds
    race         what racing spends on the same replays if its p is set so that its regret is not larger
    better       share of trials that are truly better than the selected one, by 0.003 or more
    wrong        share of all trials that are pruned although they are truly better, by 0.003 or more, than the trial
                 that they were compared with
    in vain      share of all trials that are so and have the higher value over all folds, too
    true regret  true mean of the truly best trial minus that of the selected one, and (none) the same without pruning
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray
from optuna.pruners import HyperbandPruner, MedianPruner, SuccessiveHalvingPruner, WilcoxonPruner

from hpsearch.data.folds import Folds
from hpsearch.paths import StudyPaths
from hpsearch.search.optuna_pruner import OptunaPruner, epochs_of_first_fold, images
from hpsearch.search.pruners import Pruner
from hpsearch.search.pruners.none import NoPruner
from hpsearch.search.racing import Race, TrialScores
from hpsearch.search.scheduler import Fit, MakeShortlist, OpenFits, StudyState, Suggest, next_action
from hpsearch.store.record import StudyRecord
from hpsearch.store.trials import PruneDecision

BETTER = 0.003
"""Smallest true difference at which a trial counts as better than another one."""
MODELS = [(spread, noise) for spread in (0.03, 0.01, 0.005) for noise in (0.003, 0.006, 0.012)]
ALPHAS = (0.002, 0.005, 0.01, 0.02, 0.05, 0.1)
LOOKAHEADS = (2, 4, 8)
"""What `hpsearch study --deterministic` costs: 4 is what it takes."""
OTHER_SHAPES: dict[str, dict[str, float]] = {
    "8 trials": {"n_trials": 8},
    "2 folds": {"n_folds": 2},
    "3 folds": {"n_folds": 3},
    "10 folds": {"n_folds": 10},
    "20 epochs": {"n_epochs": 20},
    "2 epochs": {"n_epochs": 2},
    "20 images": {"n_images": 20},
    "100 images": {"n_images": 100},
    "flat starts": {"flat": 0.3},
    "all equal": {"spread": 0.0},
}
"""What differs from the model with spread 0.01 and noise 0.006."""


@dataclass(frozen=True)
class Study:
    """Every score of a study that was run without pruning."""

    name: str
    trials: tuple[TrialScores, ...]
    """All of them are complete."""
    folds: Folds
    truth: NDArray[np.float64] | None = None
    """What each trial is truly worth, where the study was generated."""


@dataclass
class Tally:
    """What a rule did over many replays."""

    spent: list[float] = field(default_factory=list)
    regret: list[float] = field(default_factory=list)
    true_regret: list[float] = field(default_factory=list)
    n_complete: list[int] = field(default_factory=list)
    n_compared: int = 0
    """Number of trials that were compared with another one."""
    n_better: int = 0
    n_wrong: int = 0
    n_in_vain: int = 0


class Replay:
    """One replay of a study: its trials in an order of their own, through the real scheduler with one worker."""

    def __init__(self, study: Study, order: Sequence[int], pruner: Pruner, lookahead: int = 0) -> None:
        self.study, self.order, self.pruner, self.lookahead = study, order, pruner, lookahead
        self.open: dict[int, TrialScores] = {}
        self.ended: dict[int, TrialScores] = {}
        self.decisions: dict[int, PruneDecision] = {}
        self.compared: set[int] = set()
        self.spent = 0

    def run(self) -> Self:
        """Replay the study until the scheduler has nothing left to do."""
        while not isinstance(action := next_action(self._state()), MakeShortlist):
            if isinstance(action, Suggest):
                number = len(self.open) + len(self.ended)
                whole = self.study.trials[self.order[number]]
                self.open[number] = TrialScores(number, {}, whole.n_epochs, whole.schedule)
            else:
                assert isinstance(action, Fit), "one worker always has something to do"
                self._fit(action.trial, action.fold)
        return self

    def _fit(self, number: int, fold: int) -> None:
        whole, trial = self.study.trials[self.order[number]], self.open[number]
        for epoch in range(1, whole.n_epochs + 1):
            self.spent += 1
            candidate = replace(trial, scores={**trial.scores, fold: whole.scores[fold][:epoch]})
            self.open[number] = candidate
            if self._prune(candidate, self.lookahead):
                break
        else:
            if candidate.is_full(self.study.folds.k):
                self.ended[number] = self.open.pop(number)
        is_early = len(self.open) + len(self.ended) < len(self.order)
        if self.pruner.folds == "as needed" and not (self.lookahead and is_early):
            # When a trial is pruned, the estimates of the others change.
            while any(self._prune(each, 0) for each in list(self.open.values()) if each.finished):
                pass

    def _prune(self, candidate: TrialScores, lookahead: int) -> bool:
        last = candidate.number - lookahead if lookahead else len(self.order)
        others = [each for each in self._known() if each.number <= last and each.number != candidate.number]
        decision = self.pruner.should_prune(candidate, others, self.study.folds)
        if decision is not None:
            self.compared.add(candidate.number)
        if decision is None or not decision.drop:
            return False
        self.decisions[candidate.number] = decision
        self.open.pop(candidate.number)
        self.ended[candidate.number] = replace(candidate, is_pruned=True)
        return True

    def _known(self) -> list[TrialScores]:
        is_open_known = self.pruner.folds == "as needed"
        waiting = [each for each in self.open.values() if each.finished] if is_open_known else []
        return [*self.ended.values(), *waiting]

    def _state(self) -> StudyState:
        k, n_ended = self.study.folds.k, len(self.ended)
        opened = [OpenFits(n, 0, frozenset(range(k)), frozenset(self.open[n].finished)) for n in sorted(self.open)]
        known = self._known()
        return StudyState(
            n_left=len(self.order) - n_ended,
            n_suggested=len(opened) + n_ended,
            open=tuple(opened),
            lookahead=self.lookahead,
            folds=self.pruner.folds,
            refine=tuple(self.pruner.order(known, self.study.folds)) if self.pruner.folds == "as needed" else (),
            n_screened=sum(bool(each.finished) for each in known),
            n_further=sum(len(each.finished) - 1 for each in known if each.finished and each.number > 0),
        )


def replay(study: Study, order: Sequence[int], pruner: Pruner, tally: Tally, lookahead: int = 0) -> None:
    """Replay a study in this order, and add up what happens."""
    k, values, found = (
        study.folds.k,
        [trial.value for trial in study.trials],
        Replay(study, order, pruner, lookahead).run(),
    )
    complete = [order[number] for number, trial in found.ended.items() if trial.is_full(k)]
    chosen = max(complete, key=lambda index: values[index])
    tally.n_compared += len(found.compared)
    for number, decision in found.decisions.items():
        if study.truth is not None and decision.against is not None:
            index, other = order[number], order[decision.against]
            wrong = bool(study.truth[index] >= study.truth[other] + BETTER)
            tally.n_wrong += wrong
            tally.n_in_vain += wrong and values[index] > values[other]
    tally.spent.append(found.spent / sum(k * trial.n_epochs for trial in study.trials))
    tally.regret.append(max(values) - values[chosen])
    tally.n_complete.append(len(complete))
    if study.truth is not None:
        tally.true_regret.append(float(study.truth.max() - study.truth[chosen]))
        tally.n_better += int((study.truth >= study.truth[chosen] + BETTER).sum())


def fold_means(trial: TrialScores, folds: Folds) -> list[dict[int, float]]:
    """Return the mean score of every finished fold, as `OptunaPruner` reports it; step = fold."""
    return [{fold: float(trial.curves[fold][-1])} for fold in trial.finished]


def rules(n_epochs: int) -> dict[str, tuple[Callable[[], Pruner], float]]:
    """Name to a fresh rule, and the share of the replays that it is given: some take Optuna seconds each."""
    return {
        "none": (NoPruner, 1),
        "race": (Race, 1),
        "Median, epochs of fold 0": (lambda: OptunaPruner(MedianPruner, epochs_of_first_fold), 1),
        "SuccessiveHalving, epochs": (lambda: OptunaPruner(SuccessiveHalvingPruner, epochs_of_first_fold), 1),
        "Hyperband, epochs": (
            lambda: OptunaPruner(lambda: HyperbandPruner(max_resource=n_epochs), epochs_of_first_fold),
            1,
        ),
        "Wilcoxon, folds": (lambda: OptunaPruner(WilcoxonPruner, fold_means), 0.1),
        "Wilcoxon, images": (lambda: OptunaPruner(WilcoxonPruner, images), 1),
    }


def compare_rules(make: Callable[[int], Study], n: int) -> None:
    """Replay studies 0 to n - 1 under every rule, each in an order of its own that is the same for all; print."""
    studies = [make(index) for index in range(n)]
    orders = [np.random.default_rng([1, index]).permutation(len(study.trials)) for index, study in enumerate(studies)]

    def tally(fresh: Callable[[], Pruner], share: float, lookahead: int = 0) -> Tally:
        result = Tally()
        for study, order in list(zip(studies, orders, strict=True))[: max(1, round(n * share))]:
            replay(study, order.tolist(), fresh(), result, lookahead)
        return result

    frontier = {alpha: tally(partial(Race, alpha), 1) for alpha in ALPHAS}
    print(f"{'rule':26s} replays   spent   regret    lost  complete   race")
    for name, (fresh, share) in rules(studies[0].trials[0].n_epochs).items():
        found = tally(fresh, share)
        m = len(found.spent)
        regret = float(np.mean(found.regret))
        line = f"{name:26s} {m:7d} {np.mean(found.spent):7.1%}  {regret:.5f}"
        line += f"  {np.mean(np.array(found.regret) > 0):6.1%}  {np.mean(found.n_complete):8.1f}"
        as_good = [
            (float(np.mean(race.spent[:m])), alpha)
            for alpha, race in frontier.items()
            if np.mean(race.regret[:m]) <= regret
        ]
        if name not in ("none", "race"):
            line += f"   {min(as_good)[0]:.1%} at p < {min(as_good)[1]}" if as_good else "   -"
        print(line, flush=True)
    for lookahead in LOOKAHEADS:
        found = tally(Race, 1, lookahead)
        regret = np.array(found.regret)
        line = f"race, {lookahead} trials behind      {len(found.spent):7d} {np.mean(found.spent):7.1%}"
        line += f"  {regret.mean():.5f}  {np.mean(regret > 0):6.1%}  {np.mean(found.n_complete):8.1f}"
        print(line, flush=True)


def count_wrong(name: str, studies: Iterable[Study]) -> Tally:
    """Race these studies, each in the order of its numbers; print how often a better trial was pruned."""
    tally, unpruned = Tally(), []
    for study in studies:
        replay(study, range(len(study.trials)), Race(), tally)
        assert study.truth is not None
        chosen = max(study.trials, key=lambda trial: trial.value).number
        unpruned.append(study.truth.max() - study.truth[chosen])
    print(
        f"{name:24s} {len(tally.spent):8d} {np.mean(tally.spent):6.1%} {tally.n_better / tally.n_compared:7.1%} "
        f"{tally.n_wrong / tally.n_compared:7.2%} "
        f"{tally.n_in_vain / tally.n_compared:8.2%}  {np.mean(tally.regret):.5f}  {np.mean(tally.true_regret):.5f}"
        f" ({np.mean(unpruned):.5f})",
        flush=True,
    )
    return tally


def save(folder: Path, path: Path) -> None:
    """Save the scores of a study's complete trials, rounded to 4 digits, and their params as JSON."""
    study = from_folder(folder)
    params = [trial.params for trial in StudyRecord.open(StudyPaths(folder.resolve())).trials()]
    by_fold = [np.stack([trial.scores[fold] for trial in study.trials]) for fold in range(study.folds.k)]
    scores = np.concatenate(by_fold, axis=2).round(4).astype(np.float32)
    np.savez_compressed(path, dice=scores, fold_sizes=[each.shape[2] for each in by_fold], params=json.dumps(params))


def recorded(path: Path) -> Study:
    """Return the study of an archive. Its `dice` is (trial, epoch, image) by fold, or (trial, fold, epoch, image)."""
    archive = np.load(path)
    scores = archive["dice"]
    if "fold_sizes" in archive:
        return _study(path.name, np.split(scores, np.cumsum(archive["fold_sizes"])[:-1], axis=2))
    return _study(path.name, scores.swapaxes(0, 1))


def _same(study: Study, number: int) -> Study:
    return study


def from_folder(path: Path) -> Study:
    """A study that `hpsearch study --pruner none` recorded: its complete trials."""
    record = StudyRecord.open(StudyPaths(path.resolve()))
    trials = []
    for trial in record.contenders(record.trials()):
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
    flat: float = 0.05,
) -> Study:
    """A study from the per-image model. Folds have n_images / n_folds images each."""
    rng = np.random.default_rng(seed)
    truth = 0.83 + spread * rng.standard_normal(n_trials)
    curves = learning_curves(rng, truth, n_folds, n_epochs, flat)
    curves += noise * rng.standard_normal((n_trials, n_folds, 1))
    shape = (n_trials, n_folds, 1, n_images // n_folds)
    images = 0.13 * rng.standard_normal((1, *shape[1:])) + 0.07 * rng.standard_normal(shape)
    scores = (curves[..., None] + images).astype(np.float32)
    return _study(f"spread {spread:g}, noise {noise:g}", scores.swapaxes(0, 1), truth)


def _one(series: int, number: int, **model: Any) -> Study:
    return generated([series, number], **model)


def learning_curves(
    rng: np.random.Generator, ends: NDArray[np.float64], n_folds: int, n_epochs: int, flat: float
) -> NDArray[np.float64]:
    """Mean scores of every epoch, (trials, folds, epochs), that end in `ends`.

    Over x, the share of a cosine schedule's learning rate that is spent, a curve is end (1 - exp(-c x)) /
    (1 - exp(-c)), with c from 1 to 18 whatever the end: 24 real UNets trained for 20 epochs had c from 1.4 to 18. A
    share `flat` of the fits begins to rise only at some x up to 0.3: of those and of 145 real fits of 5 epochs, 5 in
    100 did. Scores jump with a standard deviation of 0.05 that falls to 0 with the learning rate.
    """
    n = len(ends)
    t = np.arange(1, n_epochs + 1) / n_epochs
    speed = np.exp(rng.uniform(np.log(1), np.log(18), (n, 1, 1)))
    delay = np.where(rng.random((n, n_folds, 1)) < flat, rng.uniform(0, 0.3, (n, n_folds, 1)), 0)
    x = np.clip((t + np.sin(np.pi * t) / np.pi - delay) / (1 - delay), 0, 1)
    jumps = 0.05 * np.sqrt((1 + np.cos(np.pi * t)) / 2) * rng.standard_normal((n, n_folds, n_epochs))
    return np.asarray(ends[:, None, None] * np.expm1(-speed * x) / np.expm1(-speed) + jumps)


def _study(
    name: str, scores: Sequence[NDArray[np.float32]] | NDArray[np.float32], truth: NDArray[np.float64] | None = None
) -> Study:
    """Return a study with these scores of each fold, (trial, epoch, image of the fold)."""
    sizes = [each.shape[2] for each in scores]
    folds = Folds(
        ids=tuple(str(image) for image in range(sum(sizes))),
        fold_of=tuple(fold for fold, size in enumerate(sizes) for _ in range(size)),
        k=len(sizes),
        seed=0,
        method="kfold",
    )
    n_trials, n_epochs, _ = scores[0].shape
    trials = tuple(
        TrialScores(number, {fold: each[number] for fold, each in enumerate(scores)}, n_epochs)
        for number in range(n_trials)
    )
    return Study(name, trials, folds, truth)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--recorded", type=Path, help="archive that --save has written, instead of the recorded studies"
    )
    parser.add_argument("--save", type=Path, help="save the scores of the study --study to this archive, and exit")
    parser.add_argument("--study", type=Path, action="append", default=[], help="folder of a study without pruning")
    parser.add_argument("--orders", type=int, default=200, help="replays of a recorded study")
    parser.add_argument("--generated", type=int, default=30, help="generated studies of each kind, for every rule")
    parser.add_argument("--seeds", type=int, default=1000, help="generated studies in all, to count wrong decisions")
    parser.add_argument("--quick", action="store_true", help="a tenth of all replays")
    options = parser.parse_args()
    part = 0.1 if options.quick else 1
    n_orders, n_generated, n_seeds = (
        max(2, round(part * n)) for n in (options.orders, options.generated, options.seeds)
    )
    n_seeds = max(len(MODELS), n_seeds)
    began = time.monotonic()
    if options.save and not options.study:
        parser.error("--save needs the folder of a study: --study OUT/studies/NAME")
    if options.save:
        save(options.study[0], options.save)
        return
    paths = [options.recorded] if options.recorded else [Path(__file__).with_name("recorded_study.npz")]
    if not options.recorded and (root := os.environ.get("HPSEARCH_ISIC_ROOT")):
        paths.append(Path(root).parent / "recorded-study.npz")
    for study in [*map(recorded, paths), *map(from_folder, options.study)]:
        print(f"\n{study.name}: {len(study.trials)} trials, {n_orders} orders")
        compare_rules(partial(_same, study), n_orders)
    for spread, noise in MODELS:
        print(f"\ngenerated: spread {spread:g}, noise {noise:g}, {n_generated} studies")
        compare_rules(partial(_one, 2, spread=spread, noise=noise), n_generated)
    print(f"\n{'race on generated':24s} studies  spent  better   wrong  in vain   regret  true (none)")
    tallies = []
    for place, (spread, noise) in enumerate(MODELS):
        numbers = range(place, n_seeds, len(MODELS))
        studies = map(partial(_one, 3, spread=spread, noise=noise), numbers)
        tallies.append(count_wrong(f"spread {spread:g}, noise {noise:g}", studies))
    n_wrong, n_compared = sum(tally.n_wrong for tally in tallies), sum(tally.n_compared for tally in tallies)
    regret = np.mean([value for tally in tallies for value in tally.regret])
    print(f"over all {n_seeds}: wrong {n_wrong / n_compared:.2%} of {n_compared} trials, mean regret {regret:.5f}")
    for name, shape in OTHER_SHAPES.items():
        make = partial(_one, 4, **{"spread": 0.01, "noise": 0.006, **shape})
        count_wrong(name, map(make, range(n_generated)))
    print(f"\n{time.monotonic() - began:.0f} s")


if __name__ == "__main__":
    main()
