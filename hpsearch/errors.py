"""Every error that a user can cause or mend, as one tree.

    HpsearchError               ends as one line and exit code 1
    ├── ConfigError             a setting, flag or TOML key that cannot be
    ├── DatasetError            images or masks that are missing, damaged or do not fit together
    ├── CacheError              a decoded cache that cannot be made or read
    ├── DeviceError             a device that is not there, or has too little memory
    │   └── OutOfMemoryError    memory ran out in a fit; all of it was given back
    ├── DivergedError           a loss that became NaN or infinite
    ├── CheckpointError         a checkpoint or weights file that is torn, foreign or unsafe
    ├── StudyError              a study that is missing or cannot continue as requested
    │   ├── StudyChangedError   fixed settings differ from those the study was begun with
    │   ├── StudyLockedError    another process holds the study
    │   ├── StoppedError        asked to stop before there was anything to keep
    │   └── RecordError         the study folder is damaged
    ├── ExportError             a model that cannot be handed on, or would compute something else elsewhere
    ├── TrackingError           MLflow refuses or cannot be reached
    ├── StorageError            a file cannot be written: no space, no permission, a faulty disk
    └── WorkerError             a worker died or failed in a way that is not the configuration's fault

Any other exception is a fault in `hpsearch` and keeps its traceback.
"""

import re
import struct
import zlib
from zipfile import BadZipFile

ZIP_ERRORS = (BadZipFile, zlib.error, struct.error, EOFError, RuntimeError, ValueError, OverflowError, OSError)
"""Exceptions that `zipfile`, and numpy for .npz files, raise on damaged bytes."""


class HpsearchError(Exception):
    """Base of all errors that end as one line on the terminal."""


class ConfigError(HpsearchError):
    """A setting, flag or TOML key that is unknown or has an invalid value."""


class DatasetError(HpsearchError):
    """Images or masks that are missing, damaged or do not fit together."""


class CacheError(HpsearchError):
    """A decoded cache that cannot be made or read."""


class DeviceError(HpsearchError):
    """A device that is not there, or has too little memory."""


class OutOfMemoryError(DeviceError):
    """Memory ran out in a fit; all of it was given back."""


class DivergedError(HpsearchError):
    """A loss that became NaN or infinite."""

    def __init__(self, epoch: int, loss: float) -> None:
        super().__init__(f"the training loss became {loss} in epoch {epoch}")
        self.epoch = epoch
        self.loss = loss


class CheckpointError(HpsearchError):
    """A checkpoint or weights file that is torn, foreign or unsafe to load."""


class StudyError(HpsearchError):
    """A study that is missing or cannot continue as requested."""


class StudyChangedError(StudyError):
    """Fixed settings differ from those the study was begun with."""


class StudyLockedError(StudyError):
    """Another process holds the study."""


class StoppedError(StudyError):
    """Asked to stop before there was anything to keep."""

    def __init__(self, text: str, signal: int) -> None:
        super().__init__(text)
        self.signal = signal
        """Number of the signal that asked, 0 if none did."""


class RecordError(StudyError):
    """The study folder is damaged."""


class ExportError(HpsearchError):
    """A model that cannot be handed on to other programs, or would compute something else there."""


class TrackingError(HpsearchError):
    """MLflow refuses or cannot be reached."""


class StorageError(HpsearchError):
    """A file cannot be written: no space, no permission, a faulty disk."""


class WorkerError(HpsearchError):
    """A worker died or failed in a way that is not the configuration's fault."""


def redact(text: str) -> str:
    """Return `text` with the credentials of every address in it replaced by `***`."""
    text = re.sub(r"(?<=://)(?:[^:/@\s]*:\S*|[^/\s]*)@", "***@", text)
    return re.sub(r"(?i)([?&][^=&\s]*(?:password|passwd|secret|token|key)[^=&\s]*=)[^&\s]+", r"\1***", text)
