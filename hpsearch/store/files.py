"""Read and write the study folder: settings, folds, plan, trials and replicates.

Everything else, such as the runs in MLflow, is derived from this folder. All readers use only its files, so that
background threads, reports and other processes see the same study.
"""

from collections.abc import Mapping
from dataclasses import replace
from functools import cached_property
from typing import Any, Self

from hpsearch.config.study import StudyConfig, load_config
from hpsearch.data.folds import Folds
from hpsearch.errors import ConfigError, RecordError, StudyChangedError, StudyError
from hpsearch.paths import StudyPaths, damage_named, read_json, write_json, write_text
from hpsearch.store.fits import FitRecord
from hpsearch.store.trials import FORMAT, ReplicateRecord, Shortlist, TrialRecord, read_record, record_to_json

CHANGEABLE = frozenset(
    {"study.trials", "study.until_gain", "study.confirm", "data.cache", "data.cache_dir"}
    | {"data.n_final_train", "data.n_final_test", "data.root", "data.images", "data.masks", "data.test_list"}
)
"""Settings that may change between two starts of a study, because they do not affect the score of a trial. If the
image folder changes, it must contain the same images (`StudyRecord.data_key`)."""


class StudyFiles:
    """Access to the files of one study folder. Only the coordinator writes, from one thread."""

    def __init__(self, study: StudyPaths, config: StudyConfig) -> None:
        self.paths = study
        self.config = config

    @classmethod
    def open(cls, study: StudyPaths) -> Self:
        """Open the study in an existing folder.

        Raises StudyError if there is no study, and RecordError if its settings are damaged or invalid.
        """
        if not study.toml.is_file():
            root, known = study.project.root.absolute(), ", ".join(study.project.study_names()) or "none"
            raise StudyError(f"there is no study {study.name!r} in {root}; studies there: {known}")
        try:
            # Studies of version 0.1 may contain paths relative to the folder in which they were started.
            return cls(study, load_config(study.toml).absolute())
        except ConfigError as error:
            raise RecordError(f"the study's own settings cannot be used: {error}") from error

    @classmethod
    def create(cls, study: StudyPaths, config: StudyConfig) -> Self:
        """Create a study by writing its settings, the first file of its record."""
        write_text(study.toml, config.to_sealed_toml())
        return cls(study, config)

    @property
    def name(self) -> str:
        return self.paths.name

    @property
    def n_folds(self) -> int:
        return 1 if self.config.study.folds == "fixed" else self.config.study.folds

    @cached_property
    def folds(self) -> Folds:
        """Fold of every image. Raises RecordError if the folds do not exist yet."""
        table = read_json(self.paths.folds)
        with damage_named(self.paths.folds):
            return Folds.from_dict(table["folds"])

    def data_key(self) -> str:
        """Return the key of the image cache from which the folds were made."""
        return str(read_json(self.paths.folds).get("data_key", ""))

    def write_folds(self, folds: Folds, data_key: str) -> None:
        """Store the folds, which all trials use."""
        write_json(self.paths.folds, {"format": FORMAT, "data_key": data_key, "folds": folds.to_dict()})
        self.folds = folds

    def check_config(self, config: StudyConfig) -> None:
        """Raise StudyChangedError, listing all differences, if a setting that is not in `CHANGEABLE` differs."""
        before, after = self.config.flat(), config.flat()
        before["search"], after["search"] = self.config.search.to_toml(), config.search.to_toml()
        changed = [key for key, value in before.items() if key not in CHANGEABLE and value != after[key]]
        if changed:
            listed = "; ".join(f"{key}: {before[key]!r} in the study, {after[key]!r} now" for key in changed)
            advice = "use the old settings, or start another study with --study NAME"
            raise StudyChangedError(f"study {self.name!r} was started with other settings ({listed}); {advice}")

    def update_config(self, config: StudyConfig) -> None:
        """Store the settings that may change during a study.

        Raises StudyChangedError if any other setting differs.
        """
        self.check_config(config)
        if config.to_sealed_toml() != self.paths.toml.read_text(encoding="utf-8"):
            write_text(self.paths.toml, config.to_sealed_toml())
            self.config = config

    def plan(self) -> dict[str, Any] | None:
        """Return the execution plan as a dictionary of plain types; None if it does not exist yet."""
        return read_json(self.paths.plan) if self.paths.plan.is_file() else None

    def write_plan(self, plan: Mapping[str, Any]) -> None:
        write_json(self.paths.plan, {"format": FORMAT, **plan})

    def trial_numbers(self) -> list[int]:
        """Return the numbers of the recorded trials, ascending."""
        return [number for number in self.paths.trial_numbers() if self.paths.trial(number).trial.is_file()]

    def trial(self, number: int) -> TrialRecord:
        """Read a trial.

        Raises RecordError, naming the file, if it is missing or damaged. A trial with a `taken.json`, which version
        0.1 wrote, is orphaned, regardless of the outcome in its own file.
        """
        path, taken = self.paths.trial(number).trial, self.paths.trial(number).taken
        trial = read_record(TrialRecord, path)
        if trial.number != number:
            raise RecordError(f"{path} is damaged: it describes trial {trial.number}; restore it from a backup")
        if not taken.is_file():
            return trial
        table = read_json(taken)
        reason = f"continued as trial {table['by']} by another coordinator"
        return replace(trial, outcome="orphaned", value=None, reason=reason, ended_at=table["at"], constraint=0.0)

    def known_trial(self, number: int) -> TrialRecord:
        """Read the trial that a user asked for. Raises StudyError if the study has no such trial."""
        numbers = self.trial_numbers()
        if number not in numbers:
            known = f"its last is trial {numbers[-1]}" if numbers else "it has none yet"
            raise StudyError(f"study {self.name!r} has no trial {number}: {known}")
        return self.trial(number)

    def trials(self) -> list[TrialRecord]:
        """Read all trials, by number."""
        return [self.trial(number) for number in self.trial_numbers()]

    def write_evaluation(self, evaluation: TrialRecord | ReplicateRecord) -> None:
        """Write a new or changed trial or replicate."""
        files = self.paths.trial(evaluation.number)
        path = files.trial if isinstance(evaluation, TrialRecord) else files.second
        write_json(path, record_to_json(evaluation))

    def fit(self, trial: int, fold: int, replicate: int = 0) -> FitRecord:
        """Return a fit of a trial (`replicate` 0) or of its replicate (1)."""
        return FitRecord(self.paths.trial(trial).fold(fold, replicate))

    def fits(self, trial: int, replicate: int = 0) -> list[FitRecord]:
        """Return the fits of a trial or of its replicate, by fold."""
        return [self.fit(trial, fold, replicate) for fold in range(self.n_folds)]

    def finished_folds(self, trial: int) -> list[int]:
        """Return, in ascending order, the folds for which the trial's fit has finished."""
        return [fold for fold, fit in enumerate(self.fits(trial)) if fit.is_finished]

    def shortlist(self) -> Shortlist | None:
        """Read the trials selected for replication; None if there is no shortlist yet."""
        path = self.paths.confirmation
        return read_record(Shortlist, path) if path.is_file() else None

    def write_shortlist(self, shortlist: Shortlist) -> None:
        """Write the trials selected for replication."""
        write_json(self.paths.confirmation, record_to_json(shortlist))

    def replicate(self, trial: int) -> ReplicateRecord | None:
        """Read the replicate of a trial; None if it has not begun."""
        path = self.paths.trial(trial).second
        return read_record(ReplicateRecord, path) if path.is_file() else None

    def replicate_records(self) -> list[ReplicateRecord]:
        """Read all replicates, by trial number."""
        return [found for number in self.trial_numbers() if (found := self.replicate(number)) is not None]
