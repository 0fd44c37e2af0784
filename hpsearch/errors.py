"""The tree of exceptions for errors that a user can cause or fix.

    HpsearchError               shown as one line, with exit code 1
    ├── ConfigError             a setting, flag or TOML key that is unknown or has an invalid value
    ├── DatasetError            images or masks that are missing, damaged or do not match
    ├── CacheError              a cache of decoded images that cannot be created or read
    ├── DeviceError             a device that does not exist or has too little memory
    │   └── OutOfMemoryError    a fit ran out of memory; its memory was released
    ├── DivergedError           a loss that became NaN or infinite
    ├── CheckpointError         a checkpoint or weights file that is damaged, of another origin, or unsafe to load
    ├── StudyError              a study that is missing or cannot continue as requested
    │   ├── StudyChangedError   settings that must not change differ from those that the study was started with
    │   ├── StudyLockedError    another process is running the study
    │   ├── StoppedError        the run was stopped before it had a result
    │   └── RecordError         the study folder is damaged
    ├── ExportError             a model that cannot be exported, or gives different results after export
    ├── TrackingError           MLflow rejects a request or cannot be reached
    ├── StorageError            a file cannot be written: no space, no permission, a faulty disk
    └── WorkerError             a worker died or failed for a reason other than its configuration

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
    """A setting, flag or TOML key that is unknown or has an invalid value."""


class DatasetError(HpsearchError):
    """Images or masks that are missing, damaged or do not match."""


class CacheError(HpsearchError):
    """A cache of decoded images that cannot be created or read."""


class DeviceError(HpsearchError):
    """A device that does not exist or has too little memory."""


class OutOfMemoryError(DeviceError):
    """A fit ran out of memory; its memory was released."""


class DivergedError(HpsearchError):
    """A loss that became NaN or infinite."""

    def __init__(self, epoch: int, loss: float) -> None:
        super().__init__(f"the training loss became {loss} in epoch {epoch}")
        self.epoch = epoch
        self.loss = loss


class CheckpointError(HpsearchError):
    """A checkpoint or weights file that is damaged, of another origin, or unsafe to load."""


class StudyError(HpsearchError):
    """A study that is missing or cannot continue as requested."""


class StudyChangedError(StudyError):
    """Settings that must not change differ from those that the study was started with."""


class StudyLockedError(StudyError):
    """Another process is running the study."""


class StoppedError(StudyError):
    """The run was stopped before it had a result."""

    def __init__(self, text: str, signal: int) -> None:
        super().__init__(text)
        self.signal = signal
        """Number of the signal that requested the stop; 0 if there was no signal."""


class RecordError(StudyError):
    """The study folder is damaged."""


class ExportError(HpsearchError):
    """A model that cannot be exported, or gives different results after export."""


class TrackingError(HpsearchError):
    """MLflow rejects a request or cannot be reached."""


class StorageError(HpsearchError):
    """A file cannot be written: no space, no permission, a faulty disk."""


class WorkerError(HpsearchError):
    """A worker died or failed for a reason other than its configuration."""


def redact(text: str) -> str:
    """Return `text` with the credentials in all URLs replaced by `***`."""
    text = re.sub(r"(?<=://)(?:[^:/@\s]*:\S*|[^/\s]*)@", "***@", text)
    return re.sub(r"(?i)([?&][^=&\s]*(?:password|passwd|secret|token|key)[^=&\s]*=)[^&\s]+", r"\1***", text)
