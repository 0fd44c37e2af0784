from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable
from typing import Any

import pytest

from hpsearch import config as configs
from hpsearch.config import StudyConfig
from hpsearch.config.values import module_names
from hpsearch.search.samplers import cmaes
from hpsearch.search.space import SAME_FACTOR, default_params
from hpsearch.search.suggest import suggest
from hpsearch.store.trials import Outcome, TrialRecord

SPACE = (
    "search.train.lr={low=1e-4, high=1e-1, log=true}",
    "search.unet.depth={low=2, high=5}",
    "search.data.color=['rgb', 'grayscale']",
    "search.train.batch_size=[8, 16, 32]",
)
SAMPLERS = module_names("search/samplers")
Params = dict[str, Any]


def space(sampler: str = "tpe", seed: int = 0, n_startup: int = 4, lookahead: int = 0) -> StudyConfig:
    settings = (f"study.sampler={sampler}", f"study.seed={seed}", f"study.startup_trials={n_startup}")
    return configs.load(None, [*SPACE, *settings, f"study.lookahead={lookahead}"])


def few(*overrides: str) -> StudyConfig:
    """Two networks, and a learning rate."""
    dimensions = ("search.train.lr={low=1e-3, high=1e-1, log=true}", "search.unet.depth=[3, 4]")
    # Setting the value pins the dimension, so the dimensions come last.
    return configs.load(None, ["unet.depth=4", *dimensions, "study.startup_trials=4", *overrides])


def ended(number: int, params: Params, value: float | None = None, outcome: Outcome = "complete") -> TrialRecord:
    return TrialRecord(number=number, params=params, config={}, began_at=0.0, outcome=outcome, value=value)


def near_the_optimum(params: Params) -> float:
    return -abs(params["unet.depth"] - 4) - abs(params["train.lr"] - 0.02)


def search(config: StudyConfig, n: int, score: Callable[[Params], float] = near_the_optimum) -> list[TrialRecord]:
    """Return `n` trials that end one after another."""
    history: list[TrialRecord] = []
    for number in range(n):
        params = suggest(config, history, number)
        history.append(ended(number, params, score(params)))
    return history


def params_of(trials: list[TrialRecord]) -> list[Params]:
    return [trial.params for trial in trials]


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_suggestion_depends_on_the_history_alone(sampler: str) -> None:
    history = search(space(sampler), 7)
    assert suggest(space(sampler), history, 7) == suggest(space(sampler), list(history), 7)
    assert suggest(space(sampler), history, 7).keys() == default_params(space()).keys()


@pytest.mark.parametrize("sampler", ["tpe", "random", "cmaes", "gp"])
def test_suggestions_learn_from_the_values(sampler: str) -> None:
    history = search(space(sampler), 12)
    reversed_values = [dataclasses.replace(trial, value=-(trial.value or 0.0)) for trial in history]
    same = suggest(space(sampler), history, 12) == suggest(space(sampler), reversed_values, 12)
    assert same == (sampler == "random")


@pytest.mark.parametrize("sampler", ["tpe", "cmaes", pytest.param("gp", marks=pytest.mark.slow)])
def test_a_sampler_finds_better_learning_rates_than_random_search(sampler: str) -> None:
    def by(name: str) -> float:
        dimensions = ["search.train.lr={low=1e-5, high=10.0, log=true}", "search.train.momentum={low=0.0, high=0.99}"]
        found = []
        for seed in range(3):
            settings = [f"study.sampler={name}", f"study.seed={seed}", "study.startup_trials=5"]
            config = configs.load(None, [*dimensions, *settings])
            trials = search(
                config, 24, lambda params: -abs(params["train.lr"] - 0.01) - abs(params["train.momentum"] - 0.9)
            )
            found += [trial.value or 0.0 for trial in trials[-10:]]
        return sum(found)

    assert by(sampler) > by("random")


