from __future__ import annotations

import string
import tempfile
import tomllib
from pathlib import Path

import click
import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

from hpsearch import config as configs
from hpsearch.cli.options import Settings, config_options, config_path
from hpsearch.config.search import Choice, Range
from hpsearch.config.study import apply_overrides
from hpsearch.errors import ConfigError

SHIPPED = sorted((Path(__file__).parents[2] / "experiments").glob("*.toml"))


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_shipped_studies_load_and_round_trip(path: Path) -> None:
    config = configs.load(path)
    assert configs.from_dict(tomllib.loads(config.to_toml())) == config
    assert configs.from_dict(config.to_dict()) == config


@pytest.mark.parametrize(
    ("override", "name", "moved"),
    [
        ("search.unet.base_channels=[4, 8]", "unet.base_channels", 8),
        ("search.unet.base_channels={low=20, high=40, step=8}", "unet.base_channels", 20),
        ("search.unet.depth={low=1, high=2}", "unet.depth", 2),
        ("search.train.lr={low=1e-4, high=1e-3, log=true}", "train.lr", 1e-3),
        ('search.data.color=["grayscale"]', "data.color", "grayscale"),
        ("search.data.size=[[64, 48], [32, 24]]", "data.size", (64, 48)),
    ],
)
def test_a_range_given_on_the_command_line_moves_the_default_into_it(override: str, name: str, moved: object) -> None:
    base = ["unet.base_channels=16", "unet.depth=4", "train.lr=0.05", "study.eval_size=64"]
    table = configs.load(None, base).to_dict()
    notes: list[str] = []
    config = configs.from_dict(apply_overrides(table, [override], on_note=notes.append))
    assert configs.get_setting(config, name) == moved
    (note,) = notes
    assert note.startswith(f"search.{name} = ")
    assert f"trial 0 takes {moved!r} instead" in note


def test_a_range_that_holds_the_default_says_nothing() -> None:
    notes: list[str] = []
    config = configs.load(None, ["search.unet.depth=[1, 4]"], on_note=notes.append)
    assert config.unet.depth == 4
    assert notes == []


def test_a_default_that_is_given_too_is_not_moved() -> None:
    with pytest.raises(ConfigError, match=r"unet\.depth = 4 lies outside"):
        configs.load(None, ["unet.depth=4", "search.unet.depth=[1, 2]"])
    with pytest.raises(ConfigError, match=r"unet\.depth = 4 lies outside"):
        configs.from_dict({"search": {"unet.depth": [1, 2]}})
    assert configs.load(None, ["search.unet.depth=[1, 2]", "unet.depth=4"]).unet.depth == 4


def test_a_dimension_knows_its_value_nearest_to_any_other() -> None:
    stepped = Range(low=2, high=9, step=3)
    assert [stepped.nearest(value) for value in (0, 4, 9, 20)] == [2, 5, 8, 8]
    assert all(stepped.contains(stepped.nearest(value)) for value in range(20))
    assert Range(low=0.0, high=1.0, step=0.3).nearest(0.99) == pytest.approx(0.9)
    assert Range(low=1, high=3).nearest(True) == 1
    assert Choice((2, 4, 8)).nearest(3) == 2
    assert Choice((True, False)).nearest(1) is True


def test_pinning_a_searched_setting_is_told() -> None:
    notes: list[str] = []
    search = ["search.unet.depth={low=2, high=5}", "search.train.batch_size=[8, 16]"]
    config = configs.load(
        None, [*search, "unet.depth=3", "train.epochs=2", "train.batch_size=8"], on_note=notes.append
    )
    assert len(config.search) == 0
    assert notes == [
        "unet.depth = 3 is fixed and no longer searched (the range was 2 to 5)",
        "train.batch_size = 8 is fixed and no longer searched (the range was [8, 16])",
    ]


def test_setting_a_searched_key_pins_it() -> None:
    space = ["search.unet.depth=[2, 3, 4]", "search.train.lr={low=0.001, high=0.1}"]
    config = configs.load(None, [*space, "unet.depth=3"])
    assert "unet.depth" not in config.search
    assert "train.lr" in config.search
    assert config.unet.depth == 3


