"""Check the statistics of the report on simulated studies in which the true values are known.

    python benchmarks/study_statistics.py             400 studies per setting, about 40 minutes on one core
    python benchmarks/study_statistics.py --quick     40 studies per setting, about 4 minutes
    python benchmarks/study_statistics.py --runs 0 0.006 0.010 --spreads 0 0.01 --noise normal --images 2150
    python benchmarks/study_statistics.py --shape skewed --trials 12 --confirm 0 --seed 1

A study is y[c, i] = mu[c] + a[i] + b[c, i] + r[c, fold(i)], mu about 0.8, sd of a 0.13, of b 0.07, of r 0.006
(`run`), of mu over the trials as printed (`spread`). Everything is drawn anew for each study, so the images are a
sample too. `normal`: all parts are normal. `t3`: b and r follow Student's t with 3 degrees of freedom, scaled to the
same sd; b is larger on some images than on others (log-normal, sigma 0.5), b and r are larger for some trials (sigma
0.25). `race`: the racing rule decides which folds are fitted and which trials are pruned, through the real scheduler
with one worker. Up to five of the trials that finish are confirmed: the same a and b, another r. The truth is mu of
the trial that is then chosen, and for the gain mu of it less that of trial 0. A gain is only claimed where trial 0
has finished all folds and is not chosen.

Columns (scores in units of 0.001, shares in %):

    full      trials that finished all folds
    mean      of the selected trial: bias of the first fits' mean, bias of the corrected estimate, coverage of its 95
              % interval, coverage of the prediction interval for the test mean of a retrained network
    gain      of the selected trial over trial 0: bias of the plain paired difference, and coverage of its interval;
              bias of the corrected gain with its standard error, its coverage, share of studies with a significant
              gain, and share of studies in which this is false (the true gain is 0 or less)
    regret    mu of the truly best trial minus that of the selected one
    tied      how often the tied set contains the truly best of the complete trials (of equal ones, a random one), and
              its size relative to that of the same rule with the true noise (oracle)

The last lines list the targets that are missed by more than two standard errors: |bias| of both corrected estimates
at most 1, all their coverages 93 to 97 %, false gains at most 4 %, the best trial in the tied set in at least 95 % of
studies, and (without the race) a set of at most 1.5 times the size of the oracle's. With N studies, a share of 95 %
has a standard error of sqrt(0.0475 / N): 1.1 % for 400.
"""

from __future__ import annotations

import argparse
import itertools
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray
from racing import Replay
from racing import Study as WholeStudy

from hpsearch.data.folds import Folds
from hpsearch.search.racing import Race, TrialScores
from hpsearch.stats.intervals import LEVEL
from hpsearch.stats.selection import (
    HOPELESS,
    best_row,
    corrected_estimate,
    corrected_gain,
    predict_test_mean,
    select_for_replication,
    tied_with_best,
)
from hpsearch.stats.study_scores import StudyScores

Floats = NDArray[np.float64]
Noise = Literal["normal", "t3"]
Shape = Literal["normal", "skewed"]

MEAN, SD_IMAGE, SD_CONFIGURATION = 0.8, 0.13, 0.07


@dataclass(frozen=True, kw_only=True)
class Setting:
    """Distribution that studies are drawn from."""

    spread: float
    run: float = 0.006
    noise: Noise = "normal"
    race: bool = False
    n_trials: int = 50
    n_images: int = 2150
    n_folds: int = 5
    n_replicates: int = 5
    n_test: int = 600
    shape: Shape = "normal"
    """Of mu over the trials. `skewed`: most near the best, and a long tail of bad ones, as searches leave them."""


class Study(NamedTuple):
    """A generated study and its truth."""

    scores: StudyScores
    mu: Floats
    """Truth of the full trials, (full,)."""
    highest_mu: float
    """Truth of the best of all trials."""
    has_first: bool
    """Whether trial 0 is full. It is then the first of the full trials."""
    test_mean: Floats
    """A retrained network's mean on new images, for each full trial, (full,)."""


