"""The model that MLflow loads gives the masks that `predict` writes, and contains all that it needs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
import torch
from PIL import Image

from hpsearch.data.decode import MAX_BYTES, MemoryGate, decode_job
from hpsearch.data.decode_pool import Job
from hpsearch.data.reading import Reading
from hpsearch.errors import DatasetError, ExportError
from hpsearch.inference.predictor import Ensemble, Predictor, find_images, load_predictor, predict_files
from hpsearch.inference.scoring import read_mask
from hpsearch.paths import FinalPaths
from hpsearch.tracking import mlflow_model
from hpsearch.training.checkpoint import load_weights, save_weights
from tests.data.conftest import write_oriented
from tests.inference.test_predictor import noise, write_model

FRESH = """
import json, sys
import numpy as np
from PIL import Image
import mlflow
model = mlflow.pyfunc.load_model(sys.argv[1])
paths = sys.argv[2:]
masks = model.predict(paths)
arrays = model.predict([np.asarray(Image.open(path).convert("RGB")) for path in paths])
for path, mask, same in zip(paths, masks, arrays, strict=True):
    assert np.array_equal(mask, same)
    Image.fromarray(mask).save(path + ".mask.png")
import hpsearch
print(json.dumps([hpsearch.__file__, model.metadata.model_id, model.metadata.get_input_schema() is not None]))
"""


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A network that sees lesion and skin in `noise`."""
    path = write_model(tmp_path_factory.mktemp("weights") / "model.safetensors", threshold=0.3)
    logits = Predictor.load(path, device="cpu", threads=1).logits(tensor(noise(60, 50)))
    model, info = load_weights(path)
    assert model.head.bias is not None
    with torch.no_grad():
        model.head.bias += torch.tensor(0.3).logit() - logits.median()
    save_weights(path, model, info)
    return path


@pytest.fixture(scope="module")
def predictor(weights: Path) -> Predictor:
    return Predictor.load(weights, device="cpu", threads=1)


def tensor(pixels: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(pixels.transpose(2, 0, 1)))


@pytest.mark.slow
def test_a_packed_model_gives_in_a_fresh_process_the_masks_that_predict_writes(
    weights: Path, predictor: Predictor, tmp_path: Path
) -> None:
    photos = tmp_path / "photos"
    photos.mkdir()
    for number, shape in enumerate([(50, 70), (41, 20)]):
        Image.fromarray(noise(*shape, seed=number)).save(photos / f"{number}.png")
    images = find_images([photos])
    predict_files(predictor, images, tmp_path / "masks")
    mlflow_model.pack(weights, tmp_path / "packed", run_id="0" * 32, model_id="m-1")
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, "-c", FRESH, str(tmp_path / "packed"), *map(str, images)],
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
        env=environment,
    )
    assert done.returncode == 0, done.stderr
    package, model_id, has_signature = json.loads(done.stdout.splitlines()[-1])
    # The code it was packed with, not what is installed.
    assert Path(package).is_relative_to(tmp_path / "packed" / "code")
    assert model_id == "m-1"
    assert has_signature
    for path in images:
        written = read_mask(tmp_path / "masks" / f"{path.stem}_segmentation.png")
        assert 0.02 < written.mean() < 0.98
        assert np.array_equal(np.asarray(Image.open(f"{path}.mask.png")), np.where(written, 255, 0))
    files = [path for path in (tmp_path / "packed").rglob("*") if path.is_file()]
    assert (tmp_path / "packed" / "input_example.json").is_file()
    assert not [path for path in files if path.suffix in (".pkl", ".pyc", ".pt")]


def test_paths_arrays_and_lists_give_the_same_masks(predictor: Predictor, tmp_path: Path) -> None:
    pixels = noise(60, 50)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    masks = mlflow_model.predict_masks(
        predictor, [str(tmp_path / "a.png"), tmp_path / "a.png", pixels, pixels.tolist()]
    )
    assert {(mask.dtype, mask.shape) for mask in masks} == {(np.dtype(np.uint8), (60, 50))}
    assert set(np.unique(masks[0])) == {0, 255}
    assert all(np.array_equal(mask, masks[0]) for mask in masks)


