"""What is trained next: step by step, and in whole studies whose fits are simulated."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest

from hpsearch.data.folds import Folds
from hpsearch.search import pruners
from hpsearch.search.racing import FoldOrder, Race, TrialScores
from hpsearch.search.scheduler import (
    REFINE_EVERY,
    Fit,
    MakeShortlist,
    OpenFits,
    StudyState,
    Suggest,
    next_action,
)
from hpsearch.search.stopping import Stop
from hpsearch.store.record import StudyRecord
from hpsearch.store.trials import PruneDecision
from tests.search.simulated import simulate

NEW = StudyState(n_left=4, n_suggested=0)
"""A study that has just begun."""
HALF = replace(NEW, n_left=2, n_suggested=2)
OVER = replace(NEW, n_left=0, n_suggested=4)
ORDERS: tuple[FoldOrder, ...] = get_args(FoldOrder)


def fits(trial: int, finished: tuple[int, ...] = (), running: tuple[int, ...] = (), replicate: int = 0) -> OpenFits:
    return OpenFits(trial, replicate, frozenset(range(3)), frozenset(finished), frozenset(running))


def screened(*trials: int) -> tuple[OpenFits, ...]:
    """These trials have finished their first fold."""
    return tuple(fits(trial, finished=(0,)) for trial in trials)


@pytest.mark.parametrize("folds", ORDERS)
def test_a_study_begins_with_a_suggestion(folds: FoldOrder) -> None:
    assert next_action(replace(NEW, folds=folds)) == Suggest()


@pytest.mark.parametrize("folds", ORDERS)
def test_a_trial_that_nobody_fits_comes_before_a_new_one(folds: FoldOrder) -> None:
    state = replace(HALF, n_left=3, n_suggested=4, folds=folds, open=(fits(2, running=(0,)), fits(3)))
    assert next_action(state) == Fit(3, 0)


def test_a_trial_goes_on_to_its_next_fold_unless_folds_are_fitted_as_needed() -> None:
    state = replace(HALF, n_left=3, n_suggested=3, open=screened(2), refine=(2,), n_screened=3)
    assert next_action(replace(state, folds="all")) == Fit(2, 1)
    assert next_action(replace(state, folds="in order")) == Fit(2, 1)
    assert next_action(replace(state, folds="as needed")) == Suggest()


def test_a_further_fold_is_due_after_every_few_trials() -> None:
    state = replace(NEW, n_left=90, n_suggested=4, open=screened(4, 1, 2, 3), refine=(2, 4, 1, 3))
    for n_screened in range(4 * REFINE_EVERY):
        n_due = n_screened // REFINE_EVERY
        for n_further in range(5):
            found = next_action(replace(state, n_screened=n_screened, n_further=n_further))
            assert found == (Fit(2, 1) if n_further < n_due else Suggest())


def test_a_further_fold_goes_to_the_first_in_order_that_has_one_left() -> None:
    opened = (fits(1, finished=(0,), running=(1, 2)), fits(2, finished=(0, 1)), fits(4, finished=(0,)))
    due = replace(NEW, n_left=90, n_suggested=3, open=opened, n_screened=REFINE_EVERY)
    assert next_action(replace(due, refine=(1, 2, 4))) == Fit(2, 2)
    assert next_action(replace(due, refine=(4, 1, 2))) == Fit(4, 1)
    # Those that have ended meanwhile are not open.
    assert next_action(replace(due, refine=(7, 4))) == Fit(4, 1)
    assert next_action(replace(due, refine=(1,))) == Suggest()


def test_first_folds_come_before_further_ones() -> None:
    due = replace(NEW, n_left=90, n_suggested=2, open=(*screened(2), fits(1)), refine=(2,), n_screened=REFINE_EVERY)
    assert next_action(due) == Fit(1, 0)
    # Trial 0 is completed first.
    assert next_action(replace(due, open=(*screened(0, 2), fits(1)))) == Fit(0, 1)


def test_after_the_last_suggestion_all_workers_fit_further_folds_in_order() -> None:
    state = replace(OVER, n_left=3, open=screened(1, 2, 3), refine=(3, 2, 1), n_screened=4)
    found = []
    while (action := next_action(state)) is not None:
        assert isinstance(action, Fit)
        found.append((action.trial, action.fold))
        opened = tuple(
            replace(each, running=each.running | {action.fold}) if each.trial == action.trial else each
            for each in state.open
        )
        state = replace(state, open=opened)
    assert found == [(3, 1), (3, 2), (2, 1), (2, 2), (1, 1), (1, 2)]


def test_only_a_pruner_that_wants_all_folds_lets_several_workers_fit_a_trial() -> None:
    state = replace(HALF, n_suggested=4, open=(fits(2, running=(0,)), fits(3, running=(0,))))
    assert next_action(replace(state, folds="all")) == Fit(2, 1)
    assert next_action(replace(state, folds="in order")) is None
    assert next_action(replace(state, folds="as needed")) is None


def test_a_new_trial_comes_before_helping_with_an_open_one() -> None:
    state = replace(HALF, n_suggested=3, folds="all", open=(fits(2, running=(0,)),))
    assert next_action(state) == Suggest()


def test_a_pruned_trial_is_not_fitted_and_only_a_complete_fold_of_it_is_finished() -> None:
    pruned = replace(fits(2), wanted=frozenset())
    for folds in ORDERS:
        state = replace(OVER, n_left=1, folds=folds)
        assert next_action(replace(state, open=(pruned,))) is None
        assert next_action(replace(state, open=(replace(pruned, wanted=frozenset({1})),))) == Fit(2, 1)


def test_a_used_up_space_ends_the_search() -> None:
    assert next_action(replace(HALF, n_left=1)) == Suggest()
    assert next_action(replace(HALF, n_left=0)) == MakeShortlist()


def test_open_trials_count_toward_the_trials_wanted() -> None:
    state = replace(HALF, n_suggested=4, open=(fits(2, running=(0,)), fits(3, running=(0,))))
    assert next_action(state) is None
    assert next_action(replace(state, n_left=3)) == Suggest()


def test_with_a_lookahead_a_suggestion_waits_for_the_trials_that_it_learns_from() -> None:
    state = replace(HALF, lookahead=2, n_suggested=5, n_left=7)
    for folds in ORDERS:
        waits = replace(state, folds=folds, open=(fits(3, running=(0,)), fits(4, running=(0,))))
        assert next_action(replace(waits, open=waits.open[1:])) == Suggest()
        if folds != "all":
            assert next_action(waits) is None
    # One first fold is all that it learns from a trial whose folds are fitted as needed.
    one = fits(3, finished=(0,), running=(1,))
    assert next_action(replace(state, open=(one, fits(4, running=(0,))), refine=(3,))) == Suggest()
    assert next_action(replace(state, open=(one, fits(4, running=(0,))), folds="in order")) is None


def test_with_a_lookahead_no_further_fold_is_due_before_the_last_suggestion() -> None:
    state = replace(
        NEW, n_left=90, n_suggested=9, open=screened(*range(1, 9)), refine=(2, 1), n_screened=REFINE_EVERY
    )
    assert next_action(state) == Fit(2, 1)
    assert next_action(replace(state, lookahead=2)) == Suggest()
    # Nor while a suggestion waits, though a trial has been chosen.
    waits = (fits(1, finished=(0, 1)), fits(7, running=(0,)))
    assert next_action(replace(state, lookahead=2, open=waits)) is None


def test_with_a_lookahead_one_trial_at_a_time_gets_all_its_folds() -> None:
    state = replace(OVER, n_left=3, lookahead=2, refine=(3, 1, 2))
    assert next_action(replace(state, open=(*screened(2, 1), fits(3, running=(0,))))) is None
    assert next_action(replace(state, open=screened(2, 1, 3))) == Fit(3, 1)
    # The chosen one is finished by all workers, though another has become more promising.
    for chosen in (fits(1, finished=(0,), running=(1,)), fits(1, finished=(0, 1))):
        assert next_action(replace(state, open=(*screened(2), chosen, *screened(3)))) == Fit(1, 2)
    chosen = fits(1, finished=(0, 1), running=(2,))
    assert next_action(replace(state, open=(*screened(2), chosen, *screened(3)))) is None


def test_replicates_come_when_every_trial_has_ended() -> None:
    waiting = replace(OVER, n_left=1, open=(fits(3, running=(2,), finished=(0, 1)),), refine=(3,))
    assert next_action(waiting) is None
    assert next_action(OVER) == MakeShortlist()


def test_replicates_are_fitted_in_the_order_of_the_shortlist() -> None:
    listed = (fits(2, replicate=1, running=(0, 1, 2)), fits(0, replicate=1, finished=(0,)))
    for folds in ORDERS:
        state = replace(OVER, has_shortlist=True, folds=folds)
        assert next_action(replace(state, open=listed)) == Fit(0, 1, replicate=1)
        assert next_action(replace(state, open=listed[:1])) is None
        assert next_action(state) is None


# Whole studies

SHAPE: dict[str, Any] = {"n_folds": 3, "n_images": 30, "epochs": 2}
N_TRIALS = 11


class Random:
    """A pruner by chance that depends on what it is told of the candidate."""

    def __init__(self, folds: FoldOrder) -> None:
        self.folds = folds

    def should_prune(self, candidate: TrialScores, others: object, folds: Folds) -> PruneDecision | None:
        if candidate.is_full(folds.k):
            return None
        epoch = len(candidate.scores[candidate.latest])
        rng = np.random.default_rng([candidate.number, epoch, len(candidate.finished)])
        return PruneDecision(bool(rng.random() < 0.15), 0.5, candidate.latest, epoch, "chance")


class RandomRace(Race):
    """A race that also drops by chance."""

    def should_prune(self, candidate: TrialScores, others: Any, folds: Folds) -> PruneDecision | None:
        by_chance = Random(self.folds).should_prune(candidate, others, folds)
        return by_chance if by_chance and by_chance.drop else super().should_prune(candidate, others, folds)


def outcome(record: StudyRecord) -> tuple[Any, ...]:
    """What two equal studies have in common."""
    trials = [(trial.params, trial.outcome, trial.value, trial.decisions) for trial in record.trials()]
    return trials, [record.finished_folds(number) for number in record.trial_numbers()]


@pytest.mark.parametrize("n_workers", [1, 2, 3, 5])
@pytest.mark.parametrize("folds", ORDERS)
def test_every_trial_ends_and_no_fold_is_fitted_twice(
    folds: FoldOrder, n_workers: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also with pruning by chance; `simulate` fails when no worker has a job before the study is over."""
    monkeypatch.setattr(pruners, "make_pruner", lambda _: RandomRace() if folds == "as needed" else Random(folds))
    study, found = simulate(tmp_path, f"study.trials={N_TRIALS}", n_workers=n_workers, seed=n_workers, **SHAPE)
    trials = study.record.trials()
    assert len(trials) == N_TRIALS
    assert {trial.outcome for trial in trials} == {"complete", "pruned"}
    assert max(Counter(found).values()) == 1
    for trial in trials:
        n_finished = len(study.record.finished_folds(trial.number))
        assert (n_finished == 3) == (trial.outcome == "complete") or trial.decisions[-1].drop
    if n_workers == 1 and folds != "as needed":
        assert found == sorted(found)


