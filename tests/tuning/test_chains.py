from __future__ import annotations

import datetime as dt
from typing import Any

import optuna
import pytest
from optuna.samplers import RandomSampler
from optuna.storages import InMemoryStorage
from optuna.trial import FrozenTrial, Trial, TrialState, create_trial

from hpsearch.tuning import chains
from hpsearch.tuning.chains import AsIfNobodyDied

SPACE = {"x": optuna.distributions.FloatDistribution(0.0, 1.0)}


def trial(number: int, state: TrialState, *, history: tuple[int, ...] = (), **attributes: Any) -> FrozenTrial:
    made = create_trial(
        state=state,
        value=0.5 if state == TrialState.COMPLETE else None,
        params={"x": number / 100},
        distributions=SPACE,
        user_attrs=attributes,
        system_attrs={"failed_trial": history[0], "retry_history": list(history)} if history else {},
    )
    made.number = number
    return made


def full(number: int, **more: Any) -> FrozenTrial:
    return trial(number, TrialState.COMPLETE, owner="a", outcome="full", **more)


def lost(number: int, **more: Any) -> FrozenTrial:
    return trial(number, TrialState.FAIL, owner="a", **more)


def states(*trials: FrozenTrial) -> list[str]:
    return [chain.state for chain in chains.chains(trials)]


def test_a_configuration_and_its_retries_count_once() -> None:
    trials = [lost(0), full(1), lost(2, history=(0,)), full(3), full(4, history=(0, 2))]
    found = chains.chains(trials)
    assert [[member.number for member in chain.members] for chain in found] == [[0, 2, 4], [1], [3]]
    assert [chain.draw for chain in found] == [0, 1, 2]
    assert [chain.state for chain in found] == ["counted"] * 3
    assert chains.n_taken(found) == 3
    assert chains.n_taken(found, before=1) == 1


def test_infeasible_is_free_and_what_waits_to_be_begun_takes_no_place() -> None:
    infeasible = trial(0, TrialState.PRUNED, owner="a", outcome="infeasible")
    diverged = trial(1, TrialState.PRUNED, owner="a", outcome="diverged")
    failed = trial(2, TrialState.FAIL, owner="a", outcome="failed")
    parked = trial(3, TrialState.WAITING)
    let_go = trial(4, TrialState.WAITING, owner="a")
    assert states(infeasible, diverged, failed, parked, let_go) == ["free", "counted", "counted", "parked", "open"]


def test_a_trial_that_was_failed_for_its_silence_is_open_whatever_its_owner_was_about_to_tell() -> None:
    assert states(lost(0)) == ["open"]
    assert states(trial(0, TrialState.FAIL, owner="a", outcome="full")) == ["open"]


def test_a_lost_trial_without_a_retry_is_found() -> None:
    trials = [lost(0), lost(1), trial(2, TrialState.WAITING, history=(1,)), full(3)]
    trials.append(trial(4, TrialState.FAIL, owner="a", outcome="failed"))
    assert [each.number for each in chains.without_retry(trials)] == [0]


def test_of_two_retries_of_one_trial_the_later_is_superfluous() -> None:
    trials = [lost(0), trial(1, TrialState.RUNNING, history=(0,)), trial(2, TrialState.RUNNING, history=(0,))]
    (chain,) = chains.chains(trials)
    assert not chains.is_superfluous(chain, 1)
    assert chains.is_superfluous(chain, 2)


def test_a_retry_of_what_has_ended_is_superfluous() -> None:
    (chain,) = chains.chains([full(0), trial(1, TrialState.RUNNING, history=(0,))])
    assert chains.is_superfluous(chain, 1)


def test_suggestions_are_those_of_a_study_in_which_nobody_died() -> None:
    calm = _study()
    expected = [_ask(calm).suggest_float("x", 0.0, 1.0) for _ in range(6)]
    study = _study()
    got = []
    for n in range(6):
        if n == 3:
            # Trial 1 was lost and goes on as trial 3: from here on numbers are not draws.
            study.add_trial(_retry(study.get_trials()[1]))
        got.append(_ask(study).suggest_float("x", 0.0, 1.0))
    assert got == expected


def test_a_suggestion_reads_the_trials_once_however_often_the_sampler_looks(monkeypatch: pytest.MonkeyPatch) -> None:
    study = _study()
    study.add_trials([full(0), full(1)])
    asked = _ask(study)
    read = []
    get_all_trials = study._storage.get_all_trials
    monkeypatch.setattr(study._storage, "get_all_trials", lambda *a, **k: read.append(1) or get_all_trials(*a, **k))
    study.sampler = AsIfNobodyDied(_Curious(), ["x"])
    asked.suggest_float("x", 0.0, 1.0)
    assert len(read) == 1


def test_what_was_infeasible_is_seen_to_be_so_after_a_death() -> None:
    study = _study()
    infeasible = full(0)
    infeasible.system_attrs = create_trial(value=0.0, constraints={"feasible": 2.0}).system_attrs
    study.add_trials([infeasible, lost(1)])
    study.add_trial(_retry(study.get_trials()[1]))
    curious = _Curious()
    study.sampler = AsIfNobodyDied(curious, ["x"])
    _ask(study).suggest_float("x", 0.0, 1.0)
    assert [trial.constraints for trial in curious.seen[:2]] == [{"feasible": 2.0}, {}]


class _Curious(RandomSampler):
    """Looks at all trials whenever it may."""

    seen: tuple[FrozenTrial, ...] = ()

    def infer_relative_search_space(self, study: Any, trial: Any) -> dict[str, Any]:
        self.seen = tuple(study.get_trials())
        return {}

    def sample_independent(self, study: Any, trial: Any, param_name: str, param_distribution: Any) -> float:
        self.seen = tuple(study._get_trials(deepcopy=False, use_cache=True))
        return 0.5


class _ByNumber(RandomSampler):
    """Suggests from the trial's number and how many earlier trials have params."""

    def sample_independent(self, study: Any, trial: Any, param_name: str, param_distribution: Any) -> float:
        earlier = [each for each in study.get_trials(deepcopy=False)[: trial.number] if each.params]
        return float(trial.number * 10 + len(earlier)) / 100


def _study() -> optuna.Study:
    sampler = AsIfNobodyDied(_ByNumber(), ["x"])
    return optuna.create_study(storage=InMemoryStorage(), sampler=sampler, direction="maximize")


def _ask(study: optuna.Study) -> Trial:
    return study.ask()


def _retry(trial: FrozenTrial) -> FrozenTrial:
    retry = create_trial(
        state=TrialState.RUNNING,
        params=trial.params,
        distributions=trial.distributions,
        system_attrs={"failed_trial": trial.number, "retry_history": [trial.number]},
    )
    retry.datetime_start = dt.datetime.now()
    return retry
