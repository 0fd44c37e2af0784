"""Write the files (artifacts) of the runs in MLflow: tables and figures."""

from __future__ import annotations

import csv
import json
import logging
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from hpsearch.errors import CacheError
from hpsearch.paths import StudyPaths
from hpsearch.report import trial_rows
from hpsearch.report.final_record import FinalRecord
from hpsearch.report.trial_rows import Case, CurvePoint
from hpsearch.store.record import StudyRecord
from hpsearch.store.trials import TrialRecord
from hpsearch.tracking.metrics import image_scores
from hpsearch.training.metrics import SCORES

logger = logging.getLogger(__name__)


def write_study_files(record: StudyRecord, folder: Path) -> None:
    """Copy settings, plan and folds of the study, and the report if there is one."""
    _copy((record.paths.toml, record.paths.plan, record.paths.folds), folder)
    write_report_files(record.paths, folder)


def write_report_files(study: StudyPaths, folder: Path) -> None:
    """Copy the report and its figures, if there is a report."""
    if study.report.is_file():
        _copy([study.report], folder)
        shutil.copytree(study.figures, folder / study.figures.name)


def write_trial_files(record: StudyRecord, trial: TrialRecord, folder: Path) -> None:
    """Write trial.toml, folds.json and, if there is something to show, decisions.json, scores.csv and two figures.

    trial.toml is the whole configuration; `hpsearch train --config trial.toml` runs it again.
    """
    (folder / "trial.toml").write_text(trial.study_config.to_toml(), encoding="utf-8")
    _copy([record.paths.folds], folder)
    if trial.decisions or trial.failures:
        decisions = {"decisions": trial.decisions, "failures": trial.failures}
        (folder / "decisions.json").write_text(json.dumps(decisions, indent=1), encoding="utf-8")
    if rows := list(_score_rows(record, trial.number)):
        with (folder / "scores.csv").open("w", encoding="utf-8", newline="") as file:
            csv.writer(file).writerows([["image", "fold", *SCORES], *rows])
    name, metric = f"trial {trial.number:04d} of {record.name}", record.config.study.metric
    result = f"out-of-fold {metric} {trial.value:.4f}" if trial.outcome == "complete" else trial.outcome or "open"
    _draw_curves(trial_rows.trial_curves(record, trial.number), f"{name}: {result}", folder)
    _draw_panels(partial(trial_rows.trial_cases, record, trial.number), metric, f"{name}: held-out images", folder)


def write_refit_files(record: StudyRecord, number: int, folder: Path) -> None:
    """Write trial.toml, second.json and a figure for the refit of a trial."""
    (folder / "trial.toml").write_text(record.trial(number).study_config.to_toml(), encoding="utf-8")
    _copy([record.paths.trial(number).second], folder)
    title = f"trial {number:04d} of {record.name}, refit"
    _draw_curves(trial_rows.second_curves(record, number), title, folder)


def write_final_files(record: StudyRecord, name: str, folder: Path) -> None:
    """Copy the configuration, result, test scores and model card of a final, and draw two figures."""
    final = record.paths.final(name)
    _copy((final.config, final.result, final.table, final.card), folder)
    result = FinalRecord.read(final)
    title, metric = f"final of trial {result.trial:04d} of {record.name}", result.metric
    curves = trial_rows.final_curves(final, result.n_seeds)
    _draw_curves(curves, f"{title}: {metric} {result.test[metric].mean:.4f} on the test images", folder)
    cases = partial(trial_rows.final_cases, record, final, result.test_key)
    _draw_panels(cases, metric, f"{title}: test images", folder)


def import_figures() -> None:
    """Load the drawing libraries early, so that the end of the study does not wait for them."""
    from hpsearch.report import figures  # noqa: F401


def _copy(files: Iterable[Path], folder: Path) -> None:
    for path in files:
        if path.is_file():
            shutil.copyfile(path, folder / path.name)


def _score_rows(record: StudyRecord, number: int) -> Iterator[list[Any]]:
    """Return image, fold and out-of-fold scores of every image of the finished folds, fold by fold."""
    ids = record.folds.ids
    for fold in record.finished_folds(number):
        columns = image_scores(record.fit(number, fold).counts())
        for row, index in enumerate(record.folds.held_out(fold).tolist()):
            yield [ids[index], fold, *(f"{values[row]:.6f}" for values in columns.values())]


def _draw_curves(points: Sequence[CurvePoint], title: str, folder: Path) -> None:
    if points:
        # Imported when there is something to draw: matplotlib takes half a second.
        from hpsearch.report import figures

        (folder / "curves.png").write_bytes(figures.to_png(figures.draw_curves(points, title=title)))


def _draw_panels(read_cases: Callable[[], list[Case]], metric: str, title: str, folder: Path) -> None:
    try:
        cases = read_cases()
    except CacheError as error:
        # People may remove the decoded images to save space.
        logger.info("%s: no panels: %s", title, error)
        return
    if cases:
        from hpsearch.report import figures

        (folder / "panels.png").write_bytes(figures.to_png(figures.draw_panels(cases, metric=metric, title=title)))
