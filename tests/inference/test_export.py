"""hpsearch/inference/export.py: what other programs get computes the same and says how to use it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch

from hpsearch import config as configs
from hpsearch.cli import main
from hpsearch.config.model import UNetConfig
from hpsearch.data.cache import Normalization
from hpsearch.data.decode import resize
from hpsearch.data.reading import Reading
from hpsearch.errors import CheckpointError, ExportError, StudyError
from hpsearch.inference import export
from hpsearch.inference.export import TOLERANCE, export_onnx, export_toml
from hpsearch.inference.predictor import Predictor
from hpsearch.models.unet import UNet
from hpsearch.training.checkpoint import WeightsInfo, load_weights, save_weights
from tests.recorded import FakeStudy

# The exporter speaks of its own insides when it is first used.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")

IMAGE = torch.from_numpy(np.random.default_rng(1).integers(0, 256, (3, 70, 90)).astype(np.uint8))
RGB = Normalization((0.7, 0.6, 0.5), (0.15, 0.16, 0.17))


def write_model(
    path: Path, config: UNetConfig, *, in_channels: int = 3, size: tuple[int, int] = (48, 40), **extra: Any
) -> Path:
    """A network with random weights and, where it has any, statistics that a training would leave."""
    normalization = RGB if in_channels == 3 else Normalization((0.6,), (0.16,))
    network = UNet(config, in_channels, seed=3)
    generator = torch.Generator().manual_seed(0)
    for name, values in network.named_buffers():
        if name.endswith(("running_mean", "running_var")):
            values.copy_(torch.rand(values.shape, generator=generator) + (0.5 if name.endswith("var") else -0.5))
    save_weights(
        path,
        network,
        WeightsInfo(model=config, in_channels=in_channels, normalization=normalization, size=size, extra=extra),
    )
    return path


def run(path: Path, images: np.ndarray) -> np.ndarray:
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    (logits,) = session.run(["logits"], {"images": images})
    return np.asarray(logits)


def metadata(path: Path) -> dict[str, str]:
    return {entry.key: entry.value for entry in onnx.load(path).metadata_props}


def agrees(weights: Path, folder: Path, n_images: int) -> None:
    """Export, and compare with torch on images of their own."""
    path = folder / "model.onnx"
    assert export_onnx(weights, path) <= TOLERANCE
    onnx.checker.check_model(path)
    model, info = load_weights(weights)
    images = np.random.default_rng(9).normal(0, 1.5, (n_images, info.in_channels, *info.size)).astype(np.float32)
    with torch.inference_mode():
        expected = model(torch.from_numpy(images)).numpy()
    assert expected.std() > 1e-3
    assert np.abs(run(path, images) - expected).max() <= 1e-4


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A grayscale network's weights file, and its ONNX file: exporting one takes seconds."""
    folder = tmp_path_factory.mktemp("exported")
    config = UNetConfig(base_channels=4, depth=2)
    weights = write_model(folder / "model.safetensors", config, in_channels=1, threshold=0.4, trial=7)
    # Untrained networks see one thing everywhere; this one shall see lesion and skin.
    logits = Predictor.load(weights, device="cpu", threads=1).logits(IMAGE)
    model, info = load_weights(weights)
    assert model.head.bias is not None
    with torch.no_grad():
        model.head.bias += torch.tensor(0.4).logit() - logits.median()
    save_weights(weights, model, info)
    export_onnx(weights, folder / "model.onnx")
    return weights, folder / "model.onnx"


