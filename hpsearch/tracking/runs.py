"""Define the content of the MLflow runs of a study: name, params, metrics, tags and description.

The study is the parent run, and these are its child runs:

- the trials;
- the refits: a refit trains the configuration of a trial again on all folds, with new seeds;
- the `final` runs: each has the test scores of a configuration that `hpsearch final` has retrained on the whole pool.

The content of a run is a pure function of the record (the study folder): the same record gives the same params,
metrics, times and tags. This module does not import MLflow.
"""

import dataclasses
import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, get_args

from hpsearch.config import StudyConfig, digest
from hpsearch.paths import StudyPaths, read_json
from hpsearch.report.final_record import FinalRecord
from hpsearch.store.fits import FitRecord
from hpsearch.store.record import StudyRecord, has_all_replicates
from hpsearch.store.trials import EvaluationRecord, Outcome, ReplicateRecord, Standing, TrialRecord, read_record
from hpsearch.tracking import run_files
from hpsearch.tracking.metrics import Point, cross_validation, milliseconds, points_of
from hpsearch.typed_json import to_json

STATUSES: dict[str | None, str] = {None: "RUNNING", "diverged": "FAILED", "failed": "FAILED", "orphaned": "KILLED"}
"""Maps the outcome of a trial to the status of its run; None means that the trial has not ended. Runs with any other
outcome are FINISHED, and the tag `outcome` tells them apart."""
IDENTIFYING_TAGS = {"hpsearch.trial": "trial", "hpsearch.second": "second", "hpsearch.final": "final"}
"""Tags that identify a child run, mapped to the first word of the run's key."""
WINNER, RANK = "winner", "rank"
"""Names of two tags of a trial's run. WINNER is `true` for the winner and missing for other trials. RANK is the place
in the ranking, zero-padded so that it can be sorted as text."""


@dataclass(frozen=True, kw_only=True)
class RunContent:
    """Content of a run, except for its files."""

    key: str
    """Unique key within the study: `study`, `trial 7`, `second 7` (the refit of trial 7) or `final trial-0007`."""
    name: str
    began_ms: int
    """Start of the run, Unix time in milliseconds. It distinguishes runs of a new study from those of a deleted study
    with the same name."""
    tags: dict[str, str]
    params: dict[str, str] = field(default_factory=dict)
    points: tuple[Point, ...] = ()
    note: str = ""
    """Description in Markdown."""
    status: str = "RUNNING"
    ended_ms: int | None = None

    @property
    def is_complete(self) -> bool:
        """Whether the run has ended, so that its content no longer grows."""
        return self.ended_ms is not None

    @property
    def digest(self) -> str:
        """Digest of all fields."""
        return digest(dataclasses.asdict(self))


@dataclass(frozen=True)
class RunSource:
    """A run that MLflow should contain, with the functions that read its content from the study folder."""

    key: str
    version: object
    """Value that changes whenever the content of an ended run changes."""
    read: Callable[[], RunContent]
    write_files: Callable[[Path], None]
    """Function that writes the run's artifacts into a folder."""
    weights: Path | None = None
    """Weights file of the model to register; None if the run has no model."""


def key_of(tags: Mapping[str, str]) -> str | None:
    """Return the key (`RunContent.key`) of a run with these tags; None if hpsearch did not create the run."""
    for tag, kind in IDENTIFYING_TAGS.items():
        if tag in tags:
            return f"{kind} {tags[tag]}"
    return "study" if "hpsearch.study" in tags else None


def run_keys(study: StudyPaths) -> set[str]:
    """Return the keys of the child runs for all trials, refits and `final` runs in the study folder."""
    numbers = study.trial_numbers()
    trials = {f"trial {number}" for number in numbers if study.trial(number).trial.is_file()}
    refits = {f"second {number}" for number in numbers if study.trial(number).second.is_file()}
    return trials | refits | {f"final {name}" for name in study.final_names()}


