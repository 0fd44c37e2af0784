from __future__ import annotations

import itertools
import os
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn

from hpsearch import config as configs
from hpsearch.cli import main
from hpsearch.config.model import UNetConfig
from hpsearch.data.cache import Normalization
from hpsearch.data.decode import read_image, resize
from hpsearch.data.reading import PLAIN_READING
from hpsearch.errors import CheckpointError, DatasetError, StudyError
from hpsearch.inference.predictor import (
    OUTLINE,
    Predictor,
    draw_outline,
    find_images,
    find_model,
    load_predictor,
    predict_files,
    tile_axis,
)
from hpsearch.inference.scoring import read_mask
from hpsearch.models.shapes import output_margin, output_size
from hpsearch.models.unet import UNet
from hpsearch.paths import ProjectPaths, write_json
from hpsearch.store.record import StudyRecord
from hpsearch.training.checkpoint import WeightsInfo, load_weights, save_weights
from hpsearch.training.runtime import make_runtime
from hpsearch.typed_json import to_json
from hpsearch.workers.jobs import WorkerSettings
from hpsearch.workers.plan import ExecutionPlan

PAPER = UNetConfig(base_channels=64, depth=4, stacking=2, padding="valid", norm="none", input_norm="none")
RGB = Normalization((0.5, 0.4, 0.3), (0.2, 0.25, 0.3))


class Echo(nn.Module):
    """Returns the first channel of what it sees, of the size that the network of `config`, unstretched, would."""

    def __init__(self, config: UNetConfig) -> None:
        super().__init__()
        self.config = config
        self.margin = output_margin(config)
        self.seen: list[Tensor] = []

    def forward(self, images: Tensor) -> Tensor:
        self.seen.append(images[0, 0].clone())
        margin = output_margin(self.config)
        height, width = output_size(self.config, images.shape[1], (images.shape[2], images.shape[3]))
        return images[:, :1, margin : margin + height, margin : margin + width]


def echo(config: UNetConfig, size: tuple[int, int]) -> tuple[Predictor, Echo]:
    """A predictor by tiles whose logits are the red channel / 255."""
    plain = Normalization((0.0,) * 3, (1.0,) * 3)
    info = WeightsInfo(model=config, in_channels=3, normalization=plain, size=size, extra={"match": "crop"})
    network = Echo(config)
    return Predictor(network, info, make_runtime("cpu", threads=1), tiles=True), network


def noise(height: int, width: int, seed: int = 0) -> NDArray[np.uint8]:
    """An image (H, W, 3) of smooth random blobs."""
    rng = np.random.default_rng(seed)
    small = rng.integers(0, 256, (6, 6, 3)).astype(np.uint8)
    return np.asarray(Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC))


def as_tensor(pixels: NDArray[np.uint8]) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(pixels.transpose(2, 0, 1)))


def write_model(path: Path, *, size: tuple[int, int] = (32, 32), color: str = "rgb", **extra: Any) -> Path:
    """A small network with random weights, which predicts some lesion and some skin."""
    config = UNetConfig(base_channels=2, depth=2, stacking=1, norm="none", input_norm="none")
    n_channels = 3 if color == "rgb" else 1
    normalization = RGB if color == "rgb" else Normalization((0.45,), (0.2,))
    info = WeightsInfo(model=config, in_channels=n_channels, normalization=normalization, size=size, extra=extra)
    save_weights(path, UNet(config, n_channels, seed=3), info)
    return path


