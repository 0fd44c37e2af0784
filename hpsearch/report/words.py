"""Says in plain sentences what the rows of a study show."""

from __future__ import annotations

import json
import shlex
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

from hpsearch.paths import command_line
from hpsearch.report import claimed_words
from hpsearch.report.rows import FinalRow, Repeat, StudyRows, TrialRow, Winner
from hpsearch.report.trial_rows import CurvePoint
from hpsearch.stats.intervals import Interval, Paired
from hpsearch.stats.run_variance import S_GUESS
from hpsearch.tuning import racing

SCORES = {
    "dice": "Dice",
    "jaccard": "Jaccard",
    "threshold_jaccard": "Threshold Jaccard (0.65)",
    "accuracy": "Pixel accuracy",
    "sensitivity": "Sensitivity",
    "specificity": "Specificity",
}
"""Every score's name, in the order of tables."""

_CORRECTION = (
    "The correction assumes that the configurations' true means scatter normally about a common mean. The best one "
    "is pulled towards that mean: the less the configurations differ beyond the noise of images and runs, the "
    "further. Dropped trials count with the folds they finished."
)
_NOT_COVERED = (
    "The interval does not cover three things: where many configurations are all equally good, the gain is "
    "overestimated by 0.001 to 0.002; where a few equally good ones lie far above "
    "all others, by up to 0.003; and runs of this configuration may vary more than those of the others."
)
_FEW_IMAGES_TEXT = (
    "With so few images it holds the true gain in about 91 to 97 % of studies, and where no configuration is better "
    "than any other, up to 6 % of studies are told of a gain."
)
FEW_IMAGES = 1000
"""Below this many images the correction is less exact (benchmarks/study_statistics.py)."""


def progress(rows: StudyRows) -> str:
    """How far the study is: `12 of 50 trials: 5 full, 7 dropped; running`."""
    outcomes = Counter(row.outcome for row in rows.trials)
    counts = ", ".join(f"{n} {outcome}" for outcome, n in outcomes.most_common())
    text = f"{rows.n_counted} of {rows.config.study.trials} trials"
    return f"{text}: {counts}" if counts else text


def answer(rows: StudyRows) -> list[str]:
    """The paragraphs of the answer."""
    winner = rows.winner
    if winner is None:
        if rows.n_counted < rows.config.study.trials:
            so_far = "No configuration has been evaluated on all folds yet"
        else:
            so_far = f"None of the {rows.n_counted} trials was evaluated on all folds (the race says why)"
        return [f"{so_far}, so there is no best one and no number for it."]
    score, n_full = SCORES[rows.metric], len(rows.full)
    first = (
        f"Trial {winner.number} is the best of {n_full} configurations that were evaluated fully."
        if n_full > 1
        else f"Trial {winner.number} is the only configuration that was evaluated fully."
    )
    first += (
        f" On new images like these its {score} is estimated at {interval(winner.corrected.interval)}, where the "
        "brackets hold the 95 % interval."
    )
    result = [first, _chosen(rows, winner), _gain(rows, winner)]
    if n_full > 1:
        result.append(_tied(rows, winner))
    return result


def final(row: FinalRow, metric: str) -> list[str]:
    """What the test set said about what was promised."""
    networks = "one network" if row.n_seeds == 1 else f"{row.n_seeds} networks"
    result = [
        f"Trial {row.trial} was retrained on {row.n_pool} pool images ({networks}) and evaluated on {row.n_test} "
        f"test images: {SCORES[metric]} {interval(row.test[metric])}."
    ]
    if row.predicted is not None:
        said = claimed_words.explain_test_mean(row.predicted, row.test[metric].mean)
        result.append(f"{said[0].upper()}{said[1:]}.")
    else:
        result.append("It is not the trial that the search would choose, so no prediction was made for it.")
    more = claimed_words.describe_choices(row.chosen) if row.chosen is not None else []
    if row.ensemble is not None:
        more.append(
            f"the {row.ensemble.n_networks} networks of the folds together score "
            f"{interval(row.ensemble.test[metric])} on the same test images, "
            f"{interval(row.ensemble.gain, signed=True)} over the network that was kept; that is for information, "
            "since a choice by the test set would use it up"
        )
    more += claimed_words.describe_account(row.look, row.looks, row.n_looks_before, row.n_trials_after)
    if row.leaks:
        more.append(claimed_words.describe_leaks(row.leaks, row.test[metric].mean, row.without_leaks))
    return [*result, *(f"{each[0].upper()}{each[1:]}." for each in more)]


