"""Export a model as ONNX (verified against PyTorch), and a trial as a TOML file that can be trained again."""

import importlib.util
import json
import logging
import shlex
import warnings
from pathlib import Path

import numpy as np
import torch
from torch import nn

from hpsearch import __version__
from hpsearch.config.data import GRAY_WEIGHTS
from hpsearch.errors import ExportError, StudyError
from hpsearch.inference.postprocessing import Postprocessing
from hpsearch.paths import atomic_write, write_text
from hpsearch.store.record import StudyRecord
from hpsearch.training.checkpoint import WeightsInfo, load_weights
from hpsearch.typed_json import from_json, to_json

logger = logging.getLogger(__name__)

TOLERANCE = 1e-4
"""Largest accepted absolute difference between the logits of ONNX Runtime and PyTorch."""
INPUT, OUTPUT = "images", "logits"
"""Names of the graph's input (batch, channels, H, W) and output (batch, 1, H, W), both float32. The batch size is
dynamic."""

_PACKAGES = ("onnx", "onnxscript", "onnxruntime")


def export_onnx(weights: Path, path: Path) -> float:
    """Write a network as ONNX and return the largest difference between the logits of ONNX Runtime and PyTorch.

    The input and the output are named INPUT and OUTPUT. H and W are fixed to the training size. The file's metadata
    describes the steps before and after the network (`preprocessing`, `postprocessing`) and contains the description
    stored in the weights file (`hpsearch`, JSON). The file is checked on batches of one and three images before it is
    kept.

    Raises CheckpointError for an invalid weights file. Raises ExportError if a package of the extra `onnx` is
    missing, or if the logits differ by more than TOLERANCE.
    """
    if missing := [name for name in _PACKAGES if importlib.util.find_spec(name) is None]:
        raise ExportError(f"exporting to ONNX needs {', '.join(missing)}: pip install 'hpsearch[onnx]'")
    model, info = load_weights(weights)
    # Trace with a batch of two: the exporter would turn a batch size of one into a constant.
    images = torch.zeros(2, info.in_channels, *info.size)
    with warnings.catch_warnings():
        # The exporter only warns about its own internals.
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            model,
            (images,),
            dynamo=True,
            input_names=[INPUT],
            output_names=[OUTPUT],
            dynamic_shapes={INPUT: {0: "batch"}},
            verbose=False,
        )
    assert program is not None
    proto = program.model_proto
    for key, value in describe(info).items():
        entry = proto.metadata_props.add()
        entry.key, entry.value = key, value
    with atomic_write(path) as temporary:
        temporary.write_bytes(proto.SerializeToString())
        difference = _check(temporary, model, info)
    logger.info("%s: ONNX Runtime and torch differ by at most %.1e", path, difference)
    return difference


def export_toml(record: StudyRecord, path: Path | None = None, *, number: int | None = None) -> Path:
    """Write the configuration of a study's best trial, or of trial `number`, as TOML, and return the path.

    `hpsearch train` can train the configuration again. `path` defaults to a file in the study's folder. Raises
    StudyError if the trial does not exist, or if no trial is complete yet.
    """
    if number is None:
        number = record.standing().winner
        if number is None:
            raise StudyError(f"study {record.name!r} has no complete trial yet: choose another one with --trial")
    trial, study = record.known_trial(number), record.config.study
    path = path or record.paths.trial_toml(number)
    score = record.standing().values.get(number, trial.value)
    value = f", {study.metric} {score:.4f} out of fold" if trial.outcome == "complete" else ""
    head = (
        f"# Trial {number} of study {record.name}: {trial.outcome or 'open'}{value}.\n"
        f"# Started by hpsearch {trial.code or __version__}.\n#\n"
        f"#     hpsearch train --config {shlex.quote(path.name)} --folds {study.folds}\n\n"
    )
    write_text(path, head + trial.study_config.to_toml())
    return path


def describe(info: WeightsInfo) -> dict[str, str]:
    """Return the metadata of an exported network: producer, preprocessing, post-processing, limits and `info`."""
    side = f"{info.size[0]}x{info.size[1]} pixels"
    frame, reading, choices = info.extra.get("frame"), info.reading, from_json(Postprocessing, info.extra)
    if info.sees_windows:
        resolution = f"resized to {frame[0]}x{frame[1]} pixels" if frame else "at its own resolution"
        fit = f"cover the image, {resolution}, with overlapping tiles of {side}, mirrored at its borders"
        back = "place the logits of the tiles side by side and blend them where they overlap"
    else:
        fit = f"resize the whole image to {side}, bilinear with antialiasing, and round to integers"
        back = "resize the logits to the image's own size, bilinear with half-pixel centres (align_corners false)"
    turn = "applied" if reading.turns else "ignored"
    mean = ", ".join(f"{value:.9g}" for value in info.normalization.mean)
    std = ", ".join(f"{value:.9g}" for value in info.normalization.std)
    weights = ", ".join(map(str, GRAY_WEIGHTS))
    before = {
        f"the image with its EXIF orientation {turn}, transparency dropped; RGB, 8 bits per channel (255 is the "
        f"value {reading.max_value or 255})": True,
        fit: True,
        f"combine red, green and blue into one channel with the weights {weights}": info.in_channels == 1,
        "divide by 255": True,
        f"subtract the mean {mean} and divide by the standard deviation {std}, channel by channel": True,
        "float32, (batch, channel, row, column)": True,
    }
    after = {
        "average the logits over the image and its three mirror images, after mirroring them back": choices.flips,
        back: True,
        f"a pixel is lesion where the sigmoid of its logit is above {choices.threshold:g}": True,
        "keep the largest component and fill its holes": choices.clean,
        "`final` selected an ensemble, but this file is a single network": choices.ensemble,
    }
    return {
        "producer": f"hpsearch {__version__}",
        "preprocessing": "; ".join(step for step, is_done in before.items() if is_done),
        "postprocessing": "; ".join(step for step, is_done in after.items() if is_done),
        "limits": "for research; not a medical device",
        "hpsearch": json.dumps(to_json(info), sort_keys=True),
    }


def _check(path: Path, model: nn.Module, info: WeightsInfo) -> float:
    """Return the largest difference between the logits of ONNX Runtime and PyTorch.

    Raises ExportError if it exceeds TOLERANCE.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    worst = 0.0
    for n_images in (1, 3):
        # Standard normal noise has the mean and standard deviation of normalised images.
        images = np.random.default_rng(0).standard_normal((n_images, info.in_channels, *info.size), np.float32)
        with torch.inference_mode():
            expected = model(torch.from_numpy(images)).numpy()
        (found,) = session.run([OUTPUT], {INPUT: images})
        worst = max(worst, float(np.abs(found - expected).max()))
    if not worst <= TOLERANCE:
        text = f"the exported network differs from torch's by {worst:.1e}, which is more than {TOLERANCE:.0e}"
        raise ExportError(f"{text}: {path.name} was not written")
    return worst
