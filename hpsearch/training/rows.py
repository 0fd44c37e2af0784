"""Result of one epoch of a fit: one line of epochs.jsonl. Imports no torch: the coordinator reads it."""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any


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

    def to_dict(self) -> dict[str, Any]:
        """Return plain types, from which `from_dict` makes an equal row."""
        return asdict(self)

    @classmethod
    def from_dict(cls, table: Mapping[str, Any]) -> EpochRow:
        """Return the row of a table of `to_dict` or of a line of epochs.jsonl, whose checksum is ignored."""
        table = {key: value for key, value in table.items() if key != "crc"}
        held_out = table["held_out"]
        return cls(
            **{
                **table,
                "train": Scores(**table["train"]),
                "held_out": None if held_out is None else Scores(**held_out),
            }
        )


def to_line(row: EpochRow) -> str:
    """Return the row as a line of epochs.jsonl, with its checksum."""
    text = json.dumps(row.to_dict(), allow_nan=False)
    return f'{text[:-1]}, "crc": {zlib.crc32(text.encode())}}}'


def read_lines(content: bytes) -> tuple[list[dict[str, Any]], int]:
    """Return the tables of the valid lines of an epochs.jsonl, in order, and the number of invalid lines.

    A last line without a newline was torn by a crash and is not counted.
    """
    *lines, _ = content.split(b"\n")
    tables = [table for line in lines if (table := _read_line(line)) is not None]
    return tables, len(lines) - len(tables)


def _read_line(line: bytes) -> dict[str, Any] | None:
    try:
        table = json.loads(line)
        if not isinstance(table, dict) or "epoch" not in table:
            return None
        crc = table.pop("crc", None)
        return table if crc in (None, zlib.crc32(json.dumps(table).encode())) else None
    except (ValueError, RecursionError):
        return None
