"""The study folder: what was decided and what came out, read and written.

The folder is the record; Optuna's database and MLflow are brought up to date from it. Every reader works on files
alone, so a tracking thread, a report and another process all see the same study.
"""

from __future__ import annotations

import dataclasses
import hashlib
import io
import logging
import os
import subprocess
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, Literal, cast, get_args

import numpy as np
import numpy.typing as npt

import hpsearch
from hpsearch import config as configs
from hpsearch import paths
from hpsearch.config import StudyConfig, get_setting
from hpsearch.data.folds import Folds
from hpsearch.errors import ConfigError, RecordError, StudyChangedError, StudyError
from hpsearch.paths import FitPaths, ProjectPaths, StudyPaths
from hpsearch.stats.best import rank
from hpsearch.store import lock
from hpsearch.training.rows import read_lines

logger = logging.getLogger(__name__)

FORMAT = 1
"""Version of the study folder; a folder of another version is refused, never guessed at."""

Outcome = Literal["full", "dropped", "infeasible", "diverged", "failed", "lost"]
"""`lost` only in studies of version 0.1: another coordinator continued the trial under a new number."""
COUNTED: frozenset[Outcome] = frozenset({"full", "dropped", "diverged", "failed"})
"""Outcomes that use up one of `study.trials`."""


@dataclass(frozen=True, kw_only=True)
class TrialRecord:
    """One trial: what was suggested and what became of it."""

    number: int
    params: dict[str, Any]
    config: dict[str, Any]
    """The whole configuration, as `StudyConfig.to_dict` gives it."""
    began_at: float
    """Unix time in seconds, as all times here."""
    source: Literal["default", "sampler", "enqueued"] = "sampler"
    outcome: Outcome | None = None
    value: float | None = None
    """What Optuna is told: the mean over all folds if full, the paired estimate if dropped."""
    reason: str = ""
    ended_at: float | None = None
    constraint: float = 0.0
    """Above 0 where the configuration cannot be: told to the sampler."""
    decisions: tuple[dict[str, Any], ...] = ()
    """Every verdict of the pruner, in order."""
    failures: dict[str, list[str]] = field(default_factory=dict)
    """Fold to what its worker died of, one line per death."""
    micro_batch: int | None = None
    """Images at once where memory forced parts of batches and that changed the result: such a trial never wins."""
    code: str = ""
    """What began it, as `code_version` gives it."""
    draw: int | None = None
    """Place among the suggestions, set by version 0.1 on a trial that continues a lost one."""

    @property
    def place(self) -> int:
        """Place among the suggestions, which seeds the fits."""
        return self.number if self.draw is None else self.draw

    @property
    def can_win(self) -> bool:
        return self.outcome == "full" and self.micro_batch is None

    @property
    def study_config(self) -> StudyConfig:
        return configs.from_dict(self.config)

    def to_dict(self) -> dict[str, Any]:
        table = dataclasses.asdict(self)
        if self.draw is None:
            del table["draw"]
        return {"format": FORMAT, **table}


@dataclass(frozen=True, kw_only=True)
class SecondRecord:
    """The second fits of one full trial: the same folds with other seeds."""

    trial: int
    began_at: float
    outcome: Literal["full", "diverged", "infeasible", "failed"] | None = None
    """Anything but `full`: the configuration did not stand up to other seeds."""
    reason: str = ""
    ended_at: float | None = None
    failures: dict[str, list[str]] = field(default_factory=dict)
    """As in `TrialRecord`."""
    code: str = ""

    def to_dict(self) -> dict[str, Any]:
        return {"format": FORMAT, **dataclasses.asdict(self)}


@dataclass(frozen=True)
class Shortlist:
    """The configurations that are fitted once more."""

    trials: tuple[int, ...]
    """Picked most often first."""
    of: tuple[int, ...]
    """The full trials that it was chosen from: with others it says nothing any more."""
    count: int
    """`study.confirm` when it was made."""


@dataclass(frozen=True)
class Standing:
    """How the trials of a study stand at one moment. Every view shows this ranking and no other."""

    ranking: tuple[int, ...]
    """Numbers of the contenders, best first."""
    values: dict[int, float]
    """Contender to the value that ranks it: the mean over both its fits if it is confirmed, else over its first."""
    confirmed: tuple[int, ...]
    """The contenders whose second fits count, by number: while there are any, one of them wins."""

    @property
    def winner(self) -> int | None:
        return self.ranking[0] if self.ranking else None

    @property
    def best_value(self) -> float | None:
        """The value that ranks the winner."""
        return self.values[self.ranking[0]] if self.ranking else None


