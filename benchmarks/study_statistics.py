"""Whether the report's statistics keep their promises: generated studies whose truth is known, through the real code.

    python benchmarks/study_statistics.py                     1000 studies a setting
    python benchmarks/study_statistics.py --trials 10 --images 500 --seeds 300 --shape skewed --confirm 0
    python benchmarks/study_statistics.py --seed 1            1000 others

A study is y[c, i] = mu[c] + a[i] + b[c, i] + r[c, fold(i)], mu about 0.8, sd of a 0.13, of b 0.07, of r and of mu
over the trials as printed (`run`, `spread`); all are drawn anew for each study, so the images are a sample too. Up to
five trials are confirmed: the same a and b, another r. The truth is mu of the trial that was chosen by both fits.

Printed for each setting (in units of 0.001 where it is a score):

    bias      mean error of the naive best; of plain BBC-CV; of the corrected estimate with second fits; of the one
              without them
    cover     share of studies whose 95 % interval holds the truth: of the corrected estimate with and without second
              fits, of a trial that nobody selected (image bootstrap, with run luck, corrected resampled t), of the
              difference of two such trials; whose prediction interval holds the test mean of a retrained network
    regret    mu of the truly best trial less mu of the chosen one: without and with second fits
    tied      share of studies whose tied set holds the truly best trial (with spread 0 all are equal, and one drawn
              beforehand counts), the set's mean size, that of an oracle, the ratio, and the size of a second oracle.
              The first is the same rule told the true noise. The second, which no rule can be, knows the whole
              setting: it allows the one gap that holds the best in exactly 95 % of these very studies.

The last line says whether the targets are met: |bias| of the corrected estimate at most 1, its coverage and that of
the prediction interval 93 to 97 %, the best in the tied set at least 95 % of the time, its size at most 1.5 times the
first oracle's. With N studies a share of 95 % has a standard error of sqrt(0.0475 / N): 0.7 % for 1000.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from hpsearch.report.statistics import (
    HOPELESS,
    LEVEL,
    Interval,
    StudyScores,
    bootstrap_mean,
    chosen,
    compare_trials,
    corrected_estimate,
    corrected_t,
    predict_test_mean,
    select_for_confirmation,
    tied_with_best,
)

Floats = NDArray[np.float64]
Shape = Literal["normal", "skewed"]

MEAN, SD_IMAGE, SD_CONFIGURATION = 0.8, 0.13, 0.07
RUNS, SPREADS = (0.0, 0.006, 0.010), (0.0, 0.01)
N_BAGS = 200
"""Enough for a mean over bags; the product takes more, for percentiles."""
EVERY = 5
"""Intervals from percentiles need many bags: they are asked for in each fifth study."""


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What studies are drawn from."""

    spread: float
    run: float
    n_trials: int = 50
    n_images: int = 2150
    n_folds: int = 5
    n_confirm: int = 5
    n_test: int = 600
    shape: Shape = "normal"
    """`skewed`: most trials near the best, and a long tail of bad ones, as searches leave them."""


def generate(setting: Setting, rng: np.random.Generator) -> tuple[StudyScores, Floats]:
    """A study, confirmed by the real selection, and mu of its trials."""
    shape = (setting.n_trials, setting.n_images)
    if setting.shape == "normal":
        mu = MEAN + setting.spread * rng.standard_normal(setting.n_trials)
    else:
        # None below 0.1: a mean of scores is none.
        mu = np.maximum(0.1, MEAN - setting.spread / 2 * np.abs(rng.standard_cauchy(setting.n_trials)))
    fold_of = rng.permutation(np.arange(setting.n_images) % setting.n_folds)
    without_luck = rng.standard_normal(shape, np.float32).astype(np.float64)
    without_luck *= SD_CONFIGURATION
    without_luck += mu[:, None] + SD_IMAGE * rng.standard_normal(setting.n_images)
    luck = setting.run * rng.standard_normal((2, setting.n_trials, setting.n_folds))
    study = StudyScores(scores=without_luck + luck[0][:, fold_of], fold_of=fold_of)
    if setting.n_confirm:
        best = select_for_confirmation(study.scores, setting.n_confirm, n_bags=N_BAGS)
        rows = list(best)
        study = replace(study, confirmed=best, second=without_luck[rows] + luck[1][rows][:, fold_of])
    return study, mu


