"""Results of an epoch (a line of epochs.jsonl) and of a whole fit (fit.json). Does not import torch."""

import json
import zlib
from dataclasses import dataclass, field

from hpsearch.typed_json import from_json, to_json


@dataclass(frozen=True)
class Scores:
    """Mean loss and mean scores over images."""

    loss: float
    dice: float
    jaccard: float
    accuracy: float


@dataclass(frozen=True, kw_only=True)
class EpochRow:
    """Result of one epoch."""

    epoch: int
    """Number of the epoch, from 1."""
    time: float
    """Unix time at the end of the epoch, in seconds."""
    train: Scores
    """Scores over the augmented training batches, measured during the epoch."""
    held_out: Scores | None
    """Scores over the held-out images after the epoch, at the evaluation size; None without held-out images."""
    lr: float
    """Learning rate of the last step of the epoch."""
    train_s: float
    eval_s: float
    images_per_s: float
    """Training images per second, excluding evaluation."""
    peak_bytes: int
    """Peak memory in bytes during the epoch: allocated by torch on a GPU, or resident in the process on a CPU."""

    @property
    def seconds(self) -> float:
        """Duration of training and evaluation in seconds."""
        return self.train_s + self.eval_s

    @property
    def scores(self) -> Scores:
        """Held-out scores, or the training scores if there are no held-out images."""
        return self.held_out or self.train


@dataclass(frozen=True, kw_only=True)
class FitSummary:
    """Result of a finished fit: the content of fit.json. Times and memory are stored in the rows of its epochs."""

    epochs: int
    value: float | None = None
    """Mean score over the held-out images after the last epoch; None without held-out images."""
    runtime: dict[str, str] = field(default_factory=dict)
    """Description of the machine and the library versions."""


def to_line(row: EpochRow) -> str:
    """Return the row as a line of epochs.jsonl, with a checksum but without the newline."""
    text = json.dumps(to_json(row), allow_nan=False)
    return f'{text[:-1]}, "crc": {zlib.crc32(text.encode())}}}'


def read_lines(content: bytes) -> tuple[list[EpochRow], int]:
    """Return the rows of all intact lines of epochs.jsonl, in order, and the number of damaged lines.

    A last line without a newline was cut off by a crash. It is ignored and does not count as damaged.
    """
    *lines, _ = content.split(b"\n")
    rows = [row for line in lines if (row := _read_line(line)) is not None]
    return rows, len(lines) - len(rows)


def _read_line(line: bytes) -> EpochRow | None:
    try:
        table = json.loads(line)
        crc = table.pop("crc", None)
        is_intact = crc in (None, zlib.crc32(json.dumps(table).encode()))
        return from_json(EpochRow, table) if is_intact else None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None
