"""Reads from the record what the report of a study shows, as plain typed rows. Knows no drawing and no HTML."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from hpsearch.config import StudyConfig, get_setting
from hpsearch.config.search import Choice, Range
from hpsearch.errors import RecordError
from hpsearch.inference.postprocessing import Chosen
from hpsearch.models.costs import n_parameters, why_impossible
from hpsearch.paths import read_json
from hpsearch.report.claims import Claims
from hpsearch.report.statistics import (
    Corrected,
    Interval,
    Paired,
    TrialStatistics,
    bootstrap_mean,
    trial_statistics,
)
from hpsearch.search import constant_predictions as constant
from hpsearch.search.importance import importances
from hpsearch.store import lock
from hpsearch.store.record import COUNTED, Outcome, StudyRecord, TrialRecord
from hpsearch.store.test_set_log import Look, find_look, first_look_of, looks_at, n_looks_before
from hpsearch.training.metrics import SCORES, PixelCounts
from hpsearch.workers.plan import ExecutionPlan, predicted_bytes

Floats = npt.NDArray[np.float64]

N_TEST = 600
"""Test images that are assumed before a test set was scored: as many as ISIC-2017 has."""


@dataclass(frozen=True, kw_only=True)
class TrialRow:
    """One trial: what was tried, what came out, what it cost."""

    number: int
    outcome: Outcome | Literal["open"]
    params: dict[str, Any]
    """Every searched setting."""
    value: float | None
    """Mean if full, estimate if dropped."""
    statistics: TrialStatistics | None
    """Of full trials: of both their fits where they are confirmed."""
    is_confirmed: bool
    """Whether it was fitted once more, and both fits count."""
    epochs: tuple[int, ...]
    """Epochs done, by fold."""
    n_epochs: int
    """Epochs of a whole fit."""
    n_finished: int
    """Folds that were trained to the end."""
    seconds: float
    """Training and evaluation so far."""
    whole_s: float | None
    """What all folds to the end take at the pace so far; None before the first epoch."""
    memory_bytes: int | None
    """Predicted peak of a training step; None for a network that cannot exist, or without a plan."""
    n_parameters: int | None
    """None for a network that cannot exist."""
    reason: str
    dropped_at: tuple[int, int] | None
    """Fold (from 0) and epoch (from 1) of the verdict, where it was dropped."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Winner:
    """The best full trial, and how sure that is."""

    number: int
    statistics: TrialStatistics
    corrected: Corrected
    """Its mean with the price of having been chosen taken off; its `trial` counts full trials, not numbers."""
    predicted: Interval
    """Mean on `n_predicted` new images after retraining, with a 95 % prediction interval."""
    n_predicted: int
    is_default: bool
    """Whether it has the default configuration: trial 0, or a copy of it."""
    gain: Paired | None
    """Over trial 0; None if it is trial 0, or that is not full."""
    tied: tuple[int, ...]
    """Numbers of the trials that cannot be told from the best, itself included, best first."""
    cheapest: int
    """Of the tied the one whose cross-validation took the least time."""
    scores: Floats
    """Its out-of-fold score of every image that was held out."""


@dataclass(frozen=True, kw_only=True)
class EnsembleRow:
    """The networks of the folds together on the test split."""

    n_networks: int
    test: dict[str, Interval]
    official: dict[str, Interval]
    gain: Paired
    """Of the study's metric over the network that is kept."""


@dataclass(frozen=True, kw_only=True, eq=False)
class FinalRow:
    """A retrained configuration on the test split."""

    name: str
    trial: int
    n_pool: int
    n_test: int
    n_seeds: int
    ended_at: float
    cv: dict[str, Interval]
    """Score by name, out of fold: mean over images with the interval that the images' luck gives."""
    test: dict[str, Interval]
    """The same on the test images, at the same size."""
    official: dict[str, Interval]
    """The challenge's scores of the test images, at their own resolution; empty where they were not taken."""
    predicted: Interval | None
    """What the search promised for it; None if it is not the winner."""
    scores: Floats
    """The study's metric on every test image, mean over the networks."""
    n_trials_after: int
    """Trials that began after the study's first evaluation of the test images."""
    n_looks_before: int
    """Evaluations of any of these test images before the study began."""
    look: Look
    """This evaluation; as far as final.json tells where it is not on account any more."""
    looks: tuple[Look, ...]
    """All known evaluations of any of these test images, this one included, in the order of time."""
    chosen: Chosen | None
    """What was decided out of fold; None where nothing was."""
    chosen_test: dict[str, Interval]
    """Like `test`, by the choices; empty where none was taken."""
    ensemble: EnsembleRow | None
    leaks: tuple[tuple[str, str], ...]
    """Pairs of duplicates and near-duplicates across pool and test."""
    without_leaks: float | None
    """Mean of the study's metric without their test images."""