@dataclass(frozen=True)
class FitRecord:
    """One fit as its folder tells it; nothing is read before it is asked for."""

    paths: FitPaths

    def epochs(self) -> list[dict[str, Any]]:
        """Rows of epochs.jsonl in order; a line torn by a crash is left out.

        RecordError if an epoch of a finished fit is missing. What is damaged in an unfinished one, its worker mends.
        """
        rows = read_lines(self.paths.epochs.read_bytes())[0] if self.paths.epochs.is_file() else []
        summary = self.summary()
        if summary is not None and len(rows) != summary["epochs"]:
            raise RecordError(
                f"{self.paths.epochs} is damaged: {len(rows)} of {summary['epochs']} epochs can be read"
            )
        return rows

    def summary(self) -> dict[str, Any] | None:
        """fit.json, which appears when the fit is finished; None before."""
        if not self.paths.fit.is_file():
            return None
        return cast("dict[str, Any]", paths.read_json(self.paths.fit))

    @property
    def is_finished(self) -> bool:
        return self.paths.fit.is_file()

    def scores(self) -> npt.NDArray[np.float32]:
        """Per-image score after every epoch so far, (epochs, held-out images); (0, 0) before the first."""
        if not self.paths.scores.is_file():
            return np.zeros((0, 0), np.float32)
        return cast("npt.NDArray[np.float32]", load_array(self.paths.scores, ndim=2))

    def verify(self) -> None:
        """Read everything that is kept of a fit that nobody works on; RecordError names what is damaged."""
        self.scores()
        if self.is_finished:
            self.epochs()
            self.counts()
        elif self.paths.epochs.is_file() and (n_bad := read_lines(self.paths.epochs.read_bytes())[1]):
            raise RecordError(f"{self.paths.epochs} is damaged: {n_bad} lines cannot be read")

    def counts(self) -> npt.NDArray[np.int64]:
        """tp, fp, fn, tn of every held-out image after the last epoch, (held-out images, 4)."""
        return cast("npt.NDArray[np.int64]", load_array(self.paths.counts, ndim=2))