def test_iou_is_another_name_of_jaccard() -> None:
    assert configs.load(None, ["study.metric=iou"]).study.metric == "jaccard"
    assert configs.load(None, ["train.loss=iou"]).train.loss_terms == ("jaccard",)


@pytest.mark.parametrize(
    ("override", "names"),
    [
        ("train.lrr=1", "train.lr"),
        ("trian.lr=1", "trian.lr"),
        ("train.lr=fast", "train.lr"),
        ("train.lr=nan", "train.lr"),
        ("train.epochs=2.5", "train.epochs"),
        ("train.epochs=true", "train.epochs"),
        ("unet.depth=0", "unet.depth"),
        ("unet.kernel_size=4", "unet.kernel_size"),
        ("data.size=[64]", "data.size"),
        ("study.folds=1", "study.folds"),
        ("study.folds=fixd", "study.folds"),
        ("data.images=photos", "data.masks"),
        ("search.train.lr={low=0, high=1, log=true}", "search.train.lr"),
        ("search.train.lr={low=2, high=1}", "search.train.lr"),
        ("search.train.lr={lo=2, high=1}", "search.train.lr"),
        ("search.unet.depth=[]", "search.unet.depth"),
        ("search.unet.depth=[2, 2]", "search.unet.depth"),
        ("search.unet.depth=[0, 4]", "unet.depth"),
        ("search.data.root=['a', 'b']", "data.root"),
        ("search.study.seed=[1, 2]", "study.seed"),
        ("search.data.size=[572, 256]", "study.eval_size"),
        ("search.data.match=['resize', 'crop']", "data.match"),
        ("augment.crop=true", "data.cache_size"),
        ("data.cache_size=640", "augment.crop"),
        ("no-equals-sign", "no-equals-sign"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line_that_names_it(override: str, names: str) -> None:
    with pytest.raises(ConfigError) as caught:
        configs.load(None, [override])
    assert names in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("cropping", [["data.match=crop"], ["augment.crop=true", "data.cache_size=640"]])
def test_crops_cannot_be_scored_at_another_size(cropping: list[str]) -> None:
    configs.load(None, [*cropping, "study.eval_size=572"])
    with pytest.raises(ConfigError, match=r"study\.eval_size"):
        configs.load(None, [*cropping, "study.eval_size=256"])


def test_an_error_in_a_file_names_the_file(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text("[unet]\nwidth = 3\n")
    with pytest.raises(ConfigError, match=r"mine\.toml.*unet\.width"):
        configs.load(path)
    path.write_text("[unet\n")
    with pytest.raises(ConfigError, match=r"mine\.toml"):
        configs.load(path)


def test_an_unknown_shipped_study_lists_those_there_are() -> None:
    with pytest.raises(ConfigError, match="isic2017-64"):
        config_path("isic2018")


def test_resize_mode_is_another_name_of_match(tmp_path: Path) -> None:
    assert configs.load(None, ["data.resize_mode=crop"]).data.match == "crop"
    path = tmp_path / "study.toml"
    path.write_text('[data]\nresize_mode = "crop"\n')
    assert configs.load(path).data.match == "crop"
    with pytest.raises(ConfigError, match=r"data\.match must be 'resize' or 'crop'"):
        configs.load(None, ["data.resize_mode=stretch"])


def test_params_make_the_configuration_of_a_trial() -> None:
    config = configs.load(None, ["search.unet.depth=[3, 4]", "search.train.lr={low=0.001, high=0.1}"])
    trial = config.with_params({"unet.depth": 3, "train.lr": 0.05})
    assert (trial.unet.depth, trial.train.lr, len(trial.search)) == (3, 0.05, 0)
    assert config.unet.depth == 4


@given(
    st.dictionaries(
        st.sampled_from(configs.setting_names()),
        st.one_of(st.booleans(), st.integers(-5, 600), st.floats(allow_nan=True), st.text(max_size=12)),
        max_size=3,
    )
)
def test_any_values_either_round_trip_or_are_refused_in_one_line(settings: dict[str, object]) -> None:
    table: dict[str, dict[str, object]] = {}
    for name, value in settings.items():
        section, _, key = name.partition(".")
        table.setdefault(section, {})[key] = value
    try:
        config = configs.from_dict(table)
    except ConfigError as error:
        assert "\n" not in str(error)
        assert any(name.partition(".")[2] in str(error) for name in configs.setting_names())
        return
    assert configs.from_dict(tomllib.loads(config.to_toml())) == config


VALUES = st.one_of(
    st.sampled_from(["true", "[8, 16]", "{low=1, high=4}", "{low=0.1, high=1e3, log=true}", "rgb", "nan", "1e400"]),
    st.integers(-5, 600).map(str),
    st.floats().map(str),
    st.text(max_size=12),
    st.text("[{", min_size=1, max_size=3000),
)


@given(st.sampled_from([*configs.setting_names(), *(f"search.{name}" for name in configs.setting_names())]), VALUES)
def test_what_set_is_given_either_round_trips_or_is_refused_in_one_line_that_names_it(name: str, value: str) -> None:
    try:
        config = configs.load(None, [f"{name}={value}"])
    except ConfigError as error:
        assert len(str(error).splitlines()) == 1
        assert name.rpartition(".")[2] in str(error)
        return
    assert configs.from_dict(tomllib.loads(config.to_toml())) == config


FLAGS = ["--seed", "--size", "--color", "--data", "--images", "--masks", "--set"]


@given(st.lists(st.tuples(st.sampled_from(FLAGS), VALUES), max_size=4))
def test_flags_give_a_configuration_or_one_line_that_names_what_is_wrong(given_flags: list[tuple[str, str]]) -> None:
    heard: list[Settings] = []

    @click.command()
    @config_options
    def command(settings: Settings) -> None:
        heard.append(settings)

    result = CliRunner().invoke(command, [f"{flag}={value}" for flag, value in given_flags])
    if result.exit_code == 2:
        assert any(flag in result.output for flag, _ in given_flags)
        return
    assert result.exit_code == 0, result.output
    try:
        config = configs.load(None, heard[0].overrides)
    except ConfigError as error:
        assert len(str(error).splitlines()) == 1
        return
    assert configs.from_dict(tomllib.loads(config.to_toml())) == config


@given(st.one_of(st.binary(max_size=60), st.text(string.printable, max_size=60).map(str.encode)))
def test_a_file_of_anything_is_a_configuration_or_named_in_one_line(content: bytes) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "mine.toml"
        path.write_bytes(content)
        try:
            config = configs.load(path)
        except ConfigError as error:
            assert len(str(error).splitlines()) == 1
            assert "mine.toml" in str(error)
            return
    assert configs.from_dict(tomllib.loads(config.to_toml())) == config


def test_a_file_that_hpsearch_wrote_is_refused_once_it_was_edited(tmp_path: Path) -> None:
    path = tmp_path / "study.toml"
    text = configs.load(None, ["train.epochs=7"]).to_sealed_toml()
    path.write_text(text)
    assert configs.load(path).train.epochs == 7
    for damaged in (text.replace("epochs = 7", "epochs = 8"), text[:-10], text[: text.index("[train]")]):
        path.write_text(damaged)
        with pytest.raises(ConfigError, match=r"study\.toml was changed since hpsearch wrote it"):
            configs.load(path)
    path.write_text(text.partition("\n")[2].replace("epochs = 7", "epochs = 8"))
    assert configs.load(path).train.epochs == 8


def test_the_default_network_is_left_out_of_files_as_in_version_0_1() -> None:
    config = configs.load(None)
    assert "network" not in config.to_toml()
    assert config.flat()["unet.network"] == "unet"
    assert configs.from_dict(tomllib.loads(config.to_toml())) == config


@pytest.mark.parametrize("value", ["false", "true"])
def test_a_removed_setting_of_version_0_1_is_accepted_without_effect(tmp_path: Path, value: str) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(f"[study]\nallow_microbatch = {value}\ntrials = 7\n")
    config = configs.load(path, [f"study.allow_microbatch={value}"])
    assert config == configs.load(None, ["study.trials=7"])
    assert not any("allow_microbatch" in name for name in config.flat())