def run_sources(record: StudyRecord, trials: Sequence[TrialRecord], standing: Standing) -> Iterator[RunSource]:
    """Yield the sources of all runs of a study: first the study itself, then trials, refits and `final` runs."""
    read, write = partial(study_run, record, trials, standing), partial(run_files.write_study_files, record)
    yield RunSource("study", standing, read, write)
    for trial in trials:
        version = trial, standing.values.get(trial.number), trial.number in standing.confirmed
        write = partial(run_files.write_trial_files, record, trial)
        yield RunSource(f"trial {trial.number}", version, partial(trial_run, record, trial, standing), write)
    for second in record.replicate_records():
        write = partial(run_files.write_refit_files, record, second.trial)
        yield RunSource(f"second {second.trial}", second, partial(refit_run, record, second), write)
    for name in record.paths.final_names():
        read, write = partial(final_run, record, name), partial(run_files.write_final_files, record, name)
        yield RunSource(f"final {name}", name, read, write, record.paths.final(name).model)


def study_run(record: StudyRecord, trials: Sequence[TrialRecord], standing: Standing) -> RunContent:
    """Return the content of the study's own run: settings, and the best value and outcome counts after each trial."""
    is_over = record.is_searched(trials) and has_all_replicates(record)
    ends = [trial.ended_at or 0 for trial in trials] + [second.ended_at or 0 for second in record.replicate_records()]
    search = {f"search.{name}": text_of(dimension.to_toml()) for name, dimension in record.config.search.items()}
    return RunContent(
        key="study",
        name=record.name,
        began_ms=began_ms(record, trials),
        tags=_common_tags(record, "hpsearch study", None),
        params=_params(record.config) | search,
        points=tuple(_progress(record, trials, standing)),
        note=_study_note(record.config.study.metric, trials, standing),
        status="FINISHED" if is_over else "RUNNING",
        ended_ms=milliseconds(max(ends)) if is_over else None,
    )


def trial_run(record: StudyRecord, trial: TrialRecord, standing: Standing) -> RunContent:
    """Return the content of the MLflow run for a trial in its current state.

    The cross-validation means are the values that rank the trial: means over both fits if its refit counts, otherwise
    over the first fit.
    """
    points = [] if trial.ended_at is None else points_of("estimate", trial, trial.ended_at)
    if trial.outcome == "complete":
        points = _value_points(record, trial, standing)
    return _fits_run(record, trial, trial, points, _trial_note(trial, record.config.study.metric, standing))


def refit_run(record: StudyRecord, second: ReplicateRecord) -> RunContent:
    """Return the content of the MLflow run for a trial's refit in its current state."""
    trial, points = record.trial(second.trial), []
    if second.outcome == "complete":
        scores = cross_validation([record.fits(trial.number, replicate=1)], None)
        points = points_of("cross-validation", scores, second.ended_at or 0, record.config.study.metric)
    note = f"Refit of trial {trial.number}: the same folds with new seeds\n\n{_searched_params(trial)}"
    return _fits_run(record, trial, second, points, note)


def _fits_run(
    record: StudyRecord, trial: TrialRecord, attempt: EvaluationRecord, points: Sequence[Point], note: str
) -> RunContent:
    """Return the content of the MLflow run for a trial or its refit.

    `attempt` is the record of the trial or refit, and `points` contains its metrics apart from those of the fits.
    """
    number, outcome, is_refit = str(trial.number), attempt.outcome or "open", attempt is not trial
    tags: dict[str, str] = {"hpsearch.trial": number, "outcome": outcome, "source": trial.source}
    if is_refit:
        tags = {"hpsearch.second": number, "outcome": f"refit: {outcome}", "source": "confirmation"}
    fits = record.fits(trial.number, replicate=int(is_refit))
    machine = next((summary.runtime for fit in fits if (summary := fit.summary()) is not None), None)
    version, _, commit = attempt.code.partition("+")
    found = {"reason": attempt.reason[:1000], "version.hpsearch": version, "mlflow.source.git.commit": commit}
    tags |= {tag: value for tag, value in found.items() if value}
    return RunContent(
        key=key_of(tags) or "",
        name=f"trial {trial.number:04d}{', refit' if is_refit else ''}",
        began_ms=milliseconds(attempt.began_at),
        tags=_common_tags(record, "hpsearch study", machine) | tags,
        params=_params(trial.study_config),
        points=(*_fit_points("fold", fits, attempt.ended_at), *points),
        note=note,
        status=STATUSES.get(attempt.outcome, "FINISHED"),
        ended_ms=None if attempt.ended_at is None else milliseconds(attempt.ended_at),
    )


