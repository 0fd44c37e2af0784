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


@pytest.fixture(scope="module")
def benchmark() -> ModuleType:
    path = Path(__file__).parents[2] / "benchmarks" / "data_memory.py"
    spec = importlib.util.spec_from_file_location("data_memory", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def peak_bytes(benchmark: ModuleType) -> Callable[..., int]:
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


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_the_largest_images_cost_bounded_memory_everywhere(
    root: Path, tmp_path: Path, peak_bytes: Callable[..., int]
) -> None:
    data, out = ["--data", str(root)], ["--out", str(tmp_path)]
    settings = ["unet.base_channels=2", "unet.depth=1", "unet.stacking=1", "train.epochs=1", "train.batch_size=2"]
    flags = [flag for setting in [*settings, "study.confirm=0"] for flag in ("--set", setting)]
    once = ["--size", "256", "--trials", "1", "--folds", "2", "--threads", "1", "--study", "large"]
    images = str(root / "ISIC-2017_Test_v2_Data")
    commands = {
        "check and duplicates": ["data", "check", "--duplicates", *data, *out],
        "augment": ["data", "augment", *data, *out],
        "cache, study, panels": ["study", *data, *out, *once, *flags],
        "final": ["final", "--best", "--threads", "1", *out],
        "report": ["report", *out],
        "predict": ["predict", images, "--overlays", "--probabilities", "--out-dir", str(tmp_path / "whole"), *out],
        "predict by tiles": ["predict", images, "--tiles", "--out-dir", str(tmp_path / "tiles"), *out],
    }
    peaks = {name: peak_bytes(*command) for name, command in commands.items()}
    assert all(peak < LIMIT_BYTES for peak in peaks.values()), peaks
    assert (tmp_path / "whole" / "ISIC_0000008_overlay.jpg").is_file()
    assert Image.open(tmp_path / "tiles" / "ISIC_0000008_segmentation.png").size == LARGEST[::-1]