def race(rows: StudyRows) -> str:
    """What racing saved."""
    judged = [row for row in rows.trials if row.outcome in ("full", "dropped")]
    dropped = [row for row in judged if row.outcome == "dropped"]
    if rows.race is None:
        return "No trial has come so far as to be judged."
    if not dropped:
        if len(judged) == 1:
            return "The only trial that was judged was trained to the end."
        return f"None of the {len(judged)} trials was dropped: all were trained to the end."
    early = sum(row.dropped_at is not None and sum(row.epochs) < row.n_epochs for row in dropped)
    share = len(dropped) / len(judged)
    return (
        f"{len(dropped)} of {len(judged)} trials ({share:.0%}) {'was' if len(dropped) == 1 else 'were'} dropped "
        f"before the last fold, {early} inside the first. Dropped and full ones took "
        f"{duration(rows.race.spent_s)} of training, {rows.race.share:.0%} of the {duration(rows.race.whole_s)} that "
        "all their folds would have taken."
    )


def methods(rows: StudyRows) -> str:
    """A paragraph for a paper's methods section."""
    study, data = rows.config.study, rows.config.data
    protocol = (
        f"one fixed split with {rows.n_images} validation images"
        if study.folds == "fixed"
        else f"{rows.n_folds}-fold cross-validation over {rows.n_images} images, with the same folds for every trial"
    )
    sampler = {"tpe": "a tree-structured Parzen estimator (Optuna)", "random": "random search"}[study.sampler]
    pruner = {
        "race": "A paired racing test against the best fully evaluated trial, on the same images, ended trials that "
        f"were unlikely to be better by {racing.MATTERS:g} (one-sided p < {racing.ALPHA:g}).",
        "none": "No trial was ended early.",
    }.get(study.pruner, f"The pruner {study.pruner} ended trials early.")
    return (
        f"Hyperparameters of a UNet were chosen by {sampler}, seed {study.seed}, starting from the default "
        f"configuration, and evaluated by {protocol}. Images and masks were "
        f"{'resized' if data.match == 'resize' else 'cropped'} to {data.height}x{data.width} pixels. A trial's value "
        f"is the mean over images of the {SCORES[rows.metric]} that each image got from the network that had not "
        f"seen it, after the last epoch; no epoch was picked by its score. {pruner} Only trials evaluated on all "
        f"folds could win. {_confirmation(rows)}Intervals are 95 % intervals over images and runs. The winner's mean "
        "and its gain over the default are corrected for selection by their posterior means in a mixed model of all "
        "trials' fold means (empirical Bayes). The test split was not read during the search."
    )


def _confirmation(rows: StudyRows) -> str:
    n_confirmed = sum(row.is_confirmed for row in rows.trials)
    if not n_confirmed:
        return ""
    those, was = ("configuration", "was") if n_confirmed == 1 else (f"{n_confirmed} configurations", "were")
    return (
        f"When the search was over, the {those} that {was} best on most bootstrap samples of the images {was} fitted "
        "once more on the same folds with other seeds, and the best by both fits was taken. "
    )


