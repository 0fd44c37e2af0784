"""Define the exceptions for errors that a user can cause or fix.

    HpsearchError               shown as one line, with exit code 1
    ├── ConfigError             a setting, flag or TOML key is unknown or has an invalid value
    ├── DatasetError            images or masks are missing, damaged or do not match
    ├── CacheError              a cache of decoded images cannot be created or read
    ├── DeviceError             a device does not exist or has too little memory
    │   └── OutOfMemoryError    a fit ran out of memory; its memory has been released
    ├── DivergedError           the training loss became NaN or infinite
    ├── CheckpointError         a checkpoint or weights file is damaged or unsafe to load, or belongs to another fit
    ├── StudyError              a study is missing or cannot continue as requested
    │   ├── StudyChangedError   settings that must not change differ from those of the study
    │   ├── StudyLockedError    another process is running the study
    │   ├── StoppedError        the run was stopped before it had a result
    │   └── RecordError         the study folder is damaged
    ├── ExportError             a model cannot be exported, or gives different results after export
    ├── TrackingError           MLflow rejects a request or cannot be reached
    ├── StorageError            a file cannot be written: no space, no permission, or a faulty disk
    └── WorkerError             a worker died or failed, and the configuration is not the cause

Any other exception is a bug in `hpsearch` and keeps its traceback.
"""

import re
import struct
import zlib
from zipfile import BadZipFile

ZIP_ERRORS = (BadZipFile, zlib.error, struct.error, EOFError, RuntimeError, ValueError, OverflowError, OSError)
"""Exceptions that `zipfile`, and NumPy for .npz files, raise if a file is damaged."""


class HpsearchError(Exception):
    """Base class of all errors that are shown as one line on the terminal."""


class ConfigError(HpsearchError):
    """Raised when a setting, flag or TOML key is unknown or has an invalid value."""


class DatasetError(HpsearchError):
    """Raised when images or masks are missing, damaged or do not match."""


class CacheError(HpsearchError):
    """Raised when a cache of decoded images cannot be created or read."""


class DeviceError(HpsearchError):
    """Raised when a device does not exist or has too little memory."""


class OutOfMemoryError(DeviceError):
    """Raised when a fit has run out of memory, after its memory has been released."""


class DivergedError(HpsearchError):
    """Raised when the training loss becomes NaN or infinite."""

    def __init__(self, epoch: int, loss: float) -> None:
        super().__init__(f"the training loss became {loss} in epoch {epoch}")
        self.epoch = epoch
        self.loss = loss


class CheckpointError(HpsearchError):
    """Raised when a checkpoint or weights file is damaged or unsafe to load, or belongs to another fit."""


class StudyError(HpsearchError):
    """Raised when a study is missing or cannot continue as requested."""


class StudyChangedError(StudyError):
    """Raised when settings that must not change differ from those with which the study was started."""


class StudyLockedError(StudyError):
    """Raised when another process is running the study."""


class StoppedError(StudyError):
    """Raised when a run is stopped before it has a result."""

    def __init__(self, text: str, signal: int) -> None:
        super().__init__(text)
        self.signal = signal
        """Number of the signal that requested the stop; 0 if there was no signal."""


class RecordError(StudyError):
    """Raised when the study folder is damaged."""


class ExportError(HpsearchError):
    """Raised when a model cannot be exported, or gives different results after export."""


class TrackingError(HpsearchError):
    """Raised when MLflow rejects a request or cannot be reached."""


class StorageError(HpsearchError):
    """Raised when a file cannot be written: no space, no permission, or a faulty disk."""


class WorkerError(HpsearchError):
    """Raised when a worker dies or fails, and the configuration of the trial is not the cause."""


def redact(text: str) -> str:
    """Return `text` with the credentials in all URLs replaced by `***`."""
    text = re.sub(r"(?<=://)(?:[^:/@\s]*:\S*|[^/\s]*)@", "***@", text)
    return re.sub(r"(?i)([?&][^=&\s]*(?:password|passwd|secret|token|key)[^=&\s]*=)[^&\s]+", r"\1***", text)