class StudyRecord:
    """Reads and writes one study folder. Not thread-safe for writing; only the coordinator writes."""

    def __init__(self, study: StudyPaths, config: StudyConfig, folds: Folds | None = None) -> None:
        self.paths = study
        self.config = config
        self._folds = folds

    @classmethod
    def open(cls, study: StudyPaths) -> StudyRecord:
        """The study in an existing folder. StudyError if there is none, RecordError if it is damaged."""
        if not study.toml.is_file():
            known = ", ".join(study.project.study_names()) or "none"
            raise StudyError(
                f"there is no study {study.name!r} in {study.project.root.absolute()}; studies there: {known}"
            )
        try:
            # Studies of version 0.1 may hold relative paths: they are found from the folder where they were begun.
            return cls(study, configs.load(study.toml).absolute())
        except ConfigError as error:
            raise RecordError(f"the study's own settings are damaged: {error}") from error

    @classmethod
    def create(cls, study: StudyPaths, config: StudyConfig) -> StudyRecord:
        """Begin a study: its settings are written before anything else."""
        paths.write_text(study.toml, config.to_sealed_toml())
        return cls(study, config)

    @property
    def name(self) -> str:
        return self.paths.name

    @property
    def n_folds(self) -> int:
        return 1 if self.config.study.folds == "fixed" else self.config.study.folds

    @property
    def folds(self) -> Folds:
        """The fold of every image; RecordError while they have not been made."""
        if self._folds is None:
            table = paths.read_json(self.paths.folds)
            try:
                self._folds = Folds.from_dict(table["folds"])
            except (KeyError, TypeError, ValueError) as error:
                raise RecordError(f"{self.paths.folds} is damaged: {error}") from error
        return self._folds

    @property
    def has_folds(self) -> bool:
        return self.paths.folds.is_file()

    def data_key(self) -> str:
        """Key of the cache that the folds were made from."""
        return str(paths.read_json(self.paths.folds).get("data_key", ""))

    def write_folds(self, folds: Folds, data_key: str) -> None:
        """Store the folds once; every trial uses them."""
        paths.write_json(self.paths.folds, {"format": FORMAT, "data_key": data_key, "folds": folds.to_dict()})
        self._folds = folds

    def check_config(self, config: StudyConfig) -> None:
        """Raise StudyChangedError, listing every setting that differs and may not (`CHANGEABLE` may)."""
        if differences := fixed_differences(self.config, config):
            lines = "; ".join(f"{key}: {ours!r} in the study, {theirs!r} now" for key, ours, theirs in differences)
            raise StudyChangedError(
                f"study {self.name!r} was begun with other settings ({lines}); "
                "give it the old ones, or begin another with --study NAME"
            )

    def update_config(self, config: StudyConfig) -> None:
        """Take over the settings that may change under a study; refuse the others as `check_config` does."""
        self.check_config(config)
        if config.to_sealed_toml() != self.paths.toml.read_text(encoding="utf-8"):
            paths.write_text(self.paths.toml, config.to_sealed_toml())
            self.config = config

    def plan(self) -> dict[str, Any] | None:
        """The execution plan, None before it was made."""
        if not self.paths.plan.is_file():
            return None
        return cast("dict[str, Any]", paths.read_json(self.paths.plan))

    def write_plan(self, plan: Mapping[str, Any]) -> None:
        paths.write_json(self.paths.plan, {"format": FORMAT, **plan})

    def trial_numbers(self) -> list[int]:
        """Numbers of the trials whose suggestion is on record, ascending."""
        return [number for number in self.paths.trial_numbers() if self.paths.trial(number).trial.is_file()]

    def trial(self, number: int) -> TrialRecord:
        """Read a trial. Raises RecordError, which names the file, if it is missing or damaged.

        A trial with a `taken.json` of version 0.1 is `lost`, whatever its own file says.
        """
        path = self.paths.trial(number).trial
        table = paths.read_json(path)
        try:
            if table.pop("format") != FORMAT:
                raise RecordError(f"{path} is of another version of hpsearch")
            table["decisions"] = tuple(table.get("decisions", ()))
            for name in ("history", "owner"):
                # Of version 0.1.
                table.pop(name, None)
            record = TrialRecord(**table)
        except (KeyError, TypeError, AttributeError) as error:
            raise RecordError(f"{path} is damaged: {error}") from error
        if record.number != number or record.outcome not in (None, *get_args(Outcome)):
            raise RecordError(f"{path} is damaged: it speaks of trial {record.number}, outcome {record.outcome}")
        taken = self.paths.trial(number).taken
        return _as_lost(record, paths.read_json(taken)) if taken.is_file() else record

    def known_trial(self, number: int) -> TrialRecord:
        """A trial that a user names: StudyError if the study has none of that number."""
        numbers = self.trial_numbers()
        if number not in numbers:
            known = f"its last is trial {numbers[-1]}" if numbers else "it has none yet"
            raise StudyError(f"study {self.name!r} has no trial {number}: {known}")
        return self.trial(number)

    def trials(self) -> list[TrialRecord]:
        """All trials on record, by number."""
        return [self.trial(number) for number in self.trial_numbers()]

    def write_trial(self, trial: TrialRecord) -> None:
        paths.write_json(self.paths.trial(trial.number).trial, trial.to_dict())

    def fit(self, trial: int, fold: int) -> FitRecord:
        return FitRecord(self.paths.trial(trial).fold(fold))

    def second_fit(self, trial: int, fold: int) -> FitRecord:
        return FitRecord(self.paths.trial(trial).second_fold(fold))

    def finished_folds(self, trial: int) -> list[int]:
        """Folds of a trial whose fit is finished, ascending."""
        return [fold for fold in range(self.n_folds) if self.fit(trial, fold).is_finished]

    def final_scores(self, trial: int, fold: int) -> npt.NDArray[np.float64]:
        """Per-image score after the last epoch of a finished fit, in the order of `folds.held_out(fold)`.

        RecordError if the file does not fit the folds: a wrong image order would be a silent lie.
        """
        return self._final_scores(self.fit(trial, fold), fold)

    def _final_scores(self, fit: FitRecord, fold: int) -> npt.NDArray[np.float64]:
        scores = fit.scores()
        expected = len(self.folds.held_out(fold))
        if scores.shape[0] == 0 or scores.shape[1] != expected:
            raise RecordError(f"{fit.paths.scores} holds {scores.shape} scores, fold {fold} has {expected} images")
        return np.asarray(scores[-1], np.float64)

    def out_of_fold(self, trial: int) -> npt.NDArray[np.float64]:
        """Score of every pool image from the fit that had not seen it, (pool,); NaN where no finished fit has."""
        result = np.full(len(self.folds.ids), np.nan)
        for fold in self.finished_folds(trial):
            result[self.folds.held_out(fold)] = self.final_scores(trial, fold)
        return result

    def value(self, trial: int) -> float:
        """Mean over all held-out images of a trial whose folds are all finished; RecordError if one is not."""
        scores = self.out_of_fold(trial)
        held_out = np.concatenate([self.folds.held_out(fold) for fold in range(self.n_folds)])
        if np.isnan(scores[held_out]).any():
            raise RecordError(f"trial {trial} of study {self.name!r} has no score for some images")
        return float(np.mean(scores[held_out]))

    def verify(self) -> None:
        """Read all of the ended trials; RecordError names what is damaged, before anything is concluded from it."""
        for trial in self.trials():
            if trial.outcome in (None, "lost"):
                continue
            second = self.second(trial.number)
            for fold in range(self.n_folds):
                self.fit(trial.number, fold).verify()
                if second is not None and second.outcome is not None:
                    self.second_fit(trial.number, fold).verify()
            if trial.outcome == "full" and self.value(trial.number) != trial.value:
                raise RecordError(
                    f"the scores in {self.paths.trial(trial.number).root} are not those of the value on record, "
                    f"{trial.value}: put them back from a copy"
                )

    def full_trials(self) -> list[TrialRecord]:
        """Trials that can win, by number: evaluated on all folds, as they were suggested, and no copy of another."""
        return self.contenders(self.trials())

    def contenders(self, trials: Iterable[TrialRecord]) -> list[TrialRecord]:
        """Return those of the trials that can win, by number.

        Equal configurations are one: the earliest full trial stands for it, and later copies cannot win. Otherwise
        the luckiest of several runs of one configuration would stand for it.
        """
        found: dict[tuple[Any, ...], TrialRecord] = {}
        for trial in sorted(trials, key=lambda trial: trial.number):
            if trial.can_win:
                found.setdefault(self.configuration(trial.params), trial)
        return list(found.values())

    def configuration(self, params: Mapping[str, Any]) -> tuple[Any, ...]:
        """Return a key that params share if they are the same configuration; a missing one has its default."""
        names = [name for name, _ in self.config.search]
        return self.config.search.key(
            {name: params[name] if name in params else get_setting(self.config, name) for name in names}
        )

    def is_default(self, trial: TrialRecord) -> bool:
        """Whether the trial has the default configuration, as trial 0 has."""
        return self.configuration(trial.params) == self.configuration({})

    def n_unused(self, trials: Iterable[TrialRecord]) -> int | None:
        """Return how many configurations of the search space none of these trials has had; None if without end."""
        n_configurations = self.config.search.n_configurations
        if n_configurations is None:
            return None
        return max(0, n_configurations - len({self.configuration(trial.params) for trial in trials}))

    def n_left(self, trials: Sequence[TrialRecord]) -> int:
        """Return how many trials are still to be evaluated at most, with these on record; open ones count."""
        n_left = max(0, self.config.study.trials - sum(trial.outcome in COUNTED for trial in trials))
        n_unused = self.n_unused(trials)
        if n_unused is None:
            return n_left
        return min(n_left, n_unused + sum(trial.outcome is None for trial in trials))

    def is_searched(self, trials: Sequence[TrialRecord]) -> bool:
        """Whether the search is over, with these as all its trials: replicates may still be missing."""
        return all(trial.outcome is not None for trial in trials) and self.n_left(trials) == 0

    def shortlist(self) -> Shortlist | None:
        """The configurations that are, or were, fitted once more; None before the first were chosen."""
        if not self.paths.confirmation.is_file():
            return None
        table = paths.read_json(self.paths.confirmation)
        try:
            return Shortlist(tuple(table["trials"]), tuple(table["of"]), int(table["count"]))
        except (KeyError, TypeError, ValueError) as error:
            raise RecordError(f"{self.paths.confirmation} is damaged: {error}") from error

    def write_shortlist(self, shortlist: Shortlist) -> None:
        paths.write_json(self.paths.confirmation, {"format": FORMAT, **dataclasses.asdict(shortlist)})

    def second(self, trial: int) -> SecondRecord | None:
        """How the second fits of a trial went; None where none were begun."""
        path = self.paths.trial(trial).second
        if not path.is_file():
            return None
        table = paths.read_json(path)
        try:
            if table.pop("format") != FORMAT:
                raise RecordError(f"{path} is of another version of hpsearch")
            return SecondRecord(**table)
        except (KeyError, TypeError, AttributeError) as error:
            raise RecordError(f"{path} is damaged: {error}") from error

    def write_second(self, second: SecondRecord) -> None:
        paths.write_json(self.paths.trial(second.trial).second, second.to_dict())

    def second_records(self) -> list[SecondRecord]:
        """Of all trials that were ever fitted once more, by number."""
        found = (self.second(number) for number in self.trial_numbers())
        return [second for second in found if second is not None]

    def second_out_of_fold(self, trial: int) -> npt.NDArray[np.float64]:
        """As `out_of_fold`, by the second fits of a trial whose second fits are all finished."""
        result = np.full(len(self.folds.ids), np.nan)
        for fold in range(self.n_folds):
            result[self.folds.held_out(fold)] = self._final_scores(self.second_fit(trial, fold), fold)
        return result

    def confirmed(self) -> tuple[int, ...]:
        """The shortlisted trials by number once all their second fits have ended, without those that failed.

        Empty while second fits are missing, and after a full trial has come since: then the choice is as open as if
        nothing had been confirmed.
        """
        return self.standing().confirmed

    def standing(self, trials: Iterable[TrialRecord] | None = None) -> Standing:
        """Return the ranking of the trials that can win, among `trials` where they were read already.

        Confirmed trials come first, by the mean over both their fits; then those that were not fitted again, by their
        value; last those whose configuration failed with other seeds. The earlier of equal trials comes first.
        """
        full = self.full_trials() if trials is None else self.contenders(trials)
        values = {trial.number: cast("float", trial.value) for trial in full}
        confirmed: list[int] = []
        failed: list[int] = []
        shortlist = self.shortlist()
        if shortlist is not None and shortlist.of == tuple(values):
            seconds = [self.second(number) for number in shortlist.trials]
            if all(second is not None and second.outcome is not None for second in seconds):
                ended = [second for second in seconds if second is not None]
                confirmed = sorted(second.trial for second in ended if second.outcome == "full")
                failed = [second.trial for second in ended if second.outcome != "full"]
        values |= {number: cast("float", self.mean_of_fits(number)) for number in confirmed}
        others = [number for number in values if number not in confirmed and number not in failed]
        ranking = [number for group in (confirmed, others, failed) for number in rank({n: values[n] for n in group})]
        return Standing(tuple(ranking), values, tuple(confirmed))

    def mean_of_fits(self, trial: int) -> float | None:
        """Mean over all held-out images and both fits of a trial; None while it has no complete second fits."""
        second = self.second(trial)
        if second is None or second.outcome != "full":
            return None
        both = (self.out_of_fold(trial) + self.second_out_of_fold(trial)) / 2
        return float(np.mean(both[~np.isnan(both)]))

    def worth(self, trial: TrialRecord) -> float | None:
        """What a trial is ranked by: the mean over both its fits where it is confirmed, else its value."""
        return self.standing().values.get(trial.number, trial.value)

    def best(self) -> TrialRecord | None:
        """The trial that wins (`standing`); None while none is full."""
        winner = self.standing().winner
        return None if winner is None else self.trial(winner)