@dataclass(frozen=True)
class Row:
    """One study's figures."""

    bias: tuple[float, ...]
    covered: tuple[bool, ...]
    regret: tuple[float, float]
    tied: tuple[float, float, float]
    """Whether the best is in; sizes of ours and of the oracle that knows the noise."""
    gaps: Floats
    """How far each trial lies behind the best mean, (trials,); the truly best first."""
    unselected: tuple[bool, ...] | None


def evaluate(setting: Setting, rng: np.random.Generator, *, with_percentiles: bool) -> Row:
    study, mu = generate(setting, rng)
    once = replace(study, confirmed=(), second=None)
    winner, winner_once = chosen(study), chosen(once)
    corrected = corrected_estimate(study, n_bags=N_BAGS)
    without = corrected_estimate(once, n_bags=N_BAGS)
    plain = corrected_estimate(replace(once, fold_of=np.zeros_like(study.fold_of)), n_bags=N_BAGS)
    predicted = predict_test_mean(study, corrected, n_test=setting.n_test)
    sd_test_mean = np.sqrt((SD_IMAGE**2 + SD_CONFIGURATION**2) / setting.n_test + setting.run**2)
    test_mean = mu[winner] + sd_test_mean * rng.standard_normal()
    best = int(mu.argmax())
    means = study.joint.mean(axis=1)
    tied = tied_with_best(study)
    unselected = None
    if with_percentiles:
        # The folds' images and runs are exchangeable between trials, so nobody selected trials 0 and 1.
        scores, run_variance = once.scores[0], float(once.run_variance()[0])
        fold_means = np.array([scores[images].mean() for images in once.folds])
        difference = compare_trials(once, 0, 1)
        unselected = (
            _holds(bootstrap_mean(scores), mu[0]),
            _holds(bootstrap_mean(scores, run_variance=run_variance, run_df=once.run_luck.df), mu[0]),
            _holds(corrected_t(fold_means), mu[0]),
            difference.low <= mu[0] - mu[1] <= difference.high,
        )
    gaps = means.max() - means
    return Row(
        bias=(
            once.scores[winner_once].mean() - mu[winner_once],
            plain.mean - mu[winner_once],
            corrected.mean - mu[winner],
            without.mean - mu[winner_once],
        ),
        covered=(_holds(corrected, mu[winner]), _holds(without, mu[winner_once]), _holds(predicted, test_mean)),
        regret=(mu[best] - mu[winner_once], mu[best] - mu[winner]),
        tied=(best in tied, len(tied), float(_oracle_size(setting, study, gaps))),
        gaps=np.concatenate([[gaps[best]], np.delete(gaps, best)]),
        unselected=unselected,
    )


def _holds(interval: Interval | None, truth: float) -> bool:
    assert interval is not None
    return bool(interval.low <= truth <= interval.high)


def _oracle_size(setting: Setting, study: StudyScores, gaps: Floats) -> int:
    """Size of the tied set by the product's rule when it knows the noise."""
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
    """Means over the studies of one setting; scores in units of 1."""

    setting: Setting
    n_studies: int
    bias: Floats
    bias_error: Floats
    covered: Floats
    regret: Floats
    contains: float
    sizes: Floats
    """Ours, oracle of the noise, oracle of the setting."""
    unselected: Floats

    def failures(self) -> Iterator[str]:
        where = f"spread {self.setting.spread}, run {self.setting.run}"
        if abs(self.bias[2]) > 0.001:
            yield f"{where}: bias {self.bias[2]:+.4f}"
        for name, share in (("estimate", self.covered[0]), ("prediction", self.covered[2])):
            if not 0.93 <= share <= 0.97:
                yield f"{where}: coverage of the {name} {share:.1%}"
        if self.contains < 0.95:
            yield f"{where}: the tied set holds the best {self.contains:.1%} of the time"
        if self.sizes[0] > 1.5 * self.sizes[1]:
            yield f"{where}: the tied set is {self.sizes[0] / self.sizes[1]:.2f} times the oracle's"


