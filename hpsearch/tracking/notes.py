"""Write the descriptions of the runs in MLflow, in Markdown."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from hpsearch.config import digest
from hpsearch.report.final_record import FinalRecord
from hpsearch.store.trials import Standing, TrialRecord
from hpsearch.tracking.metrics import Point

NOTE, OUR_NOTE = "mlflow.note.content", "hpsearch.note"
"""Tag with the description of a run, and tag with the digest of the description that hpsearch wrote last."""


def is_ours(tags: Mapping[str, str]) -> bool:
    """Return whether hpsearch wrote the description of a run with these tags, or nobody did."""
    return NOTE not in tags or tags.get(OUR_NOTE) == digest(tags[NOTE])


def new_note_tags(tags: Mapping[str, str], note: str) -> dict[str, str]:
    """Return the tags that set the description of a run to `note`; empty if it is set or a person wrote another."""
    if not note or tags.get(NOTE) == note or not is_ours(tags):
        return {}
    return {NOTE: note, OUR_NOTE: digest(note)}


def study_note(metric: str, trials: Sequence[TrialRecord], standing: Standing) -> str:
    """Return the description of a study: its winner, the value and the params; empty while there is no winner."""
    winner = next((trial for trial in trials if trial.number == standing.winner), None)
    if winner is None or standing.best_value is None:
        return ""
    fits = ", mean of the first fit and the refit" if winner.number in standing.confirmed else ""
    value = f"out-of-fold {metric} **{standing.best_value:.4f}**{fits}"
    return f"Best: **trial {winner.number}**, {value}\n\n{searched_params(winner)}"


def trial_note(trial: TrialRecord, points: Sequence[Point], metric: str, standing: Standing) -> str:
    """Return the description of an ended trial: its value, or why it has none, and its params."""
    if trial.outcome != "complete" or trial.value is None:
        estimate = "" if trial.value is None else f" (estimated {metric} {trial.value:.4f})"
        return f"**{trial.outcome}**{estimate}: {trial.reason}\n\n{searched_params(trial)}"
    value = standing.values.get(trial.number, trial.value)
    spreads = [point.value for point in points if point.key == f"cv/{metric}_std"]
    spread = f", standard deviation between folds {spreads[-1]:.4f}" if spreads else ""
    is_refitted = trial.number in standing.confirmed
    fits = f", mean of the first fit ({trial.value:.4f}) and the refit" if is_refitted else ""
    return f"Out-of-fold {metric} **{value:.4f}**{fits}{spread}\n\n{searched_params(trial)}"


def final_note(result: FinalRecord, trial: TrialRecord) -> str:
    """Return the description of a final: the score on the test images and what the search had estimated."""
    metric = result.metric
    test = result.test[metric]
    interval = f"{metric.capitalize()} **{test.mean:.4f}** (95 % interval {test.low:.4f} to {test.high:.4f})"
    estimate = f"the out-of-fold {metric} was {result.cv.mean:.4f}"
    return f"{interval} on {result.n_test} test images; {estimate}\n\n{searched_params(trial)}"


def searched_params(trial: TrialRecord) -> str:
    """Return the suggested params of a trial as one line of Markdown."""
    shown = (f"{value:.4g}" if isinstance(value, float) else text_of(value) for value in trial.params.values())
    listed = ", ".join(f"{name} `{value}`" for name, value in zip(trial.params, shown, strict=True))
    return listed or "the default configuration"


def text_of(value: Any) -> str:
    """Return a setting as text; lists and tables as JSON."""
    return json.dumps(value, ensure_ascii=False) if isinstance(value, list | dict) else str(value)
