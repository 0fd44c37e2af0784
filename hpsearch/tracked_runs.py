"""What each MLflow run of a study shall hold, read from the record. Knows no MLflow.

One run is the study, its children are the trials and the finals. Everything is a function of the record alone: the
same record gives the same params, metrics, times and files, whenever and wherever it is read.
"""

from __future__ import annotations

import csv
import dataclasses
import json
import logging
import re
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt

from hpsearch import paths
from hpsearch.config import StudyConfig, digest
from hpsearch.errors import CacheError
from hpsearch.paths import StudyPaths
from hpsearch.report import trial_rows
from hpsearch.report.trial_rows import CURVES, Case, CurvePoint
from hpsearch.search import replicates as confirmation
from hpsearch.store.record import FitRecord, Outcome, SecondRecord, Standing, StudyRecord, TrialRecord
from hpsearch.training.metrics import SCORES, PixelCounts

logger = logging.getLogger(__name__)

Status = Literal["RUNNING", "FINISHED", "FAILED", "KILLED"]
WINNER, RANK = "winner", "rank"
"""Tags of trials: `true` on the winner alone; the place in the study's ranking, with zeros in front to sort by."""
NOTE, OUR_NOTE = "mlflow.note.content", "hpsearch.note"
"""Tag with a run's description, and that with the digest of the description that hpsearch wrote last."""
STATUSES: dict[Outcome | None, Status] = {
    None: "RUNNING",
    "full": "FINISHED",
    "dropped": "FINISHED",
    "infeasible": "FINISHED",
    "diverged": "FAILED",
    "failed": "FAILED",
    "lost": "KILLED",
}
"""What ended as it should is finished, a dropped trial too: the tag `outcome` says how. Killed was cut off."""


@dataclass(frozen=True)
class Point:
    """One value of a metric."""

    key: str
    value: float
    step: int
    time_ms: int
    """Unix time in milliseconds: that of the record, so that sending it twice is sending it once."""
    is_revision: bool = False
    """Whether it takes the place of an earlier point of its key and step: of those MLflow shows the latest."""


@dataclass(frozen=True, kw_only=True)
class RunContent:
    """Everything that one run shall hold, but for its files."""

    key: str
    """`study`, `trial 7`, `second 7` or `final trial-0007`: unique in the study."""
    name: str
    began_ms: int
    """With the key it identifies the run: a study begun anew under an old name has other times."""
    tags: dict[str, str]
    params: dict[str, str] = field(default_factory=dict)
    points: tuple[Point, ...] = ()
    note: str = ""
    """What a person reads first, in Markdown, once the run is complete."""
    status: Status = "RUNNING"
    ended_ms: int | None = None

    @property
    def is_complete(self) -> bool:
        """Whether nothing will be added."""
        return self.ended_ms is not None

    @property
    def digest(self) -> str:
        """Of all of it."""
        return digest(dataclasses.asdict(self))


def run_keys(study: StudyPaths) -> list[str]:
    """Keys of the trials, second fits and finals on record."""
    trials = [trial_key(number) for number in study.trial_numbers() if study.trial(number).trial.is_file()]
    seconds = [second_key(number) for number in study.trial_numbers() if study.trial(number).second.is_file()]
    return [*trials, *seconds, *(final_key(name) for name in final_names(study))]


def trial_key(number: int) -> str:
    return f"trial {number}"


def second_key(number: int) -> str:
    return f"second {number}"


def final_key(name: str) -> str:
    return f"final {name}"


def key_of(tags: Mapping[str, str]) -> str | None:
    """The key of a run with these tags; None if it is none of ours."""
    if "hpsearch.trial" in tags:
        return f"trial {tags['hpsearch.trial']}"
    if "hpsearch.second" in tags:
        return f"second {tags['hpsearch.second']}"
    if "hpsearch.final" in tags:
        return f"final {tags['hpsearch.final']}"
    return "study" if "hpsearch.study" in tags else None


def is_metric(key: str) -> bool:
    """Whether a metric of that key is ours; people may add their own."""
    return re.fullmatch(r"(fold\d+|seed\d+|cv|cost|test|study)/.*", key) is not None


