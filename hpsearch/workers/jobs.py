"""Jobs that a worker runs and reports that it sends back, as frozen dataclasses. Imports no torch."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from hpsearch.config import StudyConfig
from hpsearch.data.reading import Reading
from hpsearch.inference.postprocessing import FoldNetwork, Postprocessing
from hpsearch.training.rows import EpochRow
from hpsearch.typed_json import from_json, to_json


@dataclass(frozen=True)
class WorkerSettings:
    """Settings of one worker, fixed for its lifetime."""

    device: str = "cpu"
    threads: int = 1


@dataclass(frozen=True)
class CachePaths:
    """The decoded images of a job."""

    images: Path
    """Cache of the images at the size that the network sees."""
    truth: Path | None = None
    """Cache at the size at which predictions are scored; None if it is the same cache."""


@dataclass(frozen=True, kw_only=True)
class FitJob:
    """Train one network, with a checkpoint after each epoch, and score it on the held-out images."""

    trial: int
    fold: int
    config: StudyConfig
    folder: Path
    caches: CachePaths
    train: tuple[int, ...]
    """Indices of the training images in the cache."""
    held_out: tuple[int, ...]
    """Indices of the held-out images; empty for a final fit."""
    seed: int
    replicate: int = 0
    """0: the first fit of this fold; 1: the second one, with another seed."""
    keep_best: bool = False
    """Whether the weights of the best epoch are kept too."""


@dataclass(frozen=True)
class ImageFiles:
    """An image and its mask as files."""

    name: str
    image: Path
    mask: Path


@dataclass(frozen=True, kw_only=True)
class OfficialScoreJob:
    """Predict masks at the images' own resolution and count their pixels against the true masks."""

    weights: tuple[Path, ...]
    """One network, or several that predict by their mean logits."""
    reading: Reading
    images: tuple[ImageFiles, ...]
    masks: Path | None
    """Folder for the predicted masks; None to write none."""
    counts: Path


@dataclass(frozen=True, kw_only=True)
class SelectPostprocessingJob:
    """Select threshold, test-time flips, mask cleaning and ensemble on out-of-fold predictions."""

    config: StudyConfig
    metric: str
    caches: CachePaths
    networks: tuple[FoldNetwork, ...]
    source: str
    """Description of the networks, for messages."""
    ensemble: bool
    """Whether the ensemble is considered."""
    out: Path
    """JSON file for the decisions."""


@dataclass(frozen=True)
class WeightsCopy:
    """A weights file and the path of its copy."""

    source: Path
    target: Path


@dataclass(frozen=True, kw_only=True)
class KeepJob:
    """Copy weights files and store the selected post-processing in the copies."""

    copies: tuple[WeightsCopy, ...]
    postprocessing: Postprocessing


@dataclass(frozen=True, kw_only=True)
class CountJob:
    """Predict all images of a cache by the mean logits of the networks, and write the pixel counts of each image."""

    config: StudyConfig
    caches: CachePaths
    weights: tuple[Path, ...]
    postprocessing: Postprocessing
    counts: Path
    examples: Path | None = None
    """File for a few predictions of the first network; None to save none."""


@dataclass(frozen=True)
class StepToMeasure:
    """A configuration whose training step is timed, with the images to use."""

    config: StudyConfig
    caches: CachePaths


@dataclass(frozen=True, kw_only=True)
class MeasureJob:
    """Time the training step of each configuration, and describe the machine."""

    config: StudyConfig
    threads: int
    steps: tuple[StepToMeasure, ...]
    seconds: float = 0.2
    """Minimum time for which each step is repeated."""


@dataclass(frozen=True)
class MeasuredStep:
    """Seconds per image of one configuration, measured on the device."""

    flops: int
    """FLOPs of the training step of one image."""
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
    """Free memory of the device."""
    steps: tuple[MeasuredStep, ...]
    machine: dict[str, Any]


Job = FitJob | OfficialScoreJob | SelectPostprocessingJob | KeepJob | CountJob | MeasureJob


@dataclass(frozen=True)
class Ready:
    """The worker has started and waits for a job."""


@dataclass(frozen=True)
class EpochEnded:
    """An epoch of a fit has ended and its checkpoint is written. The worker waits for the answer: go on, or stop."""

    row: EpochRow


@dataclass(frozen=True)
class Finished:
    """The job is done."""

    value: float | None = None
    """Of a FitJob: mean score over the held-out images after the last epoch; None without held-out images."""
    measurement: Measurement | None = None
    """Of a MeasureJob."""


@dataclass(frozen=True)
class Stopped:
    """The fit was stopped after an epoch, as requested."""


@dataclass(frozen=True, kw_only=True)
class Failed:
    """The job ended without a result."""

    error: str = ""
    """Name of the error's class in `hpsearch.errors`; `died`: the process ended; "": a bug in hpsearch."""
    text: str
    traceback: str = ""


Report = Ready | EpochEnded | Finished | Stopped | Failed
_CLASSES: dict[str, type[Any]] = {cls.__name__: cls for cls in (*get_args(Job), *get_args(Report))}


def to_message(part: Job | Report) -> dict[str, Any]:
    """Return a JSON table, which `from_message` reads."""
    return {**to_json(part), "class": type(part).__name__}


def from_message(table: Mapping[str, Any]) -> Any:
    """Return the job or report in a table of `to_message`."""
    return from_json(_CLASSES[table["class"]], table)
