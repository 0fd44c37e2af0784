"""Packs a final model for MLflow: a pyfunc model without pickle that takes images and gives masks.

It is loaded from code, `mlflow.pyfunc.load_model`, and brings this package and its weights (safetensors) along. What
it takes is a list of images: paths, or arrays (H, W, 3) of RGB, 8 bits a channel. What it gives are the masks that
`hpsearch predict` writes: uint8 (H, W), 0 and 255, each of its image's own size.

    mlflow.pyfunc.load_model("models:/isic2017/1").predict(["photo.jpg"])

`pack` runs this module in a process of its own: MLflow tries the model out
while it saves it, which needs torch, and the process that tracks a study has none.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import logging
import shutil
import subprocess
import tempfile
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

import hpsearch
from hpsearch import subprocesses
from hpsearch.errors import DatasetError, ExportError
from hpsearch.inference.postprocessing import Choices
from hpsearch.paths import FinalPaths

if TYPE_CHECKING:
    from hpsearch.inference.predictor import Ensemble, Predictor

REQUIREMENTS = (
    "mlflow",
    "torch",
    "torchvision",
    "numpy",
    "pandas",
    "pillow",
    "psutil",
    "safetensors",
    "tomli-w",
)
"""What `hpsearch.inference.predictor` imports; a packed model asks for the versions that are installed here."""
ARTIFACT = "final"
"""Name of the one artifact of a packed model: a folder like that of `final`, with its weights alone."""
MODEL = "lesion_masks"
"""Name of a packed model beside its run."""

_NO_ID = "m-00000000000000000000000000000000"
"""Stands for the id that MLflow gives a model, until it is known."""
_ENTRY = '''"""What MLflow runs to load the model."""

import mlflow

from hpsearch.serving import make_model

mlflow.models.set_model(make_model())
'''


def predict_masks(predictor: Predictor | Ensemble, images: Sequence[Any]) -> list[npt.NDArray[np.uint8]]:
    """The masks of images, paths or arrays (H, W, 3) or (H, W) of 0 to 255: uint8 (H, W), 0 and 255, each.

    Raises DatasetError for a file that cannot be read, and for an array that is no such image.
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


def make_model() -> Any:
    """What `mlflow.models.set_model` takes: a model whose `predict` is `predict_masks`."""
    from mlflow.pyfunc import PythonModel

    with warnings.catch_warnings():
        # MLflow says that it does not check what is in a list of anything; `predict_masks` does.
        warnings.filterwarnings("ignore", message=".*Any type hint")

        class LesionMasks(PythonModel):  # type: ignore[misc]
            """Masks of lesions, from paths or arrays."""

            def load_context(self, context: Any) -> None:
                from hpsearch.inference.predictor import load_predictor

                self._predictor = load_predictor(FinalPaths(Path(context.artifacts[ARTIFACT])).model)

            def predict(
                self, context: Any, model_input: list[Any], params: dict[str, Any] | None = None
            ) -> list[Any]:
                return predict_masks(self._predictor, model_input)

    return LesionMasks()


def save(weights: Path, folder: Path, *, run_id: str | None = None, model_id: str | None = None) -> None:
    """Write `folder`, which must not exist: the packed model of a weights file, with signature and input example.

    Threshold, flips, cleaning and ensemble are those that `final` chose, as for `hpsearch predict`. The example is
    drawn, no photograph. With ids the model says of which run and logged model it is.
    """
    import mlflow.pyfunc
    from mlflow.models import Model

    versions = [f"{name}=={importlib.metadata.version(name).partition('+')[0]}" for name in REQUIREMENTS]
    with tempfile.TemporaryDirectory() as temporary, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        final = FinalPaths(Path(temporary) / ARTIFACT)
        _copy_weights(weights, final)
        entry = Path(temporary) / f"{MODEL}.py"
        entry.write_text(_ENTRY, encoding="utf-8")
        mlflow.pyfunc.save_model(
            folder,
            python_model=str(entry),
            artifacts={ARTIFACT: str(final.root)},
            code_paths=[str(Path(hpsearch.__file__).parent)],
            input_example=[_example().tolist()],
            pip_requirements=versions,
            mlflow_model=Model(run_id=run_id, model_id=model_id, **({"model_uuid": model_id} if model_id else {})),
            metadata={"task": "lesion segmentation", "limits": "for research; not a medical device"},
        )
    for path in list(folder.rglob("__pycache__")):
        shutil.rmtree(path)