def final_run(record: StudyRecord, name: str) -> RunContent:
    """Return the content of a `final` run: the estimates of the search and the scores on the test images."""
    folder = record.paths.final(name)
    result = read_record(FinalRecord, folder.result)
    trial, ended_at = record.trial(result.trial), result.ended_at
    fits = [FitRecord(folder.seed(index)) for index in range(result.n_seeds)]
    # Digest of the test set, number of its evaluations so far, number of duplicates between it and the pool, and the
    # selected post-processing.
    facts = {"test_set": result.test_set, "test_looks": result.n_looks, "test_leaks": len(result.leaks)}
    facts["choices"] = to_json(result.chosen.choices) if result.chosen else None
    tags = {f"hpsearch.{fact}": text_of(value) for fact, value in facts.items() if value}
    tags |= _common_tags(record, "hpsearch final", result.runtime)
    params = {"final.trial": str(trial.number), "final.n_seeds": str(result.n_seeds)}
    return RunContent(
        key=f"final {name}",
        name=f"final of trial {trial.number:04d}",
        began_ms=milliseconds(result.began_at),
        tags=tags | {"hpsearch.final": name, "outcome": "final"},
        params=_params(trial.study_config) | params,
        points=(*_fit_points("seed", fits, ended_at), *points_of("final", result, ended_at, result.metric)),
        note=_final_note(result, trial),
        status="FINISHED",
        ended_ms=milliseconds(ended_at),
    )


def began_ms(record: StudyRecord, trials: Sequence[TrialRecord]) -> int:
    """Return the start time of a study's own run, as Unix time in milliseconds."""
    # In version 0.1, several machines could share a study. The run of a shared study starts when sharing began.
    shared = record.paths.root / "sharing.json"
    if shared.is_file():
        return milliseconds(read_json(shared)["began_at"])
    return milliseconds(min(trial.began_at for trial in trials))


def _fit_points(prefix: str, fits: Sequence[FitRecord], ended_at: float | None) -> Iterator[Point]:
    """Yield the metrics of all epochs of all fits and, once the run has ended, the cost of training.

    The names of the epoch metrics begin with `prefix` and the index of the fit, such as `fold0/`.
    """
    rows = [fit.epochs() for fit in fits]
    for index, each in enumerate(rows):
        for row in each:
            yield from points_of("epoch", row, row.time, prefix=f"{prefix}{index}/", step=row.epoch)
    if ended_at is not None and any(rows):
        yield from points_of("training", [row for each in rows for row in each], ended_at)


def _value_points(record: StudyRecord, trial: TrialRecord, standing: Standing) -> list[Point]:
    """Return the cross-validation metrics of a complete trial.

    If refits of the top trials (the shortlist) have changed the ranking values, a second set of points has the
    revised values.
    """
    number, metric, fits = trial.number, record.config.study.metric, record.fits(trial.number)
    first = cross_validation([fits], trial.value)
    points = points_of("cross-validation", first, trial.ended_at or 0, metric)
    ranked_at, second = _ranked_at(record, standing), record.replicate(number)
    if ranked_at is None or second is None or second.outcome != "complete":
        return points
    now = first
    if number in standing.confirmed:
        now = cross_validation([fits, record.fits(number, replicate=1)], standing.values[number])
    points += points_of("cross-validation", now, ranked_at, metric)
    return points + points_of("first fits", first, ranked_at, metric)


def _ranked_at(record: StudyRecord, standing: Standing) -> float | None:
    """Return the time at which the ranking values of refitted trials last changed; None if they never changed.

    They change when the last refit ends, and when a trial that completes later invalidates the refits.
    """
    shortlist = record.shortlist()
    if shortlist is None:
        return None
    ends = {trial.number: trial.ended_at or 0.0 for trial in record.contenders(record.trials())}
    if standing.confirmed:
        ended = [second.ended_at or 0.0 for second in record.replicate_records() if second.trial in shortlist.trials]
        # MLflow shows the latest point of a step. This time is later than those of earlier points, which belong to
        # refits that a new complete trial made invalid.
        return max([*ended, *ends.values()]) + 0.001
    return min((end for number, end in ends.items() if number not in shortlist.of), default=None)