def _as_lost(trial: TrialRecord, taken: Mapping[str, Any]) -> TrialRecord:
    reason = f"continued as trial {taken['by']} by another coordinator"
    return dataclasses.replace(trial, outcome="lost", value=None, reason=reason, ended_at=taken["at"], constraint=0.0)


def has_all_refits(record: StudyRecord) -> bool:
    """Return whether no refit is missing once the search itself is over."""
    study = record.config.study
    full = [trial.number for trial in record.full_trials()]
    if study.folds == "fixed" or study.confirm == 0 or len(full) < 2:
        return True
    stored = record.shortlist()
    return (
        stored is not None
        and (stored.of, stored.count) == (tuple(full), study.confirm)
        and all((second := record.second(number)) is not None and second.outcome for number in stored.trials)
    )


def no_study(project: ProjectPaths) -> StudyError:
    """The error of a project folder that holds no study."""
    root = project.root.absolute()
    return StudyError(f"there is no study in {root}: begin one with `hpsearch study`, or name the folder (--out)")


def study_record(project: ProjectPaths, name: str | None) -> StudyRecord:
    """Return the study `name`; without one, the only study there is, or the only one that runs.

    Raises StudyError, listing the studies, where that leaves a choice.
    """
    if name is not None:
        return StudyRecord.open(project.study(name))
    names = project.study_names()
    if not names:
        raise no_study(project)
    if len(names) > 1:
        running = lock.running_studies(project)
        if len(running) != 1:
            listed = ", ".join(f"{each} (running)" if each in running else each for each in names)
            raise StudyError(f"several studies in {project.root}: {listed}; choose one with --study NAME")
        names = running
    return StudyRecord.open(project.study(names[0]))


