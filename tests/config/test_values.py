from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Annotated

import pytest

import hpsearch
from hpsearch import config as configs
from hpsearch.config.search import StudySettings
from hpsearch.config.train import TrainConfig
from hpsearch.config.values import ModuleName, module_names
from hpsearch.errors import ConfigError


def test_names_are_the_modules_of_the_folder_without_helpers() -> None:
    names = module_names("training/losses")
    assert {"bce", "dice", "jaccard"} <= set(names)
    assert "_overlap" not in names
    assert (Path(hpsearch.__file__).parent / "training/losses/_overlap.py").is_file()


@pytest.mark.parametrize(
    ("setting", "value", "valid", "nearest"),
    [
        ("train.loss", "dise", "'bce' or 'dice'", "dice"),
        ("train.loss", "bce+dise", "a sum such as 'bce+dice'", "dice"),
        ("study.sampler", "tpee", "'random' or ", "tpe"),
        ("study.pruner", "rase", "'race'", "race"),
        ("unet.network", "unett", "'unet'", "unet"),
    ],
)
def test_an_unknown_name_is_refused_with_the_valid_names_and_the_nearest(
    setting: str, value: str, valid: str, nearest: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        configs.load(None, [f"{setting}={value}"])
    assert f"{setting} must be " in str(caught.value)
    assert valid in str(caught.value)
    assert str(caught.value).endswith(f"(did you mean {nearest}?)")


def test_names_are_checked_in_python_too() -> None:
    with pytest.raises(ConfigError, match=r"study\.sampler must be .* got 'grid'"):
        StudySettings(sampler="grid")
    with pytest.raises(ConfigError, match=r"train\.loss = 'dice\+dice' lists a loss twice"):
        TrainConfig(loss="dice+dice")


def test_a_setting_of_module_names_is_described_by_them() -> None:
    losses = " or ".join(map(repr, module_names("training/losses")))
    assert configs.describe_type(Annotated[str, ModuleName("training/losses")]) == losses
    loss = Annotated[str, ModuleName("training/losses", is_sum=True)]
    assert configs.describe_type(loss) == f"{losses} or a sum such as 'bce+dice'"


def test_checking_names_imports_none_of_the_modules() -> None:
    code = (
        "import sys, hpsearch.config as c; c.load(None, ['train.loss=dice', 'study.sampler=random']);"
        "assert not {'torch', 'optuna', 'numpy'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
