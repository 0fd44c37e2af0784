"""Images of 6748x4499 cost bounded anonymous memory in every process of every command."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from PIL import Image

from tests.data.conftest import pair_paths, tiny_pairs, write_pairs

LARGEST = (4499, 6748)
"""Height and width of the largest image of ISIC-2017: 30 million pixels."""
LIMIT_BYTES = 2**30

# What these do with thirty million pixels takes its time on a machine with other work.
pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(1500),
    pytest.mark.skipif(sys.platform != "linux", reason="reads /proc"),
]


@pytest.fixture(scope="module")
def benchmark() -> ModuleType:
    path = Path(__file__).parents[2] / "benchmarks" / "data_memory.py"
    spec = importlib.util.spec_from_file_location("data_memory", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


PeakBytes = Callable[..., int]


@pytest.fixture(scope="module")
def peak_bytes(benchmark: ModuleType) -> PeakBytes:
    """Anonymous memory of the largest process of a command that succeeds."""

    def run(*arguments: str) -> int:
        code, largest, _ = benchmark.peak_anonymous_bytes([sys.executable, "-m", "hpsearch", *arguments])
        assert code == 0
        return int(largest)

    return run


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Small images, with one of the largest kind in the training split and one in the test split."""
    root = tmp_path_factory.mktemp("large") / "ISIC-2017"
    write_pairs(root, "archive", tiny_pairs(5, 2, 2))
    rng = np.random.default_rng(0)
    rows, columns = np.ogrid[: LARGEST[0], : LARGEST[1]]
    for number, split in ((0, "train"), (8, "test")):
        image, mask = pair_paths(root, "archive", f"ISIC_{number:07d}", split)  # type: ignore[arg-type]
        inside = np.hypot(rows - 2200, columns - 3000 - 200 * number) < 1300
        Image.fromarray(np.where(inside, 255, 0).astype(np.uint8)).save(mask)
        skin = np.repeat(np.where(inside, 90, 190).astype(np.uint8)[..., None], 3, axis=2)
        skin[::7, ::5] += rng.integers(0, 60, 3, dtype=np.uint8)
        image.unlink()
        Image.fromarray(skin).save(image.with_suffix(".jpg"), quality=90)
    return root


@pytest.fixture(scope="module")
def project(root: Path, peak_bytes: PeakBytes) -> tuple[Path, int]:
    """A project with a study of one trial over that data, and the peak of what made it."""
    out = root.parent / "project"
    settings = ["unet.base_channels=2", "unet.depth=1", "unet.stacking=1", "train.epochs=1", "train.batch_size=2"]
    flags = [flag for setting in [*settings, "study.confirm=0"] for flag in ("--set", setting)]
    once = ["--size", "256", "--trials", "1", "--folds", "2", "--threads", "1"]
    return out, peak_bytes("study", "--data", str(root), "--out", str(out), *once, *flags)


def test_checking_them_and_their_duplicates(root: Path, tmp_path: Path, peak_bytes: PeakBytes) -> None:
    peak = peak_bytes("data", "check", "--duplicates", "--data", str(root), "--out", str(tmp_path))
    assert peak < LIMIT_BYTES


def test_augmenting_them(root: Path, tmp_path: Path, peak_bytes: PeakBytes) -> None:
    peak = peak_bytes("data", "augment", "--data", str(root), "--to", str(tmp_path / "more"), "--out", str(tmp_path))
    # An image is changed as a whole, in float32: 110 bytes per pixel (docs/data.md).
    assert peak < 4 * LIMIT_BYTES


def test_caching_training_and_panels(project: tuple[Path, int]) -> None:
    assert project[1] < LIMIT_BYTES


@pytest.fixture(scope="module")
def final(project: tuple[Path, int], peak_bytes: PeakBytes) -> tuple[Path, int]:
    """The project with a final model, and the peak of what made it."""
    return project[0], peak_bytes("final", "--best", "--threads", "1", "--out", str(project[0]))


def test_final_and_report(final: tuple[Path, int], peak_bytes: PeakBytes) -> None:
    assert final[1] < LIMIT_BYTES
    assert peak_bytes("report", "--out", str(final[0])) < LIMIT_BYTES


@pytest.mark.parametrize("tiles", ["--whole", "--tiles"])
def test_predicting_them(
    root: Path, final: tuple[Path, int], tiles: str, tmp_path: Path, peak_bytes: PeakBytes
) -> None:
    image = str(root / "ISIC-2017_Test_v2_Data" / "ISIC_0000008.jpg")
    where = ["--out", str(final[0]), "--out-dir", str(tmp_path)]
    assert peak_bytes("predict", image, tiles, "--overlays", "--probabilities", *where) < LIMIT_BYTES
    with Image.open(tmp_path / "ISIC_0000008_segmentation.png") as mask:
        assert mask.size == LARGEST[::-1]
