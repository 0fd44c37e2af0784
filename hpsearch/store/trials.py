"""Frozen dataclasses for the records of trials and replicates, and for the ranking of trials."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal, TypeVar, get_args

from hpsearch.config import StudyConfig
from hpsearch.errors import RecordError
from hpsearch.paths import read_json
from hpsearch.typed_json import from_json, to_json

T = TypeVar("T")

FORMAT = 1
"""Version of the study folder. A folder of another version is refused."""

Outcome = Literal["complete", "pruned", "infeasible", "diverged", "failed", "orphaned"]
"""`orphaned` only in studies of version 0.1: another process continued the trial under a new number."""
COUNTED: frozenset[Outcome] = frozenset({"complete", "pruned", "diverged", "failed"})
"""Outcomes that count toward `study.trials`."""
OUTCOMES_OF_0_1 = {"full": "complete", "dropped": "pruned", "lost": "orphaned"}
"""Outcomes that version 0.1 recorded under other names."""


@dataclass(frozen=True)
class PruneDecision:
    """A pruner's decision after an epoch, with its reasons."""

    drop: bool
    estimate: float
    """Estimated value of the candidate: recorded if it is pruned."""
    fold: int
    """Counted from 0, as in all files."""
    epoch: int
    """Epochs done in that fold."""
    reason: str
    d: float | None = None
    """Mean advantage of the reference scores over the candidate's; None if there is no complete trial yet."""
    se: float | None = None
    s: float | None = None
    """Run-to-run standard deviation of a fold's mean."""
    p: float | None = None
    """One-sided probability of such a large mean d if the candidate is better by `racing.MATTERS`."""
    against: int | None = None
    """Number of the incumbent."""


@dataclass(frozen=True, kw_only=True)
class EvaluationRecord:
    """Fields that the records of a trial and of its replicate share."""

    began_at: float
    """Unix time in seconds, as all times here."""
    outcome: Outcome | None = None
    """None while it is open."""
    reason: str = ""
    ended_at: float | None = None
    failures: dict[str, list[str]] = field(default_factory=dict)
    """Maps each fold, counted from 0, to one line per death of a worker that fitted it."""
    code: str = ""
    """Version that began it, as `code_version` returns it."""

    def __post_init__(self) -> None:
        outcome = OUTCOMES_OF_0_1.get(self.outcome or "", self.outcome)
        if outcome not in (None, *get_args(Outcome)):
            raise ValueError(f"unknown outcome {outcome}")
        object.__setattr__(self, "outcome", outcome)


@dataclass(frozen=True, kw_only=True)
class TrialRecord(EvaluationRecord):
    """One trial: its params and its outcome."""

    number: int
    params: dict[str, Any]
    config: dict[str, Any]
    """The whole configuration, as `StudyConfig.to_dict` returns it."""
    source: Literal["default", "sampler", "enqueued"] = "sampler"
    value: float | None = None
    """Mean out-of-fold score of a complete trial; estimate of a pruned one."""
    constraint: float = 0.0
    """Above 0 if the configuration is infeasible: shown to the sampler."""
    decisions: tuple[PruneDecision, ...] = ()
    """Every decision of the pruner, in order."""
    micro_batch: int | None = None
    """Images per part if batches were split to fit in memory and this changed the result. Such a trial cannot win."""
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


@dataclass(frozen=True, kw_only=True)
class ReplicateRecord(EvaluationRecord):
    """The replicate of one complete trial: fits of the same folds with other seeds.

    With any outcome but `complete`, the configuration failed with other seeds, so that it cannot win.
    """

    trial: int
    decisions: ClassVar[tuple[PruneDecision, ...]] = ()
    """A replicate is never pruned."""

    @property
    def number(self) -> int:
        """Number of the trial."""
        return self.trial

    @property
    def place(self) -> int:
        """The number, which seeds the fits."""
        return self.trial


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
    """Numbers of the trials whose replicates count, ascending. If there are any, the winner is one of them."""

    @property
    def winner(self) -> int | None:
        """Number of the best trial."""
        return self.ranking[0] if self.ranking else None

    @property
    def best_value(self) -> float | None:
        """Ranking value of the winner."""
        return self.values[self.ranking[0]] if self.ranking else None


def count_trials(trials: Iterable[TrialRecord]) -> int:
    """Return how many trials count toward `study.trials`."""
    return sum(trial.outcome in COUNTED for trial in trials)


def record_to_json(record: EvaluationRecord | Shortlist) -> dict[str, Any]:
    """Return the content of the record's file."""
    table = {"format": FORMAT, **to_json(record)}
    # Only trials of version 0.1 have one.
    return {name: value for name, value in table.items() if name != "draw" or value is not None}


def read_record(cls: type[T], path: Path) -> T:
    """Return the dataclass in a JSON file. Raises RecordError, which names the file, if it is damaged."""
    table = read_json(path)
    try:
        if table.get("format", FORMAT) != FORMAT:
            raise RecordError(f"{path} is of another version of hpsearch: update hpsearch")
        return from_json(cls, table)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise RecordError(f"{path} is damaged: put it back from a copy") from error
