from __future__ import annotations

import dataclasses
import runpy
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import pytest

from hpsearch import config as configs
from hpsearch.config import study
from hpsearch.config.model import UNetConfig
from hpsearch.config.study import SECTIONS, annotation_of
from hpsearch.config.train import TrainConfig
from hpsearch.config.values import ModuleName
from hpsearch.errors import ConfigError

ROOT = Path(__file__).parents[2]
SEARCHABLE = [
    name
    for name in configs.setting_names()
    if name not in configs.NOT_SEARCHABLE and not name.startswith("study.") and name != "augment.crop"
]
"""All settings that may differ between trials; random crops need other settings of the data as well."""


def _values(name: str) -> list[Any]:
    """Return valid values of a setting, its default among them."""
    section, _, key = name.partition(".")
    default = getattr(SECTIONS[section](), key)
    annotation = annotation_of(name)
    for module_name in get_args(annotation):
        if isinstance(module_name, ModuleName):
            return [default]
    if get_origin(annotation) is Literal:
        return list(get_args(annotation))
    if isinstance(default, bool):
        return [False, True]
    if isinstance(default, int):
        return [default, default + 2]
    return [default, default / 2 + 0.01]


@pytest.mark.parametrize("name", SEARCHABLE)
def test_every_setting_of_a_trial_can_be_searched(name: str) -> None:
    values = _values(name)
    overrides = ["study.eval_size=64", f"search.{name}={values!r}"]
    config = configs.load(None, [*overrides, "data.size=64"] if name != "data.size" else overrides)
    assert name in config.search
    for value in values:
        trial = config.with_params({name: value})
        assert configs.get_setting(trial, name) == value
    assert configs.from_dict(config.to_dict()) == config


def test_settings_that_trials_must_share_cannot_be_searched() -> None:
    for name in set(configs.setting_names()) - set(SEARCHABLE) - {"augment.crop"}:
        with pytest.raises(ConfigError, match="cannot be searched"):
            configs.from_dict({"search": {name: [1, 2]}})


@dataclass(frozen=True, kw_only=True)
class LabelSmoothing(TrainConfig):
    """The settings of a fit, and one more."""

    label_smoothing: float = 0.1
    """Share of the label that goes to the other class."""


@pytest.fixture
def new_setting(monkeypatch: pytest.MonkeyPatch) -> str:
    """A setting that was added to its dataclass and nowhere else."""
    monkeypatch.setitem(study.SECTIONS, "train", LabelSmoothing)
    return "train.label_smoothing"


def test_a_new_setting_needs_its_field_only(new_setting: str, tmp_path: Path) -> None:
    path = tmp_path / "study.toml"
    path.write_text(f'[search]\n"{new_setting}" = {{ low = 0.0, high = 0.2 }}\n')
    config = configs.load(path, [f"{new_setting}=0.05", f"search.{new_setting}=[0.0, 0.05]"])
    assert configs.get_setting(config.with_params({new_setting: 0.0}), new_setting) == 0.0
    path.write_text(config.to_sealed_toml())
    assert configs.load(path) == config
    assert config.flat()[new_setting] == 0.05
    with pytest.raises(ConfigError, match=r"train\.label_smoothing must be a number, got 'much'"):
        configs.load(None, [f"{new_setting}=much"])


@dataclass(frozen=True, kw_only=True)
class _Section:
    """A section with one setting."""

    label_smoothing: float = 0.1
    """Share of the label that goes to the other class."""


def test_a_new_setting_is_described_in_the_reference() -> None:
    script = runpy.run_path(str(ROOT / "docs/make_reference.py"))
    row = script["describe_section"]("train", _Section).splitlines()[-1]
    assert row == "| `train.label_smoothing` | `0.1` | a number | Share of the label that goes to the other class. |"


def test_every_setting_has_a_description() -> None:
    script = runpy.run_path(str(ROOT / "docs/make_reference.py"))
    for cls in SECTIONS.values():
        assert [field.name for field in dataclasses.fields(cls)] == list(script["attribute_docs"](cls))


def test_a_later_setting_of_the_network_leaves_the_files_of_existing_studies_as_they_are() -> None:
    @dataclass(frozen=True, kw_only=True)
    class Later(UNetConfig):
        dropout: float = 0.0

    assert Later().to_dict() == UNetConfig().to_dict()
    assert Later(dropout=0.5).to_dict() == {**UNetConfig().to_dict(), "dropout": 0.5}
