"""Read the recorded files of one fit: epochs, scores, counts, weights."""

import hashlib
import io
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from hpsearch.errors import RecordError
from hpsearch.paths import FitPaths, damage_named
from hpsearch.store.trials import read_record
from hpsearch.training.rows import EpochRow, FitSummary, read_lines


@dataclass(frozen=True)
class FitRecord:
    """Files of one fit. Each file is read on access."""

    paths: FitPaths

    @property
    def is_finished(self) -> bool:
        return self.paths.fit.is_file()

    def summary(self) -> FitSummary | None:
        """Return the content of fit.json; None if the fit is not finished."""
        return read_record(FitSummary, self.paths.fit) if self.is_finished else None

    def epochs(self) -> list[EpochRow]:
        """Return the rows of epochs.jsonl in order, ignoring a last line that a crash truncated.

        Raises RecordError if an epoch of a finished fit is missing. An unfinished fit is not checked, because the
        worker repairs it.
        """
        rows = self._lines()[0]
        if (summary := self.summary()) is not None and len(rows) != summary.epochs:
            raise RecordError(f"{self.paths.epochs} is damaged: {len(rows)} of {summary.epochs} epochs can be read")
        return rows

    def scores(self) -> npt.NDArray[np.float32]:
        """Return the per-image scores after each epoch so far, (epochs, held-out images); (0, 0) before the first."""
        if not self.paths.scores.is_file():
            return np.zeros((0, 0), np.float32)
        return load_array(self.paths.scores, ndim=2)

    def counts(self) -> npt.NDArray[np.int64]:
        """Return tp, fp, fn and tn of each held-out image after the last epoch, (held-out images, 4)."""
        return load_array(self.paths.counts, ndim=2)

    def verify(self) -> None:
        """Check that the files of the fit can be read. No worker may be writing them at the same time.

        Raises RecordError, naming the damaged file.
        """
        self.scores()
        if self.is_finished:
            self.epochs()
            self.counts()
        elif n_bad := self._lines()[1]:
            raise RecordError(f"{self.paths.epochs} is damaged: {n_bad} lines cannot be read")

    def _lines(self) -> tuple[list[EpochRow], int]:
        return read_lines(self.paths.epochs.read_bytes() if self.paths.epochs.is_file() else b"")


def remove_checkpoints(fit: FitPaths) -> None:
    """Remove the checkpoints and the attempt, which only an unfinished fit needs."""
    for path in (fit.last, fit.previous, fit.attempt):
        path.unlink(missing_ok=True)


def remove_networks(fit: FitPaths) -> None:
    """Remove all networks of a fit, and keep its scores. Cluster workers can then no longer write to its folder."""
    for path in (fit.last, fit.previous, fit.weights, fit.best, fit.attempt):
        path.unlink(missing_ok=True)


def load_array(path: Path, *, ndim: int) -> npt.NDArray[Any]:
    """Return the array in a .npy file.

    Raises RecordError if the file is missing or damaged, or if the array is not numeric and finite with `ndim`
    dimensions.
    """
    # NumPy's reader raises many kinds of exceptions if the header is damaged.
    with damage_named(path, (Exception,)):
        content = path.read_bytes()
        file = io.BytesIO(content)
        array = np.lib.format.read_array(file, allow_pickle=False)
    checksum = content[file.tell() :]
    if checksum not in (b"", hashlib.sha256(content[: file.tell()]).digest()):
        raise RecordError(f"{path} was changed after it was written: restore it from a backup")
    if array.ndim != ndim or array.dtype.kind not in "fi" or not np.isfinite(array).all():
        raise RecordError(f"{path} is damaged: it contains a {array.dtype} array of shape {array.shape}, or NaN")
    return array