@pytest.mark.parametrize("exif", ["apply", "ignore"])
@pytest.mark.parametrize("format", ["png", "jpg"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_photo_is_seen_as_in_training_by_predict_and_by_the_served_model(
    weights: Path, tmp_path: Path, orientation: int, format: str, exif: Literal["apply", "ignore"]
) -> None:
    model, info = load_weights(weights)
    reading = Reading(exif)
    path = tmp_path / "model.safetensors"
    save_weights(path, model, replace(info, extra={**info.extra, "reading": reading.for_images()}))
    predictor = Predictor.load(path, device="cpu", threads=1)
    upright, photo = noise(60, 50), tmp_path / f"a.{format}"
    write_oriented(photo, upright, orientation)
    # The image as a cache holds it: where the mask that was trained on was drawn.
    size = (50, 60) if exif == "ignore" and orientation >= 5 else (60, 50)
    Image.fromarray(np.zeros(size, np.uint8)).save(tmp_path / "m.png")
    job = Job(photo, tmp_path / "m.png", ("resize",), *size, reading=reading)
    _, [(trained_on, _)] = decode_job(job, MemoryGate(MAX_BYTES))
    if exif == "apply" and format == "png":
        assert np.array_equal(trained_on, upright)
    expected = np.multiply(predictor.mask(predictor.logits(tensor(trained_on))), 255, dtype=np.uint8)
    assert predict_files(predictor, [photo], tmp_path / "out") == {}
    with Image.open(tmp_path / "out" / "a_segmentation.png") as mask:
        assert np.array_equal(np.array(mask), expected)
    (served,) = mlflow_model.predict_masks(predictor, [str(photo)])
    assert np.array_equal(served, expected)


def test_weights_of_version_0_1_see_an_image_as_they_did(predictor: Predictor, tmp_path: Path) -> None:
    assert "reading" not in predictor.info.extra
    upright = noise(60, 50)
    write_oriented(tmp_path / "a.png", upright, 6)
    (mask,) = mlflow_model.predict_masks(predictor, [tmp_path / "a.png"])
    (stored,) = mlflow_model.predict_masks(predictor, [np.ascontiguousarray(np.rot90(upright))])
    assert np.array_equal(mask, stored)
    deep = upright[..., 0].astype(np.uint16) * 256 + 255
    Image.fromarray(deep).save(tmp_path / "b.png")
    masks = mlflow_model.predict_masks(predictor, [tmp_path / "b.png", upright[..., 0]])
    assert np.array_equal(masks[0], masks[1])


def test_a_photo_above_full_scale_is_refused_and_named(weights: Path, tmp_path: Path) -> None:
    model, info = load_weights(weights)
    path = tmp_path / "model.safetensors"
    extra = {**info.extra, "reading": Reading(max_value=4095).for_images()}
    save_weights(path, model, replace(info, extra=extra))
    predictor = Predictor.load(path, device="cpu", threads=1)
    Image.fromarray(np.full((20, 30), 4096, np.uint16)).save(tmp_path / "a.png")
    bad = predict_files(predictor, [tmp_path / "a.png"], tmp_path / "out")
    assert "has the value 4096, above the full scale 4095" in bad[tmp_path / "a.png"]


def test_a_gray_array_is_taken_as_gray_light(predictor: Predictor) -> None:
    gray = noise(40, 30)[..., 0]
    one, three = mlflow_model.predict_masks(predictor, [gray, np.repeat(gray[..., None], 3, axis=2)])
    assert np.array_equal(one, three)


@pytest.mark.parametrize(
    "image",
    [
        np.zeros((4, 5, 4), np.uint8),
        np.zeros((4, 5, 3)),
        np.full((4, 5, 3), 256),
        np.full((4, 5, 3), -1),
        np.zeros((0, 5, 3), np.uint8),
        [[1, 2], [3]],
        None,
    ],
)
def test_what_is_no_image_is_refused_in_a_line(predictor: Predictor, image: object) -> None:
    with pytest.raises(DatasetError, match=r"an image must be a path or an array \(H, W, 3\)"):
        mlflow_model.predict_masks(predictor, [image])


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("is_chosen", [True, False])
def test_an_ensemble_travels_along_where_it_was_chosen(tmp_path: Path, is_chosen: bool) -> None:
    weights = write_model(tmp_path / "final" / "model.safetensors", ensemble=is_chosen)
    for fold in range(2):
        write_model(tmp_path / "final" / "ensemble" / f"fold{fold}.safetensors")
    mlflow_model._save(weights, tmp_path / "packed", "0" * 32, "m-1")
    (packed,) = (tmp_path / "packed").rglob("model.safetensors")
    assert packed.read_bytes() == weights.read_bytes()
    assert isinstance(load_predictor(packed, device="cpu"), Ensemble if is_chosen else Predictor)
    assert FinalPaths(packed.parent).ensemble.is_dir() == is_chosen


def test_a_file_that_cannot_be_packed_is_named(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=r"gone\.safetensors cannot be packed for MLflow"):
        mlflow_model.pack(tmp_path / "gone.safetensors", tmp_path / "packed", run_id="0" * 32, model_id="m-1")
