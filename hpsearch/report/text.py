"""Describe a study in sentences, for the report and the model card."""

from __future__ import annotations

import json
import shlex
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

from hpsearch.paths import command_line
from hpsearch.report.formats import SCORES, count, duration, number
from hpsearch.report.rows import StudyRows, TrialRow
from hpsearch.report.templating import paragraphs
from hpsearch.report.trial_rows import CurvePoint
from hpsearch.search.racing import ALPHA, MATTERS
from hpsearch.stats.run_variance import S_GUESS


def progress(rows: StudyRows) -> str:
    """Return how far the study is: `12 of 50 trials: 5 complete, 7 pruned`."""
    outcomes = Counter(row.outcome for row in rows.trials)
    counts = ", ".join(f"{n} {outcome}" for outcome, n in outcomes.most_common())
    text = f"{rows.n_counted} of {count(rows.config.study.trials, 'trial')}"
    return f"{text}: {counts}" if counts else text


def about(rows: StudyRows) -> str:
    """Return metric, folds, images and progress of the study in a line."""
    folds = "one fixed split" if rows.is_fixed_split else count(rows.n_folds, "fold")
    return f"{SCORES[rows.metric]}, {folds}, {count(rows.n_images, 'held-out image')}. {progress(rows)}."


def answer(rows: StudyRows) -> list[str]:
    """Return the paragraphs about the best configuration."""
    return paragraphs("answer.txt.jinja", rows=rows, s_guess=S_GUESS)


def race(rows: StudyRows) -> str:
    """Return what pruning saved."""
    ended = [row for row in rows.trials if row.outcome in ("complete", "pruned")]
    pruned = [row for row in ended if row.outcome == "pruned"]
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
    return " ".join(paragraphs("methods.txt.jinja", rows=rows, matters=MATTERS, alpha=ALPHA))


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
    """Return (command, purpose) pairs that repeat the study; NAME.toml holds the settings shown on the page."""
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
    return row.reason.rpartition(": ")[2] if row.outcome == "pruned" else row.reason


def _toml(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, tuple | list):
        return json.dumps(list(value))
    return json.dumps(value, ensure_ascii=False) if isinstance(value, str) else repr(value)
