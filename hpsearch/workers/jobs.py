"""Jobs that workers run and reports that they send back, as frozen dataclasses. Does not import torch."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from hpsearch.config import StudyConfig
from hpsearch.data.dataset import Sample
from hpsearch.data.reading import Reading
from hpsearch.inference.postprocessing import FoldNetwork, Postprocessing
from hpsearch.training.rows import EpochRow
from hpsearch.typed_json import from_json, to_json


@dataclass(frozen=True)
class WorkerSettings:
    """Settings of one worker, fixed for its lifetime."""

    device: str = "cpu"
    threads: int = 1


@dataclass(frozen=True, kw_only=True)
class Capacity:
    """Properties of a worker that determine which configurations it can train."""

    device: str
    """Type of the device: `cpu`, `cuda`, `mps` or `xla`."""
    precision: str
    """Precision of autocast if `train.amp` is auto: float32, bf16 or fp16."""
    memory_bytes: int
    """Memory of the device that the worker may use, in bytes."""


def worker_name(host: str, address: str) -> str:
    """Return the name of a Dask worker: its host and port, such as `lab1:40123`."""
    return f"{host}:{address.rpartition(':')[2]}"


@dataclass(frozen=True, kw_only=True)
class ClusterWorker:
    """A Dask worker and its device."""

    address: str
    host: str
    device_name: str
    """Name of the GPU or of the processor."""
    unit: str
    """Identifier of the GPU, or the host. Dask workers with the same unit share its memory."""
    threads: int
    capacity: Capacity
    is_connected: bool = True

    @property
    def name(self) -> str:
        """Name of the Dask worker in all messages."""
        return worker_name(self.host, self.address)


@dataclass(frozen=True)
class CachePaths:
    """Paths of the caches of decoded images that a job uses."""

    images: Path
    """Cache from which the images for the network are taken."""
    truth: Path | None = None
    """Cache of the same images at the size at which predictions are scored; None if it is the same cache."""


@dataclass(frozen=True, kw_only=True)
class FitJob:
    """Job that trains one network, saves a checkpoint after each epoch, and scores the held-out images."""

    trial: int
    fold: int
    config: StudyConfig
    folder: Path
    caches: CachePaths
    train: tuple[int, ...]
    """Indices of the training images in the cache."""
    held_out: tuple[int, ...]
    """Indices of the held-out images in the cache; empty for the fits of `hpsearch final`."""
    seed: int
    replicate: int = 0
    """Number of the replicate: 0 for the first fit of this fold, 1 for the second fit, which uses another seed."""
    attempt: str = ""
    """Name of the attempt on a cluster (`workers.attempts`); empty on this machine."""

    @property
    def name(self) -> str:
        """Name of the fit, for the log."""
        if not self.held_out:
            return f"the final fit of trial {self.trial}"
        return f"{'the refit of ' if self.replicate else ''}trial {self.trial}, fold {self.fold + 1}"


@dataclass(frozen=True, kw_only=True)
class OfficialScoreJob:
    """Job that counts pixels for the scores of the ISIC-2017 challenge.

    It predicts a mask at the original resolution of each image and compares it with the true mask.
    """

    weights: tuple[Path, ...]
    """Weights file of one network, or of several networks whose logits are averaged."""
    reading: Reading
    """Rules for decoding the images and masks."""
    images: tuple[Sample, ...]
    masks: Path | None
    """Folder for the predicted masks; None to write no masks."""
    counts: Path
    """File for the pixel counts tp, fp, fn, tn of each image."""


@dataclass(frozen=True, kw_only=True)
class SelectPostprocessingJob:
    """Job that selects the post-processing on out-of-fold predictions: threshold, flips, cleaning and ensemble."""

    config: StudyConfig
    caches: CachePaths
    networks: tuple[FoldNetwork, ...]
    source: str
    """Description of the networks, for messages."""
    ensemble: bool
    """Whether to consider the ensemble of all networks."""
    out: Path
    """JSON file to which the selection is written."""


@dataclass(frozen=True, kw_only=True)
class KeepJob:
    """Job that copies weights files and stores the selected post-processing in the copies."""

    copies: tuple[tuple[Path, Path], ...]
    """Pairs of paths: a weights file and its copy."""
    postprocessing: Postprocessing


@dataclass(frozen=True, kw_only=True)
class CountJob:
    """Job that predicts all images of a cache with one network or an ensemble, and writes the pixel counts."""

    config: StudyConfig
    caches: CachePaths
    weights: tuple[Path, ...]
    """Weights file of one network, or of several networks whose logits are averaged."""
    postprocessing: Postprocessing
    counts: Path
    """File for the pixel counts tp, fp, fn, tn of each image."""
    examples: Path | None = None
    """File for a few example predictions of the first network; None to save none."""


@dataclass(frozen=True)
class StepToMeasure:
    """Configuration whose training step is timed, and the images to use."""

    config: StudyConfig
    caches: CachePaths


@dataclass(frozen=True, kw_only=True)
class MeasureJob:
    """Job that times the training step of each configuration and describes the machine."""

    config: StudyConfig
    threads: int
    steps: tuple[StepToMeasure, ...]
    seconds: float = 0.2
    """Each step is repeated for at least this many seconds."""


@dataclass(frozen=True)
class MeasuredStep:
    """Measured seconds per image in training and evaluation with one configuration."""

    flops: int
    """FLOPs of a training step per image."""
    train_s: float
    eval_s: float


@dataclass(frozen=True)
class Measurement:
    """Result of a MeasureJob."""

    device: str
    n_devices: int
    precision: str
    """Precision of autocast if `train.amp` is auto: float32, bf16 or fp16."""
    memory_bytes: int
    """Free memory of the device in bytes."""
    steps: tuple[MeasuredStep, ...]
    machine: dict[str, Any]


Job = FitJob | OfficialScoreJob | SelectPostprocessingJob | KeepJob | CountJob | MeasureJob


@dataclass(frozen=True)
class Ready:
    """Report that the worker has started and waits for a job."""


@dataclass(frozen=True)
class EpochEnded:
    """Report that an epoch has ended and its checkpoint is written. The worker waits for a reply: continue or
    stop."""

    row: EpochRow


@dataclass(frozen=True)
class Finished:
    """Report that the job is done."""

    value: float | None = None
    """Mean score over the held-out images after the last epoch of a FitJob; None without held-out images or for other
    jobs."""
    measurement: Measurement | None = None
    """Result of a MeasureJob; None for other jobs."""


@dataclass(frozen=True)
class Stopped:
    """Report that the fit was stopped after an epoch, as requested."""


@dataclass(frozen=True, kw_only=True)
class Failed:
    """Report that the job ended without a result."""

    error: str = ""
    """Name of the error's class in `hpsearch.errors`; "died" if the process ended; empty for a bug in hpsearch."""
    text: str
    traceback: str = ""


Report = Ready | EpochEnded | Finished | Stopped | Failed
_CLASSES: dict[str, type[Any]] = {cls.__name__: cls for cls in (*get_args(Job), *get_args(Report))}


def to_message(part: Job | Report) -> dict[str, Any]:
    """Return a job or report as a JSON table, which `from_message` can read."""
    return {**to_json(part), "class": type(part).__name__}


def from_message(table: Mapping[str, Any]) -> Any:
    """Return the job or report that `to_message` converted to a table."""
    return from_json(_CLASSES[table["class"]], table)
