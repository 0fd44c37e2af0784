from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.cli.test_main import exit_code
from tests.search.studies import write_tiny_dataset


@pytest.mark.slow
def test_study_and_final_run_without_a_flag_and_name_the_image_that_pool_and_test_share(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = write_tiny_dataset(tmp_path)
    shutil.copy(
        root / "ISIC-2017_Training_Data" / "ISIC_0000003.png", root / "ISIC-2017_Test_v2_Data" / "ISIC_0000012.png"
    )
    shutil.copy(
        root / "ISIC-2017_Training_Part1_GroundTruth" / "ISIC_0000003_segmentation.png",
        root / "ISIC-2017_Test_v2_Part1_GroundTruth" / "ISIC_0000012_segmentation.png",
    )
    assert exit_code("data", "check", "--data", str(root), "--out", str(tmp_path)) == 0
    said = capsys.readouterr().out
    assert "15 pairs can be used: 8 train, 3 val, 4 test" in said
    assert "ISIC_0000003 of the pool is the same file as ISIC_0000012 of the test split" in said

    settings = ["unet.base_channels=2", "unet.depth=1", "unet.stacking=1", "train.epochs=1", "study.confirm=0"]
    flags = [flag for setting in settings for flag in ("--set", setting)]
    small = ["--size", "24", "--trials", "2", "--folds", "2", "--threads", "1"]
    common = ["--out", str(tmp_path), "--tracking", "none"]
    assert exit_code("study", "--data", str(root), *small, *flags, *common) == 0
    said = capsys.readouterr().out
    assert "ISIC_0000003 of the pool is the same file as ISIC_0000012 of the test split" in said
    assert "on 11 images" in said
    assert exit_code("final", "--best", *common) == 0
    said = capsys.readouterr().out
    assert "retrained on 11 pool images, evaluated on 4 test images" in said
    assert sum(line.startswith("test, no duplicates") for line in said.splitlines()) == 1
    assert "ISIC_0000003 and ISIC_0000012" in said
