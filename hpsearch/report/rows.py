"""Read the content of a study's report from the study folder as typed rows. Contains no drawing and no HTML."""

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from hpsearch.config import StudyConfig, get_setting
from hpsearch.models.network import n_parameters, why_impossible
from hpsearch.report.estimates import Estimates
from hpsearch.report.final_record import FinalResult, final_result
from hpsearch.search.constant_predictions import constant_warnings
from hpsearch.search.importance import importances
from hpsearch.stats.study_scores import TrialStatistics
from hpsearch.store import lock
from hpsearch.store.record import StudyRecord
from hpsearch.store.trials import Outcome, Standing, TrialRecord, count_trials
from hpsearch.typed_json import from_json
from hpsearch.workers.plan import ExecutionPlan, predicted_bytes

N_TEST = 600
"""Number of test images that the prediction assumes if no model was retrained yet: the ISIC-2017 test set has 600."""


@dataclass(frozen=True, kw_only=True)
class TrialRow:
    """Params, result and cost of a trial."""

    number: int
    outcome: Outcome | Literal["open"]
    params: dict[str, Any]
    """Value of each searched setting."""
    value: float | None
    """Mean score of a complete trial, or estimate of a pruned one; None if there is neither."""
    statistics: TrialStatistics | None
    """Statistics of a complete trial, over both fits if it was replicated; None for other trials."""
    epochs: tuple[int, ...]
    """Number of finished epochs of each fold."""
    n_epochs: int
    """Number of epochs of a complete fit."""
    seconds: float
    """Time spent on training and evaluation so far."""
    memory_bytes: int | None
    """Predicted peak memory of a training step; None if the network is impossible or the study has no plan yet."""
    n_parameters: int | None
    """Number of parameters of the network; None if the network is impossible."""
    reason: str

    @property
    def whole_s(self) -> float:
        """Extrapolated time to train all folds, in seconds; 0 before the first epoch."""
        return self.seconds / (sum(self.epochs) or 1) * self.n_epochs * len(self.epochs)


@dataclass(frozen=True, kw_only=True, eq=False)
class StudyRows:
    """Content of the report of a study."""

    record: StudyRecord
    config: StudyConfig
    n_images: int
    """Number of images that are held out in one of the folds."""
    is_running: bool
    updated_at: float
    """Unix time of the last event: the end of a trial or `final` run, or the start of a trial that has not ended; 0
    without trials."""
    n_counted: int
    """Number of trials that count toward `study.trials`."""
    trials: tuple[TrialRow, ...]
    standing: Standing
    """Ranking of the trials that can win, and the values by which they are ranked."""
    estimates: Estimates | None
    """Estimates of the complete trials; None if no trial is complete."""
    importances: dict[str, float]
    """Share of the variance between trials that each searched setting explains."""
    finals: tuple[FinalResult, ...]
    """Results of the `final` runs, in the order in which they ended."""
    machine: dict[str, str]
    """Device, precision, threads and versions of the study's plan."""
    warnings: tuple[str, ...] = ()
    """Warnings about trials whose network predicts only one class, with the likely causes."""

    @property
    def metric(self) -> str:
        return self.config.study.metric

    @property
    def is_fixed_split(self) -> bool:
        return self.config.study.folds == "fixed"

    @property
    def is_sample(self) -> bool:
        """Whether the study uses the built-in synthetic dataset."""
        return self.config.data.root == "sample" and not self.config.data.images

    @property
    def complete(self) -> tuple[TrialRow, ...]:
        """Rows of the trials that can win, best first."""
        return tuple(self.trial(number) for number in self.standing.ranking)

    def trial(self, number: int) -> TrialRow:
        return next(row for row in self.trials if row.number == number)

    @property
    def winner_final(self) -> FinalResult | None:
        """Result of the latest `final` run for the winner; None if there is none."""
        return next((final for final in reversed(self.finals) if final.trial.number == self.standing.winner), None)


def study_rows(record: StudyRecord) -> StudyRows:
    """Read the content of the report for the current state of a study, which may be running.

    Raises RecordError if the study's folder is damaged or has no folds yet.
    """
    trials, estimates = record.trials(), Estimates.of(record)
    finals = [final_result(record, name, estimates) for name in record.paths.final_names()]
    finals.sort(key=lambda final: (final.ended_at, final.paths.root.name))
    times = [trial.ended_at or trial.began_at for trial in trials] + [final.ended_at for final in finals]
    return StudyRows(
        record=record,
        config=record.config,
        n_images=int(np.sum(np.asarray(record.folds.fold_of) >= 0)),
        is_running=lock.is_held(record.paths),
        updated_at=max(times, default=0.0),
        n_counted=count_trials(trials),
        trials=tuple(_trial_row(record, trial, estimates) for trial in trials),
        standing=record.standing(trials),
        estimates=estimates,
        importances=importances(record),
        finals=tuple(finals),
        machine={name: str(value) for name, value in ((record.plan() or {}).get("machine") or {}).items()},
        warnings=tuple(constant_warnings(record, record.trial_numbers())),
    )


def _trial_row(record: StudyRecord, trial: TrialRecord, estimates: Estimates | None) -> TrialRow:
    config, data, plan = trial.study_config, trial.study_config.data, record.plan()
    statistics = estimates.statistics.get(trial.number) if estimates is not None else None
    epochs = [fit.epochs() for fit in record.fits(trial.number)]
    is_possible = why_impossible(config.unet, data.n_channels, data.height, data.width) is None
    return TrialRow(
        number=trial.number,
        outcome=trial.outcome or "open",
        params={name: get_setting(config, name) for name in record.config.search},
        value=trial.value if statistics is None else statistics.mean,
        statistics=statistics,
        epochs=tuple(map(len, epochs)),
        n_epochs=config.train.epochs,
        seconds=float(sum(row.seconds for rows in epochs for row in rows)),
        memory_bytes=predicted_bytes(config, from_json(ExecutionPlan, plan)) if is_possible and plan else None,
        n_parameters=n_parameters(config.unet, data.n_channels) if is_possible else None,
        reason=trial.reason,
    )
