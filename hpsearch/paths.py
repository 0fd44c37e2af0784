"""Define the paths of all files that hpsearch writes, and write files atomically.

OUT/
  hpsearch.db   mlflow.db   mlruns/         databases of Optuna and MLflow, derived from the record
  test-looks.jsonl                          log of all evaluations of test sets
  cache/<key>/                              decoded images, shared by all studies
  studies/<name>/                           the record of one study
    study.toml   plan.json   folds.json     settings, execution plan, fold of each image
    study.lock   holder.json   study.log    lock, process that holds it, log
    confirmation.json                       the shortlist of trials to refit
    trials/0007/
      trial.json                            params, outcome, value, decisions
      taken.json                            only in version 0.1: the trial that continued this one
      second.json   second2/                the replicate with other seeds: its result and its fit of fold 2
      fold2/                                the fit of fold 2
        epochs.jsonl                        one line per epoch
        scores.npy                          (epochs, held-out images) float32, the study's metric
        counts.npy                          (held-out images, 4) int64: tp, fp, fn, tn after the last epoch
        examples.npz                        a few held-out predictions for figures
        last.pt   previous.pt   best.pt     checkpoints, removed after the fit (best.pt stays)
        weights.safetensors                 the network after the last epoch
        fit.json                            written last, when the fit is complete
        attempt                             only on a cluster, during the fit: the attempt that may write here
    final/<run>/                            a retrained configuration with its test scores and model
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import secrets
import shlex
import shutil
import unicodedata
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hpsearch.errors import ConfigError, RecordError, StorageError

CHECK_WRITE: ContextVar[Callable[[Path], None]] = ContextVar("CHECK_WRITE", default=lambda path: None)
"""Function that is called immediately before a file is replaced or appended to, and may refuse it with an exception.
`workers.attempts` sets it."""
_STUDY_NAME = re.compile(r"[^\W_][\w .+-]{0,79}")
_DAMAGE = (AttributeError, KeyError, TypeError, ValueError, RecursionError, RecordError)
"""Exceptions that mean that a file does not have the expected content."""
_CHECKSUM = "sha256"
"""Key of the checksum in a JSON file."""
_FULL = (errno.ENOSPC, errno.EDQUOT)
"""Values of `errno` that mean that a disk is full."""
_REFUSALS = (*_FULL, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO, errno.ESTALE, errno.ENOTDIR, errno.EEXIST)
"""Values of `errno` that mean that a disk or file server refuses to write."""


def study_name_of(folder: Path) -> str:
    """Return a study name derived from the name of `folder`, short enough to be prefixed with `train-`."""
    name = unicodedata.normalize("NFC", folder.name)
    return re.sub(r"[^\w .+-]+", "_", name).lstrip(" ._+-")[:74].rstrip(" .") or "images"


def absolute(path: str | os.PathLike[str]) -> Path:
    """Return `path` as an absolute path. `~` is expanded, and links are not resolved."""
    plain = Path(path).expanduser().absolute()
    short = Path(os.path.normpath(plain))
    # `link/..` is the parent of the link's target, so normpath must not remove both.
    return short if short.resolve() == plain.resolve() else plain


@dataclass(frozen=True)
class _Folder:
    """A folder whose files have fixed names."""

    root: Path


class _Entry:
    """Descriptor that returns the path of a file or folder below an instance's root."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __get__(self, folder: _Folder, owner: type | None = None) -> Path:
        return folder.root / self._name


class ProjectPaths(_Folder):
    """Paths in the project folder (`--out`): databases, artifacts, caches and all studies."""

    root: Path
    """Path of the project folder."""

    def __init__(self, root: str | os.PathLike[str]) -> None:
        super().__init__(Path(root))

    optuna_db = _Entry("hpsearch.db")
    mlflow_db = _Entry("mlflow.db")
    mlruns = _Entry("mlruns")
    looks = _Entry("test-looks.jsonl")
    """Log with one line for each evaluation of a test set."""
    cache = _Entry("cache")
    studies = _Entry("studies")

    def study(self, name: str) -> StudyPaths:
        """Return the paths of the study `name`. Raise ConfigError if this is not a folder name on every system."""
        if not _STUDY_NAME.fullmatch(name) or name.endswith((" ", ".")):
            rule = "letters, digits, '.', '_', '-', '+' and spaces, at most 80, beginning with a letter or digit"
            raise ConfigError(f"study name {name!r} cannot be a folder name: use {rule}")
        return StudyPaths(self.studies / name)

    def study_names(self) -> list[str]:
        """Return the sorted names of the studies in this project."""
        return sorted(path.parent.name for path in self.studies.glob("*/study.toml"))