def notes(tags: Mapping[str, str]) -> dict[str, str]:
    """Of the tags of a run those that people have put there."""
    ours = {"outcome", "reason", "source", "seed", "device", "processor", "precision", "threads", "micro_batch"}
    ours |= {WINNER, RANK}
    return {
        key: value
        for key, value in tags.items()
        if (key == NOTE and tags.get(OUR_NOTE) != digest(value))
        or (key not in ours and not key.startswith(("mlflow.", "hpsearch.", "version.")))
    }


def ranking_tags(standing: Standing) -> dict[int, dict[str, str]]:
    """Return the tags WINNER and RANK of every trial that can win."""
    result = {number: {RANK: f"{place:04d}"} for place, number in enumerate(standing.ranking, start=1)}
    if standing.winner is not None:
        result[standing.winner][WINNER] = "true"
    return result


def study_run(record: StudyRecord, trials: Sequence[TrialRecord]) -> RunContent:
    """The parent: the study's own settings, and after each trial the best value and how many ended how."""
    config, standing = record.config, record.standing(trials)
    ended = sorted(
        (trial for trial in trials if trial.ended_at is not None), key=lambda t: (t.ended_at or 0, t.number)
    )
    is_over = record.is_searched(trials) and confirmation.is_over(record)
    ends = [trial.ended_at or 0 for trial in ended] + [second.ended_at or 0 for second in record.second_records()]
    search = {f"search.{name}": _text(dimension.to_toml()) for name, dimension in config.search}
    return RunContent(
        key="study",
        name=record.name,
        began_ms=_ms(min(trial.began_at for trial in trials)),
        tags={
            "hpsearch.study": record.name,
            "mlflow.source.name": "hpsearch study",
            "seed": str(config.study.seed),
            **_machine_tags((record.plan() or {}).get("machine", {})),
        },
        params=_params(config) | search,
        points=tuple(_progress(record, ended, standing)),
        note=_study_note(record, trials, standing),
        status="FINISHED" if is_over else "RUNNING",
        ended_ms=_ms(max(ends)) if is_over else None,
    )


def trial_run_began_ms(trial: TrialRecord) -> int:
    """The time by which, with its key, a trial's run is found again."""
    return _ms(trial.began_at)


def trial_run(record: StudyRecord, trial: TrialRecord, standing: Standing) -> RunContent:
    """A trial, as far as it has come. Its means are those that rank it: over both fits once it is confirmed."""
    number, metric = trial.number, record.config.study.metric
    folds = [record.fit(number, fold) for fold in range(record.n_folds)]
    rows = [fit.epochs() for fit in folds]
    points = [point for fold, each in enumerate(rows) for point in _curve_points(f"fold{fold}/", each)]
    if trial.ended_at is not None:
        at = _ms(trial.ended_at)
        points += _summary(_cost([row for each in rows for row in each]), at)
        if trial.outcome == "full":
            first = _cross_validation([folds], metric, trial.value)
            points += _summary(first, at)
            if (ranked_at := _ranked_at(record, standing)) is not None and record.mean_of_fits(number) is not None:
                second = [record.second_fit(number, fold) for fold in range(record.n_folds)]
                both = _cross_validation([folds, second], metric, standing.values.get(number))
                now = both if number in standing.confirmed else first
                points += [Point(key, value, 0, _ms(ranked_at), is_revision=True) for key, value in now.items()]
                means = {key: value for key, value in first.items() if key.endswith("_mean")}
                points += _summary({f"{key[:-5]}_first": value for key, value in means.items()}, _ms(ranked_at))
        elif trial.value is not None:
            points += _summary({"cv/estimate": trial.value}, at)
    machine = next((summary["runtime"] for fit in folds if (summary := fit.summary()) is not None), None)
    tags = {
        "hpsearch.study": record.name,
        "hpsearch.trial": str(number),
        "mlflow.source.name": "hpsearch study",
        "outcome": trial.outcome or "open",
        "source": trial.source,
        "seed": str(record.config.study.seed),
        **_machine_tags(machine or (record.plan() or {}).get("machine", {})),
        **_reason_and_code(trial.reason, trial.code),
    }
    if trial.micro_batch is not None:
        tags["micro_batch"] = str(trial.micro_batch)
    return RunContent(
        key=trial_key(number),
        name=f"trial {number:04d}",
        began_ms=trial_run_began_ms(trial),
        tags=tags,
        params=_params(trial.study_config),
        points=tuple(points),
        note=_trial_note(trial, points, metric, standing),
        status=STATUSES[trial.outcome],
        ended_ms=None if trial.ended_at is None else _ms(trial.ended_at),
    )