@dataclass(frozen=True, kw_only=True)
class Race:
    """What the pruner saved, over the full and dropped trials."""

    spent_s: float
    whole_s: float
    """What cross-validating all of them on all folds takes, each at its own pace."""

    @property
    def share(self) -> float:
        return self.spent_s / self.whole_s


@dataclass(frozen=True, kw_only=True)
class Repeat:
    """What is needed to repeat the study."""

    toml: str
    data_key: str
    folds_digest: str
    folds_method: str
    machine: dict[str, str]
    """Device, precision, threads and versions."""


@dataclass(frozen=True, kw_only=True, eq=False)
class StudyRows:
    """All that the report of a study shows."""

    name: str
    config: StudyConfig
    n_folds: int
    n_images: int
    """Images that were held out once."""
    is_running: bool
    updated_at: float
    """Unix time of the last trial's end, or of its beginning if it has not ended; 0 before the first."""
    n_counted: int
    """Trials that count toward `study.trials`."""
    trials: tuple[TrialRow, ...]
    ranking: tuple[int, ...]
    """Numbers of the trials that can win, best first."""
    winner: Winner | None
    """None while no trial is full."""
    race: Race | None
    """None while no trial is full or dropped."""
    second_fits: tuple[int, int] | None
    """Second fits done, and of how many, while some are missing; None before and after."""
    importances: dict[str, float]
    finals: tuple[FinalRow, ...]
    """In the order in which they ended."""
    repeat: Repeat
    warnings: tuple[str, ...] = ()
    """Sentences about trials whose network predicts one class only, with the likely causes."""

    @property
    def metric(self) -> str:
        return self.config.study.metric

    @property
    def full(self) -> tuple[TrialRow, ...]:
        """The trials that can win, best first."""
        rows = {row.number: row for row in self.trials}
        return tuple(rows[number] for number in self.ranking)

    def trial(self, number: int) -> TrialRow:
        return next(row for row in self.trials if row.number == number)


def study_rows(record: StudyRecord) -> StudyRows:
    """Everything at this moment, also of a study that runs or has just begun.

    Raises RecordError if the folder is damaged, or if the study has no folds yet.
    """
    trials = record.trials()
    claims = Claims.of(record)
    statistics = dict(zip(claims.full, trial_statistics(claims.scores), strict=True)) if claims is not None else {}
    standing = record.standing(trials)
    confirmed = standing.confirmed
    rows = tuple(_trial_row(record, trial, statistics.get(trial.number), confirmed) for trial in trials)
    results = _final_results(record)
    winner = _winner(record, claims, statistics, results) if claims is not None else None
    ended = [row for row in rows if row.outcome in ("full", "dropped") and row.whole_s is not None]
    n_held_out = len(_held_out(record))
    return StudyRows(
        name=record.name,
        config=record.config,
        n_folds=record.n_folds,
        n_images=n_held_out,
        is_running=lock.is_held(record.paths),
        updated_at=max(
            [trial.ended_at or trial.began_at for trial in trials] + [result["ended_at"] for _, result in results],
            default=0.0,
        ),
        n_counted=sum(trial.outcome in COUNTED for trial in trials),
        trials=rows,
        ranking=standing.ranking,
        winner=winner,
        race=Race(spent_s=sum(r.seconds for r in ended), whole_s=sum(r.whole_s or 0 for r in ended))
        if ended
        else None,
        second_fits=_second_fits(record),
        importances=importances(record),
        finals=tuple(_final_row(record, name, result, claims, trials) for name, result in results),
        repeat=_repeat(record),
        warnings=tuple(constant.describe(record, constant.find_constant_fits(record, record.trial_numbers()))),
    )


def pareto_front(costs: Sequence[float], values: Sequence[float]) -> list[int]:
    """Indices of the points that no other beats in one without losing in the other, cheapest first.

    Of points that are equal in both the first stays.
    """
    front: list[int] = []
    for index in sorted(range(len(costs)), key=lambda i: (costs[i], -values[i], i)):
        if not front or values[index] > values[front[-1]]:
            front.append(index)
    return front


