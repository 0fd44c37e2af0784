from __future__ import annotations

import itertools

import optuna
import pytest
from optuna.samplers import RandomSampler
from optuna.trial import FrozenTrial, TrialState, create_trial

from hpsearch import config as configs
from hpsearch.config import StudyConfig
from hpsearch.search.samplers import (
    SAME_FACTOR,
    ReplayableSampler,
    decode,
    default_params,
    distributions,
    encode,
    make_sampler,
    suggest,
)

optuna.logging.set_verbosity(optuna.logging.WARNING)

pytestmark = pytest.mark.filterwarnings("ignore::optuna.exceptions.ExperimentalWarning")

SPACE = [
    "search.train.lr={low=1e-4, high=1e-1, log=true}",
    "search.unet.depth={low=2, high=5}",
    "search.data.color=['rgb', 'grayscale']",
    "search.train.batch_size=[8, 16, 32]",
]


def space(sampler: str = "tpe", seed: int = 0, n_startup: int = 4) -> StudyConfig:
    settings = [f"study.sampler={sampler}", f"study.seed={seed}", f"study.startup_trials={n_startup}"]
    return configs.load(None, [*SPACE, *settings])


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


TWO_NETWORKS = ["search.train.lr={low=1e-3, high=1e-1, log=true}", "search.unet.depth=[3, 4]"]


def few(*overrides: str) -> StudyConfig:
    # Setting the value pins the dimension, so the dimensions come last.
    return configs.load(None, ["unet.depth=4", *TWO_NETWORKS, "study.startup_trials=4", *overrides])


def test_no_suggestion_has_the_discrete_part_of_an_earlier_one_and_nearly_its_learning_rate() -> None:
    found = search(few(), 25)
    for number, params in enumerate(found):
        for earlier in found[:number]:
            if params["unet.depth"] == earlier["unet.depth"]:
                ratio = float(params["train.lr"]) / float(earlier["train.lr"])  # type: ignore[arg-type]
                assert not 1 / SAME_FACTOR < ratio < SAME_FACTOR


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
    study = optuna.create_study(direction="maximize", sampler=make_sampler(config, {0: default_params(config)}))
    found = []
    for _ in range(31):
        trial = study.ask()
        found.append(config.search.key(suggest(trial, config.search)))
        study.tell(trial, 0.5)
    assert len(set(found[:30])) == 30
    assert found[30] in found[:30]


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


def test_the_search_learns_from_first_fits_and_estimates_whatever_the_trials_are_ranked_by() -> None:
    """The same suggestion before and after replicates, and where estimates are not shown as values."""

    def next_params(shown: bool) -> dict[str, object]:
        study = optuna.create_study(direction="maximize", sampler=make_sampler(few(), {}))
        for each in _told(few(), 8):
            each.user_attrs = {"search_value": each.value}
            if shown and each.number % 2:
                each.values = [1.0 - each.values[0]]
            elif shown:
                each.state, each.values = TrialState.PRUNED, None
            study.add_trial(each)
        return suggest(study.ask(), few().search)

    assert next_params(shown=True) == next_params(shown=False)


def _told(config: StudyConfig, n: int) -> list[optuna.trial.FrozenTrial]:
    study = optuna.create_study(direction="maximize", sampler=make_sampler(config, {}))
    for _ in range(n):
        trial = study.ask()
        suggest(trial, config.search)
        study.tell(trial, 0.5 - abs(trial.params["train.lr"] - 0.02))
    return study.get_trials()


def _infeasible_of(sampler: str, n: int, seed: int) -> tuple[int, set[tuple[object, ...]]]:
    """How many of the last 40 of `n` suggestions are infeasible, where the best ones lie next to what is."""
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
    study = optuna.create_study(direction="maximize", sampler=make_sampler(config, {}))
    infeasible: list[bool] = []
    networks = []
    for _ in range(n):
        trial = study.ask()
        params = suggest(trial, config.search)
        size = params["unet.base_channels"] * params["train.batch_size"] / 1000
        infeasible.append(size > 1)
        if size > 1:
            networks.append((params["unet.base_channels"], params["train.batch_size"]))
            trial.set_user_attr("outcome", "infeasible")
            trial.set_constraint("feasible", size - 1)
            study.tell(trial, state=TrialState.PRUNED)
        else:
            study.tell(trial, size - abs(params["train.lr"] - 0.02))
    assert len(set(networks)) == len(networks)
    return sum(infeasible[-40:]), set(networks)


def test_tpe_suggests_fewer_infeasible_configurations_after_it_has_seen_some() -> None:
    by_tpe, at_random = (
        sum(_infeasible_of(sampler, 60, seed)[0] for seed in range(6)) for sampler in ("tpe", "random")
    )
    assert by_tpe < 0.8 * at_random