def pack(weights: Path, folder: Path, *, run_id: str, model_id: str) -> None:
    """`save` in a process of its own; ExportError, with its last words, if it fails."""
    if not weights.is_file():
        raise ExportError(f"{weights} cannot be packed for MLflow: it is missing")
    done = subprocess.run(
        subprocesses.command(
            "hpsearch.serving", str(weights), str(folder), "--run-id", run_id, "--model-id", model_id
        ),
        env=subprocesses.environment(),
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
    )
    if done.returncode != 0:
        said = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        raise ExportError(f"{weights} cannot be packed for MLflow: {said[-1][:300]}")


def register(
    client: Any,
    weights: Path,
    folder: Path,
    *,
    experiment_id: str,
    run_id: str,
    name: str,
    tags: Mapping[str, str],
    description: str,
) -> None:
    """Pack the model of a run and make it the next version of the registered model `name`; nothing if it is one.

    `client` is an MlflowClient, `folder` a place for the packed model. The model is packed before MLflow is asked for
    anything, and what a failed attempt left in MLflow is used again: any number of attempts ends with one model, its
    files and one version. Raises ExportError, and MLflow's own errors.
    """
    from mlflow.entities import LoggedModelOutput

    if client.search_model_versions(f"run_id = '{run_id}'"):
        return
    pack(weights, folder, run_id=run_id, model_id=_NO_ID)
    left = client.search_logged_models([experiment_id], filter_string=f"source_run_id = '{run_id}'")
    model = (
        left[0]
        if left
        else client.create_logged_model(experiment_id, name=MODEL, source_run_id=run_id, model_type="segmentation")
    )
    description_file = folder / "MLmodel"
    packed = description_file.read_text(encoding="utf-8")
    description_file.write_text(packed.replace(_NO_ID, model.model_id), encoding="utf-8")
    client.log_model_artifacts(model.model_id, str(folder))
    client.finalize_logged_model(model.model_id, "READY")
    outputs = client.get_run(run_id).outputs
    if model.model_id not in [each.model_id for each in (outputs.model_outputs if outputs else [])]:
        client.log_outputs(run_id, [LoggedModelOutput(model.model_id, step=0)])
    if not client.search_registered_models(f"name = '{name}'"):
        client.create_registered_model(name, tags={"hpsearch.study": name}, description="Networks that `final` made.")
    # Not `models:/...`: MLflow would look for that where its global address points, not where this client does.
    version = client.create_model_version(
        name,
        model.artifact_location,
        run_id=run_id,
        tags=dict(tags),
        description=description,
        model_id=model.model_id,
    )
    linked = json.dumps([{"name": name, "version": version.version}])
    client.set_logged_model_tags(model.model_id, {"mlflow.modelVersions": linked})


def _copy_weights(weights: Path, final: FinalPaths) -> None:
    """The network in `weights`, and the ensemble beside it where `final` chose that to predict."""
    from hpsearch.training.checkpoint import load_weights

    _, info = load_weights(weights)
    files = {final.model: weights}
    if Choices.from_table(info.extra).ensemble:
        members = FinalPaths(weights.parent).ensemble
        files |= {final.ensemble / path.name: path for path in members.glob("*.safetensors")}
    for target, source in files.items():
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, target)


def _pixels(image: Any) -> npt.NDArray[np.uint8]:
    """An array, or lists as JSON brings them, as (H, W, 3) uint8."""
    try:
        array = np.asarray(image)
    except ValueError as error:
        raise DatasetError(f"an image must be a path or an array (H, W, 3): {error}") from error
    is_image = array.ndim == 2 or (array.ndim == 3 and array.shape[2] == 3)
    if not (is_image and array.size and array.dtype.kind in "ui" and array.min() >= 0 and array.max() <= 255):
        raise DatasetError(
            "an image must be a path or an array (H, W, 3) or (H, W) of whole numbers from 0 to 255, got "
            f"{array.dtype} of shape {array.shape}"
        )
    pixels = array.astype(np.uint8)
    return pixels if pixels.ndim == 3 else np.repeat(pixels[..., None], 3, axis=2)


def _example(side: int = 32) -> npt.NDArray[np.uint8]:
    """A dark disc on skin, (side, side, 3)."""
    rows, columns = np.mgrid[:side, :side] - (side - 1) / 2
    is_lesion = np.hypot(rows, columns) < side / 4
    return np.where(is_lesion[..., None], (96, 60, 50), (214, 165, 140)).astype(np.uint8)


def main() -> None:
    parser = argparse.ArgumentParser(description=save.__doc__)
    parser.add_argument("weights", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--run-id")
    parser.add_argument("--model-id")
    given = parser.parse_args()
    logging.getLogger("mlflow").setLevel(logging.WARNING)
    save(given.weights, given.folder, run_id=given.run_id, model_id=given.model_id)


if __name__ == "__main__":
    main()