def second_run(record: StudyRecord, second: SecondRecord) -> RunContent:
    """The second fits of a trial, as far as they have come."""
    trial, metric = record.trial(second.trial), record.config.study.metric
    folds = [record.second_fit(trial.number, fold) for fold in range(record.n_folds)]
    rows = [fit.epochs() for fit in folds]
    points = [point for fold, each in enumerate(rows) for point in _curve_points(f"fold{fold}/", each)]
    if second.ended_at is not None:
        at = _ms(second.ended_at)
        points += _summary(_cost([row for each in rows for row in each]), at)
        if second.outcome == "full":
            points += _summary(_cross_validation([folds], metric, None), at)
    machine = next((summary["runtime"] for fit in folds if (summary := fit.summary()) is not None), None)
    return RunContent(
        key=second_key(trial.number),
        name=f"trial {trial.number:04d}, second fits",
        began_ms=_ms(second.began_at),
        tags={
            "hpsearch.study": record.name,
            "hpsearch.second": str(trial.number),
            "mlflow.source.name": "hpsearch study",
            "outcome": f"second fits: {second.outcome or 'open'}",
            "source": "confirmation",
            "seed": str(record.config.study.seed),
            **_machine_tags(machine or (record.plan() or {}).get("machine", {})),
            **_reason_and_code(second.reason, second.code),
        },
        params=_params(trial.study_config),
        points=tuple(points),
        note=f"Trial {trial.number} fitted once more, on the same folds with other seeds\n\n{_searched(trial)}",
        status=STATUSES[second.outcome],
        ended_ms=None if second.ended_at is None else _ms(second.ended_at),
    )


def final_names(study: StudyPaths) -> list[str]:
    """Names of the finals that were scored on the test split, sorted."""
    if not study.finals.is_dir():
        return []
    return sorted(path.name for path in study.finals.iterdir() if study.final(path.name).result.is_file())


def final_run(record: StudyRecord, name: str) -> RunContent:
    """A retrained configuration: what cross-validation promised beside what the test split gave."""
    folder = record.paths.final(name)
    result = paths.read_json(folder.result)
    at, metric = _ms(result["ended_at"]), result["metric"]
    rows = [FitRecord(folder.seed(index)).epochs() for index in range(result["n_seeds"])]
    points = [point for index, each in enumerate(rows) for point in _curve_points(f"seed{index}/", each)]
    values = {f"cv/{metric}_mean": result["cv"]["mean"], f"cv/{metric}_std": result["cv_fold_std"]}
    for score, interval in result["test"].items():
        values |= {f"test/{score}": interval["mean"]}
        if score == metric:
            values |= {f"test/{score}_low": interval["low"], f"test/{score}_high": interval["high"]}
    for score, interval in result.get("official", {}).items():
        values |= {f"test/official/{score}": interval["mean"]}
    for claim in ("corrected", "predicted"):
        if claimed := result.get(claim):
            values |= {f"cv/{metric}_{claim}{end}": claimed[key] for key, end in _ENDS.items()}
    if chosen := result.get("chosen_test"):
        values |= {f"test/chosen/{metric}": chosen[metric]["mean"]}
    if ensemble := result.get("ensemble"):
        values |= {f"test/ensemble/{metric}": ensemble["test"][metric]["mean"]}
    trial = record.trial(result["trial"])
    config = trial.study_config
    return RunContent(
        key=final_key(name),
        name=f"final of trial {trial.number:04d}",
        began_ms=_ms(result["began_at"]),
        tags={
            "hpsearch.study": record.name,
            "hpsearch.final": name,
            "mlflow.source.name": "hpsearch final",
            "outcome": "final",
            **_account_tags(result),
            "seed": str(config.study.seed),
            **_machine_tags(result["runtime"]),
        },
        params=_params(config) | {"final.trial": str(trial.number), "final.n_seeds": str(result["n_seeds"])},
        points=(*points, *_summary(_cost([row for each in rows for row in each]), at), *_summary(values, at)),
        note=_final_note(result, trial),
        status="FINISHED",
        ended_ms=at,
    )


