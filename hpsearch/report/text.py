"""Describe a study in sentences, and render the templates of the report: the page, the model card, paragraphs."""

import json
import shlex
from collections import Counter
from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np

from hpsearch import __version__, paths
from hpsearch.paths import command_line
from hpsearch.report import formats
from hpsearch.report.formats import SCORES, count, interval, number
from hpsearch.report.rows import FinalRow, FinalScores, StudyRows, TrialRow
from hpsearch.search.racing import ALPHA, MATTERS
from hpsearch.stats.run_variance import S_GUESS
from hpsearch.store.test_set_log import describe_evaluation_count
from hpsearch.training.rows import EpochRow


def render(template: str, **values: Any) -> str:
    """Return a rendered template. Values in HTML are escaped."""
    return str(_environment().get_template(template).render(**values))


def paragraphs(template: str, **values: Any) -> list[str]:
    """Return the paragraphs of a rendered text, which empty lines separate."""
    blocks = render(template, **values).split("\n\n")
    return [" ".join(block.split()) for block in blocks if block.strip()]


@cache
def _environment() -> Any:
    from jinja2 import Environment, PackageLoader, StrictUndefined, select_autoescape

    made = Environment(
        loader=PackageLoader("hpsearch.report"),
        autoescape=select_autoescape(["html.jinja"]),
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        undefined=StrictUndefined,
    )
    made.globals |= {"version": __version__, "formats": formats, "command_line": paths.command_line}
    return made


def progress(rows: StudyRows) -> str:
    """Return how far the study is: `12 of 50 trials: 5 complete, 7 pruned`."""
    outcomes = Counter(row.outcome for row in rows.trials)
    counts = ", ".join(f"{n} {outcome}" for outcome, n in outcomes.most_common())
    text = f"{rows.n_counted} of {count(rows.config.study.trials, 'trial')}"
    return f"{text}: {counts}" if counts else text


def answer(rows: StudyRows) -> list[str]:
    """Return the paragraphs about the best configuration."""
    return paragraphs("answer.txt.jinja", rows=rows, s_guess=S_GUESS)


def race(rows: StudyRows) -> str:
    """Return what pruning saved."""
    return " ".join(paragraphs("race.txt.jinja", rows=rows))


def methods(rows: StudyRows) -> str:
    """Return a paragraph for the methods section of a paper."""
    return " ".join(paragraphs("methods.txt.jinja", rows=rows, matters=MATTERS, alpha=ALPHA))


def introduce(final: FinalRow, metric: str) -> str:
    """Return what was retrained and evaluated, and its test score."""
    return (
        f"Trial {final.trial} was retrained on {count(final.n_pool, 'pool image')} "
        f"({count(max(1, final.n_seeds), 'network')}) and evaluated on {count(final.n_test, 'test image')}: "
        f"{SCORES[metric]} {interval(final.test[metric])}."
    )


def describe_final(final: FinalScores, metric: str, winner: int | None) -> list[str]:
    """Return the paragraphs about a final that follow its score; `winner` is the winner of the search.

    The first one compares the score with its prediction. The others are about the post-processing, the ensemble,
    earlier evaluations, and duplicates.
    """
    given = {"final": final, "metric": metric, "winner": winner}
    return paragraphs("final.txt.jinja", **given, describe_evaluation_count=describe_evaluation_count)


def gap(fits: Sequence[Sequence[EpochRow]], metric: str) -> str:
    """Return how much higher training scores than held-out images at half time and at the end; empty if unknown."""
    ahead: dict[int, list[float]] = {}
    for row in (row for rows in fits for row in rows):
        if row.held_out is not None:
            ahead.setdefault(row.epoch, []).append(getattr(row.train, metric) - getattr(row.held_out, metric))
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


def stopped_at(row: TrialRow) -> str:
    """Return where a trial ended: `fold 2, epoch 3 of 10`."""
    if row.pruned_at is None and set(row.epochs) == {row.n_epochs}:
        return "all folds"
    if row.pruned_at is None and not any(row.epochs):
        return "before the first epoch"
    last = max((fold for fold, epochs in enumerate(row.epochs) if epochs), default=0)
    fold, epoch = row.pruned_at or (last, row.epochs[last])
    return f"fold {fold + 1}, epoch {epoch} of {row.n_epochs}"


def reason(row: TrialRow) -> str:
    """Return why a trial ended. The place of pruning is left out, because `stopped_at` gives it."""
    return row.reason.rpartition(": ")[2] if row.outcome == "pruned" else row.reason


def _toml(value: Any) -> str:
    if isinstance(value, float):
        return repr(value)
    return json.dumps(value, ensure_ascii=False)
