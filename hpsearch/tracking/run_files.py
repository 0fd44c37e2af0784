"""Write the artifacts of MLflow runs: settings, tables and figures. The kinds of runs are described in `runs`."""

import csv
import json
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from hpsearch.paths import StudyPaths
from hpsearch.report.trial_rows import image_scores, trial_cases
from hpsearch.store.record import StudyRecord
from hpsearch.store.trials import TrialRecord
from hpsearch.training.metrics import SCORES
from hpsearch.training.rows import EpochRow
from hpsearch.typed_json import to_json


def write_study_files(record: StudyRecord, folder: Path) -> None:
    """Copy the settings, plan and folds of the study, and its report if there is one, into `folder`."""
    _copy(folder, record.paths.toml, record.paths.plan, record.paths.folds)
    write_report_files(record.paths, folder)


def write_report_files(study: StudyPaths, folder: Path) -> None:
    """Copy the report of a study and its figures into `folder`. Do nothing if there is no report."""
    if study.report.is_file():
        _copy(folder, study.report)
        shutil.copytree(study.figures, folder / study.figures.name)


def write_trial_files(record: StudyRecord, trial: TrialRecord, folder: Path) -> None:
    """Write trial.toml and folds.json, and also decisions.json, scores.csv and two figures if their data exists.

    trial.toml is the whole configuration. `hpsearch train --config trial.toml` trains it again.
    """
    (folder / "trial.toml").write_text(trial.study_config.to_toml(), encoding="utf-8")
    _copy(folder, record.paths.folds)
    if trial.decisions or trial.failures:
        decisions = {"decisions": to_json(trial.decisions), "failures": trial.failures}
        (folder / "decisions.json").write_text(json.dumps(decisions, indent=1), encoding="utf-8")
    if rows := list(_score_rows(record, trial.number)):
        with (folder / "scores.csv").open("w", encoding="utf-8", newline="") as file:
            csv.writer(file).writerows([["image", "fold", *SCORES], *rows])
    name, metric = f"trial {trial.number:04d} of {record.name}", record.config.study.metric
    result = f"out-of-fold {metric} {trial.value:.4f}" if trial.outcome == "complete" else trial.outcome or "open"
    _draw_curves(folder, [fit.epochs() for fit in record.fits(trial.number)], f"{name}: {result}")
    if cases := trial_cases(record, trial.number):
        from hpsearch.report import figures

        panels = figures.draw_panels(cases, metric=metric, title=f"{name}: held-out images")
        (folder / "panels.png").write_bytes(figures.to_bytes(panels))


def write_refit_files(record: StudyRecord, number: int, folder: Path) -> None:
    """Write the files of the refit of trial `number`: configuration, result (second.json) and curves."""
    (folder / "trial.toml").write_text(record.trial(number).study_config.to_toml(), encoding="utf-8")
    _copy(folder, record.paths.trial(number).second)
    epochs = [fit.epochs() for fit in record.fits(number, replicate=1)]
    _draw_curves(folder, epochs, f"trial {number:04d} of {record.name}, refit")


def write_final_files(record: StudyRecord, name: str, folder: Path) -> None:
    """Copy the configuration, result, test scores, model card and figures of the `final` run called `name`."""
    final = record.paths.final(name)
    _copy(folder, final.config, final.result, final.table, final.card, final.curves, final.panels)


def _copy(folder: Path, *files: Path) -> None:
    for path in files:
        if path.is_file():
            shutil.copyfile(path, folder / path.name)


def _score_rows(record: StudyRecord, number: int) -> Iterator[list[Any]]:
    """Yield the rows of scores.csv: image, fold and out-of-fold scores of each image in the finished folds."""
    for fold in record.finished_folds(number):
        columns = image_scores(record.fit(number, fold).counts()).values()
        for index, *scores in zip(record.folds.held_out(fold).tolist(), *columns, strict=True):
            yield [record.folds.ids[index], fold, *(f"{score:.6f}" for score in scores)]


def _draw_curves(folder: Path, fits: Sequence[Sequence[EpochRow]], title: str) -> None:
    # Imported here because Matplotlib takes half a second to import.
    from hpsearch.report import figures

    if any(fits):
        (folder / "curves.png").write_bytes(figures.to_bytes(figures.draw_curves(fits, title=title)))