def as_exported(monkeypatch: pytest.MonkeyPatch, path: Path) -> None:
    """Let the exporter give that file's network at once."""
    program = SimpleNamespace(model_proto=onnx.load(path))
    monkeypatch.setattr(torch.onnx, "export", lambda *_, **__: program)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("config", "in_channels", "size"),
    [
        (UNetConfig(base_channels=4, depth=2, input_norm="image"), 3, (48, 40)),
        (UNetConfig(base_channels=4, depth=2, padding="valid", norm="none"), 3, (61, 75)),
        (UNetConfig(base_channels=4, depth=2, norm="group"), 1, (37, 50)),
    ],
    ids=["same", "valid", "grayscale and odd sizes"],
)
def test_onnx_computes_what_torch_computes(
    tmp_path: Path, config: UNetConfig, in_channels: int, size: tuple[int, int]
) -> None:
    agrees(write_model(tmp_path / "model.safetensors", config, in_channels=in_channels, size=size), tmp_path, 2)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("config", "in_channels", "size"),
    [
        (UNetConfig(), 3, (188, 188)),
        (UNetConfig(padding="valid", norm="none"), 3, (220, 220)),
        (UNetConfig(), 1, (100, 130)),
        (UNetConfig(base_channels=8, norm="instance"), 3, (130, 67)),
    ],
    ids=["default", "paper", "grayscale", "instance"],
)
def test_onnx_computes_what_torch_computes_at_full_width(
    tmp_path: Path, config: UNetConfig, in_channels: int, size: tuple[int, int]
) -> None:
    agrees(write_model(tmp_path / "model.safetensors", config, in_channels=in_channels, size=size), tmp_path, 1)


def test_onnx_and_its_metadata_are_enough_to_get_the_mask_that_predict_gives(exported: tuple[Path, Path]) -> None:
    weights, path = exported
    onnx.checker.check_model(path)
    said = metadata(path)
    table = json.loads(said["hpsearch"])
    assert table["extra"] == {"threshold": 0.4, "trial": 7}
    # As the sentences say, step by step.
    assert "resize the whole image to 48x40 pixels" in said["preprocessing"]
    assert "EXIF orientation ignored" in said["preprocessing"]
    small = resize(IMAGE, *table["size"]).numpy().astype(np.float64)
    assert "weights 0.299, 0.587, 0.114" in said["preprocessing"]
    gray = np.tensordot([0.299, 0.587, 0.114], small, 1)
    assert "mean 0.6 and divide by the standard deviation 0.16" in said["preprocessing"]
    ready = ((gray / 255 - 0.6) / 0.16).astype(np.float32)
    logits = torch.from_numpy(run(path, ready[None, None]))
    full = torch.nn.functional.interpolate(logits, size=(70, 90), mode="bilinear", align_corners=False)[0, 0]
    assert "above 0.4" in said["postprocessing"]
    pred = full.sigmoid().numpy() > 0.4
    predictor = Predictor.load(weights, device="cpu", threads=1)
    expected = predictor.logits(IMAGE)
    assert np.abs(full.numpy() - expected.numpy()).max() <= 1e-4
    assert 0.02 < pred.mean() < 0.98
    assert (pred != predictor.mask(expected)).mean() < 0.002


def test_onnx_takes_batches_of_any_size(exported: tuple[Path, Path]) -> None:
    weights, path = exported
    model, info = load_weights(weights)
    images = np.random.default_rng(2).normal(0, 1, (5, 1, *info.size)).astype(np.float32)
    with torch.inference_mode():
        assert np.abs(run(path, images) - model(torch.from_numpy(images)).numpy()).max() <= 1e-4


@pytest.mark.parametrize(
    ("reading", "turn", "deep"),
    [
        (Reading(), "EXIF orientation applied", "255 is the value 255"),
        (Reading("ignore", max_value=4095), "EXIF orientation ignored", "255 is the value 4095"),
    ],
)
def test_the_metadata_say_how_files_became_pixels(tmp_path: Path, reading: Reading, turn: str, deep: str) -> None:
    config = UNetConfig(base_channels=2, depth=1)
    weights = write_model(tmp_path / "model.safetensors", config, reading=reading.for_images())
    _, info = load_weights(weights)
    assert info.reading == reading
    said = export.describe(info)
    assert turn in said["preprocessing"]
    assert deep in said["preprocessing"]
    assert json.loads(said["hpsearch"])["extra"]["reading"] == {"exif": reading.exif, "max_value": reading.max_value}


def test_a_network_of_crops_says_that_it_wants_windows(tmp_path: Path) -> None:
    weights = write_model(tmp_path / "model.safetensors", UNetConfig(base_channels=2, depth=1), match="crop")
    _, info = load_weights(weights)
    said = export.describe(info)
    assert "overlapping tiles of 48x40" in said["preprocessing"]
    assert "blend them" in said["postprocessing"]


