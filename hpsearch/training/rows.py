"""What one epoch of a fit gave: one line of epochs.jsonl. Imports no torch: the coordinator reads it."""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Scores:
    """Means over images: of the loss, and of three scores per image."""

    loss: float
    dice: float
    jaccard: float
    accuracy: float


@dataclass(frozen=True, kw_only=True)
class EpochRow:
    """One epoch."""

    epoch: int
    """From 1."""
    time: float
    """Unix time at its end, in seconds."""
    train: Scores
    """Over the augmented batches as they were trained on."""
    held_out: Scores | None
    """After the epoch, at the evaluation size; None where nothing is held out."""
    lr: float
    """Learning rate of the epoch's last step."""
    train_s: float
    eval_s: float
    images_per_s: float
    """Training images a second, evaluation not counted."""
    peak_bytes: int
    """Most memory in use so far: allocated on a GPU, resident in the process on a CPU."""

    def to_dict(self) -> dict[str, Any]:
        """Plain types only; `from_dict` gives an equal row."""
        return asdict(self)

    @classmethod
    def from_dict(cls, table: Mapping[str, Any]) -> EpochRow:
        """The row of such a table, or of a line of epochs.jsonl, whose checksum is left alone."""
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
    """The row as a line of epochs.jsonl, with its checksum."""
    text = json.dumps(row.to_dict(), allow_nan=False)
    return f'{text[:-1]}, "crc": {zlib.crc32(text.encode())}}}'


def read_lines(content: bytes) -> tuple[list[dict[str, Any]], int]:
    """Tables of the good lines of an epochs.jsonl, in order, without checksums, and how many whole lines are bad.

    A last line without its end was torn by a crash; it counts for nothing.
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
