"""Describe a study in sentences, for the report and the model card."""

from __future__ import annotations

import json
import shlex
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

from hpsearch.paths import command_line
from hpsearch.report.formats import SCORES, count, duration, interval, number, outcome_name
from hpsearch.report.rows import Repeat, StudyRows, TrialRow, Winner
from hpsearch.report.trial_rows import CurvePoint
from hpsearch.stats.run_variance import S_GUESS
from hpsearch.tuning.racing import ALPHA, MATTERS

CORRECTION = (
    "The correction assumes that the true means of the configurations are normally distributed. The best one is "
    "pulled towards their common mean: the smaller the differences between configurations compared with the noise of "
    "images and runs, the stronger the pull. Pruned trials count with the folds that they finished."
)
NOT_COVERED = (
    "The interval does not cover three things: if many configurations are equally good, the gain is overestimated by "
    "0.001 to 0.002; if a few equally good ones are far better than all others, by up to 0.003; and runs of this "
    "configuration may vary more than those of the others."
)
FEW_IMAGES_TEXT = (
    "With so few images the interval contains the true gain in about 91 to 97 % of studies. If no configuration is "
    "better than any other, up to 6 % of studies report a gain."
)
FEW_IMAGES = 1000
"""Below this many images the correction is less exact (benchmarks/study_statistics.py)."""
N_LISTED = 10
"""Number of tied trials that are named; the rest is counted."""


def progress(rows: StudyRows) -> str:
    """Return how far the study is: `12 of 50 trials: 5 complete, 7 pruned`."""
    outcomes = Counter(outcome_name(row.outcome) for row in rows.trials)
    counts = ", ".join(f"{n} {outcome}" for outcome, n in outcomes.most_common())
    text = f"{rows.n_counted} of {count(rows.config.study.trials, 'trial')}"
    return f"{text}: {counts}" if counts else text


def about(rows: StudyRows) -> str:
    """Return metric, folds, images and progress of the study in a line."""
    folds = "one fixed split" if rows.is_fixed_split else count(rows.n_folds, "fold")
    return f"{SCORES[rows.metric]}, {folds}, {count(rows.n_images, 'held-out image')}. {progress(rows)}."


def answer(rows: StudyRows) -> list[str]:
    """Return the paragraphs about the best configuration."""
    winner = rows.winner
    if winner is None:
        if rows.n_counted < rows.config.study.trials:
            return ["No configuration has been evaluated on all folds yet, so there is no best one."]
        n_trials = count(rows.n_counted, "trial")
        return [f"None of the {n_trials} was evaluated on all folds (see “The race”), so there is no best one."]
    n_complete = len(rows.complete)
    which = f"the best of {n_complete} configurations" if n_complete > 1 else "the only configuration"
    paragraphs = [
        f"Trial {winner.number} is {which} that {'were' if n_complete > 1 else 'was'} evaluated on all folds. On new "
        f"images from the same source its {SCORES[rows.metric]} is estimated at "
        f"{interval(winner.corrected.interval)}. Brackets give 95 % intervals.",
        _correction(rows, winner),
        _gain(rows, winner),
    ]
    return [*paragraphs, _tied(rows, winner)] if n_complete > 1 else paragraphs


def race(rows: StudyRows) -> str:
    """Return what pruning saved."""
    ended = [row for row in rows.trials if row.outcome in ("full", "dropped")]
    pruned = [row for row in ended if row.outcome == "dropped"]
    if rows.race is None:
        return "No trial has reached a pruning decision yet."
    if not pruned:
        if len(ended) == 1:
            return "The only trial was trained on all folds."
        return f"None of the {len(ended)} trials was pruned: all were trained on all folds."
    in_first = sum(row.pruned_at is not None and sum(row.epochs) < row.n_epochs for row in pruned)
    return (
        f"{len(pruned)} of {count(len(ended), 'trial')} ({len(pruned) / len(ended):.0%}) "
        f"{'was' if len(pruned) == 1 else 'were'} pruned before the last fold, {in_first} of them in the first fold. "
        f"Complete and pruned trials took {duration(rows.race.spent_s)} of training, {rows.race.share:.0%} of the "
        f"{duration(rows.race.whole_s)} that all their folds would have taken."
    )