class StudyPaths(_Folder):
    """Paths in the folder of one study."""

    toml = _Entry("study.toml")
    plan = _Entry("plan.json")
    folds = _Entry("folds.json")
    lock = _Entry("study.lock")
    holder = _Entry("holder.json")
    log = _Entry("study.log")
    stop_request = _Entry("stop")
    """File that exists while a stop of the study is requested. It contains `now` if the study must stop without
    finishing its current epochs."""
    enqueued = _Entry("enqueued.json")
    """Params that the user enqueued, in order."""
    confirmation = _Entry("confirmation.json")
    report = _Entry("report.html")
    figures = _Entry("figures")
    tracking = _Entry(".tracking")
    """Folder of files to be uploaded to MLflow. They are removed after the upload."""
    trials = _Entry("trials")
    finals = _Entry("final")

    @property
    def name(self) -> str:
        return self.root.name

    @property
    def project(self) -> ProjectPaths:
        return ProjectPaths(self.root.parent.parent)

    def trial_stop_request(self, number: int) -> Path:
        """Return the path of the file that exists while a stop of this trial is requested."""
        return self.root / f"stop-trial-{number}"

    def trial_toml(self, number: int) -> Path:
        """Return the path of the exported configuration of a trial."""
        return self.root / f"trial-{number:04d}.toml"

    def trial(self, number: int) -> TrialPaths:
        return TrialPaths(self.trials / f"{number:04d}")

    def trial_numbers(self) -> list[int]:
        """Return the numbers of the trials that have a folder, ascending."""
        return sorted(int(path.name) for path in self.trials.glob("*") if path.name.isdecimal())

    def final(self, run: str) -> FinalPaths:
        return FinalPaths(self.finals / run)

    def final_names(self) -> list[str]:
        """Return the sorted names of the `final` runs that have a result."""
        return sorted(path.name for path in self.finals.glob("*") if self.final(path.name).result.is_file())


class TrialPaths(_Folder):
    """Paths in the folder of one trial, which has a folder for each fold."""

    trial = _Entry("trial.json")
    taken = _Entry("taken.json")
    second = _Entry("second.json")

    def fold(self, fold: int, replicate: int = 0) -> FitPaths:
        return FitPaths(self.root / f"{'second' if replicate else 'fold'}{fold}")


class FitPaths(_Folder):
    """Paths in the folder of one fit: a configuration trained once on one set of images."""

    epochs = _Entry("epochs.jsonl")
    scores = _Entry("scores.npy")
    counts = _Entry("counts.npy")
    test_counts = _Entry("test_counts.npy")
    """tp, fp, fn and tn of each test image; only in the fits of a `final` run."""
    examples = _Entry("examples.npz")
    last = _Entry("last.pt")
    previous = _Entry("previous.pt")
    best = _Entry("best.pt")
    weights = _Entry("weights.safetensors")
    fit = _Entry("fit.json")
    attempt = _Entry("attempt")
    """Name of the attempt that may write here, while a cluster runs the fit."""


class FinalPaths(_Folder):
    """Paths in the folder of one `final` run: a retrained configuration and its results on the test split."""

    result = _Entry("final.json")
    config = _Entry("config.toml")
    table = _Entry("test.csv")
    masks = _Entry("masks")
    """Predicted masks of the test images at their original resolution, named as in the ISIC-2017 challenge."""
    official_counts = _Entry("official_counts.npy")
    """tp, fp, fn and tn of each test image at its original resolution, for the kept model (`model.safetensors`). The
    scores are computed from them as in the challenge."""
    submission = _Entry("submission.zip")
    panels = _Entry("panels.png")
    curves = _Entry("curves.png")
    model = _Entry("model.safetensors")
    choices = _Entry("choices.json")
    """Post-processing selected on out-of-fold predictions (threshold, flips and cleaning), with its scores."""
    chosen_counts = _Entry("chosen_counts.npy")
    """tp, fp, fn and tn of the test images at evaluation size, for the kept model with the selected
    post-processing."""
    ensemble = _Entry("ensemble")
    """Fold networks that are kept to predict as an ensemble."""
    ensemble_counts = _Entry("ensemble_counts.npy")
    ensemble_official_counts = _Entry("ensemble_official_counts.npy")
    card = _Entry("model-card.md")
    """Model card in Markdown: description, training data, scores and limitations of the model."""

    def seed(self, index: int) -> FitPaths:
        """Return the paths of the fit with seed number `index`, from 0 (`final --seeds 3` trains three fits)."""
        return FitPaths(self.root / f"seed{index}")


def command_line(command: str, study: str, project: ProjectPaths | None = None) -> str:
    """Return the shell command `hpsearch COMMAND --study STUDY`, with `--out` unless the project is `.`."""
    root = "." if project is None else str(project.root)
    out = "" if root == "." else f" --out {shlex.quote(root)}"
    return f"hpsearch {command} --study {shlex.quote(study)}{out}"


