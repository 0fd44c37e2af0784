"""Define the records of trials, replicates and rankings as frozen dataclasses."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal, TypeVar, get_args

from hpsearch.config import StudyConfig
from hpsearch.errors import RecordError
from hpsearch.paths import damage_named, read_json
from hpsearch.typed_json import from_json, to_json

T = TypeVar("T")

FORMAT = 1
"""Version of the study folder's format. Folders of other versions are rejected."""

Outcome = Literal["complete", "pruned", "infeasible", "diverged", "failed", "orphaned"]
"""How a trial ended. Only studies of version 0.1 have `orphaned` trials: another process continued the trial under a
new number."""
COUNTED: frozenset[Outcome] = frozenset({"complete", "pruned", "diverged", "failed"})
"""Outcomes that count toward `study.trials`."""
OUTCOMES_OF_0_1 = {"full": "complete", "dropped": "pruned", "lost": "orphaned"}
"""Maps the names that version 0.1 recorded for some outcomes to the current names."""


@dataclass(frozen=True)
class PruneDecision:
    """Decision of a pruner after an epoch, with its reasons."""

    drop: bool
    """Whether the trial is pruned."""
    estimate: float
    """Estimated value of the candidate. It becomes the trial's value if the trial is pruned."""
    fold: int
    """Fold, counted from 0 as in all files."""
    epoch: int
    """Number of finished epochs in that fold."""
    reason: str
    d: float | None = None
    """Expected value of the leading trial minus that of the candidate (`search.racing`); None if no comparison was
    possible."""
    se: float | None = None
    """Standard error of `d`."""
    s: float | None = None
    """Run-to-run standard deviation of a fold's mean score."""
    p: float | None = None
    """Probability that the value of the candidate exceeds that of the leading trial by more than `racing.MATTERS`. In
    studies of version 0.1: p-value of the hypothesis that it does."""
    against: int | None = None
    """Number of the leading trial."""


@dataclass(frozen=True, kw_only=True)
class EvaluationRecord:
    """Fields shared by the records of a trial and of its replicate."""

    began_at: float
    """Unix time of the start, in seconds."""
    outcome: Outcome | None = None
    """How the trial or replicate ended; None while it is open."""
    reason: str = ""
    ended_at: float | None = None
    failures: dict[str, list[str]] = field(default_factory=dict)
    """Maps each fold, counted from 0, to one line for each worker that died while fitting it."""
    workers: dict[str, str] = field(default_factory=dict)
    """Maps each fold, counted from 0, to the name of the worker that is fitting it or has fitted it."""
    code: str = ""
    """Version of hpsearch that began the trial or replicate, as returned by `code_version`."""

    def __post_init__(self) -> None:
        outcome = OUTCOMES_OF_0_1.get(self.outcome or "", self.outcome)
        if outcome not in (None, *get_args(Outcome)):
            raise ValueError(f"unknown outcome {outcome}")
        object.__setattr__(self, "outcome", outcome)


@dataclass(frozen=True, kw_only=True)
class TrialRecord(EvaluationRecord):
    """Record of one trial: its params and its outcome."""

    number: int
    params: dict[str, Any]
    config: dict[str, Any]
    """Complete configuration, as returned by `StudyConfig.to_dict`."""
    source: Literal["default", "sampler", "enqueued"] = "sampler"
    value: float | None = None
    """Mean out-of-fold score of a complete trial, or estimate of a pruned one."""
    constraint: float = 0.0
    """Constraint value for the sampler, above 0 if the configuration is infeasible or diverged."""
    decisions: tuple[PruneDecision, ...] = ()
    """All decisions of the pruner, in order."""
    micro_batch: int | None = None
    """Number of images in each part of a batch. Set only in trials of version 0.1 whose result was changed by
    splitting batches. These trials cannot win."""
    draw: int | None = None
    """Position among the suggestions if it differs from the trial number. Version 0.1 set it for trials that
    continued an orphaned trial."""

    @property
    def place(self) -> int:
        """Position among the suggestions, which determines the seeds of the fits."""
        return self.number if self.draw is None else self.draw

    @property
    def can_win(self) -> bool:
        """Whether the trial is complete and was trained with the suggested configuration."""
        return self.outcome == "complete" and self.micro_batch is None

    @property
    def study_config(self) -> StudyConfig:
        """Complete configuration of the trial."""
        return StudyConfig.from_dict(self.config)


@dataclass(frozen=True, kw_only=True)
class ReplicateRecord(EvaluationRecord):
    """Record of the replicate of one complete trial: fits of the same folds with other seeds.

    If the outcome is not `complete`, the configuration failed with other seeds and cannot win.
    """

    trial: int
    decisions: ClassVar[tuple[PruneDecision, ...]] = ()
    """Always empty, because replicates are never pruned."""

    @property
    def number(self) -> int:
        """Number of the replicated trial."""
        return self.trial

    @property
    def place(self) -> int:
        """Trial number, which determines the seeds of the fits."""
        return self.trial


@dataclass(frozen=True)
class Shortlist:
    """Trials selected for replication."""

    trials: tuple[int, ...]
    """Numbers of the selected trials, in descending order of how often each is the best in bootstrap samples."""
    of: tuple[int, ...]
    """Numbers of the trials that could win when the shortlist was made. If these trials change, the shortlist is no
    longer valid."""
    count: int
    """Value of `study.confirm` when the shortlist was made."""


@dataclass(frozen=True)
class Standing:
    """Ranking of a study's trials at one moment. The report, MLflow and Optuna's database all show this ranking."""

    ranking: tuple[int, ...]
    """Numbers of the trials that can win, best first."""
    values: dict[int, float]
    """Maps the number of each trial that can win to its ranking value: the mean score over both fits of each fold if
    the trial is in `confirmed`, else over the first fits."""
    confirmed: tuple[int, ...]
    """Numbers, in ascending order, of the trials whose replicates are complete. If there are any, the winner is one
    of them.

    Empty until all replicates have ended. Also empty if a trial has become complete since the shortlist was made.
    """

    @property
    def winner(self) -> int | None:
        """Number of the best trial."""
        return self.ranking[0] if self.ranking else None


def count_trials(trials: Iterable[TrialRecord]) -> int:
    """Return the number of trials that count toward `study.trials`."""
    return sum(trial.outcome in COUNTED for trial in trials)


def record_to_json(record: EvaluationRecord | Shortlist) -> dict[str, Any]:
    """Return the content of a record's file as a dictionary."""
    table = {"format": FORMAT, **to_json(record)}
    # Only trials of version 0.1 have a `draw`.
    return {name: value for name, value in table.items() if name != "draw" or value is not None}


def read_record(cls: type[T], path: Path) -> T:
    """Return the record in a JSON file.

    Raises RecordError, naming the file, if it is damaged or of another version.
    """
    table = read_json(path)
    if isinstance(table, dict) and table.get("format", FORMAT) != FORMAT:
        raise RecordError(f"{path} was written by another version of hpsearch: update hpsearch")
    with damage_named(path):
        return from_json(cls, table)
