from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from hpsearch.config.model import UNetConfig
from hpsearch.data.batches import DeviceData
from hpsearch.data.cache import Normalization, open_cache
from hpsearch.inference import select_postprocessing as choosing
from hpsearch.inference.postprocessing import FoldNetwork, Postprocessing, SelectedPostprocessing
from hpsearch.inference.predictor import Ensemble, Predictor, load_predictor
from hpsearch.inference.scoring import count_mask
from hpsearch.models.unet import UNet
from hpsearch.training.checkpoint import WeightsInfo, load_weights, save_weights
from hpsearch.training.evaluation import mean_over_flips
from hpsearch.training.runtime import Runtime, make_runtime
from tests.recorded import write_cache

N, SIZE = 12, 16
MODEL = UNetConfig(base_channels=2, depth=1, stacking=1, norm="none", input_norm="none")


@pytest.fixture
def data(tmp_path: Path) -> DeviceData:
    write_cache(tmp_path, "pool", [f"ISIC_{i:07d}" for i in range(N)], ["train"] * N, SIZE)
    return DeviceData(open_cache(tmp_path / "pool-memmap"))


@pytest.fixture
def runtime() -> Runtime:
    return make_runtime("cpu", amp="off", compile="off", threads=1)


def network(path: Path, seed: int, **extra: Any) -> Path:
    """A network that was never trained, with a normalisation of its own."""
    model = UNet(MODEL, 3, seed=seed)
    normalization = Normalization((0.5 + 0.01 * seed,) * 3, (0.25,) * 3)
    info = WeightsInfo(model=MODEL, in_channels=3, normalization=normalization, size=(SIZE, SIZE), extra=extra)
    save_weights(path, model, info)
    return path


def choose(
    tmp_path: Path,
    data: DeviceData,
    runtime: Runtime,
    *,
    seeds: tuple[int, int] = (0, 1),
    metric: str = "dice",
    ensemble: bool = False,
) -> SelectedPostprocessing:
    folds = [
        FoldNetwork(
            network(tmp_path / f"first{fold}.safetensors", fold),
            network(tmp_path / f"other{fold}.safetensors", fold + 7),
            tuple(range(fold, N, 2)),
        )
        for fold in range(2)
    ]
    return choosing.select(folds, data, runtime, metric=metric, source="refits of trial 7", ensemble=ensemble)


def test_every_choice_is_made_on_all_held_out_images_and_is_on_record(
    tmp_path: Path, data: DeviceData, runtime: Runtime
) -> None:
    chosen = choose(tmp_path, data, runtime, ensemble=True)
    assert (chosen.n_images, chosen.source) == (N, "refits of trial 7")
    assert [each.name for each in chosen.decisions] == ["flips", "threshold", "clean", "ensemble"]
    assert [each.name for each in choose(tmp_path, data, runtime).decisions][-1] == "clean"
    assert choose(tmp_path, data, runtime) == choose(tmp_path, data, runtime)


