"""Pack the network of a `final` run as an MLflow pyfunc model, without pickle, and register it.

A `final` run is the MLflow run of a configuration that `hpsearch final` has retrained on the whole pool. The model
contains this package and the weights (safetensors). Its input is a list of images: paths, or RGB arrays (H, W, 3)
with 8 bits per channel. Its output is the list of masks that `hpsearch predict` writes: uint8 (H, W) with the values
0 and 255, each at the size of its image.

    mlflow.pyfunc.load_model("models:/isic2017/1").predict(["photo.jpg"])
"""

from __future__ import annotations

import importlib.metadata
import json
import logging
import shutil
import subprocess
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

import hpsearch
from hpsearch import subprocesses
from hpsearch.errors import DatasetError, ExportError
from hpsearch.inference.postprocessing import Postprocessing
from hpsearch.paths import FinalPaths
from hpsearch.typed_json import from_json

if TYPE_CHECKING:
    from hpsearch.inference.predictor import Ensemble, Predictor
    from hpsearch.tracking.runs import RunContent

REQUIREMENTS = ("mlflow", "torch", "torchvision", "numpy", "pandas", "pillow", "psutil", "safetensors", "tomli-w")
"""Packages that a packed model requires, pinned to the versions installed when it was packed."""
ARTIFACT = "weights"
"""Name of the artifact with the network's weights in a packed model."""
MODEL = "lesion_masks"
"""Name of a packed model in its run, and name of the module that is its entry point."""

_NO_ID = "m-00000000000000000000000000000000"
"""Placeholder for the model id in a packed model. MLflow assigns the id only after packing."""


def predict_masks(predictor: Predictor | Ensemble, images: Sequence[Any]) -> list[npt.NDArray[np.uint8]]:
    """Return the mask of each image, uint8 (H, W) with values 0 and 255.

    Each image is a path, or an integer array (H, W, 3) or (H, W) with values from 0 to 255. Raises DatasetError for
    an unreadable file, and for an array that is not an image.
    """
    import torch

    from hpsearch.data.decode import read_image

    masks = []
    for image in images:
        if isinstance(image, str | Path):
            tensor = read_image(Path(image), predictor.info.reading)
        else:
            tensor = torch.from_numpy(np.ascontiguousarray(_pixels(image).transpose(2, 0, 1)))
        masks.append(np.multiply(predictor.mask(predictor.logits(tensor)), 255, dtype=np.uint8))
    return masks


