"""Names every file that hpsearch writes, and writes them whole or not at all.

OUT/
  hpsearch.db   mlflow.db   mlruns/         Optuna's and MLflow's, brought up to date from the record
  test-looks.jsonl                          every scoring of a test set
  cache/<key>/                              decoded images, shared by all studies
  studies/<name>/                           the record of one study
    study.toml   plan.json   folds.json     settings, execution plan, fold of every image
    study.lock   holder.json   study.log    who runs it; one line per event
    confirmation.json                       the configurations that are fitted once more, and of which it was chosen
    coordinators/<host>-<pid>-<n>/          of each coordinator, where several share the study: log, state.json
    trials/0007/
      trial.json                            params, outcome, value, decisions
      taken.json                            there if its coordinator died: the trial that goes on with it
      second.json   second2/                once more with other seeds: how that went, one fit of it
      fold2/                                one fit
        epochs.jsonl                        one line per epoch
        scores.npy                          (epochs, held-out images) float32, the study's metric
        counts.npy                          (held-out images, 4) int64: tp, fp, fn, tn after the last epoch
        examples.npz                        a few held-out predictions for the panels
        last.pt   previous.pt   best.pt     checkpoints, gone when the fit is done (best.pt stays)
        weights.safetensors                 the network after the last epoch
        fit.json                            appears last: the fit is finished
    final/<run>/                            a retrained configuration, its test scores and model
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shlex
import shutil
import unicodedata
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hpsearch.errors import ConfigError, RecordError, StorageError

_STUDY_NAME = re.compile(r"[^\W_][\w .+-]{0,79}")


_CHECKSUM = "sha256"
"""Key of the checksum in a JSON table."""
_REFUSALS = frozenset(
    {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO, errno.ENOTDIR, errno.ESTALE}
)
"""What a disk, or whoever keeps it, answers to who wants to write."""


def check_study_name(name: str) -> str:
    """`name` itself if it can be a folder everywhere; ConfigError otherwise."""
    if not _STUDY_NAME.fullmatch(name) or name.endswith((" ", ".")):
        raise ConfigError(
            f"study name {name!r} cannot be a folder name: use letters, digits, '.', '_', '-', '+' and spaces, "
            "at most 80, beginning with a letter or digit"
        )
    return name


def study_name_of(folder: Path) -> str:
    """Return a study's name for the images in `folder`: its name, fit for `train-NAME` too."""
    name = unicodedata.normalize("NFC", folder.name)
    return re.sub(r"[^\w .+-]+", "_", name).lstrip(" ._+-")[:74].rstrip(" .") or "images"


def absolute(path: str | os.PathLike[str]) -> Path:
    """Return `path` from the root of the file system: `~` is the home folder, and links stay as they are."""
    plain = Path(path).expanduser().absolute()
    short = Path(os.path.normpath(plain))
    # `link/..` is the parent of the link's target, which taking both out of the path would miss.
    return short if short.resolve() == plain.resolve() else plain


@dataclass(frozen=True)
class ProjectPaths:
    """The folder that `--out` names: databases, artifacts, caches and all studies."""

    root: Path
    """The folder itself, given as a path or a string."""

    def __init__(self, root: str | os.PathLike[str]) -> None:
        object.__setattr__(self, "root", Path(root))

    @property
    def optuna_db(self) -> Path:
        return self.root / "hpsearch.db"

    @property
    def mlflow_db(self) -> Path:
        return self.root / "mlflow.db"

    @property
    def mlruns(self) -> Path:
        return self.root / "mlruns"

    @property
    def looks(self) -> Path:
        """One line for every time that a test set was scored."""
        return self.root / "test-looks.jsonl"

    @property
    def cache(self) -> Path:
        return self.root / "cache"

    @property
    def studies(self) -> Path:
        return self.root / "studies"

    def study(self, name: str) -> StudyPaths:
        return StudyPaths(self.studies / check_study_name(name))

    def study_names(self) -> list[str]:
        """Names of the studies that were begun here, sorted."""
        if not self.studies.is_dir():
            return []
        return sorted(path.name for path in self.studies.iterdir() if (path / "study.toml").is_file())