def methods(rows: StudyRows) -> str:
    """Return a paragraph for the methods section of a paper."""
    study, data = rows.config.study, rows.config.data
    protocol = (
        f"on one fixed split with {rows.n_images} validation images"
        if rows.is_fixed_split
        else f"by {rows.n_folds}-fold cross-validation on {rows.n_images} images, with the same folds for every trial"
    )
    sampler = {"tpe": "a tree-structured Parzen estimator (Optuna)", "random": "random search"}[study.sampler]
    pruner = {
        "race": "Trials were pruned by a paired racing test against the best complete trial on the same images if "
        f"they were unlikely to be better by {MATTERS:g} (one-sided p < {ALPHA:g}).",
        "none": "No trial was pruned.",
    }.get(study.pruner, f"Trials were pruned by Optuna's {study.pruner} pruner.")
    return (
        f"The hyperparameters of a UNet were searched by {sampler} with seed {study.seed}, starting from the default "
        f"configuration. Each trial was evaluated {protocol}. Images and masks were "
        f"{'resized' if data.match == 'resize' else 'cropped'} to {data.height}x{data.width} pixels. The value of a "
        f"trial is the mean over images of the out-of-fold {SCORES[rows.metric]} after the last epoch; no epoch was "
        f"selected by its score. {pruner} Only trials evaluated on all folds could win. {_replication(rows)}"
        "Intervals are 95 % intervals over images and runs. The winner's mean and its gain over the default "
        "are corrected for selection: they are posterior means in a mixed model of all trials' fold means (empirical "
        "Bayes). The search did not read the test split."
    )


