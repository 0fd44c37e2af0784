from __future__ import annotations

import optuna
import pytest

from hpsearch import config as configs
from hpsearch.config import StudyConfig
from hpsearch.tuning.search_space import decode, default_params, distributions, encode, make_sampler, suggest

optuna.logging.set_verbosity(optuna.logging.WARNING)

pytestmark = pytest.mark.filterwarnings("ignore::optuna.exceptions.ExperimentalWarning")

SPACE = [
    "search.train.lr={low=1e-4, high=1e-1, log=true}",
    "search.unet.depth={low=2, high=5}",
    "search.data.color=['rgb', 'grayscale']",
    "search.train.batch_size=[8, 16, 32]",
]


def space(sampler: str = "tpe", seed: int = 0) -> StudyConfig:
    return configs.load(None, [*SPACE, f"study.sampler={sampler}", f"study.seed={seed}", "study.startup_trials=4"])


def search(config: StudyConfig, n: int, *, interrupt_at: int | None = None) -> list[dict[str, object]]:
    """Params of `n` trials; every ask is made by a sampler that was made for it, as after a restart."""
    storage = optuna.storages.InMemoryStorage()
    study = optuna.create_study(direction="maximize", storage=storage)
    found = []
    for number in range(n):
        study = optuna.load_study(study_name=study.study_name, storage=storage)
        study.sampler = make_sampler(config, {0: default_params(config)})
        trial = study.ask()
        if number == interrupt_at:
            trial.suggest_categorical("data.color", ["rgb", "grayscale"])
            trial = optuna.trial.Trial(study, trial._trial_id)
        params = suggest(trial, config.search)
        study.tell(trial, -abs(params["unet.depth"] - 4) - abs(params["train.lr"] - 0.02))
        found.append(params)
    return found


@pytest.mark.parametrize("sampler", ["tpe", "random"])
def test_a_restarted_study_suggests_what_it_would_have_suggested(sampler: str) -> None:
    assert search(space(sampler), 12) == search(space(sampler), 12)


def test_a_suggestion_that_was_cut_short_is_completed_as_it_would_have_been() -> None:
    assert search(space(), 12, interrupt_at=9) == search(space(), 12)


def test_suggestions_do_not_repeat_as_a_reopened_seed_would() -> None:
    found = search(space("random"), 16)
    assert len({tuple(params.values()) for params in found}) == 16


def test_another_seed_suggests_other_configurations() -> None:
    assert search(space(seed=1), 6)[1:] != search(space(seed=2), 6)[1:]


def test_trial_0_is_the_default_configuration() -> None:
    first = search(space(), 1)[0]
    assert first == {"data.color": "rgb", "train.batch_size": 16, "train.lr": 0.01, "unet.depth": 4}


def test_sizes_survive_optuna_as_pairs() -> None:
    assert decode(encode((256, 192))) == (256, 192)
    assert decode(encode("rgb")) == "rgb"
    assert decode(encode(64)) == 64


def test_every_kind_of_dimension_has_its_distribution() -> None:
    # Setting the value pins the dimension, so the dimension comes after it.
    config = configs.load(None, ["unet.stacking=1", *SPACE, "search.unet.stacking={low=1, high=3, step=2}"])
    found = distributions(config.search)
    assert isinstance(found["train.lr"], optuna.distributions.FloatDistribution)
    assert found["train.lr"].log
    assert isinstance(found["unet.stacking"], optuna.distributions.IntDistribution)
    assert found["unet.stacking"].step == 2
    assert isinstance(found["data.color"], optuna.distributions.CategoricalDistribution)