CHANGEABLE = frozenset(
    {"study.trials", "study.confirm", "data.cache", "data.cache_dir", "data.n_final_train", "data.n_final_test"}
    | {"data.root", "data.images", "data.masks", "data.test_list"}
)
"""Settings that may change between two starts of a study: none of them changes the score of a trial. Images that lie
elsewhere must be the same ones (`StudyRecord.data_key`)."""


def fixed_differences(ours: StudyConfig, theirs: StudyConfig) -> list[tuple[str, Any, Any]]:
    """(setting, ours, theirs) for every setting that differs and may not change under a study."""
    before, after = ours.flat(), theirs.flat()
    differences = [
        (key, before[key], after[key]) for key in before if key not in CHANGEABLE and before[key] != after[key]
    ]
    if ours.search != theirs.search:
        differences.append(("search", ours.search.to_toml(), theirs.search.to_toml()))
    return differences


@cache
def code_version() -> str:
    """Version of hpsearch; in a checkout with its commit, and `dirty` if that is not all: `0.1.0+4d3c...dirty`."""
    root = Path(hpsearch.__file__).parents[1]
    if not (root / ".git").exists():
        # Installed: a repository further up is somebody else's.
        return hpsearch.__version__
    command = ["git", "-C", str(root), "describe", "--always", "--dirty=.dirty", "--abbrev=40", "--exclude=*"]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=20, env=os.environ | {"GIT_OPTIONAL_LOCKS": "0"}
        )
    except (OSError, subprocess.TimeoutExpired):
        return hpsearch.__version__
    commit = done.stdout.strip()
    return f"{hpsearch.__version__}+{commit}" if done.returncode == 0 and commit else hpsearch.__version__