def by_hand(weights: Path, image: NDArray[np.uint8]) -> NDArray[np.float64]:
    """Logits (H, W): the image resized, normalised and predicted, and the logits resized back, step by step."""
    model, info = load_weights(weights)
    small = resize(as_tensor(image), *info.size).double() / 255
    if info.in_channels == 1:
        small = (small * torch.tensor([0.299, 0.587, 0.114], dtype=torch.float64).view(3, 1, 1)).sum(0, keepdim=True)
    mean, std = (torch.tensor(values).double().view(-1, 1, 1) for values in vars(info.normalization).values())
    with torch.no_grad():
        logits = model.double()(((small - mean) / std)[None])
    # Bilinear with half-pixel centres, from its definition.
    source = logits[0, 0].numpy()
    for axis, length in enumerate(image.shape[:2]):
        n = source.shape[axis]
        at = np.clip((np.arange(length) + 0.5) * n / length - 0.5, 0, n - 1)
        low = np.floor(at).astype(int)
        share = np.expand_dims(at - low, 1 - axis)
        above = np.minimum(low + 1, n - 1)
        source = np.take(source, low, axis) * (1 - share) + np.take(source, above, axis) * share
    return np.asarray(source)


def test_the_papers_tiles_are_four_of_572_at_the_corners_of_a_mirrored_696() -> None:
    predictor, network = echo(PAPER, (572, 572))
    image = noise(512, 512)
    logits = predictor.logits(as_tensor(image))
    padded = F.pad(as_tensor(image)[None].float(), (92, 92, 92, 92), mode="reflect")[0, 0] / 255
    assert padded.shape == (696, 696)
    corners = [(0, 0), (0, 124), (124, 0), (124, 124)]
    assert len(network.seen) == 4
    for seen, (top, left) in zip(network.seen, corners, strict=True):
        torch.testing.assert_close(seen, padded[top : top + 572, left : left + 572])
    torch.testing.assert_close(logits, as_tensor(image)[0].float() / 255)


def test_the_papers_outputs_of_388_are_averaged_where_they_overlap() -> None:
    assert output_margin(PAPER) == 92
    assert output_size(PAPER, 3, (572, 572)) == (388, 388)
    first, second = tile_axis(512, 388, blend=False)
    assert (first.start, second.start) == (0, 124)
    expected = torch.where(torch.arange(388) < 124, 1.0, 0.5)
    assert torch.equal(first.weights, expected)
    assert torch.equal(second.weights, expected.flip(0))


@pytest.mark.parametrize("size", [(32, 32), (33, 44)])
@pytest.mark.parametrize("shape", [(70, 50), (20, 31), (31, 100), (1, 40), (96, 96)])
@pytest.mark.parametrize("padding", ["same", "valid"])
def test_a_network_that_returns_its_input_gives_back_any_image_by_tiles(
    padding: Any, shape: tuple[int, int], size: tuple[int, int]
) -> None:
    predictor, _ = echo(UNetConfig(base_channels=1, depth=2, stacking=1, padding=padding), size)
    image = as_tensor(noise(*shape))
    torch.testing.assert_close(predictor.logits(image), image[0].float() / 255)


def test_the_margin_is_where_a_valid_network_puts_its_output() -> None:
    # All weights 1 and a kernel of 3: the output's first pixel is what is centred on the margin.
    config = UNetConfig(base_channels=1, depth=2, stacking=1, padding="valid", norm="none", input_norm="none")
    network = UNet(config, 1).double().eval()
    network.margin = output_margin(config)
    for parameter in network.parameters():
        nn.init.ones_(parameter) if parameter.dim() > 1 else nn.init.zeros_(parameter)
    images = torch.zeros(1, 1, 40, 40, dtype=torch.float64, requires_grad=True)
    output = network(images + 1)
    assert output.shape[-1] == output_size(config, 1, (40, 40))[0]
    # The skip of the first stage is the finest path: without the decoder below it sees only around the margin.
    margin = output_margin(config)
    with torch.no_grad():
        network.decoder[-1].up.weight.zero_()
    (gradient,) = torch.autograd.grad(network(images + 1)[0, 0, 0, 0], images)
    rows = gradient[0, 0].abs().sum(1).nonzero().flatten()
    assert (int(rows.min()) + int(rows.max())) / 2 == margin


def write_valid(path: Path, **extra: Any) -> Path:
    """A small network without padding, made for images of 40 pixels, whose output is 28."""
    config = UNetConfig(base_channels=2, depth=1, stacking=1, padding="valid", norm="none", input_norm="none")
    info = WeightsInfo(model=config, in_channels=3, normalization=RGB, size=(40, 40), extra=extra)
    save_weights(path, UNet(config, 3, seed=3), info)
    return path