def test_a_threshold_and_a_cleaning_that_help_every_image_are_taken(
    tmp_path: Path, data: DeviceData, runtime: Runtime, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By networks that know every lesion but are never sure, and always see another one in a corner."""
    _, info = load_weights(network(tmp_path / "probe.safetensors", 0))

    def timid(images: Tensor) -> Tensor:
        # The lesions of the fake cache are dark.
        logits = torch.where(images.mean(dim=1, keepdim=True) < 0, -1.0, -4.0)
        logits[:, :, :2, :2] = 4.0
        return logits

    monkeypatch.setattr(choosing, "load_weights", lambda path, device: (timid, info))
    chosen = choose(tmp_path, data, runtime)
    decisions = {each.name: each for each in chosen.decisions}
    assert chosen.choices.clean
    assert 0.1 <= chosen.choices.threshold < 0.27
    assert decisions["threshold"].gain.difference > 0.5
    assert decisions["clean"].gain.difference > 0


Logits = Callable[[Tensor], Tensor]


def networks_that(patch: pytest.MonkeyPatch, tmp_path: Path, behave: Callable[[str, Tensor, Tensor], Tensor]) -> None:
    """Have the network of each file give the logits `behave(name, images, lesion)`; images are as they are stored."""
    info = dataclasses.replace(
        load_weights(network(tmp_path / "probe.safetensors", 0))[1],
        normalization=Normalization((0.0,) * 3, (1.0,) * 3),
    )

    def load(path: Path, device: object) -> tuple[Logits, WeightsInfo]:
        def logits(images: Tensor) -> Tensor:
            # The lesions of the fake cache are dark.
            return behave(path.stem, images, images.mean(dim=1, keepdim=True) < 0.47)

        return logits, info

    patch.setattr(choosing, "load_weights", load)


@pytest.mark.parametrize("ensemble", [False, True])
def test_every_image_is_predicted_by_the_networks_that_have_not_seen_it(
    tmp_path: Path, data: DeviceData, runtime: Runtime, monkeypatch: pytest.MonkeyPatch, ensemble: bool
) -> None:
    stored = [image.tobytes() for image in data.cache.read(np.arange(N))[0]]
    predicted: dict[str, set[int]] = {}
    scored_by = []
    select_threshold = choosing.select_threshold

    def note(name: str, images: Tensor, lesion: Tensor) -> Tensor:
        shown = (images * 255).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
        # Mirror images are not stored.
        predicted.setdefault(name, set()).update(
            stored.index(each.tobytes()) for each in shown if each.tobytes() in stored
        )
        return torch.where(lesion, 2.0, -2.0)

    def watch(scores: Any, network_of: Any) -> Any:
        scored_by.append(network_of.tolist())
        return select_threshold(scores, network_of)

    networks_that(monkeypatch, tmp_path, note)
    monkeypatch.setattr(choosing, "select_threshold", watch)
    choose(tmp_path, data, runtime, ensemble=ensemble)
    even, odd = set(range(0, N, 2)), set(range(1, N, 2))
    others = {"other0": even, "other1": odd} if ensemble else {}
    assert predicted == {"first0": even, "first1": odd, **others}
    assert scored_by == [[0] * (N // 2) + [1] * (N // 2)]


def is_odd(images: Tensor) -> Tensor:
    """Half of the pixels, (B, 1, H, W), the same ones in mirror images."""
    return (images[:, :1] * 255).round().to(torch.int64) % 2 == 1


def dice_of(preds: NDArray[np.bool_], masks: NDArray[np.bool_]) -> NDArray[np.float64]:
    """Of each image of (B, H, W)."""
    both = (preds & masks).sum((1, 2))
    return np.asarray(2 * both / (preds.sum((1, 2)) + masks.sum((1, 2))))


def test_each_choice_is_made_on_top_of_those_before(
    tmp_path: Path, data: DeviceData, runtime: Runtime, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By networks that see lesion on the whole left, are too timid about half of it, and see more in the corners.

    The second ones are timid about all of it.
    """

    def behave(name: str, images: Tensor, lesion: Tensor) -> Tensor:
        logits = torch.where(lesion, torch.where(is_odd(images) & (name[0] == "f"), 1.0, -1.0), -3.0)
        logits[..., :2, :2] = logits[..., -2:, :2] = logits[..., :2, -2:] = logits[..., -2:, -2:] = 4.0
        # The mean over flips is without it.
        logits[..., : SIZE // 2] += 5
        logits[..., SIZE // 2 :] -= 5
        return logits

    networks_that(monkeypatch, tmp_path, behave)
    chosen = choose(tmp_path, data, runtime, ensemble=True)
    assert chosen.choices.flips
    assert chosen.choices.clean
    assert 0.05 < chosen.choices.threshold < 0.27
    images, masks = data.cache.read(np.arange(N))
    lesion = masks > 0
    corners = np.zeros_like(lesion)
    corners[:, :2, :2] = corners[:, -2:, :2] = corners[:, :2, -2:] = corners[:, -2:, -2:] = True
    sure, all_of_it = lesion & (images[..., 0] % 2 == 1) | corners, lesion | corners
    gains = {each.name: each.gain.difference for each in chosen.decisions}
    assert gains["threshold"] == pytest.approx(np.mean(dice_of(all_of_it, lesion) - dice_of(sure, lesion)))
    assert gains["clean"] == pytest.approx(1 - np.mean(dice_of(all_of_it, lesion)))
    # By all of these choices each network is right.
    assert gains["ensemble"] == 0


@pytest.mark.parametrize("metric", ["dice", "jaccard"])
def test_an_ensemble_is_measured_by_its_mean_logits_against_the_mean_of_its_members_scores(
    tmp_path: Path, data: DeviceData, runtime: Runtime, monkeypatch: pytest.MonkeyPatch, metric: str
) -> None:
    """Each network of a pair is a little wrong about half of the lesion, of which the other one is sure."""

    def behave(name: str, images: Tensor, lesion: Tensor) -> Tensor:
        wrong = is_odd(images) if name.startswith("first") else ~is_odd(images)
        return torch.where(lesion, torch.where(wrong, -2.0, 6.0), -6.0)

    networks_that(monkeypatch, tmp_path, behave)
    # At any threshold that finds the rest: without one, so that it is the ensemble that does.
    monkeypatch.setattr(choosing, "THRESHOLDS", (0.5,))
    monkeypatch.setattr("hpsearch.inference.postprocessing.THRESHOLDS", (0.5,))
    chosen = choose(tmp_path, data, runtime, metric=metric, ensemble=True)
    images, masks = data.cache.read(np.arange(N))
    odd, lesion = images[..., 0] % 2 == 1, masks > 0
    alone = np.stack([dice_of(lesion & ~odd, lesion), dice_of(lesion & odd, lesion)])
    if metric == "jaccard":
        alone = alone / (2 - alone)
    decisions = {each.name: each for each in chosen.decisions}
    assert not decisions["clean"].taken
    assert decisions["ensemble"].gain.difference == pytest.approx(1 - alone.mean())
    assert chosen.choices == Postprocessing(ensemble=True)


def test_a_model_that_is_kept_knows_its_choices_and_without_any_is_the_file_it_was(tmp_path: Path) -> None:
    source = network(tmp_path / "source.safetensors", 0, threshold=0.5, match="resize")
    choosing.keep_model(source, tmp_path / "same.safetensors", Postprocessing())
    assert (tmp_path / "same.safetensors").read_bytes() == source.read_bytes()
    choices = Postprocessing(threshold=0.35, flips=True, clean=True)
    choosing.keep_model(source, tmp_path / "kept.safetensors", choices)
    predictor = Predictor.load(tmp_path / "kept.safetensors", device="cpu", threads=1)
    assert predictor.choices == choices
    assert predictor.info.extra["match"] == "resize"


@pytest.mark.parametrize(
    "choices",
    [Postprocessing(), Postprocessing(threshold=0.3), Postprocessing(threshold=0.45, flips=True, clean=True)],
)
def test_counts_are_those_of_the_masks_that_predict_makes(
    tmp_path: Path, data: DeviceData, runtime: Runtime, choices: Postprocessing
) -> None:
    """By one network and by several, each with its own normalisation."""
    (tmp_path / "ensemble").mkdir()
    kept = []
    for seed, name in enumerate(("model", "ensemble/fold0", "ensemble/fold1")):
        source = network(tmp_path / f"source{seed}.safetensors", seed)
        kept.append(tmp_path / f"{name}.safetensors")
        choosing.keep_model(source, kept[-1], choices)
    images, masks = data.cache.read(np.arange(N))
    for weights, ensemble in ((kept[:1], False), (kept[1:], True)):
        networks = [load_weights(path) for path in weights]
        (counts,) = choosing.count_pixels_of(networks, np.arange(N), [choices], data, runtime)
        predictor = load_predictor(kept[0], device="cpu", threads=1, ensemble=ensemble)
        assert isinstance(predictor, Ensemble) == ensemble
        for row, image, mask in zip(counts, images, masks, strict=True):
            pred = predictor.mask(predictor.logits(torch.from_numpy(image).permute(2, 0, 1)))
            assert np.array_equal(row, count_mask(pred, mask > 0, name="image"))


@pytest.mark.parametrize("flips", [False, True])
def test_a_valid_network_of_windows_is_counted_where_its_output_lies(
    tmp_path: Path, data: DeviceData, runtime: Runtime, flips: bool
) -> None:
    """16x16 windows have outputs of 8x8, four pixels from the border."""
    config = dataclasses.replace(MODEL, padding="valid")
    info = WeightsInfo(
        model=config, in_channels=3, normalization=Normalization((0.5,) * 3, (0.25,) * 3), size=(SIZE, SIZE),
        extra={"match": "crop"},
    )  # fmt: skip
    save_weights(tmp_path / "valid.safetensors", UNet(config, 3, seed=0), info)
    networks = [load_weights(tmp_path / "valid.safetensors")]
    (counts,) = choosing.count_pixels_of(networks, np.arange(N), [Postprocessing(flips=flips)], data, runtime)
    assert set(counts.sum(1)) == {8 * 8}
    inside = data.cache.read(np.arange(N))[1][:, 4:12, 4:12] > 0
    assert np.array_equal(counts[:, 0] + counts[:, 2], inside.sum((1, 2)))


def test_the_mean_over_flips_is_the_same_for_every_mirror_image() -> None:
    model = UNet(MODEL, 3, seed=0).eval()
    images = torch.randn(2, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        mean = mean_over_flips(model, images)
        for axes in ((-1,), (-2,), (-2, -1)):
            assert torch.allclose(mean_over_flips(model, images.flip(axes)).flip(axes), mean, atol=1e-6)
        assert not torch.allclose(mean, model(images), atol=1e-3)


def test_an_ensemble_has_the_mean_logits_of_its_members(tmp_path: Path, data: DeviceData) -> None:
    paths = [network(tmp_path / f"{seed}.safetensors", seed) for seed in range(3)]
    image = torch.from_numpy(data.cache.read(np.arange(1))[0][0]).permute(2, 0, 1)
    members = [Predictor.load(path, device="cpu", threads=1).logits(image) for path in paths]
    found = Ensemble([Predictor.load(path, device="cpu", threads=1) for path in paths]).logits(image)
    torch.testing.assert_close(found, torch.stack(members).mean(0))


def test_an_ensemble_is_used_if_it_was_chosen_and_it_is_there(tmp_path: Path) -> None:
    source = network(tmp_path / "source.safetensors", 0)
    model = tmp_path / "model.safetensors"
    choosing.keep_model(source, model, Postprocessing(ensemble=True))
    assert type(load_predictor(model, device="cpu", threads=1)) is Predictor
    (tmp_path / "ensemble").mkdir()
    network(tmp_path / "ensemble/fold0.safetensors", 1)
    assert isinstance(load_predictor(model, device="cpu", threads=1), Ensemble)
    assert type(load_predictor(model, device="cpu", threads=1, ensemble=False)) is Predictor
