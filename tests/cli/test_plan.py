from __future__ import annotations

import re
from pathlib import Path

import pytest
from click.testing import CliRunner

from hpsearch import config as configs
from hpsearch.cli import group
from hpsearch.cli.plan import gibibytes, time_of_study
from hpsearch.errors import ConfigError, DatasetError
from hpsearch.paths import ProjectPaths
from tests.search.studies import write_tiny_dataset


def plan(*arguments: str) -> str:
    result = CliRunner().invoke(group, ["plan", *arguments], catch_exceptions=False)
    assert result.exit_code == 0
    return result.output


def test_the_report_s_network_has_its_objects_and_layers() -> None:
    shown = plan("--config", "report-fig14")
    assert (
        "10 objects: a stacked convolution, 4 down, 4 up, a 1x1 convolution; 28 layers with the interpolation"
        in shown
    )
    rows = shown[shown.index("layer   ") :].splitlines()[1:]
    assert len(rows) == 28
    kinds = [row.split()[1] for row in rows]
    counts = {kind: kinds.count(kind) for kind in set(kinds)}
    assert counts == {"convolution": 18, "pool": 4, "up": 4, "head": 1, "interpolation": 1}
    assert [row.split()[3] for row in rows][:3] == ["570x570", "568x568", "284x284"]
    assert rows[-2].split()[3] == "388x388"


def test_what_overrides_change_in_the_search_is_said_first() -> None:
    sets = ["--set", "search.unet.base_channels=[4, 8]", "--set", "train.lr=0.1"]
    first, second, *_ = plan("--config", "isic2017-64", "--no-layers", *sets).splitlines()
    assert first == "note: train.lr = 0.1 is fixed and no longer searched (the range was 0.001 to 0.3)"
    assert second.startswith("UNet, base channels 8")


def test_without_a_border_taken_away_there_are_27_layers() -> None:
    shown = plan("--config", "report-fig14", "--set", "unet.padding=same", "--no-layers")
    assert "27 layers\n" in shown


@pytest.mark.parametrize("windows", [("data.match=crop",), ("augment.crop=true", "data.cache_size=700")])
def test_a_network_that_is_trained_on_windows_has_27_layers_and_no_interpolation(windows: tuple[str, ...]) -> None:
    sets = [word for change in windows for word in ("--set", change)]
    shown = plan("--config", "report-fig14", *sets)
    assert "27 layers\n" in shown
    rows = shown[shown.index("layer   ") :].splitlines()[1:]
    assert len(rows) == 27
    assert rows[-1].split()[1:4] == ["head", "1", "388x388"]


@pytest.mark.parametrize(
    ("changes", "saved", "verdict"),
    [
        ([], "5.50 GiB; at one byte per value, as the source report estimates: 1.08 GiB", "fits 8 GiB"),
        (
            ["train.batch_size=64"],
            "21.90 GiB; at one byte per value, as the source report estimates: 4.30",
            "does not fit 8",
        ),
        (
            ["unet.base_channels=64"],
            "10.99 GiB; at one byte per value, as the source report estimates: 2.14",
            "does not fit 8",
        ),
    ],
)
def test_the_report_s_memory_stands_beside_its_own_estimate(changes: list[str], saved: str, verdict: str) -> None:
    sets = [word for change in changes for word in ("--set", change)]
    shown = plan("--config", "report-fig14", "--preset", "rtx4060", "--no-layers", *sets)
    assert saved in shown
    assert f"\n{verdict}" in shown


def test_a_preset_s_precision_holds_where_the_study_leaves_it_open() -> None:
    assert ", fp16\n" in plan("--preset", "t4", "--no-layers").partition("10 objects")[0]
    assert ", bf16\n" in plan("--preset", "rtx4060", "--no-layers").partition("10 objects")[0]
    assert ", float32\n" in plan("--preset", "t4", "--no-layers", "--set", "train.amp=off").partition("10 objects")[0]
    chosen = plan("--preset", "t4", "--no-layers", "--precision", "bf16").partition("10 objects")[0]
    assert ", bf16\n" in chosen


def test_an_impossible_configuration_is_reported_in_one_line() -> None:
    shown = plan("--config", "report-fig14", "--set", "data.size=96")
    assert "impossible: " in shown
    assert "images must be at least 173x173" in shown
    assert len(shown.splitlines()) == 2


def test_memory_is_read_as_people_write_it() -> None:
    assert gibibytes("8GB") == gibibytes("8 GiB") == gibibytes("8") == gibibytes("8192MB") == 8
    with pytest.raises(ConfigError, match="--memory 'much'"):
        gibibytes("much")


def test_a_dataset_that_a_flag_names_must_exist_and_its_pool_is_counted(tmp_path: Path) -> None:
    root = write_tiny_dataset(tmp_path)
    assert plan("--no-layers", "--data", str(root)).splitlines()[0] == f"11 pool images in {root}"
    result = CliRunner().invoke(group, ["plan", "--no-layers", "--data", str(tmp_path / "nowhere")])
    assert isinstance(result.exception, DatasetError)
    assert "there is no folder" in str(result.exception)


@pytest.mark.slow
def test_measured_steps_tell_how_long_the_study_will_take(tmp_path: Path) -> None:
    settings = ["data.size=32", "unet.base_channels=2", "unet.depth=1", "train.epochs=2"]
    chosen = [part for value in (*settings, f'data.root="{tmp_path}"') for part in ("--set", value)]
    text = plan(*chosen, "--set", "search.unet.depth=[1, 2]", "--no-layers", "--measure")
    assert "2150 images as in ISIC-2017, because there is no dataset in" in text
    expected = r"50 trials left, then up to 5 refits: about .* on this machine \(without pruning .*\), .* per fit"
    assert re.search(expected, text)


def test_where_nothing_can_exist_there_is_nothing_to_measure(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no step to measure"):
        time_of_study(configs.load(None, ["data.size=16", "unet.depth=9"]), ProjectPaths(tmp_path), "cpu")