def gap(points: Sequence[CurvePoint], metric: str) -> str:
    """Return how much higher training scores than held-out images at half time and at the end; empty if unknown."""
    ahead: dict[int, list[float]] = {}
    for point in points:
        if point.score == metric and point.held_out is not None:
            ahead.setdefault(point.epoch, []).append(point.train - point.held_out)
    if not ahead:
        return ""
    last = max(ahead)
    half = max(1, last // 2)
    name = f"the {SCORES[metric]} on training images minus that on held-out images"
    text = f"After epoch {last}, {name} is {number(float(np.mean(ahead[last])), signed=True)}"
    if half < last:
        text += f"; after epoch {half} it was {number(float(np.mean(ahead[half])), signed=True)}"
    return f"{text}. A growing gap is a sign of overfitting."


def commands(rows: StudyRows) -> list[tuple[str, str]]:
    """Return (command, purpose) of everything that repeats the study; NAME.toml holds the settings of the page."""
    toml = shlex.quote(f"{rows.name}.toml")
    result = [(command_line(f"study --config {toml}", rows.name), "the search")]
    for final in rows.finals:
        seeds = f" --seeds {final.n_seeds}" if final.n_seeds > 1 else ""
        result.append((command_line(f"final --trial {final.trial}{seeds}", rows.name), "retraining and test"))
    if rows.winner is not None:
        params = rows.trial(rows.winner.number).params
        pinned = "".join(f" --set {shlex.quote(f'{key}={_toml(value)}')}" for key, value in params.items())
        train = f"hpsearch train --config {toml}{pinned} --folds {rows.config.study.folds}"
        result.append((train, "only the best configuration"))
    return result


def continue_command(rows: StudyRows) -> str:
    """Return the command that continues the search, with one more trial if all are done."""
    more = f" --trials {rows.n_counted + 1}" if rows.n_counted >= rows.config.study.trials else ""
    return command_line(f"study{more}", rows.name)


def facts(repeat: Repeat) -> list[tuple[str, str]]:
    """Return (name, value) of what the results depend on besides the settings."""
    names = {"device_name": "processor", "platform": "operating system"}
    machine = [(names.get(name, name), value) for name, value in repeat.machine.items()]
    folds = [("folds", f"{repeat.folds_method}, SHA-256 {repeat.folds_digest}"), ("data key", repeat.data_key)]
    return [*folds, *machine]


def stopped_at(row: TrialRow, n_folds: int) -> str:
    """Return where a trial ended: `fold 2, epoch 3 of 10`."""
    if row.pruned_at is not None:
        fold, epoch = row.pruned_at
    elif row.n_finished == n_folds:
        return "all folds"
    elif not any(row.epochs):
        return "before the first epoch"
    else:
        fold = max(fold for fold, epochs in enumerate(row.epochs) if epochs)
        epoch = row.epochs[fold]
    return f"fold {fold + 1}, epoch {epoch} of {row.n_epochs}"


def reason(row: TrialRow) -> str:
    """Return why a trial ended. The place of pruning is left out, because `stopped_at` gives it."""
    return row.reason.rpartition(": ")[2] if row.outcome == "dropped" else row.reason


def _replication(rows: StudyRows) -> str:
    n_replicated = sum(row.is_replicated for row in rows.trials)
    if not n_replicated:
        return ""
    those, were = ("configuration", "was") if n_replicated == 1 else (f"{n_replicated} configurations", "were")
    return (
        f"After the search, the {those} that {were} best on most bootstrap samples of the images {were} refitted on "
        "the same folds with new seeds, and the best by both fits was selected. "
    )


def _correction(rows: StudyRows, winner: Winner) -> str:
    corrected, mean = winner.corrected, "that mean"
    plain = f"mean on the {rows.n_images} validation images" if rows.is_fixed_split else "cross-validation mean"
    text = f"Its plain {plain} is {interval(winner.statistics.total)}"
    if corrected.method == "single":
        return f"{text}. Only one configuration is complete, so there is no selection bias to correct."
    if corrected.method == "confirmed":
        n_replicated = sum(row.is_replicated for row in rows.trials)
        those = "this configuration was" if n_replicated == 1 else f"the {n_replicated} best candidates were"
        mean = "the mean of its first fits"
        text = (
            f"The mean of its first fits is {corrected.naive:.4f}; {those} then refitted with new seeds, and the "
            f"mean over both fits is {interval(winner.statistics.total)}"
        )
    bias = corrected.naive - corrected.mean
    if bias >= 0.00005:
        effect = f"being selected as the best of many makes {mean} too high by an estimated {bias:.4f}"
    elif bias > -0.00005:
        effect = f"there is no sign of selection bias in {mean}"
    else:
        effect = f"the corrected estimate is {-bias:.4f} higher than {mean}, so there is no sign of selection bias"
    text = f"{text}; {effect}. {CORRECTION}"
    if rows.n_folds == 1:
        text += (
            " One fold does not show how much runs differ: a standard deviation of "
            f"{S_GUESS:g} is assumed, and the interval does not cover a larger one."
        )
    return text


def _gain(rows: StudyRows, winner: Winner) -> str:
    if winner.is_default:
        return "It is the default configuration: the search has found nothing better so far."
    if winner.gain is None:
        return "The default configuration (trial 0) was not evaluated on all folds, so the gain over it is unknown."
    meaning = (
        "more than chance explains."
        if winner.gain.low > 0
        else "this may be chance, so the default may be equally good."
    )
    few = f" {FEW_IMAGES_TEXT}" if rows.n_images < FEW_IMAGES else ""
    return (
        "Its gain over the default configuration (trial 0), on the same images and corrected for selection, is "
        f"{interval(winner.gain, signed=True)} (p = {winner.gain.p:.2g}): {meaning} {NOT_COVERED}{few}"
    )


def _tied(rows: StudyRows, winner: Winner) -> str:
    others = [trial for trial in winner.tied if trial != winner.number]
    if not others:
        return "With 95 % confidence it is the best: no other configuration is tied with it."
    listed = ", ".join(map(str, others[:N_LISTED]))
    more = f" and {len(others) - N_LISTED} more" if len(others) > N_LISTED else ""
    text = (
        f"{len(winner.tied)} of {len(rows.complete)} configurations cannot be distinguished from the best with 95 % "
        f"confidence: trial {winner.number} and trial{'s' if len(others) > 1 else ''} {listed}{more}."
    )
    if winner.cheapest == winner.number:
        return f"{text} Trial {winner.number} is also the cheapest of them."
    share = rows.trial(winner.cheapest).seconds / rows.trial(winner.number).seconds
    return f"{text} The cheapest of them is trial {winner.cheapest}, which took {share:.0%} of the time of the best."


def _toml(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, tuple | list):
        return json.dumps(list(value))
    return json.dumps(value, ensure_ascii=False) if isinstance(value, str) else repr(value)