@pytest.mark.parametrize("n_workers", [1, 4])
def test_without_pruning_every_fold_of_every_trial_is_fitted_once(n_workers: int, tmp_path: Path) -> None:
    _, found = simulate(tmp_path, "study.trials=5", "study.pruner=none", n_workers=n_workers, **SHAPE)
    assert sorted(found) == [(trial, fold) for trial in range(5) for fold in range(3)]


def test_in_a_race_every_trial_gets_one_fold_and_few_get_more_before_the_last_is_suggested(tmp_path: Path) -> None:
    n_trials = 3 * REFINE_EVERY
    study, found = simulate(tmp_path, f"study.trials={n_trials}", **SHAPE)
    firsts = [trial for trial, fold in found if fold == 0]
    assert firsts == list(range(n_trials))
    early = found[: found.index((n_trials - 1, 0))]
    n_finished = sum(bool(study.record.finished_folds(trial)) for trial in range(n_trials - 1))
    # Trial 0 is completed in any case.
    assert sum(fold > 0 for trial, fold in early if trial > 0) == n_finished // REFINE_EVERY > 0
    assert len(found) < 2 * n_trials
    assert any(trial.outcome == "complete" for trial in study.record.trials())


@pytest.mark.parametrize("is_limited", [False, True])
def test_near_the_time_limit_the_leader_is_completed_before_another_trial_begins(
    is_limited: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    n_early = 6

    def left_s(_: Stop) -> float:
        return 1e-3 if is_limited and len(list(tmp_path.rglob("trial.json"))) >= n_early else math.inf

    monkeypatch.setattr(Stop, "left_s", property(left_s))
    _, found = simulate(tmp_path, f"study.trials={N_TRIALS}", **SHAPE)
    early = Counter(trial for trial, _ in found[: found.index((n_early, 0))] if trial > 0)
    assert (max(early.values()) == SHAPE["n_folds"]) == is_limited


def test_a_trial_is_pruned_while_it_waits(tmp_path: Path) -> None:
    """A decision after another trial's fold is about the last finished fold of the trial that waits."""
    study, found = simulate(tmp_path, f"study.trials={3 * N_TRIALS}", **SHAPE)
    pruned = [trial for trial in study.record.trials() if trial.outcome == "pruned"]
    n_by_later_trials = 0
    for trial in pruned:
        decision = trial.decisions[-1]
        finished = study.record.finished_folds(trial.number)
        if finished:
            assert decision.epoch == 2
            assert decision.fold == max(finished)
            assert decision.reason.startswith(f"after fold {decision.fold + 1}")
        n_by_later_trials += finished == [0] and (decision.against or 0) > trial.number
    assert n_by_later_trials
    assert len(found) == len(set(found))


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_with_a_lookahead_the_result_does_not_depend_on_the_number_of_workers(seed: int, tmp_path: Path) -> None:
    settings = (f"study.trials={N_TRIALS}", f"study.seed={seed}", "study.lookahead=3")
    expected, jobs = simulate(tmp_path / "1", *settings, n_folds=4, n_images=60, epochs=2)
    assert {trial.outcome for trial in expected.record.trials()} == {"complete", "pruned"}
    for n_workers in (2, 3, 5):
        study, found = simulate(
            tmp_path / str(n_workers), *settings, n_workers=n_workers, seed=seed, n_folds=4, n_images=60, epochs=2
        )
        assert sorted(found) == sorted(jobs)
        assert outcome(study.record) == outcome(expected.record)


@pytest.mark.parametrize(("lookahead", "n_workers"), [(0, 1), (3, 1), (3, 3)])
def test_a_study_that_is_killed_goes_on_as_if_it_had_not_been(lookahead: int, n_workers: int, tmp_path: Path) -> None:
    settings = (f"study.trials={N_TRIALS}", f"study.lookahead={lookahead}")
    whole, jobs = simulate(tmp_path / "whole", *settings, **SHAPE)
    killed, found = simulate(tmp_path / "killed", *settings, n_workers=n_workers, interrupt_after=(2,) * 10, **SHAPE)
    assert set(found) == set(jobs)
    assert outcome(killed.record) == outcome(whole.record)


def too_large(trial: int, running: tuple[int, ...] = ()) -> OpenFits:
    """A trial that needs more memory than the idle worker has."""
    return replace(fits(trial, running=running), fits_worker=False)


def test_a_worker_passes_over_a_trial_that_needs_more_memory() -> None:
    state = replace(NEW, n_left=2, n_suggested=2, folds="in order", open=(too_large(0), fits(1)))
    assert next_action(state) == Fit(1, 0)
    # Nor does it help with one after the search.
    assert next_action(replace(state, open=(too_large(0, running=(0,)), fits(1, (0, 1, 2))), n_left=2)) is None
    assert next_action(replace(state, has_shortlist=True, open=(too_large(0),))) is None


def test_no_further_trial_begins_while_most_open_trials_wait_for_a_larger_worker() -> None:
    one = replace(NEW, n_left=9, n_suggested=2, folds="in order", open=(too_large(0),))
    assert next_action(one) is None
    running = fits(1, running=(0,))
    assert next_action(replace(one, open=(too_large(0), running))) == Suggest()
    assert next_action(replace(one, open=(too_large(0), too_large(2), running))) is None
    # A trial that a larger worker is fitting does not wait.
    assert next_action(replace(one, open=(too_large(0, running=(0,)),))) == Suggest()