def write_study_files(record: StudyRecord, folder: Path) -> None:
    """Settings, plan and folds, as the study folder has them, and the report if there is one."""
    for path in (record.paths.toml, record.paths.plan, record.paths.folds):
        if path.is_file():
            (folder / path.name).write_bytes(path.read_bytes())
    write_report_files(record, folder)


def write_report_files(record: StudyRecord, folder: Path) -> None:
    """The report and its figures, as the study folder has them; nothing where there is none."""
    if record.paths.report.is_file():
        shutil.copyfile(record.paths.report, folder / record.paths.report.name)
        shutil.copytree(record.paths.figures, folder / record.paths.figures.name)


def write_trial_files(record: StudyRecord, trial: TrialRecord, folder: Path) -> None:
    """trial.toml, folds.json and, where there is something to show, decisions.json, scores.csv and two figures.

    trial.toml is the whole configuration, which `hpsearch train --config` runs again.
    """
    (folder / "trial.toml").write_text(trial.study_config.to_toml(), encoding="utf-8")
    (folder / "folds.json").write_bytes(record.paths.folds.read_bytes())
    if trial.decisions or trial.failures:
        said = {"decisions": trial.decisions, "failures": trial.failures}
        (folder / "decisions.json").write_text(json.dumps(said, indent=1), encoding="utf-8")
    if rows := list(_score_rows(record, trial.number)):
        with (folder / "scores.csv").open("w", encoding="utf-8", newline="") as file:
            csv.writer(file).writerows([["image", "fold", *SCORES], *rows])
    name, metric = f"trial {trial.number:04d} of {record.name}", record.config.study.metric
    result = f"{metric} {trial.value:.4f} out of fold" if trial.outcome == "full" else trial.outcome or "open"
    _write_curves(trial_rows.trial_curves(record, trial.number), f"{name}: {result}", folder)
    _write_panels(partial(trial_rows.trial_cases, record, trial.number), metric, f"{name}: held-out images", folder)


def write_second_files(record: StudyRecord, number: int, folder: Path) -> None:
    """trial.toml, second.json and a figure."""
    trial = record.trial(number)
    (folder / "trial.toml").write_text(trial.study_config.to_toml(), encoding="utf-8")
    (folder / "second.json").write_bytes(record.paths.trial(number).second.read_bytes())
    title = f"trial {number:04d} of {record.name}, second fits"
    _write_curves(trial_rows.second_curves(record, number), title, folder)


def write_final_files(record: StudyRecord, name: str, folder: Path) -> None:
    """The configuration, the result and the score of every test image, as the study folder has them; two figures."""
    final = record.paths.final(name)
    for path in (final.config, final.result, final.table, final.card):
        if path.is_file():
            (folder / path.name).write_bytes(path.read_bytes())
    result = paths.read_json(final.result)
    title, metric = f"final of trial {result['trial']:04d} of {record.name}", result["metric"]
    curves = trial_rows.final_curves(final, result["n_seeds"])
    _write_curves(curves, f"{title}: {metric} {result['test'][metric]['mean']:.4f} on the test images", folder)
    cases = partial(trial_rows.final_cases, record, final, result["test_key"])
    _write_panels(cases, metric, f"{title}: test images", folder)


def import_figures() -> None:
    """Load what draws while folds run, so that the end of the study does not wait for it."""
    from hpsearch.report import figures  # noqa: F401


def _write_curves(points: Sequence[CurvePoint], title: str, folder: Path) -> None:
    if points:
        # Half a second to import: not for `--help`, and not before there is something to draw.
        from hpsearch.report import figures

        (folder / "curves.png").write_bytes(figures.to_png(figures.draw_curves(points, title=title)))


def _write_panels(read_cases: Callable[[], list[Case]], metric: str, title: str, folder: Path) -> None:
    try:
        cases = read_cases()
    except CacheError as error:
        # The decoded images can be made again, and may have been removed to save space.
        logger.info("%s: no panels: %s", title, error)
        return
    if cases:
        from hpsearch.report import figures

        (folder / "panels.png").write_bytes(figures.to_png(figures.draw_panels(cases, metric=metric, title=title)))


