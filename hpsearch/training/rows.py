"""Results of one epoch of a fit: one line of epochs.jsonl. Imports no torch: the coordinator reads it."""

import json
import zlib
from dataclasses import dataclass

from hpsearch.typed_json import from_json, to_json


@dataclass(frozen=True)
class Scores:
    """Means over images of the loss and of three scores."""

    loss: float
    dice: float
    jaccard: float
    accuracy: float


@dataclass(frozen=True, kw_only=True)
class EpochRow:
    """Result of one epoch."""

    epoch: int
    """Counted from 1."""
    time: float
    """Unix time at its end, in seconds."""
    train: Scores
    """Over the augmented training batches."""
    held_out: Scores | None
    """After the epoch, at the evaluation size; None without held-out images."""
    lr: float
    """Learning rate of the last step of the epoch."""
    train_s: float
    eval_s: float
    images_per_s: float
    """Training images per second, without evaluation."""
    peak_bytes: int
    """Peak memory of the epoch: allocated on a GPU, resident in the process on a CPU."""

    @property
    def seconds(self) -> float:
        """Training and evaluation together."""
        return self.train_s + self.eval_s

    @property
    def scores(self) -> Scores:
        """The held-out scores; those of the training batches where nothing is held out."""
        return self.held_out or self.train


def to_line(row: EpochRow) -> str:
    """Return the row as a line of epochs.jsonl, with its checksum."""
    text = json.dumps(to_json(row), allow_nan=False)
    return f'{text[:-1]}, "crc": {zlib.crc32(text.encode())}}}'


def read_lines(content: bytes) -> tuple[list[EpochRow], int]:
    """Return the rows of the intact lines of an epochs.jsonl, in order, and the number of damaged lines.

    A last line without its end was cut off by a crash and does not count.
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
