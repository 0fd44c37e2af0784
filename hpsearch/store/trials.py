"""What is recorded of trials and replicates, and how trials are ranked, as frozen dataclasses."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args

from hpsearch.config import StudyConfig
from hpsearch.errors import RecordError
from hpsearch.typed_json import from_json, to_json

FORMAT = 1
"""Version of the study folder. A folder of another version is refused."""

Outcome = Literal["complete", "pruned", "infeasible", "diverged", "failed", "orphaned"]
"""`orphaned` only in studies of version 0.1: another process continued the trial under a new number."""
ReplicateOutcome = Literal["complete", "diverged", "infeasible", "failed"]
COUNTED: frozenset[Outcome] = frozenset({"complete", "pruned", "diverged", "failed"})
"""Outcomes that count toward `study.trials`."""
OUTCOMES_OF_0_1 = {"full": "complete", "dropped": "pruned", "lost": "orphaned"}
"""Outcomes that version 0.1 recorded under other names."""
RecordT = TypeVar("RecordT", "TrialRecord", "ReplicateRecord")


@dataclass(frozen=True, kw_only=True)
class TrialRecord:
    """One trial: its params and what became of it."""

    number: int
    params: dict[str, Any]
    config: dict[str, Any]
    """The whole configuration, as `StudyConfig.to_dict` returns it."""
    began_at: float
    """Unix time in seconds, as all times here."""
    source: Literal["default", "sampler", "enqueued"] = "sampler"
    outcome: Outcome | None = None
    """None while the trial is open."""
    value: float | None = None
    """Mean out-of-fold score of a complete trial; estimate of a pruned one."""
    reason: str = ""
    ended_at: float | None = None
    constraint: float = 0.0
    """Above 0 if the configuration is infeasible: shown to the sampler."""
    decisions: tuple[dict[str, Any], ...] = ()
    """Every decision of the pruner, in order."""
    failures: dict[str, list[str]] = field(default_factory=dict)
    """Maps each fold to one line per death of a worker that fitted it."""
    micro_batch: int | None = None
    """Images at a time if memory forced parts of batches and that changed the result. Such a trial cannot win."""
    code: str = ""
    """Version that began it, as `code_version` returns it."""
    draw: int | None = None
    """Place among the suggestions, set by version 0.1 on a trial that continues an orphaned one."""

    @property
    def place(self) -> int:
        """Place among the suggestions, which seeds the fits."""
        return self.number if self.draw is None else self.draw

    @property
    def can_win(self) -> bool:
        """Whether the trial is complete, with the configuration that was suggested."""
        return self.outcome == "complete" and self.micro_batch is None

    @property
    def study_config(self) -> StudyConfig:
        """The whole configuration."""
        return StudyConfig.from_dict(self.config)

    def orphaned(self, taken: Mapping[str, Any]) -> TrialRecord:
        """Return the trial as it is if version 0.1 continued it under the number in `taken`."""
        reason = f"continued as trial {taken['by']} by another coordinator"
        return replace(self, outcome="orphaned", value=None, reason=reason, ended_at=taken["at"], constraint=0.0)


@dataclass(frozen=True, kw_only=True)
class ReplicateRecord:
    """The replicate of one complete trial: fits of the same folds with other seeds."""

    trial: int
    began_at: float
    outcome: ReplicateOutcome | None = None
    """Anything but `complete`: the configuration failed with other seeds, so that it cannot win."""
    reason: str = ""
    ended_at: float | None = None
    failures: dict[str, list[str]] = field(default_factory=dict)
    """As in `TrialRecord`."""
    code: str = ""


@dataclass(frozen=True)
class Shortlist:
    """The trials that are replicated."""

    trials: tuple[int, ...]
    """Those selected most often first."""
    of: tuple[int, ...]
    """The complete trials that it was selected from. With other complete trials it is void."""
    count: int
    """`study.confirm` when it was made."""


@dataclass(frozen=True)
class Standing:
    """The ranking of a study's trials at one moment. All views show this ranking."""

    ranking: tuple[int, ...]
    """Numbers of the trials that can win, best first."""
    values: dict[int, float]
    """Trial number to its ranking value: the mean over both fits if its replicate counts, else over the first."""
    confirmed: tuple[int, ...]
    """Trials whose replicates count, by number. If there are any, one of them wins."""

    @property
    def winner(self) -> int | None:
        """Number of the best trial."""
        return self.ranking[0] if self.ranking else None

    @property
    def best_value(self) -> float | None:
        """The value that ranks the winner."""
        return self.values[self.ranking[0]] if self.ranking else None


def count_trials(trials: Iterable[TrialRecord]) -> int:
    """Return how many trials count toward `study.trials`."""
    return sum(trial.outcome in COUNTED for trial in trials)


def record_to_json(record: TrialRecord | ReplicateRecord | Shortlist) -> dict[str, Any]:
    """Return the content of the record's file."""
    table = to_json(record)
    if table.get("draw", 0) is None:
        del table["draw"]
    return {"format": FORMAT, **table}


def record_from_json(cls: type[RecordT], table: Mapping[str, Any], path: Path) -> RecordT:
    """Return the trial or replicate in a table read from `path`; RecordError if it is damaged."""
    try:
        if table["format"] != FORMAT:
            raise RecordError(f"{path} is of another version of hpsearch")
        outcome = OUTCOMES_OF_0_1.get(table.get("outcome") or "", table.get("outcome"))
        record = from_json(cls, {**table, "outcome": outcome})
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise RecordError(f"{path} is damaged: {error}") from error
    if record.outcome not in (None, *get_args(Outcome)):
        raise RecordError(f"{path} is damaged: it has the outcome {record.outcome}")
    return record