def _score_rows(record: StudyRecord, number: int) -> Iterator[list[Any]]:
    """Every image of the finished folds, with its scores out of fold, in the order of the folds."""
    ids = record.folds.ids
    for fold in record.finished_folds(number):
        held_out = record.folds.held_out(fold)
        columns = _scores(record.fit(number, fold).counts())
        for row, index in enumerate(held_out.tolist()):
            yield [ids[index], fold, *(f"{values[row]:.6f}" for values in columns.values())]


def _scores(counts: npt.NDArray[np.int64]) -> dict[str, npt.NDArray[np.float64]]:
    """Every score of every image, each (n,)."""
    columns = PixelCounts.from_columns(counts)
    return {name: np.asarray(score(columns), np.float64) for name, score in SCORES.items()}


def _cross_validation(fits: Sequence[Sequence[FitRecord]], metric: str, value: float | None) -> dict[str, float]:
    """Means over all held-out images and over the fits of each fold; of Dice and Jaccard the spread of the folds too.

    `fits` holds the folds of the first fits, and those of the second where they count.
    """
    by_fold = [
        {name: np.mean([scores[name] for scores in each], axis=0) for name in SCORES}
        for each in zip(*([_scores(fit.counts()) for fit in folds] for folds in fits), strict=True)
    ]
    result = {}
    for name in SCORES:
        result[f"cv/{name}_mean"] = float(np.mean(np.concatenate([scores[name] for scores in by_fold])))
        if name in ("dice", "jaccard") and len(by_fold) > 1:
            result[f"cv/{name}_std"] = float(np.std([np.mean(scores[name]) for scores in by_fold], ddof=1))
    # The value is a mean of float32 scores: the run shows the number that the search went by.
    return result if value is None else result | {f"cv/{metric}_mean": value}


def _ranked_at(record: StudyRecord, standing: Standing) -> float | None:
    """Return when the values that rank refitted trials last changed; None before they ever did.

    That is when the last replicate ended, or when the first full trial came after them and opened the choice again.
    """
    shortlist = record.shortlist()
    if shortlist is None:
        return None
    ends = {trial.number: trial.ended_at or 0.0 for trial in record.full_trials()}
    if standing.confirmed:
        seconds = [record.second(number) for number in shortlist.trials]
        ended = [second.ended_at or 0.0 for second in seconds if second is not None]
        # Later than what opened the choice before: MLflow takes the latest of equal steps.
        return max([*ended, *ends.values()]) + 0.001
    return min((end for number, end in ends.items() if number not in shortlist.of), default=None)