def generate(setting: Setting, rng: np.random.Generator) -> Study:
    """Draw a study, race it if wanted, and confirm it by the real selection."""
    n_trials, n_images, n_folds = setting.n_trials, setting.n_images, setting.n_folds
    if setting.shape == "normal":
        mu = MEAN + setting.spread * rng.standard_normal(n_trials)
    else:
        # None below 0.1: a mean of scores is none.
        mu = np.maximum(0.1, MEAN - setting.spread / 2 * np.abs(rng.standard_cauchy(n_trials)))
    fold_of = rng.permutation(np.arange(n_images) % n_folds)
    of_images = rng.standard_normal((n_trials, n_images), np.float32)
    runs = rng.standard_normal((2, n_trials, n_folds))
    if setting.noise == "t3":
        of_image, of_trial = _uneven(rng, n_images, 0.5), _uneven(rng, n_trials, 0.25)[:, None]
        of_images /= np.sqrt(rng.chisquare(3, of_images.shape))
        of_images *= of_image * of_trial
        runs = rng.standard_t(3, runs.shape) / np.sqrt(3) * of_trial
    without_runs = SD_CONFIGURATION * of_images.astype(np.float64)
    without_runs += mu[:, None] + SD_IMAGE * rng.standard_normal(n_images)
    first = without_runs + setting.run * runs[0][:, fold_of]
    n_finished = race(first, fold_of, n_folds) if setting.race else np.full(n_trials, n_folds)
    full = np.flatnonzero(n_finished == n_folds)
    dropped = np.where(fold_of < n_finished[:, None], first, np.nan)[n_finished < n_folds]
    study = StudyScores(scores=first[full], fold_of=fold_of, pruned=dropped)
    if setting.n_replicates and len(full) > 1 and n_folds > 1:
        best = select_for_replication(study.scores, setting.n_replicates)
        rows = full[list(best)]
        study = replace(
            study, replicated=best, replicates=without_runs[rows] + setting.run * runs[1][rows][:, fold_of]
        )
    sd_test_mean = np.sqrt((SD_IMAGE**2 + SD_CONFIGURATION**2) / setting.n_test + setting.run**2)
    is_first_full = bool(n_finished[0] == n_folds)
    return Study(study, mu[full], mu.max(), is_first_full, mu[full] + sd_test_mean * rng.standard_normal(len(full)))


def _uneven(rng: np.random.Generator, n: int, sigma: float) -> Floats:
    """Log-normal standard deviations with a mean square of 1, (n,)."""
    return np.exp(sigma * rng.standard_normal(n) - sigma**2)


def race(scores: Floats, fold_of: NDArray[np.int64], n_folds: int) -> NDArray[np.int64]:
    """Run a study with the racing rule and return the number of finished folds of each trial, (trials,).

    A fit has one epoch here, so that no trial ends inside its first fold.
    """
    ids = tuple(map(str, range(len(fold_of))))
    folds = Folds(ids=ids, fold_of=tuple(fold_of.tolist()), k=n_folds, seed=0, method="kfold")
    of_fold = [scores[:, None, folds.held_out(fold)].astype(np.float32) for fold in range(n_folds)]
    trials = tuple(
        TrialScores(number, {fold: each[number] for fold, each in enumerate(of_fold)}, 1)
        for number in range(len(scores))
    )
    ended = Replay(WholeStudy("", trials, folds), range(len(trials)), Race()).run().ended
    return np.array([len(ended[number].finished) for number in range(len(trials))])


class Row(NamedTuple):
    """One study's figures; scores in units of 1, NaN where no gain is claimed."""

    n_full: float
    naive: float
    mean: float
    covered: float
    predicted: float
    plain_gain: float
    plain_covered: float
    gain: float
    gain_covered: float
    sure: float
    false: float
    regret: float
    holds_best: float
    size: float
    oracle_size: float