def test_what_was_stretched_in_training_is_stretched_in_tiles(tmp_path: Path) -> None:
    weights = write_valid(tmp_path / "model.safetensors", match="resize")
    image = as_tensor(noise(40, 40))
    whole, tiled = (Predictor.load(weights, device="cpu", tiles=tiles).logits(image) for tiles in (False, True))
    torch.testing.assert_close(tiled, whole)


def test_what_was_trained_on_windows_is_never_stretched(tmp_path: Path) -> None:
    weights = write_valid(tmp_path / "model.safetensors", match="crop")
    image = as_tensor(noise(40, 40))
    model, info = load_weights(weights)
    (height, width), margin = output_size(info.model, 3, (40, 40)), output_margin(info.model)
    # As much mirrored on each side as the network takes away: its output is then about the image itself.
    padded = F.pad(image[None].float(), (margin,) * 4, mode="reflect")
    mean, std = (torch.tensor(values).view(-1, 1, 1) * 255 for values in vars(RGB).values())
    with torch.inference_mode():
        corner = model(((padded - mean) / std)[..., :40, :40])
    assert corner.shape[-2:] == (height, width)
    for tiles in (False, True):
        logits = Predictor.load(weights, device="cpu", tiles=tiles).logits(image)
        assert logits.shape == (40, 40)
        # Only the first of the windows reaches the corner.
        torch.testing.assert_close(logits[:8, :8], corner[0, 0, :8, :8], atol=1e-4, rtol=1e-4)


def test_windows_of_resized_frames_are_laid_over_the_resized_image(tmp_path: Path) -> None:
    config = UNetConfig(base_channels=1, depth=1, stacking=1)
    plain = Normalization((0.0,) * 3, (1.0,) * 3)
    info = WeightsInfo(model=config, in_channels=3, normalization=plain, size=(32, 32), extra={"frame": [48, 64]})
    predictor = Predictor(Echo(config), info, make_runtime("cpu", threads=1), tiles=True)
    image = as_tensor(noise(120, 100))
    small = resize(image, 48, 64)[0].float() / 255
    expected = F.interpolate(small[None, None], size=(120, 100), mode="bilinear", align_corners=False)[0, 0]
    torch.testing.assert_close(predictor.logits(image), expected)


@pytest.mark.parametrize(("length", "out"), [(100, 40), (40, 40), (7, 40), (81, 40), (1000, 41)])
@pytest.mark.parametrize("blend", [True, False])
def test_the_shares_of_all_tiles_add_up_to_one(length: int, out: int, blend: bool) -> None:
    total = torch.zeros(length)
    tiles = tile_axis(length, out, blend=blend)
    for tile in tiles:
        total[tile.covers] += tile.weights
        assert 0 <= tile.inside.start < tile.inside.stop <= out
    torch.testing.assert_close(total, torch.ones(length))
    if blend:
        overlaps = [a.covers.stop - b.covers.start for a, b in itertools.pairwise(tiles)]
        assert all(overlap >= out / 4 for overlap in overlaps)


def test_blended_windows_count_the_less_the_nearer_their_border() -> None:
    first, second = tile_axis(60, 40, blend=True)
    # 20 pixels are in both: the first loses in equal steps what the second gains.
    assert bool((first.weights[:20] == 1).all())
    assert bool((first.weights[20:].diff() < 0).all())
    torch.testing.assert_close(first.weights[20:], second.weights[:20].flip(0))
    assert float(first.weights[20]) == pytest.approx(20 / 21)


def test_an_image_smaller_than_a_window_lies_in_its_middle() -> None:
    (tile,) = tile_axis(20, 32, blend=True)
    assert (tile.start, tile.covers, tile.inside) == (-6, slice(0, 20), slice(6, 26))