def _end_full(trial: FrozenTrial) -> None:
    trial.state, trial.value = TrialState.COMPLETE, 0.9
    trial.user_attrs = {"outcome": "full"}


def _end_infeasible(trial: FrozenTrial) -> None:
    # An infeasible network is not suggested again at any learning rate.
    trial.state, trial.user_attrs = TrialState.PRUNED, {"outcome": "infeasible"}
    trial.set_constraint("feasible", 0.5)


_END = {"full": _end_full, "infeasible": _end_infeasible}


def test_with_a_lookahead_what_became_of_the_last_trials_changes_nothing() -> None:
    config = few("study.lookahead=3")

    def run(told: int, how: str) -> dict[str, object]:
        """Params of trial 10 when the trials before `told` have ended so, the others being under way."""
        study = optuna.create_study(direction="maximize", sampler=make_sampler(config, {}))
        trials = []
        for number in range(11):
            trials.append(study.ask())
            suggest(trials[-1], config.search)
            if number >= 3:
                study.tell(trials[number - 3], -abs(trials[number - 3].params["train.lr"] - 0.02))
        fresh = optuna.create_study(direction="maximize", sampler=make_sampler(config, {}))
        for each in study.get_trials()[:10]:
            if each.number < told and not each.state.is_finished():
                _END[how](each)
                each.datetime_complete = each.datetime_start
            fresh.add_trial(each)
        return suggest(fresh.ask(), config.search)

    under_way = run(8, "full")
    for how in _END:
        assert run(9, how) == run(10, how) == under_way


class _Spy(RandomSampler):
    """Notes the trials that it is shown."""

    def __init__(self) -> None:
        super().__init__(seed=0)
        self.shown: list[FrozenTrial] = []

    def sample_relative(self, study: optuna.Study, trial: FrozenTrial, search_space: object) -> dict[str, object]:
        self.shown = study.get_trials()
        return {}


def test_a_lookahead_shows_nothing_of_what_became_of_later_trials() -> None:
    """Neither values nor attributes: an outcome, a reason, a constraint."""
    config, spy = few(), _Spy()
    sampler = ReplayableSampler(lambda seed: spy, seed=0, space=config.search, lookahead=3)
    study = optuna.create_study(direction="maximize", sampler=sampler)
    for number in range(6):
        trial = study.ask()
        suggest(trial, config.search)
        if number < 5:
            trial.set_user_attr("outcome", "full")
            trial.set_constraint("feasible", -1.0)
            study.tell(trial, 0.1 * number)
    told = study.get_trials()
    assert [each.number for each in spy.shown] == list(range(6))
    assert [each.params for each in spy.shown[:5]] == [each.params for each in told[:5]]
    for shown, each in zip(spy.shown[:3], told, strict=False):
        assert (shown.state, shown.value) == (TrialState.COMPLETE, each.value)
        assert (shown.user_attrs, shown.system_attrs) == (each.user_attrs, each.system_attrs)
    for shown in spy.shown[3:]:
        assert (shown.state, shown.values, shown.datetime_complete) == (TrialState.RUNNING, None, None)
        assert (shown.user_attrs, shown.system_attrs) == ({}, {})


def test_suggestions_of_a_linear_range_differ_by_more_than_a_fortieth() -> None:
    config = configs.load(None, ["search.train.momentum={low=0.1, high=0.9}", "study.startup_trials=3"])
    study = optuna.create_study(direction="maximize", sampler=make_sampler(config, {}))
    found: list[float] = []
    for _ in range(14):
        trial = study.ask()
        found.append(suggest(trial, config.search)["train.momentum"])
        study.tell(trial, -abs(found[-1] - 0.7))
    assert min(above - below for below, above in itertools.pairwise(sorted(found))) > 0.8 / 40


def test_suggestions_are_random_for_the_startup_trials_only() -> None:
    at_random, learnt = (search(space(n_startup=n), 8) for n in (100, 4))
    assert learnt[:4] == at_random[:4]
    assert learnt[4:] != at_random[4:]


def test_a_running_trial_influences_the_next_suggestion() -> None:
    """Otherwise several workers would try the same configuration."""
    config = space()
    suggested = []
    for under_way in ({"train.lr": 2e-4, "unet.depth": 2}, {"train.lr": 9e-2, "unet.depth": 5}):
        study = optuna.create_study(direction="maximize", sampler=make_sampler(config, {}))
        for _ in range(8):
            trial = study.ask()
            params = suggest(trial, config.search)
            study.tell(trial, -abs(params["unet.depth"] - 4) - abs(params["train.lr"] - 0.02))
        params = {"data.color": "rgb", "train.batch_size": 16, **under_way}
        study.add_trial(
            create_trial(state=TrialState.RUNNING, params=params, distributions=distributions(config.search))
        )
        suggested.append(suggest(study.ask(), config.search))
    assert suggested[0] != suggested[1]