def evaluate(setting: Setting, rng: np.random.Generator) -> Row:
    """Draw one study and compare its claims with the truth."""
    study, mu, highest_mu, has_first, test_mean = generate(setting, rng)
    winner, corrected = best_row(study), corrected_estimate(study)
    predicted = predict_test_mean(study, corrected, n_test=setting.n_test)
    tied = tied_with_best(study)
    best = int(rng.choice(np.flatnonzero(mu == mu.max())))
    gains = [np.nan] * 6
    if has_first and winner != 0:
        truth, gain = mu[winner] - mu[0], corrected_gain(study, winner)
        difference = study.joint[winner] - study.joint[0]
        variance = difference.var(ddof=1) / study.n_images + study.run_variances[[0, winner]].sum()
        error = float(difference.mean() - truth)
        gains = [
            error,
            abs(error) <= 1.96 * np.sqrt(variance),
            gain.difference - truth,
            gain.low <= truth <= gain.high,
            gain.low > 0,
            gain.low > 0 and truth <= 0,
        ]
    return Row(
        study.n_trials,
        corrected.naive - mu[winner],
        corrected.mean - mu[winner],
        corrected.low <= mu[winner] <= corrected.high,
        predicted.low <= test_mean[winner] <= predicted.high,
        *gains,
        highest_mu - mu[winner],
        best in tied,
        len(tied),
        _oracle_size(setting, study),
    )


def _oracle_size(setting: Setting, study: StudyScores) -> int:
    """Size of the tied set by the product's rule when it knows the noise."""
    means = study.joint.mean(axis=1)
    gaps = means.max() - means
    variance = SD_CONFIGURATION**2 / setting.n_images + setting.run**2 / setting.n_folds / study.n_fits
    contends = gaps <= HOPELESS * np.sqrt(variance + variance[gaps.argmin()])
    n_fits = study.n_fits[contends]
    allowed = _oracle_gaps(setting, int((n_fits == 1).sum()), int((n_fits == 2).sum()))
    return int((gaps[contends] <= allowed[n_fits - 1]).sum())


@cache
def _oracle_gaps(setting: Setting, n_once: int, n_twice: int) -> Floats:
    """The gap to the best mean that equal trials keep 95 % of the time, for those with one fit and with two, (2,)."""
    n_fits = np.repeat([1, 2], [n_once, n_twice])
    variance = SD_CONFIGURATION**2 / setting.n_images + setting.run**2 / setting.n_folds / n_fits
    noise = np.random.default_rng(0).standard_normal((4000, len(n_fits))) * np.sqrt(variance)
    behind = noise.max(axis=1, keepdims=True) - noise
    return np.array([np.quantile(behind[:, n_fits == n], LEVEL) if (n_fits == n).any() else 0.0 for n in (1, 2)])


@dataclass(frozen=True)
class Summary:
    """Means over the studies of one setting."""

    setting: Setting
    n_studies: int
    mean: Row
    error: Row
    """Standard errors of `mean`."""
    n_gains: int
    """Number of studies that claim a gain."""

    def missed(self) -> Iterator[str]:
        """Targets that are missed by more than two standard errors, in words."""
        of, mean, error = self.setting, self.mean, self.error
        where = f"{of.noise}, {of.n_images} images, spread {of.spread:g}, run {of.run:g}{', race' if of.race else ''}"
        for name, bias, se in (("mean", mean.mean, error.mean), ("gain", mean.gain, error.gain)):
            if abs(bias) > 0.001 + 2 * se:
                yield f"{where}: bias of the {name} {bias:+.4f}"
        # The standard error of a share that is as it should be, since one that is 100 % shows none.
        chance, of_gains = (2 * np.sqrt(LEVEL * (1 - LEVEL) / max(1, n)) for n in (self.n_studies, self.n_gains))
        for name, share, tolerance in (
            ("mean", mean.covered, chance),
            ("prediction", mean.predicted, chance),
            ("gain", mean.gain_covered, of_gains),
        ):
            if share < 0.93 - tolerance or share > 0.97 + tolerance:
                yield f"{where}: coverage of the {name} {share:.1%}"
        if mean.false > 0.04 + of_gains:
            yield f"{where}: false gains {mean.false:.1%}"
        if mean.holds_best < LEVEL - chance:
            yield f"{where}: the tied set holds the best {mean.holds_best:.1%} of the time"
        if not of.race and mean.size > 1.5 * mean.oracle_size:
            yield f"{where}: the tied set is {mean.size / mean.oracle_size:.2f} times the oracle's"