def describe_dimension(dimension: Choice | Range) -> str:
    """`2 to 4`, `0.001 to 0.3, logarithmic`, `rgb, grayscale`."""
    if isinstance(dimension, Choice):
        return ", ".join(show_value(value) for value in dimension.values)
    text = f"{show_value(dimension.low)} to {show_value(dimension.high)}"
    if dimension.step is not None:
        text += f" in steps of {show_value(dimension.step)}"
    return text + (", logarithmic" if dimension.log else "")


def show_value(value: Any) -> str:
    """A setting's value as people write it: three digits, pairs as `256x192`."""
    if isinstance(value, float):
        return f"{value:.3g}"
    if isinstance(value, tuple | list):
        return "x".join(map(str, value))
    return str(value)


def position(dimension: Choice | Range, value: Any) -> float:
    """Where a value lies in its dimension: 0 at the first or lowest, 1 at the last or highest."""
    if isinstance(dimension, Choice):
        index = dimension.values.index(tuple(value) if isinstance(value, list) else value)
        return index / (len(dimension.values) - 1) if len(dimension.values) > 1 else 0.5
    low, high, here = float(dimension.low), float(dimension.high), float(value)
    if low == high:
        return 0.5
    if dimension.log:
        low, high, here = (float(np.log(each)) for each in (low, high, here))
    return (here - low) / (high - low)


def _held_out(record: StudyRecord) -> npt.NDArray[np.int64]:
    return np.flatnonzero(np.asarray(record.folds.fold_of) >= 0)


def _trial_row(
    record: StudyRecord, trial: TrialRecord, statistics: TrialStatistics | None, confirmed: Sequence[int]
) -> TrialRow:
    config = trial.study_config
    fits = [record.fit(trial.number, fold) for fold in range(record.n_folds)]
    epochs = [fit.epochs() for fit in fits]
    n_done = sum(len(rows) for rows in epochs)
    seconds = float(sum(row["train_s"] + row["eval_s"] for rows in epochs for row in rows))
    verdict = next((each for each in reversed(trial.decisions) if each.get("drop")), None)
    data = config.data
    exists = why_impossible(config.unet, data.n_channels, data.height, data.width) is None
    plan = record.plan()
    return TrialRow(
        number=trial.number,
        outcome=trial.outcome or "open",
        params={name: get_setting(config, name) for name, _ in record.config.search},
        value=trial.value if statistics is None else statistics.mean,
        statistics=statistics,
        is_confirmed=trial.number in confirmed,
        epochs=tuple(len(rows) for rows in epochs),
        n_epochs=config.train.epochs,
        n_finished=sum(fit.is_finished for fit in fits),
        seconds=seconds,
        whole_s=seconds / n_done * config.train.epochs * record.n_folds if n_done else None,
        memory_bytes=predicted_bytes(config, ExecutionPlan.from_dict(plan)) if exists and plan else None,
        n_parameters=n_parameters(config.unet, data.n_channels) if exists else None,
        reason=trial.reason,
        dropped_at=(verdict["fold"], verdict["epoch"]) if trial.outcome == "dropped" and verdict else None,
    )


def _second_fits(record: StudyRecord) -> tuple[int, int] | None:
    shortlist = record.shortlist()
    if shortlist is None or shortlist.of != tuple(trial.number for trial in record.full_trials()):
        return None
    ended = {second.trial for second in record.second_records() if second.outcome is not None}
    if ended.issuperset(shortlist.trials):
        return None
    fits = [record.second_fit(number, fold) for number in shortlist.trials for fold in range(record.n_folds)]
    return sum(fit.is_finished for fit in fits), len(fits)


def _winner(
    record: StudyRecord,
    claims: Claims,
    statistics: dict[int, TrialStatistics],
    results: Sequence[tuple[str, dict[str, Any]]],
) -> Winner:
    number = claims.winner
    n_test = next((int(result["n_test"]) for _, result in reversed(results) if result["trial"] == number), N_TEST)
    predicted = claims.predicted(number, n_test=n_test)
    assert predicted is not None
    return Winner(
        number=number,
        statistics=statistics[number],
        corrected=claims.corrected,
        predicted=predicted,
        n_predicted=n_test,
        is_default=record.is_default(record.trial(number)),
        gain=claims.gain(number),
        tied=claims.tied,
        cheapest=claims.cheapest_tied(record),
        scores=claims.scores.joint[claims.corrected.trial],
    )