def remove_checkpoints(fit: FitPaths) -> None:
    """Remove what only an unfinished fit needs."""
    for path in (fit.last, fit.previous):
        path.unlink(missing_ok=True)


def remove_networks(fit: FitPaths) -> None:
    """Remove every network of a fit; its scores stay."""
    remove_checkpoints(fit)
    for path in (fit.weights, fit.best):
        path.unlink(missing_ok=True)


def now() -> float:
    """Unix time in seconds, rounded to the millisecond that MLflow keeps."""
    return round(time.time(), 3)


def load_array(path: Path, *, ndim: int) -> npt.NDArray[Any]:
    """The numbers in a .npy file. RecordError, naming it, if it is missing, damaged, or of another dimension."""
    try:
        content = path.read_bytes()
        file = io.BytesIO(content)
        array = np.lib.format.read_array(file, allow_pickle=False)
    except FileNotFoundError as error:
        raise RecordError(f"{path} is missing") from error
    except OSError as error:
        raise RecordError(f"{path} cannot be read: {error.strerror or error}") from error
    except Exception as error:
        # A damaged head of the file can say anything, and NumPy's reader fails in as many ways.
        raise RecordError(f"{path} is damaged: {error}") from error
    checksum = content[file.tell() :]
    if checksum not in (b"", hashlib.sha256(content[: file.tell()]).digest()):
        raise RecordError(f"{path} was changed since it was written: its checksum is wrong")
    if array.ndim != ndim or array.dtype.kind not in "fi" or not np.isfinite(array).all():
        raise RecordError(f"{path} is damaged: it holds a {array.dtype} array of shape {array.shape}, or NaN")
    return array