def test_cmaes_continues_its_generations_from_the_record(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without replaying, every suggestion comes from the first generation, far from the optimum."""
    dimensions = ["search.train.momentum={low=0.0, high=0.99}", "search.train.lr={low=1e-4, high=1e-1, log=true}"]
    config = configs.load(None, [*dimensions, "study.sampler=cmaes", "study.startup_trials=1"])

    def late_distance() -> float:
        trials = search(config, 40, lambda params: -abs(params["train.momentum"] - 0.9))
        return sum(abs(trial.params["train.momentum"] - 0.9) for trial in trials[-10:])

    replayed = late_distance()
    monkeypatch.setattr(cmaes, "IS_REPLAYED", False)
    assert replayed < 0.5 * late_distance()


def test_suggestions_of_a_seed_do_not_repeat() -> None:
    assert len({tuple(params.values()) for params in params_of(search(space("random"), 16))}) == 16


def test_another_seed_suggests_other_configurations() -> None:
    assert params_of(search(space(seed=1), 6))[1:] != params_of(search(space(seed=2), 6))[1:]


def test_trial_0_is_the_default_configuration() -> None:
    first = suggest(space(), [], 0, {"train.lr": 0.05})
    assert first == {"data.color": "rgb", "train.batch_size": 16, "train.lr": 0.01, "unet.depth": 4}


def test_enqueued_params_come_before_suggestions() -> None:
    wanted = {"data.color": "grayscale", "train.batch_size": 8, "train.lr": 0.05, "unet.depth": 3}
    assert suggest(space(), search(space(), 3), 3, wanted) == wanted


def test_no_suggestion_has_the_discrete_part_of_an_earlier_one_and_nearly_its_learning_rate() -> None:
    found = params_of(search(few(), 25))
    for number, params in enumerate(found):
        for earlier in found[:number]:
            if params["unet.depth"] == earlier["unet.depth"]:
                assert not 1 / SAME_FACTOR < params["train.lr"] / earlier["train.lr"] < SAME_FACTOR


@pytest.mark.parametrize("sampler", ["tpe", "random"])
def test_a_finite_space_is_repeated_only_once_every_configuration_was_suggested(sampler: str) -> None:
    """Also one whose steps round: 0.1 + 2 * 0.1 is not the 0.3 of the default configuration."""
    config = configs.load(
        None,
        [
            "train.momentum=0.3",
            "search.data.color=['rgb', 'grayscale']",
            "search.unet.depth={low=2, high=4}",
            "search.train.momentum={low=0.1, high=0.5, step=0.1}",
            "study.startup_trials=4",
            f"study.sampler={sampler}",
        ],
    )
    assert config.search.n_configurations == 2 * 3 * 5
    found = [config.search.key(params) for params in params_of(search(config, 31, lambda params: 0.5))]
    assert len(set(found[:30])) == 30
    assert found[30] in found[:30]


def test_a_pruned_trial_teaches_its_estimate() -> None:
    """As if it were complete with that value."""
    history = search(few(), 8)
    pruned = [dataclasses.replace(trial, outcome="pruned") for trial in history]
    assert suggest(few(), pruned, 8) == suggest(few(), history, 8)


def _infeasible_of(sampler: str, n: int, seed: int) -> int:
    """Return how many of the last 40 of `n` suggestions are infeasible, where the best lie next to those."""
    config = configs.load(
        None,
        [
            "search.unet.base_channels={low=8, high=64, step=4}",
            "search.train.batch_size={low=4, high=64, step=4}",
            "search.train.lr={low=1e-3, high=1e-1, log=true}",
            f"study.sampler={sampler}",
            f"study.seed={seed}",
        ],
    )
    history: list[TrialRecord] = []
    networks = []
    for number in range(n):
        params = suggest(config, history, number)
        size = params["unet.base_channels"] * params["train.batch_size"] / 1000
        if size > 1:
            networks.append((params["unet.base_channels"], params["train.batch_size"]))
            trial = dataclasses.replace(ended(number, params, outcome="infeasible"), constraint=size - 1)
        else:
            trial = ended(number, params, size - abs(params["train.lr"] - 0.02))
        history.append(trial)
    # An infeasible network is not suggested again at any learning rate.
    assert len(set(networks)) == len(networks)
    return sum(trial.outcome == "infeasible" for trial in history[-40:])


def test_tpe_suggests_fewer_infeasible_configurations_after_it_has_seen_some() -> None:
    by_tpe, at_random = (sum(_infeasible_of(each, 60, seed) for seed in range(6)) for each in ("tpe", "random"))
    assert by_tpe < 0.8 * at_random


@pytest.mark.parametrize("outcome", ["complete", "infeasible", None])
def test_with_a_lookahead_the_results_of_the_last_trials_change_nothing(outcome: Outcome | None) -> None:
    config = few("study.lookahead=3")
    history = search(config, 10)
    changed = [
        dataclasses.replace(trial, outcome=outcome, value=0.9 if outcome == "complete" else None, constraint=0.5)
        if trial.number > 10 - 3
        else trial
        for trial in history
    ]
    assert suggest(config, changed, 10) == suggest(config, history, 10)
    known = [*changed[:7], dataclasses.replace(changed[7], value=5.0), *changed[8:]]
    assert suggest(config, known, 10) != suggest(config, history, 10)


def test_suggestions_of_a_linear_range_differ_by_more_than_a_fortieth() -> None:
    config = configs.load(None, ["search.train.momentum={low=0.1, high=0.9}", "study.startup_trials=3"])
    trials = search(config, 14, lambda params: -abs(params["train.momentum"] - 0.7))
    found = sorted(trial.params["train.momentum"] for trial in trials)
    assert min(above - below for below, above in itertools.pairwise(found)) > 0.8 / 40


def test_suggestions_are_random_for_the_startup_trials_only() -> None:
    at_random, learnt = (params_of(search(space(n_startup=n), 8)) for n in (100, 4))
    assert learnt[:4] == at_random[:4]
    assert learnt[4:] != at_random[4:]


def test_a_running_trial_influences_the_next_suggestion() -> None:
    """Otherwise several workers would try the same configuration."""
    history = search(space(), 8)
    suggested = []
    for open_params in ({"train.lr": 2e-4, "unet.depth": 2}, {"train.lr": 9e-2, "unet.depth": 5}):
        params = {"data.color": "rgb", "train.batch_size": 16, **open_params}
        running = TrialRecord(number=8, params=params, config={}, began_at=0.0)
        suggested.append(suggest(space(), [*history, running], 9))
    assert suggested[0] != suggested[1]
