"""Describe a study in sentences, and render the templates of the report page, the model card and paragraphs."""

import json
import shlex
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
from jinja2 import Environment, PackageLoader, StrictUndefined, select_autoescape

from hpsearch import __version__
from hpsearch.paths import command_line
from hpsearch.report import formats
from hpsearch.report.formats import SCORES, count, number
from hpsearch.report.rows import StudyRows
from hpsearch.search.racing import ALPHA, MATTERS, MAX_INSIDE
from hpsearch.stats.run_variance import S_GUESS
from hpsearch.store.test_set_log import describe_evaluation_count
from hpsearch.training.rows import EpochRow


def render(template: str, **values: Any) -> str:
    """Render a template of `hpsearch.report`. Values are escaped in HTML templates."""
    return _TEMPLATES.get_template(template).render(**values)


def paragraphs(template: str, **values: Any) -> list[str]:
    """Render a text template and return its paragraphs, which are separated by empty lines.

    The templates are:

    - answer: the best configuration of `rows`.
    - race: the time that pruning saved.
    - methods: text for the methods section of a paper.
    - introduction: what was retrained and evaluated for the result `final`, and its score.
    - final: the interpretation of the result `final`. The first paragraph compares it with its prediction. The others
      describe the post-processing, the ensemble, earlier evaluations and duplicates.
    """
    blocks = render(f"{template}.txt.jinja", **values).split("\n\n")
    return [" ".join(block.split()) for block in blocks if block.strip()]


_TEMPLATES = Environment(
    loader=PackageLoader("hpsearch.report"),
    autoescape=select_autoescape(["html.jinja"]),
    trim_blocks=True,
    lstrip_blocks=True,
    keep_trailing_newline=True,
    undefined=StrictUndefined,
)
_TEMPLATES.globals |= {"version": __version__, "s_guess": S_GUESS}
_TEMPLATES.globals |= {"alpha": ALPHA, "matters": MATTERS, "max_inside": MAX_INSIDE}
_TEMPLATES.globals |= {f.__name__: f for f in (command_line, describe_evaluation_count, paragraphs)}
_TEMPLATES.globals["formats"] = formats


def progress(rows: StudyRows) -> str:
    """Describe the progress of a study: `12 of 50 trials: 5 complete, 7 pruned`."""
    outcomes = Counter(row.outcome for row in rows.trials)
    counts = ", ".join(f"{n} {outcome}" for outcome, n in outcomes.most_common())
    text = f"{rows.n_counted} of {count(rows.config.study.trials, 'trial')}"
    return f"{text}: {counts}" if counts else text


def gap(fits: Sequence[Sequence[EpochRow]], metric: str) -> str:
    """Describe the gap between training and held-out scores after the last epoch and after half of the epochs.

    Return an empty string if no epoch has held-out scores.
    """
    rows = [row for rows in fits for row in rows if row.held_out is not None]
    if not rows:
        return ""

    def ahead(epoch: int) -> str:
        values = [getattr(row.train, metric) - getattr(row.held_out, metric) for row in rows if row.epoch == epoch]
        return number(float(np.mean(values)), signed=True)

    last = max(row.epoch for row in rows)
    name = f"the {SCORES[metric]} on training images minus that on held-out images"
    before = f"; after epoch {last // 2} it was {ahead(last // 2)}" if last > 1 else ""
    return f"After epoch {last}, {name} is {ahead(last)}{before}. A growing gap is a sign of overfitting."


def commands(rows: StudyRows) -> list[tuple[str, str]]:
    """Return the commands that repeat the study as (command, purpose) pairs.

    The commands read the file NAME.toml, which must contain the settings shown on the page.
    """
    name, toml = rows.record.name, shlex.quote(f"{rows.record.name}.toml")
    result = [(command_line(f"study --config {toml}", name), "the search")]
    for final in rows.finals:
        seeds = f" --seeds {final.n_seeds}" if final.n_seeds > 1 else ""
        result.append((command_line(f"final --trial {final.trial.number}{seeds}", name), "retraining and test"))
    if rows.standing.winner is not None:
        params = rows.trial(rows.standing.winner).params
        # JSON and TOML have the same syntax for the values of settings.
        settings = [f"{key}={json.dumps(value, ensure_ascii=False)}" for key, value in params.items()]
        pinned = "".join(f" --set {shlex.quote(each)}" for each in settings)
        train = f"hpsearch train --config {toml}{pinned} --folds {rows.config.study.folds}"
        result.append((train, "only the best configuration"))
    return result