def summarise(setting: Setting, n_studies: int, seed: int = 0) -> Summary:
    """Evaluate `n_studies` studies, each from a seed of its own."""
    rows = np.array([evaluate(setting, np.random.default_rng([seed, number])) for number in range(n_studies)], float)
    is_known = np.isfinite(rows)
    counts = np.where(is_known.any(axis=0), is_known.sum(axis=0), np.nan)
    mean = np.nansum(rows, axis=0) / counts
    error = np.sqrt(np.nansum((rows - mean) ** 2, axis=0)) / counts
    n_gains = int(is_known[:, Row._fields.index("gain")].sum())
    return Summary(setting, n_studies, Row(*mean), Row(*error), n_gains)


HEAD = (
    "noise  images spread   run race full | naive  mean cover pred. | plain cover  gain  (se) cover  sure false "
    "| regret |  tied  size"
)


def line(found: Summary) -> str:
    """One line of the table."""
    of, mean = found.setting, found.mean
    return (
        f"{of.noise:6s} {of.n_images:6d} {of.spread:6.3f} {of.run:5.3f} {'yes' if of.race else 'no':>4s} "
        f"{mean.n_full:4.1f} | {1000 * mean.naive:5.2f} {1000 * mean.mean:5.2f} {100 * mean.covered:5.1f} "
        f"{100 * mean.predicted:5.1f} | {1000 * mean.plain_gain:5.2f} {100 * mean.plain_covered:5.1f} "
        f"{1000 * mean.gain:5.2f} ({1000 * found.error.gain:.2f}) {100 * mean.gain_covered:5.1f} "
        f"{100 * mean.sure:5.1f} {100 * mean.false:5.1f} | {1000 * mean.regret:6.2f} | {100 * mean.holds_best:5.1f} "
        f"{mean.size / mean.oracle_size:5.2f}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--studies", type=int, default=400, help="studies a setting (400)")
    parser.add_argument("--quick", action="store_true", help="40 studies a setting")
    parser.add_argument("--seed", type=int, default=0, help="of the studies' own seeds: another gives others (0)")
    parser.add_argument("--noise", nargs="+", choices=("normal", "t3"), default=("normal", "t3"))
    parser.add_argument("--images", nargs="+", type=int, default=(2150, 400))
    parser.add_argument("--spreads", nargs="+", type=float, default=(0.0, 0.003, 0.01, 0.02))
    parser.add_argument("--runs", nargs="+", type=float, default=(0.006,))
    parser.add_argument("--race", nargs="+", choices=("no", "yes"), default=("no", "yes"))
    parser.add_argument("--trials", type=int, default=50)
    parser.add_argument("--folds", type=int, default=5)
    parser.add_argument("--confirm", type=int, default=5)
    parser.add_argument("--shape", choices=("normal", "skewed"), default="normal", help="of mu over the trials")
    given = parser.parse_args()
    n_studies = 40 if given.quick else given.studies
    print(
        f"{n_studies} studies a setting: {given.trials} trials ({given.shape}), {given.folds} folds, "
        f"up to {given.confirm} confirmed, seed {given.seed}\n{HEAD}"
    )
    missed, began = [], time.perf_counter()
    for racing, noise, n_images, run, spread in itertools.product(
        given.race, given.noise, given.images, given.runs, given.spreads
    ):
        setting = Setting(
            spread=spread,
            run=run,
            noise=noise,
            race=racing == "yes",
            n_trials=given.trials,
            n_images=n_images,
            n_folds=given.folds,
            n_replicates=given.confirm,
            shape=given.shape,
        )
        found = summarise(setting, n_studies, given.seed)
        missed += found.missed()
        print(line(found), flush=True)
    print("\n".join(["missed:", *missed]) if missed else "every target is met")
    print(f"({time.perf_counter() - began:.0f} s)")


if __name__ == "__main__":
    main()