def test_what_final_chose_is_said(tmp_path: Path) -> None:
    config = UNetConfig(base_channels=2, depth=1)
    _, plain = load_weights(write_model(tmp_path / "a.safetensors", config))
    said = export.describe(plain)["postprocessing"]
    assert "above 0.5" in said
    assert not any(word in said for word in ("mirror", "component", "ensemble"))
    choices = {"threshold": 0.35, "flips": True, "clean": True, "ensemble": True}
    _, chosen = load_weights(write_model(tmp_path / "b.safetensors", config, **choices))
    said = export.describe(chosen)["postprocessing"]
    assert "above 0.35" in said
    assert all(word in said for word in ("three mirror images", "largest component", "ensemble"))


def test_what_computes_something_else_is_not_written(
    exported: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, info = load_weights(exported[0])
    assert model.head.bias is not None
    with torch.no_grad():
        model.head.bias += 0.01
    save_weights(tmp_path / "model.safetensors", model, info)
    as_exported(monkeypatch, exported[1])
    with pytest.raises(ExportError, match=r"differs from torch's by 1\.0e-02"):
        export_onnx(tmp_path / "model.safetensors", tmp_path / "model.onnx")
    assert not (tmp_path / "model.onnx").exists()


def test_without_its_packages_onnx_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(export, "_PACKAGES", ("onnx", "no_such_package"))
    with pytest.raises(ExportError, match=r"needs no_such_package: pip install 'hpsearch\[onnx\]'"):
        export_onnx(tmp_path / "model.safetensors", tmp_path / "model.onnx")


def test_a_pickle_is_not_exported(tmp_path: Path) -> None:
    torch.save({}, tmp_path / "model.pt")
    with pytest.raises(CheckpointError, match="cannot be read as a complete safetensors file"):
        export_onnx(tmp_path / "model.pt", tmp_path / "model.onnx")


def test_the_best_configuration_is_exported_as_one_that_runs_again(tmp_path: Path) -> None:
    study = FakeStudy(tmp_path)
    study.trial(**{"train.lr": 0.002})
    best = study.trial(**{"train.lr": 0.05, "unet.depth": 4})
    study.trial("pruned")
    path = export_toml(study.record)
    assert path == study.record.paths.root / "trial-0001.toml"
    assert configs.load(path, ()) == best.study_config
    head = path.read_text(encoding="utf-8").partition("[")[0]
    assert f"# Trial 1 of study fake: complete, dice {best.value:.4f} out of fold." in head
    assert "hpsearch train --config trial-0001.toml --folds 2" in head


def test_any_trial_can_be_exported_and_one_that_is_not_there_cannot(tmp_path: Path) -> None:
    study = FakeStudy(tmp_path)
    with pytest.raises(StudyError, match="no complete trial yet"):
        export_toml(study.record)
    dropped = study.trial("pruned")
    path = export_toml(study.record, tmp_path / "mine.toml", number=0)
    assert configs.load(path, ()) == dropped.study_config
    with pytest.raises(StudyError, match="no trial 4: its last is trial 0"):
        export_toml(study.record, number=4)


def test_the_command_writes_what_it_was_asked_for(
    exported: tuple[Path, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    as_exported(monkeypatch, exported[1])
    study = FakeStudy(tmp_path)
    study.trial()
    shutil.copy(exported[0], tmp_path / "model.safetensors")
    with pytest.raises(SystemExit) as caught:
        main(["export", "--onnx", "--toml", "--model", str(tmp_path), "--out", str(tmp_path)])
    assert caught.value.code == 0
    assert (tmp_path / "model.onnx").is_file()
    assert study.record.paths.trial_toml(0).is_file()
    said = capsys.readouterr().out
    assert str(tmp_path / "model.onnx") in said
    assert str(study.record.paths.trial_toml(0)) in said
    with pytest.raises(SystemExit) as caught:
        main(["export", "--out", str(tmp_path)])
    assert caught.value.code == 2