def pack(weights: Path, folder: Path, *, run_id: str, model_id: str) -> None:
    """Pack a weights file as a model in the new folder `folder`, in a separate process.

    `run_id` and `model_id` are stored in the model. MLflow runs the model while saving it, which requires PyTorch,
    but the process that tracks a study does not import PyTorch. Raises ExportError with the last line of the separate
    process's error output if packing fails.
    """
    if not weights.is_file():
        raise ExportError(f"{weights} cannot be packed for MLflow: it is missing")
    command = subprocesses.command("hpsearch.tracking.mlflow_model", str(weights), str(folder), run_id, model_id)
    environment = subprocesses.environment()
    done = subprocess.run(command, env=environment, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    if done.returncode != 0:
        lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        raise ExportError(f"{weights} cannot be packed for MLflow: {lines[-1][:300]}")


def register(client: Any, weights: Path, folder: Path, experiment_id: str, run_id: str, content: RunContent) -> None:
    """Pack the network of a `final` run and register it as the next version of the model named after the study.

    `client` is an MlflowClient, `folder` an existing temporary folder, and `content` the content of the run. Nothing
    happens if the run already has a registered version. A call continues where a failed one stopped, so that any
    number of calls creates only one model and one version. Raises ExportError, and MLflow's own errors.
    """
    from mlflow.entities import LoggedModelOutput

    if client.search_model_versions(f"run_id = '{run_id}'"):
        return
    packed, study = folder / MODEL, content.tags["hpsearch.study"]
    pack(weights, packed, run_id=run_id, model_id=_NO_ID)
    found = client.search_logged_models([experiment_id], filter_string=f"source_run_id = '{run_id}'")
    facts = {"name": MODEL, "source_run_id": run_id, "model_type": "segmentation"}
    model = found[0] if found else client.create_logged_model(experiment_id, **facts)
    text = (packed / "MLmodel").read_text(encoding="utf-8")
    (packed / "MLmodel").write_text(text.replace(_NO_ID, model.model_id), encoding="utf-8")
    client.log_model_artifacts(model.model_id, str(packed))
    client.finalize_logged_model(model.model_id, "READY")
    outputs = client.get_run(run_id).outputs
    if model.model_id not in [each.model_id for each in (outputs.model_outputs if outputs else [])]:
        client.log_outputs(run_id, [LoggedModelOutput(model.model_id, step=0)])
    if not client.search_registered_models(f"name = '{study}'"):
        description = "Networks that `hpsearch final` trained for this study."
        client.create_registered_model(study, tags={"hpsearch.study": study}, description=description)
    # Not `models:/...`, which MLflow would look up at its global tracking URI instead of the client's URI.
    source = model.artifact_location
    tags = {key: content.tags[key] for key in ("hpsearch.study", "hpsearch.final")}
    note = f"{content.note}\n\nFor research; not a medical device."
    version = client.create_model_version(study, source, run_id, tags, description=note, model_id=model.model_id)
    linked = json.dumps([{"name": study, "version": version.version}])
    client.set_logged_model_tags(model.model_id, {"mlflow.modelVersions": linked})


def _save(weights: Path, folder: Path, run_id: str, model_id: str) -> None:
    """Write an MLflow model with signature and input example for run `run_id` and logged model `model_id`.

    Like `hpsearch predict`, the model uses the threshold, test-time augmentation, mask cleaning and ensemble that
    `final` selected. The input example is synthetic, not a photograph.
    """
    import mlflow.pyfunc
    from mlflow.models import Model

    from hpsearch.training.checkpoint import load_weights

    choices = from_json(Postprocessing, load_weights(weights)[1].extra)
    # MLflow copies the network and the ensemble to one folder.
    ensemble = {"ensemble": str(FinalPaths(weights.parent).ensemble)} if choices.ensemble else {}
    versions = [f"{name}=={importlib.metadata.version(name).partition('+')[0]}" for name in REQUIREMENTS]
    # The example image is a dark square on a skin-coloured background.
    example = np.full((32, 32, 3), (214, 165, 140))
    example[8:24, 8:24] = (96, 60, 50)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        mlflow.pyfunc.save_model(
            folder,
            python_model=str(Path(__file__).with_name(f"{MODEL}.py")),
            artifacts={ARTIFACT: str(weights), **ensemble},
            code_paths=[str(Path(hpsearch.__file__).parent)],
            input_example=[example.tolist()],
            pip_requirements=versions,
            mlflow_model=Model(run_id=run_id, model_id=model_id, model_uuid=model_id),
            metadata={"task": "lesion segmentation", "limits": "for research; not a medical device"},
        )
    for path in list(folder.rglob("__pycache__")):
        shutil.rmtree(path)


def _pixels(image: Any) -> npt.NDArray[np.uint8]:
    """Convert an array, or nested lists from JSON, to (H, W, 3) uint8."""
    try:
        array = np.asarray(image)
    except ValueError:
        array = np.array(None)
    is_image = array.ndim == 2 or (array.ndim == 3 and array.shape[2] == 3)
    if not (is_image and array.size and array.dtype.kind in "ui" and array.min() >= 0 and array.max() <= 255):
        rule = "an image must be a path or an array (H, W, 3) or (H, W) of integers from 0 to 255"
        raise DatasetError(f"{rule}, got {array.dtype} of shape {array.shape}")
    pixels = array.astype(np.uint8)
    return pixels if pixels.ndim == 3 else np.repeat(pixels[..., None], 3, axis=2)


if __name__ == "__main__":
    logging.getLogger("mlflow").setLevel(logging.WARNING)
    _save(Path(sys.argv[1]), Path(sys.argv[2]), *sys.argv[3:])