def _progress(record: StudyRecord, trials: Sequence[TrialRecord], standing: Standing) -> Iterator[Point]:
    """Yield the metrics of the study after each ended trial. The step is the number of ended trials.

    Once refits count, the best value of the last step is the winner's mean over both fits.
    """
    metric = record.config.study.metric
    can_win = {trial.number for trial in record.contenders(trials)}
    values: list[float] = []
    n: Counter[str] = Counter({outcome: 0 for outcome in get_args(Outcome) if outcome != "orphaned"})
    ended = sorted((trial.ended_at, trial.number, trial) for trial in trials if trial.ended_at is not None)
    for step, (at, number, trial) in enumerate(ended, start=1):
        n[str(trial.outcome)] += 1
        if number in can_win and trial.value is not None:
            values.append(trial.value)
        yield from points_of("study", {"best": max(values, default=None), "n": n}, at, metric, step=step)
    if standing.confirmed:
        at = max(_ranked_at(record, standing) or 0.0, ended[-1][0] + 0.001)
        yield from points_of("study", {"best": standing.values[standing.ranking[0]]}, at, metric, step=len(ended))


def _params(config: StudyConfig) -> dict[str, str]:
    return {name: text_of(value) for name, value in config.flat().items()}


def _common_tags(record: StudyRecord, command: str, machine: Mapping[str, Any] | None) -> dict[str, str]:
    """Return the tags that all runs have: study, seed, command, machine and versions.

    `machine` defaults to the machine of the study's plan.
    """
    if machine is None:
        machine = (record.plan() or {}).get("machine", {})
    names = {"device": "device", "device_name": "processor", "precision": "precision", "threads": "threads"}
    names |= {name: f"version.{name}" for name in ("python", "torch", "numpy", "cuda", "cudnn", "torch_xla")}
    tags = {tag: str(machine[name]) for name, tag in names.items() if name in machine}
    seed = str(record.config.study.seed)
    return tags | {"hpsearch.study": record.name, "seed": seed, "mlflow.source.name": command}


NOTE, OUR_NOTE = "mlflow.note.content", "hpsearch.note"
"""Tag with the description of a run, and tag with the digest of the last description that hpsearch wrote."""


def new_note_tags(tags: Mapping[str, str], note: str) -> dict[str, str]:
    """Return the tags to set the description of a run to `note`.

    Return no tags if the description is already `note`, or if a user has changed it.
    """
    is_free = NOTE not in tags or tags.get(OUR_NOTE) == digest(tags[NOTE])
    return {NOTE: note, OUR_NOTE: digest(note)} if note and is_free and tags.get(NOTE) != note else {}


def _study_note(metric: str, trials: Sequence[TrialRecord], standing: Standing) -> str:
    """Return the description of a study's own run: its winner; empty if there is no winner."""
    winner = next((trial for trial in trials if trial.number == standing.winner), None)
    return f"Best: **trial {winner.number}**. {_trial_note(winner, metric, standing)}" if winner else ""


def _trial_note(trial: TrialRecord, metric: str, standing: Standing) -> str:
    """Return the description of a trial's run: value (or outcome and reason) and params."""
    if trial.outcome == "complete":
        is_refitted = trial.number in standing.confirmed
        fits = f", mean of the first fit ({trial.value:.4f}) and the refit" if is_refitted else ""
        result = f"Out-of-fold {metric} **{standing.values.get(trial.number, trial.value):.4f}**{fits}"
    else:
        estimate = "" if trial.value is None else f" (estimated {metric} {trial.value:.4f})"
        result = f"**{trial.outcome}**{estimate}: {trial.reason}"
    return f"{result}\n\n{_searched_params(trial)}"


def _final_note(result: FinalRecord, trial: TrialRecord) -> str:
    """Return the description of a `final` run: test score, out-of-fold score of its trial, and params."""
    metric = result.metric
    test = result.test[metric]
    interval = f"{metric.capitalize()} **{test.mean:.4f}** (95 % interval {test.low:.4f} to {test.high:.4f})"
    estimate = f"the out-of-fold {metric} was {result.cv.mean:.4f}"
    return f"{interval} on {result.n_test} test images; {estimate}\n\n{_searched_params(trial)}"


def _searched_params(trial: TrialRecord) -> str:
    """Return the suggested params of a trial as one line of Markdown."""
    shown = (f"{value:.4g}" if isinstance(value, float) else text_of(value) for value in trial.params.values())
    listed = ", ".join(f"{name} `{value}`" for name, value in zip(trial.params, shown, strict=True))
    return listed or "the default configuration"


def text_of(value: Any) -> str:
    """Format a value as text. Lists and dicts are formatted as JSON."""
    return json.dumps(value, ensure_ascii=False) if isinstance(value, list | dict) else str(value)