def _final_results(record: StudyRecord) -> list[tuple[str, dict[str, Any]]]:
    """Name and final.json of what was scored on the test split, in the order of time."""
    if not record.paths.finals.is_dir():
        return []
    names = [path.name for path in record.paths.finals.iterdir() if record.paths.final(path.name).result.is_file()]
    results = [(name, read_json(record.paths.final(name).result)) for name in names]
    return sorted(results, key=lambda each: (each[1]["ended_at"], each[0]))


def _final_row(
    record: StudyRecord,
    name: str,
    result: dict[str, Any],
    claims: Claims | None,
    trials: Sequence[TrialRecord],
) -> FinalRow:
    predicted = None
    if claims is not None:
        predicted = claims.predicted(result["trial"], n_test=result["n_test"], n_runs=max(1, result["n_seeds"]))
    chosen, ensemble = result.get("chosen"), result.get("ensemble")
    began_at = trials[0].began_at
    look = _look(record, result, began_at)
    looks = looks_at(record.paths.project, look)
    first = first_look_of(looks, record.name, began_at) or look
    return FinalRow(
        name=name,
        trial=result["trial"],
        n_pool=result["n_pool"],
        n_test=result["n_test"],
        n_seeds=result["n_seeds"],
        ended_at=result["ended_at"],
        cv={score: bootstrap_mean(values) for score, values in _out_of_fold(record, result["trial"]).items()},
        test={score: Interval(**result["test"][score]) for score in SCORES},
        official=_intervals(result.get("official", {})),
        predicted=predicted,
        scores=_test_scores(record, name),
        n_trials_after=sum(trial.began_at > first.at for trial in trials),
        n_looks_before=n_looks_before(looks, began_at),
        look=look,
        looks=looks,
        chosen=Chosen.from_table(chosen) if chosen else None,
        chosen_test=_intervals(result.get("chosen_test", {})),
        ensemble=EnsembleRow(
            n_networks=ensemble["n_networks"],
            test=_intervals(ensemble["test"]),
            official=_intervals(ensemble["official"]),
            gain=Paired(**ensemble["gain"]),
        )
        if ensemble
        else None,
        leaks=tuple((pair["a"], pair["b"]) for pair in result.get("leaks", ())),
        without_leaks=result.get("without_leaks"),
    )


def _look(record: StudyRecord, result: dict[str, Any], study_began_at: float) -> Look:
    """A final's entry in the account. Version 0.1 did not write down which it is."""
    project = record.paths.project
    if (found := find_look(project, result.get("look", ""))) is not None:
        return found
    known = Look(
        test_set=result.get("test_set", ""),
        at=result["ended_at"],
        study=record.name,
        study_began_at=study_began_at,
        trial=result["trial"],
        folder=str(project.root.absolute()),
        n_images=result["n_test"],
        metric=result["metric"],
        score=result["test"][result["metric"]]["mean"],
        id="",
    )
    same = (look for look in looks_at(project, known) if look.id and look.test_set == known.test_set)
    return next((look for look in same if look.configuration == known.configuration), known)


def _intervals(table: dict[str, dict[str, float]]) -> dict[str, Interval]:
    return {score: Interval(**each) for score, each in table.items()}


def _out_of_fold(record: StudyRecord, number: int) -> dict[str, Floats]:
    """Every score of every image that was held out, by the score's name, in the order of the folds.

    The mean over both fits of a confirmed trial.
    """
    fits = [record.fit, record.second_fit] if number in record.confirmed() else [record.fit]
    tables = [np.concatenate([fit(number, fold).counts() for fold in range(record.n_folds)]) for fit in fits]
    counts = [PixelCounts.from_columns(table) for table in tables]
    return {name: np.mean([score(each) for each in counts], axis=0) for name, score in SCORES.items()}


def _test_scores(record: StudyRecord, name: str) -> Floats:
    table = record.paths.final(name).table
    try:
        with table.open(encoding="utf-8", newline="") as file:
            return np.array([float(row[record.config.study.metric]) for row in csv.DictReader(file)])
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise RecordError(f"{table} is damaged: {error}") from error


def _repeat(record: StudyRecord) -> Repeat:
    folds = record.folds
    return Repeat(
        toml=record.config.to_toml(),
        data_key=record.data_key(),
        folds_digest=str(folds.to_dict()["digest"]),
        folds_method=folds.method,
        machine={name: str(value) for name, value in ((record.plan() or {}).get("machine") or {}).items()},
    )