def summarise(setting: Setting, n_studies: int, seed: int = 0) -> Summary:
    """Means over `n_studies` studies, each from a seed of its own."""
    rows = [
        evaluate(setting, np.random.default_rng([seed, number]), with_percentiles=number % EVERY == 0)
        for number in range(n_studies)
    ]
    bias = np.array([row.bias for row in rows])
    tied = np.array([row.tied for row in rows])
    gaps = np.array([row.gaps for row in rows])
    fixed_gap = np.quantile(gaps[:, 0], LEVEL)
    return Summary(
        setting=setting,
        n_studies=n_studies,
        bias=bias.mean(axis=0),
        bias_error=bias.std(axis=0) / np.sqrt(n_studies),
        covered=np.mean([row.covered for row in rows], axis=0),
        regret=np.mean([row.regret for row in rows], axis=0),
        contains=float(tied[:, 0].mean()),
        sizes=np.array([tied[:, 1].mean(), tied[:, 2].mean(), (gaps <= fixed_gap).sum(axis=1).mean()]),
        unselected=np.mean([row.unselected for row in rows if row.unselected is not None], axis=0),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=1000, help="studies a setting (1000)")
    parser.add_argument(
        "--seed", type=int, default=0, help="of the studies' own seeds: another gives other studies (0)"
    )
    parser.add_argument("--trials", type=int, default=50)
    parser.add_argument("--images", type=int, default=2150)
    parser.add_argument("--folds", type=int, default=5)
    parser.add_argument("--confirm", type=int, default=5)
    parser.add_argument("--shape", choices=("normal", "skewed"), default="normal", help="of mu over the trials")
    given = parser.parse_args()
    print(
        f"{given.seeds} studies a setting: {given.trials} full trials ({given.shape}), {given.images} images, "
        f"{given.folds} folds, up to {given.confirm} confirmed, seed {given.seed}"
    )
    print(
        "spread    run |  naive  plain   ours (se)  no 2nd |  ours no 2nd predicted | images  total  folds-t  paired "
        "| regret once both |  tied   size oracle ratio setting's"
    )
    failures, began = [], time.perf_counter()
    for spread in SPREADS:
        for run in RUNS:
            setting = Setting(
                spread=spread,
                run=run,
                n_trials=given.trials,
                n_images=given.images,
                n_folds=given.folds,
                n_confirm=given.confirm,
                shape=given.shape,
            )
            summary = summarise(setting, given.seeds, given.seed)
            failures += summary.failures()
            bias, covered = summary.bias * 1000, summary.covered * 100
            unselected, regret = summary.unselected * 100, summary.regret * 1000
            sizes = summary.sizes
            print(
                f"{spread:6.3f} {run:6.3f} | {bias[0]:6.2f} {bias[1]:6.2f} {bias[2]:6.2f} "
                f"({summary.bias_error[2] * 1000:.2f}) {bias[3]:6.2f} | {covered[0]:5.1f} {covered[1]:6.1f} "
                f"{covered[2]:9.1f} | {unselected[0]:6.1f} {unselected[1]:6.1f} {unselected[2]:8.1f} "
                f"{unselected[3]:7.1f} | {regret[0]:11.2f} {regret[1]:4.2f} | {summary.contains * 100:5.1f} "
                f"{sizes[0]:6.1f} {sizes[1]:6.1f} {sizes[0] / sizes[1]:5.2f} {sizes[2]:9.1f}",
                flush=True,
            )
    print("; ".join(failures) or "every target is met", f"({time.perf_counter() - began:.0f} s)")


if __name__ == "__main__":
    main()