def _cost(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    if not rows:
        return {}
    train_s = sum(row["train_s"] for row in rows)
    return {
        "cost/seconds": train_s + sum(row["eval_s"] for row in rows),
        "cost/images_per_s": sum(row["images_per_s"] * row["train_s"] for row in rows) / train_s,
        "cost/peak_memory_mib": max(row["peak_bytes"] for row in rows) / 2**20,
    }


def _curve_points(prefix: str, rows: Iterable[Mapping[str, Any]]) -> Iterator[Point]:
    for row in rows:
        for score in CURVES:
            yield Point(f"{prefix}train_{score}", row["train"][score], row["epoch"], _ms(row["time"]))
            if row["held_out"] is not None:
                yield Point(f"{prefix}{score}", row["held_out"][score], row["epoch"], _ms(row["time"]))


def _progress(record: StudyRecord, ended: Sequence[TrialRecord], standing: Standing) -> Iterator[Point]:
    """After each trial that ended: the best value so far, and how many ended how. The step counts ended trials.

    The end of the replicates has the step of the last trial before it.
    """
    key = f"study/best_{record.config.study.metric}"
    confirmed_at = _ranked_at(record, standing) if standing.confirmed else None
    contenders = {trial.number for trial in record.contenders(ended)}
    values: dict[int, float] = {}
    counts: Counter[str] = Counter()
    for step, trial in enumerate(ended, start=1):
        counts[str(trial.outcome)] += 1
        at = trial.ended_at or 0
        if trial.number in contenders and trial.value is not None:
            values[trial.number] = trial.value
        is_confirmed = confirmed_at is not None and at >= confirmed_at
        best = standing.best_value if is_confirmed else max(values.values(), default=None)
        if best is not None:
            yield Point(key, best, step, _ms(at))
        for outcome in (each for each in get_args(Outcome) if each != "lost" or counts[each]):
            yield Point(f"study/n_{outcome}", float(counts[outcome]), step, _ms(at))
    if confirmed_at is not None and standing.best_value is not None:
        n_before = sum((trial.ended_at or 0) < confirmed_at for trial in ended)
        yield Point(key, standing.best_value, n_before, _ms(confirmed_at), is_revision=True)


def _study_note(record: StudyRecord, trials: Sequence[TrialRecord], standing: Standing) -> str:
    """The winner, its value and its settings."""
    winner = next((trial for trial in trials if trial.number == standing.winner), None)
    if winner is None or standing.best_value is None:
        return ""
    fits = ", mean of two fits" if winner.number in standing.confirmed else ""
    value = f"{record.config.study.metric.capitalize()} **{standing.best_value:.4f}** out of fold{fits}"
    return f"Best: **trial {winner.number}**, {value}\n\n{_searched(winner)}"


def _trial_note(trial: TrialRecord, points: Sequence[Point], metric: str, standing: Standing) -> str:
    if trial.outcome != "full" or trial.value is None:
        return f"**{trial.outcome}**{_told(trial.value, metric)}: {trial.reason}\n\n{_searched(trial)}"
    spreads = [point.value for point in points if point.key == f"cv/{metric}_std"]
    spread = f", {spreads[-1]:.4f} between folds" if spreads else ""
    value = standing.values.get(trial.number, trial.value)
    fits = f", mean of two fits (the first: {trial.value:.4f})" if trial.number in standing.confirmed else ""
    return f"{metric.capitalize()} **{value:.4f}** out of fold{fits}{spread}\n\n{_searched(trial)}"


def _told(value: float | None, metric: str) -> str:
    return "" if value is None else f", {metric} probably {value:.4f}"


def _final_note(result: Mapping[str, Any], trial: TrialRecord) -> str:
    metric = result["metric"]
    test, cv = result["test"][metric], result["cv"]
    found = f"{metric.capitalize()} **{test['mean']:.4f}** ({test['low']:.4f} to {test['high']:.4f})"
    promised = f"on {result['n_test']} test images; out of fold it was {cv['mean']:.4f}"
    return f"{found} {promised}\n\n{_searched(trial)}"


def _searched(trial: TrialRecord) -> str:
    """The params that were suggested, short."""
    shown = (f"{value:.4g}" if isinstance(value, float) else _text(value) for value in trial.params.values())
    listed = ", ".join(f"{name} `{value}`" for name, value in zip(trial.params, shown, strict=True))
    return listed or "the default configuration"


def _summary(values: Mapping[str, float], at_ms: int) -> list[Point]:
    return [Point(key, value, 0, at_ms) for key, value in values.items()]


def _params(config: StudyConfig) -> dict[str, str]:
    return {name: _text(value) for name, value in config.flat().items()}


def _machine_tags(machine: Mapping[str, Any]) -> dict[str, str]:
    names = {"device": "device", "device_name": "processor", "precision": "precision", "threads": "threads"}
    versions = ("python", "torch", "numpy", "cuda", "cudnn", "torch_xla")
    tags = {tag: str(machine[name]) for name, tag in names.items() if name in machine}
    return tags | {f"version.{name}": str(machine[name]) for name in versions if name in machine}


_ENDS = {"mean": "", "low": "_low", "high": "_high"}


def _account_tags(result: Mapping[str, Any]) -> dict[str, str]:
    """Which test set was scored, the how manieth look at it that was, and what was chosen out of fold."""
    if "test_set" not in result:
        return {}
    tags = {"hpsearch.test_set": result["test_set"], "hpsearch.test_looks": str(result["n_looks"])}
    if result["leaks"]:
        tags["hpsearch.test_leaks"] = str(len(result["leaks"]))
    return tags | ({"hpsearch.choices": _text(result["chosen"]["choices"])} if result["chosen"] else {})


def _reason_and_code(reason: str, code: str) -> dict[str, str]:
    tags = {"reason": reason[:1000]} if reason else {}
    if code:
        tags["version.hpsearch"], _, commit = code.partition("+")
        tags |= {"mlflow.source.git.commit": commit} if commit else {}
    return tags


def _text(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False) if isinstance(value, list | dict) else str(value)


def _ms(seconds: float) -> int:
    return round(seconds * 1000)