def gap(points: Sequence[CurvePoint], metric: str) -> str:
    """How far training is above or below held-out images, at half time and at the end; empty without epochs."""
    ahead: dict[int, list[float]] = {}
    for point in points:
        if point.score == metric and point.held_out is not None:
            ahead.setdefault(point.epoch, []).append(point.train - point.held_out)
    if not ahead:
        return ""
    last = max(ahead)
    half = max(1, last // 2)
    difference = f"{SCORES[metric]} of training minus that of held-out images"
    text = f"After epoch {last} the {difference} is {np.mean(ahead[last]):+.4f}"
    if half < last:
        text += f", after epoch {half} it was {np.mean(ahead[half]):+.4f}"
    return text + ". A gap that keeps growing is overfitting."


def commands(rows: StudyRows) -> list[tuple[str, str]]:
    """(command, what it does) of what repeats the study, in any folder; NAME.toml holds the settings below."""
    toml = shlex.quote(f"{rows.name}.toml")
    result = [(command_line(f"study --config {toml}", rows.name), "the search")]
    for row in rows.finals:
        seeds = f" --seeds {row.n_seeds}" if row.n_seeds > 1 else ""
        result.append((command_line(f"final --trial {row.trial}{seeds}", rows.name), "retraining and test"))
    if rows.winner is not None:
        params = rows.trial(rows.winner.number).params
        pinned = "".join(f" --set {shlex.quote(f'{key}={_toml(value)}')}" for key, value in params.items())
        result.append(
            (
                f"hpsearch train --config {toml}{pinned} --folds {rows.config.study.folds}",
                "the best configuration alone",
            )
        )
    return result


def facts(repeat: Repeat) -> list[tuple[str, str]]:
    """(name, value) of what the numbers depend on beside the settings."""
    names = {"device_name": "processor", "platform": "operating system"}
    machine = [(names.get(name, name), value) for name, value in repeat.machine.items()]
    folds = [("folds", f"{repeat.folds_method}, SHA-256 {repeat.folds_digest}"), ("data key", repeat.data_key)]
    return [*folds, *machine]


def stopped_at(row: TrialRow, n_folds: int) -> str:
    """Where a trial ended: `fold 1, epoch 3 of 10`; folds count from 0, as in the record."""
    if row.dropped_at is not None:
        return f"fold {row.dropped_at[0]}, epoch {row.dropped_at[1]} of {row.n_epochs}"
    if row.n_finished == n_folds:
        return "all folds"
    reached = [fold for fold, epochs in enumerate(row.epochs) if epochs]
    if not reached:
        return "before the first epoch"
    return f"fold {reached[-1]}, epoch {row.epochs[reached[-1]]} of {row.n_epochs}"


def interval(value: Interval | Paired, *, signed: bool = False) -> str:
    """`0.8503 [0.8401, 0.8605]`."""
    mean = value.difference if isinstance(value, Paired) else value.mean
    numbers = [f"{number:+.4f}" if signed else f"{number:.4f}" for number in (mean, value.low, value.high)]
    # A typographic minus is as wide as a plus.
    return f"{numbers[0]} [{numbers[1]}, {numbers[2]}]".replace("-", "\N{MINUS SIGN}")


def duration(seconds: float) -> str:
    """`45 s`, `12 min`, `3 h 20 min`, `2 days 4 h`."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    if minutes < 90:
        return f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    if hours < 36:
        return f"{hours} h {minutes:02d} min"
    days, hours = divmod(hours, 24)
    return f"{days} days {hours} h"


def _chosen(rows: StudyRows, winner: Winner) -> str:
    corrected = winner.corrected
    text = f"Its plain cross-validation mean is {interval(winner.statistics.total)}"
    if rows.config.study.folds == "fixed":
        text = f"Its plain mean on the {rows.n_images} validation images is {interval(winner.statistics.total)}"
    if corrected.method == "single":
        return f"{text}. Only one configuration was evaluated fully, so there is no selection bias to correct."
    mean = "that mean"
    if corrected.method == "confirmed":
        n_confirmed = sum(row.is_confirmed for row in rows.trials)
        those = "this configuration was" if n_confirmed == 1 else f"the {n_confirmed} best candidates were"
        text = (
            f"The mean of its first fits is {corrected.naive:.4f}; {those} then refitted with new seeds, and the "
            f"mean over both fits is {interval(winner.statistics.total)}"
        )
        mean = "the mean of its first fits"
    bias = corrected.naive - corrected.mean
    if bias >= 0.00005:
        price = f"being selected as the best of many makes {mean} too high by an estimated {bias:.4f}"
    elif bias > -0.00005:
        price = f"there is no sign of selection bias in {mean}"
    else:
        price = f"the corrected estimate is {-bias:.4f} higher than {mean}, so there is no sign of selection bias"
    text = f"{text}; {price}. {_CORRECTION}"
    if rows.n_folds == 1:
        text += (
            f" One fold does not show how much runs differ: a standard deviation of {S_GUESS:g} is assumed, "
            "and the interval does not cover a larger one."
        )
    return text


def _gain(rows: StudyRows, winner: Winner) -> str:
    if winner.is_default:
        return "It is the default configuration: nothing better was found so far."
    if winner.gain is None:
        return "The default configuration (trial 0) was not evaluated fully, so the gain over it is not known."
    verdict = (
        "more than chance explains."
        if winner.gain.low > 0
        else "no more than chance may give, so the default may be as good."
    )
    few = f" {_FEW_IMAGES_TEXT}" if rows.n_images < FEW_IMAGES else ""
    return (
        f"Its gain over the default configuration (trial 0), on the same images and corrected for selection, is "
        f"{interval(winner.gain, signed=True)} (p = {winner.gain.p:.2g}): {verdict} {_NOT_COVERED}{few}"
    )


def _tied(rows: StudyRows, winner: Winner) -> str:
    others = [number for number in winner.tied if number != winner.number]
    if not others:
        return "No other configuration can be taken for the best: it stands alone."
    listed = ", ".join(map(str, others[:10])) + (f" and {len(others) - 10} more" if len(others) > 10 else "")
    text = (
        f"{len(winner.tied)} of {len(rows.full)} configurations cannot be told from the best with 95 % confidence: "
        f"beside trial {winner.number} {'this is trial' if len(others) == 1 else 'these are trials'} {listed}."
    )
    if winner.cheapest == winner.number:
        return f"{text} Trial {winner.number} is also the cheapest of them."
    share = rows.trial(winner.cheapest).seconds / rows.trial(winner.number).seconds
    return f"{text} The cheapest of them is trial {winner.cheapest}, which took {share:.0%} of the best one's time."


def _toml(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, tuple | list):
        return json.dumps(list(value))
    return json.dumps(value, ensure_ascii=False) if isinstance(value, str) else repr(value)