def test_an_outline_is_the_inner_border_of_the_mask() -> None:
    image = as_tensor(noise(12, 12))
    mask = np.zeros((12, 12), bool)
    mask[3:9, 2:10] = True
    drawn = draw_outline(image, mask)
    border = mask.copy()
    border[4:8, 3:9] = False
    assert (drawn[border] == OUTLINE).all()
    assert np.array_equal(drawn[~border], image.permute(1, 2, 0).numpy()[~border])


@pytest.mark.parametrize("color", ["rgb", "grayscale"])
@pytest.mark.parametrize("shape", [(70, 50), (20, 31), (32, 32)])
def test_a_prediction_is_what_resizing_by_hand_gives(tmp_path: Path, color: str, shape: tuple[int, int]) -> None:
    weights = write_model(tmp_path / "model.safetensors", color=color)
    image = noise(*shape)
    expected = by_hand(weights, image)
    predictor = Predictor.load(weights, device="cpu", threads=1)
    logits = predictor.logits(as_tensor(image))
    np.testing.assert_allclose(logits.numpy(), expected, atol=2e-5)
    certain = np.abs(expected) > 2e-5
    assert np.array_equal(predictor.mask(logits)[certain], (expected > 0)[certain])


def test_a_network_trained_on_crops_predicts_by_tiles_unless_told_otherwise(tmp_path: Path) -> None:
    weights = write_model(tmp_path / "model.safetensors", match="crop")
    assert Predictor.load(weights, device="cpu").tiles
    assert not Predictor.load(weights, device="cpu", tiles=False).tiles
    assert not Predictor.load(write_model(tmp_path / "other.safetensors", match="resize"), device="cpu").tiles


def test_the_threshold_in_the_file_decides(tmp_path: Path) -> None:
    logits = torch.tensor([[-1.0, 0.0, 0.1, 1.0, 2.0]])
    plain = Predictor.load(write_model(tmp_path / "a.safetensors"), device="cpu")
    strict = Predictor.load(write_model(tmp_path / "b.safetensors", threshold=0.8), device="cpu")
    assert plain.mask(logits).tolist() == [[False, False, True, True, True]]
    assert strict.mask(logits).tolist() == [[False, False, False, False, True]]


def test_masks_have_the_images_own_size_and_two_values(tmp_path: Path) -> None:
    weights = write_model(tmp_path / "model.safetensors")
    for name, shape in {"a.png": (50, 70), "b.jpg": (41, 20)}.items():
        Image.fromarray(noise(*shape)).save(tmp_path / name)
    predictor = Predictor.load(weights, device="cpu", threads=1)
    images = find_images([tmp_path])
    assert predict_files(predictor, images, tmp_path / "out", probabilities=True, overlays=True) == {}
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        f"{stem}_{what}" for stem in ("a", "b") for what in ("overlay.jpg", "probability.png", "segmentation.png")
    ]
    for path in images:
        image = read_image(path, PLAIN_READING)
        mask, probability = (
            read_image(tmp_path / "out" / f"{path.stem}_{what}.png", PLAIN_READING)[0].numpy()
            for what in ("segmentation", "probability")
        )
        assert mask.shape == image.shape[1:]
        assert set(np.unique(mask)) <= {0, 255}
        logits = predictor.logits(image)
        assert np.array_equal(mask > 0, predictor.mask(logits))
        assert np.array_equal(read_mask(tmp_path / "out" / f"{path.stem}_segmentation.png"), mask > 0)
        assert np.array_equal(probability, np.rint(logits.sigmoid().numpy() * 255))
        assert read_image(tmp_path / "out" / f"{path.stem}_overlay.jpg", PLAIN_READING).shape == image.shape