@dataclass(frozen=True)
class StudyPaths:
    """The record of one study."""

    root: Path

    @property
    def name(self) -> str:
        return self.root.name

    @property
    def project(self) -> ProjectPaths:
        return ProjectPaths(self.root.parent.parent)

    @property
    def toml(self) -> Path:
        return self.root / "study.toml"

    @property
    def plan(self) -> Path:
        return self.root / "plan.json"

    @property
    def folds(self) -> Path:
        return self.root / "folds.json"

    @property
    def lock(self) -> Path:
        return self.root / "study.lock"

    @property
    def holder(self) -> Path:
        return self.root / "holder.json"

    @property
    def log(self) -> Path:
        return self.root / "study.log"

    @property
    def stop_request(self) -> Path:
        """There while somebody asks the study to stop; holds `now` if it shall not wait for the epoch."""
        return self.root / "stop"

    def trial_stop_request(self, number: int) -> Path:
        """There while somebody asks that this trial end."""
        return self.root / f"stop-trial-{number}"

    @property
    def enqueued(self) -> Path:
        """Params that a user wants tried, in order."""
        return self.root / "enqueued.json"

    @property
    def confirmation(self) -> Path:
        return self.root / "confirmation.json"

    @property
    def report(self) -> Path:
        return self.root / "report.html"

    @property
    def figures(self) -> Path:
        return self.root / "figures"

    @property
    def tracking(self) -> Path:
        """Temporary folder for files on their way to MLflow."""
        return self.root / ".tracking"

    @property
    def sharing(self) -> Path:
        """There where several coordinators share the study: database, heartbeat and grace."""
        return self.root / "sharing.json"

    @property
    def coordinators(self) -> Path:
        return self.root / "coordinators"

    @property
    def trials(self) -> Path:
        return self.root / "trials"

    @property
    def finals(self) -> Path:
        return self.root / "final"

    def trial_toml(self, number: int) -> Path:
        """One trial's configuration, exported."""
        return self.root / f"trial-{number:04d}.toml"

    def trial(self, number: int) -> TrialPaths:
        return TrialPaths(self.trials / f"{number:04d}")

    def trial_numbers(self) -> list[int]:
        """Numbers of the trials that have a folder, ascending."""
        if not self.trials.is_dir():
            return []
        return sorted(int(path.name) for path in self.trials.iterdir() if path.name.isdecimal())

    def final(self, run: str) -> FinalPaths:
        return FinalPaths(self.finals / run)

    def final_names(self) -> list[str]:
        """Return the sorted names of the finals that have a result."""
        return sorted(path.name for path in self.finals.glob("*") if self.final(path.name).result.is_file())


@dataclass(frozen=True)
class TrialPaths:
    """One trial: what was suggested, what came out, and a folder for each fold."""

    root: Path

    @property
    def number(self) -> int:
        return int(self.root.name)

    @property
    def trial(self) -> Path:
        return self.root / "trial.json"

    @property
    def taken(self) -> Path:
        return self.root / "taken.json"

    def fold(self, fold: int) -> FitPaths:
        return FitPaths(self.root / f"fold{fold}")

    @property
    def second(self) -> Path:
        return self.root / "second.json"

    def second_fold(self, fold: int) -> FitPaths:
        return FitPaths(self.root / f"second{fold}")


@dataclass(frozen=True)
class FitPaths:
    """One fit: a configuration trained once on one set of images."""

    root: Path

    @property
    def epochs(self) -> Path:
        return self.root / "epochs.jsonl"

    @property
    def scores(self) -> Path:
        return self.root / "scores.npy"

    @property
    def counts(self) -> Path:
        return self.root / "counts.npy"

    @property
    def test_counts(self) -> Path:
        """Of a final fit: tp, fp, fn, tn of every test image."""
        return self.root / "test_counts.npy"

    @property
    def examples(self) -> Path:
        return self.root / "examples.npz"

    @property
    def last(self) -> Path:
        return self.root / "last.pt"

    @property
    def previous(self) -> Path:
        return self.root / "previous.pt"

    @property
    def best(self) -> Path:
        return self.root / "best.pt"

    @property
    def weights(self) -> Path:
        return self.root / "weights.safetensors"

    @property
    def fit(self) -> Path:
        return self.root / "fit.json"


@dataclass(frozen=True)
class FinalPaths:
    """One retrained configuration and what it gave on the test split."""

    root: Path

    @property
    def result(self) -> Path:
        return self.root / "final.json"

    @property
    def config(self) -> Path:
        return self.root / "config.toml"

    @property
    def table(self) -> Path:
        return self.root / "test.csv"

    @property
    def masks(self) -> Path:
        """Predicted masks of the test images at their own resolution, named as the challenge names them."""
        return self.root / "masks"

    @property
    def official_counts(self) -> Path:
        """tp, fp, fn, tn of those masks."""
        return self.root / "official_counts.npy"

    @property
    def submission(self) -> Path:
        return self.root / "submission.zip"

    @property
    def panels(self) -> Path:
        return self.root / "panels.png"

    @property
    def curves(self) -> Path:
        return self.root / "curves.png"

    @property
    def model(self) -> Path:
        return self.root / "model.safetensors"

    @property
    def choices(self) -> Path:
        """What was decided out of fold about threshold, flips and cleaning, and on what grounds."""
        return self.root / "choices.json"

    @property
    def chosen_counts(self) -> Path:
        """tp, fp, fn, tn of the test images at the size of evaluation, of the model kept, by those choices."""
        return self.root / "chosen_counts.npy"

    @property
    def ensemble(self) -> Path:
        """Networks of the folds, kept to predict together."""
        return self.root / "ensemble"

    @property
    def ensemble_counts(self) -> Path:
        return self.root / "ensemble_counts.npy"

    @property
    def ensemble_official_counts(self) -> Path:
        return self.root / "ensemble_official_counts.npy"

    @property
    def ensemble_masks(self) -> Path:
        return self.root / "ensemble_masks"

    @property
    def card(self) -> Path:
        """What the model is, was trained on and scores, and what it is not for, in Markdown."""
        return self.root / "model-card.md"

    def seed(self, index: int) -> FitPaths:
        """The fit with the index-th seed (`final --seeds 3` makes three)."""
        return FitPaths(self.root / f"seed{index}")


