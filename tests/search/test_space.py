from __future__ import annotations

import optuna
import pytest

from hpsearch import config as configs
from hpsearch.search.space import decode, default_params, distributions, encode, is_same, unused_params

SPACE = (
    "unet.stacking=1",
    "search.train.lr={low=1e-4, high=1e-1, log=true}",
    "search.unet.depth={low=2, high=5}",
    "search.data.color=['rgb', 'grayscale']",
    "search.unet.stacking={low=1, high=3, step=2}",
)


def test_sizes_survive_optuna_as_pairs() -> None:
    assert decode(encode((256, 192))) == (256, 192)
    assert decode(encode("rgb")) == "rgb"
    assert decode(encode(64)) == 64


def test_every_kind_of_dimension_has_its_distribution() -> None:
    found = distributions(configs.load(None, SPACE).search)
    assert isinstance(found["train.lr"], optuna.distributions.FloatDistribution)
    assert found["train.lr"].log
    assert isinstance(found["unet.stacking"], optuna.distributions.IntDistribution)
    assert found["unet.stacking"].step == 2
    assert isinstance(found["data.color"], optuna.distributions.CategoricalDistribution)


def test_the_default_params_are_those_of_the_configuration() -> None:
    assert default_params(configs.load(None, SPACE)) == {
        "data.color": "rgb",
        "train.lr": 0.01,
        "unet.depth": 4,
        "unet.stacking": 1,
    }


def test_continuous_values_are_the_same_if_they_are_close() -> None:
    rate = configs.load(None, SPACE).search["train.lr"]
    assert is_same(0.01, 0.0119, rate)
    assert not is_same(0.01, 0.0121, rate)
    assert is_same(0.01, 0.1, rate, any_float=True)


def test_discrete_values_are_the_same_only_if_they_are_equal() -> None:
    depth = configs.load(None, SPACE).search["unet.depth"]
    assert is_same(3, 3, depth)
    assert not is_same(3, 4, depth, any_float=True)


def test_unused_params_are_the_rest_of_the_grid() -> None:
    config = configs.load(
        None, ["unet.depth=2", "search.unet.depth={low=2, high=3}", "search.data.color=['rgb', 'grayscale']"]
    )
    used = [{"unet.depth": 2, "data.color": "rgb"}, {"unet.depth": 3, "data.color": "rgb"}]
    assert unused_params(config.search, used) == [
        {"data.color": "grayscale", "unet.depth": 2},
        {"data.color": "grayscale", "unet.depth": 3},
    ]


def test_a_continuous_space_has_no_list_of_unused_params() -> None:
    assert unused_params(configs.load(None, SPACE).search, []) == []


@pytest.mark.parametrize(
    ("dimensions", "expected"),
    [
        ((), 1),
        (("search.unet.depth=[2, 3]", "search.data.color=['rgb', 'grayscale']"), 4),
        (("search.unet.depth={low=2, high=5, step=2}",), 2),
        (("search.train.batch_size={low=4, high=16, log=true}",), 13),
        (("search.train.lr={low=0.01, high=0.01}", "search.unet.depth=[4]"), 1),
        (("search.train.lr={low=0.01, high=0.02}", "search.unet.depth=[4]"), None),
    ],
)
def test_the_configurations_of_a_space_are_counted(dimensions: tuple[str, ...], expected: int | None) -> None:
    given = ["unet.depth=4" if "[4]" in str(dimensions) else "unet.depth=2", "train.batch_size=8", "train.lr=0.01"]
    assert configs.load(None, [*given, *dimensions]).search.n_configurations == expected