def test_bad_files_are_named_and_skipped(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    weights = write_model(tmp_path / "model.safetensors")
    photos = tmp_path / "photos"
    photos.mkdir()
    Image.fromarray(noise(30, 30)).save(photos / "good.png")
    (photos / "broken.jpg").write_bytes(b"\xff\xd8\xff\xe0 no more")
    (photos / "note.txt").write_text("not an image")
    Image.fromarray(noise(30, 30)).save(photos / "scan.bmp")
    (photos / "link.jpg").symlink_to("nowhere.jpg")
    arguments = [str(photos), str(tmp_path / "gone.png"), "--model", str(weights), "--device", "cpu"]
    with pytest.raises(SystemExit) as caught:
        main(["predict", *arguments, "--out-dir", str(tmp_path / "masks")])
    assert caught.value.code == 1
    said = capsys.readouterr().out
    assert [path.name for path in (tmp_path / "masks").iterdir()] == ["good_segmentation.png"]
    assert "4 of 5 files could not be read" in said
    assert f"\n  {photos}/broken.jpg cannot be decoded: " in said
    assert f"\n  there is no file {tmp_path}/gone.png\n" in said
    assert f"\n  {photos}/link.jpg is a link to nowhere.jpg, which does not exist\n" in said
    assert "scan.bmp cannot be decoded: it is neither JPEG nor PNG: convert it" in said
    assert "note.txt" not in said


def test_names_of_any_bytes_are_predicted_and_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    weights = write_model(tmp_path / "model.safetensors")
    photos = tmp_path / "photos"
    photos.mkdir()
    good, bad = (photos / os.fsdecode(name) for name in (b"l\xe9sion.jfif", b"tw\xf6\nlines.png"))
    Image.fromarray(noise(30, 30)).save(good, format="JPEG")
    bad.write_bytes(b"no image")
    with pytest.raises(SystemExit) as caught:
        main(["predict", str(photos), "--model", str(weights), "--device", "cpu", "--out-dir", str(tmp_path / "m")])
    assert caught.value.code == 1
    assert [path.name for path in (tmp_path / "m").iterdir()] == [os.fsdecode(b"l\xe9sion_segmentation.png")]
    assert f"\n  {photos}/tw\\xf6\\nlines.png cannot be decoded: " in capsys.readouterr().out


def test_a_command_without_bad_files_ends_well(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_model(tmp_path / "model.safetensors")
    Image.fromarray(noise(30, 40)).save(tmp_path / "a.png")
    with pytest.raises(SystemExit) as caught:
        # The folder of a final is as good as the file in it.
        main(["predict", f"{tmp_path}/*.png", "--model", str(tmp_path), "--out-dir", str(tmp_path / "m"), "--tiles"])
    assert caught.value.code == 0
    assert "\n1 mask in" in capsys.readouterr().out
    assert (tmp_path / "m" / "a_segmentation.png").is_file()


def test_a_single_file_or_a_model_that_is_not_there_is_named_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Image.fromarray(noise(30, 40)).save(tmp_path / "a.png")
    for arguments, said in (
        ((f"{tmp_path}/b.png", "--model", f"{tmp_path}/no"), f"hpsearch: there is no file {tmp_path}/b.png\n"),
        (
            (f"{tmp_path}/a.png", "--model", f"{tmp_path}/no"),
            f"hpsearch: there is no model in {tmp_path}/no: choose a",
        ),
    ):
        with pytest.raises(SystemExit) as caught:
            main(["predict", *arguments])
        captured = capsys.readouterr()
        assert (caught.value.code, captured.out) == (1, "")
        assert captured.err.startswith(said)
        assert captured.err.count("\n") == 1


@pytest.mark.parametrize("kind", ["pickle", "torch"])
def test_a_pickle_for_a_model_is_refused_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str
) -> None:
    model = tmp_path / "model.pt"
    if kind == "pickle":
        model.write_bytes(pickle.dumps({"weights": [1.0]}))
    else:
        torch.save({"weights": torch.zeros(2)}, model)
    Image.fromarray(noise(30, 30)).save(tmp_path / "a.png")
    with pytest.raises(SystemExit) as caught:
        main(["predict", str(tmp_path / "a.png"), "--model", str(model), "--out-dir", str(tmp_path / "masks")])
    assert caught.value.code == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "cannot be read as a complete safetensors file" in error
    assert not (tmp_path / "masks").exists()


def test_images_are_found_in_files_folders_and_globs(tmp_path: Path) -> None:
    for name in ("b.jpg", "a.PNG", "a_superpixels.png", "a_segmentation.png", ".hidden.png", "deep/c.jpeg"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    names = [path.name for path in find_images([tmp_path / "b.jpg", tmp_path, f"{tmp_path}/**/*.jp*g"])]
    assert names == ["b.jpg", "a.PNG", "c.jpeg"]
    assert find_images([tmp_path / "a_segmentation.png"]) == [tmp_path / "a_segmentation.png"]
    with pytest.raises(DatasetError, match="has no images"):
        find_images([f"{tmp_path}/*.tiff"])
    (tmp_path / "deeper").mkdir()
    with pytest.raises(DatasetError, match="deeper has no images"):
        find_images([tmp_path / "deeper"])


def test_two_images_for_one_mask_are_refused(tmp_path: Path) -> None:
    for folder in ("x", "y"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "a.png").touch()
    with pytest.raises(DatasetError, match="would have the same output files"):
        find_images([tmp_path / "x", tmp_path / "y"])
    for name in ("é.png", "e\u0301.PNG"):
        (tmp_path / name).touch()
    with pytest.raises(DatasetError, match="would have the same output files"):
        find_images([tmp_path])


def test_without_a_model_the_latest_final_of_the_study_is_taken(tmp_path: Path) -> None:
    from hpsearch.store.record import StudyRecord
    from tests.search.studies import tiny_config

    project = ProjectPaths(tmp_path)
    study = project.study("tiny")
    StudyRecord.create(study, tiny_config(tmp_path))
    with pytest.raises(StudyError, match="no final model yet"):
        find_model(project, None, None)
    for trial, ended_at in ((3, 200.0), (7, 100.0)):
        final = study.final(f"trial-{trial:04d}")
        write_json(final.result, {"ended_at": ended_at})
        write_model(final.model)
    assert find_model(project, None, None) == study.final("trial-0003").model
    write_json(study.final("trial-0007").result, {"ended_at": 300.0})
    assert find_model(project, None, None) == study.final("trial-0007").model
    assert find_model(project, None, str(study.final("trial-0007").root)) == study.final("trial-0007").model
    with pytest.raises(CheckpointError, match="there is no model in"):
        find_model(project, None, str(study.finals))


def test_predict_takes_the_threads_of_the_plan_and_spares_the_true_masks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    study, masks = ProjectPaths(tmp_path).study("mine"), tmp_path / "masks"
    masks.mkdir()
    own = configs.load(None, [f"data.images={tmp_path}", f"data.masks={masks}"])
    plan = ExecutionPlan(device="cpu", precision="float32", workers=(WorkerSettings("cpu", 3),), memory_bytes=1)
    StudyRecord.create(study, own).write_plan(to_json(plan))
    weights = study.final("trial-0000").model
    weights.parent.mkdir(parents=True)
    write_model(weights)
    Image.fromarray(noise(30, 40)).save(tmp_path / "a.png")
    used: list[int | None] = []

    def load(path: Path, *, threads: int | None, **how: Any) -> Predictor:
        used.append(threads)
        return load_predictor(path, threads=1, **how)

    monkeypatch.setattr("hpsearch.inference.predictor.load_predictor", load)
    codes = []
    for more in (["masks"], ["found"], ["found", "--threads", "2"]):
        with pytest.raises(SystemExit) as caught:
            main(
                [
                    "predict",
                    f"{tmp_path}/a.png",
                    "--model",
                    str(weights),
                    "--out-dir",
                    f"{tmp_path}/{more[0]}",
                    *more[1:],
                ]
            )
        codes.append(caught.value.code)
    assert codes == [1, 0, 0]
    assert used == [3, 2]
    assert "contains the true masks of study 'mine': choose another folder" in capsys.readouterr().err
    assert list(masks.iterdir()) == []