def command_line(command: str, study: str, project: ProjectPaths | None = None) -> str:
    """Return `hpsearch COMMAND --study STUDY` for a shell, with `--out` where the project is not `.`."""
    root = "." if project is None else str(project.root)
    out = "" if root == "." else f" --out {shlex.quote(root)}"
    return f"hpsearch {command} --study {shlex.quote(study)}{out}"


@contextmanager
def atomic_write(path: Path, *, sync: bool = True) -> Iterator[Path]:
    """Yield a temporary path beside `path`; rename it to `path` when the block succeeds.

    The name carries the process id, so that a file left by a killed process is known as such
    (`remove_stale_temporaries`). Raises StorageError, naming path and free space, when the disk refuses.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        if sync:
            with temporary.open("rb+") as file:
                os.fsync(file.fileno())
        temporary.replace(path)
        if sync:
            _sync_folder(path.parent)
    except OSError as error:
        raise storage_error(path, error) from error
    finally:
        with suppress(OSError):
            temporary.unlink()


def write_text(path: Path, text: str) -> None:
    """Write `text` as UTF-8, whole or not at all."""
    with atomic_write(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    """Write `value` as indented JSON, whole or not at all. NaN and infinity are refused: they are not JSON.

    A table gets a checksum, which `read_json` looks at and takes off.
    """
    if isinstance(value, dict):
        value = {**value, _CHECKSUM: _checksum(json.loads(json.dumps(value, allow_nan=False)))}
    write_text(path, json.dumps(value, indent=1, allow_nan=False, ensure_ascii=False) + "\n")


def read_json(path: Path) -> Any:
    """The JSON value in `path`. RecordError, naming the file, if it is damaged, edited or missing."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise RecordError(f"{path} is missing") from error
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise RecordError(f"{path} is damaged: {error}") from error
    except OSError as error:
        raise RecordError(f"{path} cannot be read: {error.strerror or error}") from error
    if isinstance(value, dict) and _CHECKSUM in value and value.pop(_CHECKSUM) != _checksum(value):
        raise RecordError(f"{path} was changed since it was written: put it back from a copy")
    return value


def sha256_text(text: str) -> str:
    """SHA-256 of the UTF-8 of `text`, in hexadecimal."""
    return hashlib.sha256(text.encode()).hexdigest()


def append_line(path: Path, line: str) -> None:
    """Append one line and sync it. A line torn by a crash has no newline and is recognised by that."""
    try:
        with path.open("ab") as file:
            file.write(line.encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise storage_error(path, error) from error


def remove_stale_temporaries(folder: Path) -> None:
    """Remove what `atomic_write` left below `folder` when its process was killed. Call it while holding the study."""
    for path in folder.rglob(".*.tmp"):
        with suppress(OSError):
            path.unlink()


def storage_error(path: Path, error: OSError) -> StorageError:
    """One line that says which file, why, how much room is left, and what to do."""
    reason = error.strerror or str(error)
    try:
        room = f"{free_bytes(path) / 2**20:.0f} MiB free there"
    except OSError:
        room = "how much is free there cannot be found out"
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        advice = "make room and run the same command again"
    elif error.errno in (errno.EROFS, errno.EACCES, errno.EPERM):
        advice = "choose another folder with --out, or give yourself the right to write there"
    else:
        advice = "see to the disk and run the same command again"
    return StorageError(f"cannot write {path}: {reason} ({room}); {advice}")


@contextmanager
def refusals_named(folder: Path) -> Iterator[None]:
    """Turn what a disk refuses in the block into a StorageError that names the file, or else `folder`."""
    try:
        yield
    except OSError as error:
        if error.errno not in _REFUSALS:
            raise
        raise storage_error(Path(os.fsdecode(error.filename or folder)), error) from error


def free_bytes(path: Path) -> int:
    """Free space on the disk that holds `path`, or will."""
    folder = path
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    return shutil.disk_usage(folder).free


def _checksum(table: dict[str, Any]) -> str:
    return sha256_text(json.dumps(table, sort_keys=True))


def _sync_folder(folder: Path) -> None:
    # The rename itself is only durable once the folder is.
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