@contextmanager
def atomic_write(path: Path, *, sync: bool = True) -> Iterator[Path]:
    """Yield a temporary path next to `path`, and rename it to `path` if the block succeeds.

    The temporary name is unique, even across machines. `remove_stale_temporaries` removes the files that killed
    processes leave behind. If `sync` is true, the file and its new name are flushed to disk. Raises StorageError,
    naming the path, if writing fails.
    """
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        if sync:
            with temporary.open("rb+") as file:
                os.fsync(file.fileno())
        CHECK_WRITE.get()(path)
        temporary.replace(path)
        if sync:
            # A rename is durable only after its folder is synced.
            descriptor = os.open(path.parent, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
    except OSError as error:
        raise storage_error(path, error) from error
    finally:
        with suppress(OSError):
            temporary.unlink()


def write_text(path: Path, text: str) -> None:
    """Write `text` as UTF-8 atomically."""
    with atomic_write(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, table: Mapping[str, Any]) -> None:
    """Write `table` as indented JSON atomically, with a checksum, which `read_json` verifies and removes.

    Raises ValueError for NaN and infinity, which JSON does not support.
    """
    table = {**table, _CHECKSUM: _checksum(json.loads(json.dumps(table, allow_nan=False)))}
    write_text(path, json.dumps(table, indent=1, allow_nan=False, ensure_ascii=False) + "\n")


def read_json(path: Path) -> Any:
    """Return the JSON value in `path`.

    Raises RecordError, naming the file, if it is damaged, edited or missing.
    """
    with damage_named(path):
        value = json.loads(path.read_text(encoding="utf-8"))
    if isinstance(value, dict) and _CHECKSUM in value and value.pop(_CHECKSUM) != _checksum(value):
        raise RecordError(f"{path} was changed after it was written: restore it from a backup")
    return value


@contextmanager
def damage_named(path: Path, errors: tuple[type[Exception], ...] = _DAMAGE) -> Iterator[None]:
    """Convert errors in the block, which reads `path`, to a RecordError that names the file.

    An OSError means that the file cannot be read, and any of `errors` that it is damaged.
    """
    try:
        yield
    except OSError as error:
        raise RecordError(f"{path} cannot be read: {error.strerror or error}") from error
    except errors as error:
        raise RecordError(f"{path} is damaged: restore it from a backup") from error


def sha256_text(text: str) -> str:
    """Return the SHA-256 of `text` as UTF-8, in hexadecimal."""
    return hashlib.sha256(text.encode()).hexdigest()


def sha256_file(path: Path) -> str:
    """Return the SHA-256 of a file's content, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def digest(value: Any) -> str:
    """Return 16 hexadecimal digits of the SHA-256 of `value` as canonical JSON.

    `value` must consist of plain types.
    """
    return sha256_text(json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False))[:16]


def stable_seed(*parts: int | str) -> int:
    """Return a 31-bit seed that depends only on `parts`, not on the process or the machine."""
    return int(sha256_text("\x1f".join(map(str, parts)))[:8], 16) >> 1


def append_line(path: Path, line: str) -> None:
    """Append one line and flush it to disk. A crash may leave a last line without a newline, which readers ignore."""
    try:
        with path.open("ab") as file:
            CHECK_WRITE.get()(path)
            file.write(line.encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise storage_error(path, error) from error


def remove_stale_temporaries(folder: Path) -> None:
    """Remove temporary files that killed processes left behind in `folder`. The caller must hold the study's lock."""
    for path in folder.rglob(".*.tmp"):
        with suppress(OSError):
            path.unlink()


def storage_error(path: Path, error: OSError) -> StorageError:
    """Return a one-line error with the file, the reason, and what to do.

    The error states the free space if the disk is full.
    """
    room, advice = "", "check the disk and its permissions, or choose another folder with --out,"
    if error.errno in _FULL:
        room, advice = f" ({free_bytes(path) / 2**20:.0f} MiB free there)", "free some space"
    reason = error.strerror or error
    return StorageError(f"cannot write {path}: {reason}{room}; {advice} and run the same command again")


@contextmanager
def refusals_named(folder: Path) -> Iterator[None]:
    """Convert write errors in the block to a StorageError that names the file, or `folder` if the file is unknown."""
    try:
        yield
    except OSError as error:
        if error.errno not in _REFUSALS:
            raise
        raise storage_error(Path(os.fsdecode(error.filename or folder)), error) from error


def free_bytes(path: Path) -> int:
    """Return the number of free bytes on the disk of `path`. The path does not have to exist yet."""
    return shutil.disk_usage(next(each for each in (path, *path.parents) if each.exists())).free


def _checksum(table: dict[str, Any]) -> str:
    return sha256_text(json.dumps(table, sort_keys=True))
