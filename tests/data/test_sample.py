from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from torchvision.io import read_image

from hpsearch.config.data import DataConfig
from hpsearch.data import sample
from hpsearch.data.layouts import find_samples
from hpsearch.data.sample import LARGE_SIZE, Bytes, draw_pair, draw_sample
from hpsearch.errors import DatasetError, StorageError

FOLDERS = {
    "ISIC-2017_Training_Data",
    "ISIC-2017_Training_Part1_GroundTruth",
    "ISIC-2017_Validation_Data",
    "ISIC-2017_Validation_Part1_GroundTruth",
    "ISIC-2017_Test_v2_Data",
    "ISIC-2017_Test_v2_Part1_GroundTruth",
}


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("drawn") / "ISIC-2017"
    draw_sample(folder, n_train=12, n_val=3, n_test=4)
    return folder


@pytest.fixture(scope="module")
def pairs() -> list[tuple[Bytes, Bytes]]:
    return [draw_pair(np.random.default_rng((0, number))) for number in range(40)]


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_the_sample_has_the_layout_of_the_archive(drawn: Path) -> None:
    assert {path.name for path in drawn.iterdir()} == FOLDERS
    dataset = find_samples(DataConfig(root=str(drawn)))
    assert dataset.layout == "archive"
    assert dataset.problems == ()
    assert [len(dataset.split(split)) for split in ("train", "val", "test")] == [12, 3, 4]


def test_every_mask_is_binary_and_as_large_as_its_image(drawn: Path) -> None:
    for each in find_samples(DataConfig(root=str(drawn))).samples:
        image, mask = read_image(str(each.image)), read_image(str(each.mask))
        assert image.shape == (3, *mask.shape[1:])
        assert mask.shape[0] == 1
        assert mask.unique().tolist() == [0, 255]


def test_sizes_differ_and_some_images_are_portrait(pairs: list[tuple[Bytes, Bytes]]) -> None:
    shapes = [image.shape[:2] for image, _ in pairs]
    assert len(set(shapes)) > 35
    assert any(height > width for height, width in shapes)
    assert all(200 <= side <= 400 for shape in shapes for side in shape)


def test_one_seed_gives_the_same_bytes_and_another_gives_others(drawn: Path, tmp_path: Path) -> None:
    draw_sample(tmp_path / "same", n_train=12, n_val=3, n_test=4)
    draw_sample(tmp_path / "other", n_train=12, n_val=3, n_test=4, seed=1)
    assert contents(tmp_path / "same") == contents(drawn)
    other = contents(tmp_path / "other")
    assert other.keys() == contents(drawn).keys()
    assert all(other[name] != bytes_ for name, bytes_ in contents(drawn).items())


def test_an_image_does_not_depend_on_how_many_are_drawn(drawn: Path, tmp_path: Path) -> None:
    draw_sample(tmp_path / "few", n_train=2, n_val=1, n_test=1)
    few = contents(tmp_path / "few")
    assert len(few) == 8
    assert few.items() <= contents(drawn).items()


def test_the_best_centre_disc_scores_below_065(pairs: list[tuple[Bytes, Bytes]]) -> None:
    masks = [mask > 0 for _, mask in pairs]

    def dice(radius: float) -> float:
        scores = []
        for mask in masks:
            rows, columns = ((np.arange(side) + 0.5) / side - 0.5 for side in mask.shape)
            disc = rows[:, None] ** 2 + columns[None] ** 2 < radius**2
            scores.append(2 * (disc & mask).sum() / (disc.sum() + mask.sum()))
        return float(np.mean(scores))

    assert 0.3 < max(dice(radius) for radius in (0.1, 0.2, 0.25, 0.3, 0.4)) < 0.65


def test_lesions_are_darker_than_their_skin_and_of_very_different_contrast(pairs: list[tuple[Bytes, Bytes]]) -> None:
    contrasts = []
    for image, mask in pairs:
        green = image[..., 1].astype(float)
        skin = green[(mask == 0) & (green > 60)]
        contrasts.append(np.median(skin) - np.median(green[mask > 0]))
    assert min(contrasts) > 5
    assert max(contrasts) > 3 * np.quantile(contrasts, 0.1)


def test_a_large_image_has_the_largest_size_of_the_archive(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert LARGE_SIZE == (4499, 6748)
    monkeypatch.setattr(sample, "LARGE_SIZE", (900, 1350))
    draw_sample(tmp_path / "large", n_train=2, n_val=0, n_test=0, n_large=1)
    dataset = find_samples(DataConfig(root=str(tmp_path / "large")))
    large, small = (read_image(str(each.image)) for each in dataset.samples)
    mask = read_image(str(dataset.samples[0].mask))
    assert large.shape == (3, 900, 1350)
    assert mask.shape == (1, 900, 1350)
    assert mask.unique().tolist() == [0, 255]
    assert max(small.shape) <= 400


def test_progress_counts_every_image(tmp_path: Path) -> None:
    calls: list[tuple[int, int]] = []
    draw_sample(
        tmp_path / "s", n_train=2, n_val=1, n_test=1, progress=lambda done, total: calls.append((done, total))
    )
    assert calls == [(1, 4), (2, 4), (3, 4), (4, 4)]


def test_a_folder_that_holds_something_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(DatasetError, match="already exists"):
        draw_sample(tmp_path)
    assert (tmp_path / "mine.txt").read_text() == "mine"


def test_an_empty_folder_is_filled(tmp_path: Path) -> None:
    draw_sample(tmp_path, n_train=1, n_val=1, n_test=1)
    assert {path.name for path in tmp_path.iterdir()} == FOLDERS


def test_an_interrupted_drawing_leaves_nothing(tmp_path: Path) -> None:
    def interrupt(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        draw_sample(tmp_path / "sample", n_train=2, n_val=0, n_test=0, progress=interrupt)
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_refuses_is_a_storage_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(StorageError, match="sample"):
        draw_sample(tmp_path / "file" / "sample", n_train=1, n_val=0, n_test=0)


def test_the_module_imports_no_torch() -> None:
    code = "import hpsearch.data.sample, sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
