from __future__ import annotations

from dataclasses import replace

from hpsearch.search.scheduler import (
    Action,
    Fit,
    MakeShortlist,
    OpenFits,
    StudyState,
    Suggest,
    next_action,
)

NEW = StudyState(n_left=4, n_suggested=0, has_complete=False)
"""A study that has just begun."""
RACING = replace(NEW, n_left=2, n_suggested=2, has_complete=True)
OVER = replace(NEW, n_left=0, n_suggested=4, has_complete=True)


def fits(trial: int, finished: tuple[int, ...] = (), running: tuple[int, ...] = (), replicate: int = 0) -> OpenFits:
    return OpenFits(trial, replicate, frozenset(range(3)), frozenset(finished), frozenset(running))


def simulate(state: StudyState, n_workers: int) -> list[Action]:
    """Run a study in which every fit takes one round and no trial is pruned, and return the actions."""
    found: list[Action] = []
    while True:
        started: list[Fit] = []
        while len(started) < n_workers:
            action = next_action(state)
            if isinstance(action, Fit):
                started.append(action)
                running = tuple(
                    replace(each, running=each.running | {action.fold})
                    if (each.trial, each.replicate) == (action.trial, action.replicate)
                    else each
                    for each in state.open
                )
                state = replace(state, open=running)
            elif isinstance(action, Suggest):
                state = replace(state, n_suggested=state.n_suggested + 1, open=(*state.open, fits(state.n_suggested)))
            elif isinstance(action, MakeShortlist):
                state = replace(state, has_shortlist=True, open=(fits(1, replicate=1), fits(0, replicate=1)))
            else:
                break
            found.append(action)
        if not started:
            return found
        ended = tuple(
            replace(each, finished=each.finished | each.running, running=frozenset()) for each in state.open
        )
        left = tuple(each for each in ended if each.finished < each.wanted)
        n_complete = sum(each.finished == each.wanted and not each.replicate for each in ended)
        has_complete = state.has_complete or n_complete > 0
        state = replace(state, open=left, n_left=state.n_left - n_complete, has_complete=has_complete)


def test_a_study_begins_with_a_suggestion() -> None:
    assert next_action(NEW) == Suggest()


def test_one_worker_fits_the_folds_of_a_trial_one_after_another() -> None:
    expected = [Suggest(), Fit(0, 0), Fit(0, 1), Fit(0, 2), Suggest(), Fit(1, 0)]
    assert simulate(NEW, 1)[:6] == expected


def test_every_fold_of_every_trial_and_replicate_is_fitted_once() -> None:
    for n_workers in (1, 2, 5, 20):
        for folds_in_turn in (True, False):
            found = [
                each
                for each in simulate(replace(NEW, folds_in_turn=folds_in_turn), n_workers)
                if isinstance(each, Fit)
            ]
            trials = [(trial, fold, 0) for trial in range(4) for fold in range(3)]
            refits = [(trial, fold, 1) for trial in range(2) for fold in range(3)]
            assert sorted((each.trial, each.fold, each.replicate) for each in found) == sorted(trials + refits)


def test_all_workers_fit_the_first_trial_until_it_is_complete() -> None:
    state = replace(NEW, n_suggested=1, open=(fits(0, running=(0,)),))
    assert next_action(state) == Fit(0, 1)
    assert next_action(replace(state, judges_any_fold=False)) == Suggest()


def test_a_trial_that_nobody_fits_comes_before_a_new_one() -> None:
    state = replace(RACING, n_suggested=4, open=(fits(2, running=(0,)), fits(3, finished=(0,))))
    assert next_action(state) == Fit(3, 1)


def test_a_trial_with_a_finished_fold_is_helped_when_no_trial_is_left_to_begin() -> None:
    state = replace(RACING, n_suggested=4, open=(fits(2, running=(0,)), fits(3, finished=(0,), running=(1,))))
    assert next_action(state) == Fit(3, 2)
    assert next_action(replace(state, lookahead=2)) is None


def test_without_a_race_every_open_trial_is_helped() -> None:
    state = replace(RACING, n_suggested=4, folds_in_turn=False, open=(fits(2, running=(0,)), fits(3, running=(0,))))
    assert next_action(state) == Fit(2, 1)


def test_a_pruned_trial_is_not_helped_and_only_a_complete_fold_of_it_is_finished() -> None:
    pruned = replace(fits(2), wanted=frozenset())
    assert next_action(replace(OVER, n_left=1, open=(pruned,))) is None
    assert next_action(replace(OVER, n_left=1, open=(replace(pruned, wanted=frozenset({1})),))) == Fit(2, 1)


def test_a_used_up_space_ends_the_search() -> None:
    assert next_action(replace(RACING, n_left=1)) == Suggest()
    assert next_action(replace(RACING, n_left=0)) == MakeShortlist()


def test_open_trials_count_toward_the_trials_wanted() -> None:
    state = replace(RACING, n_suggested=4, open=(fits(2, running=(0,)), fits(3, running=(0,))))
    assert next_action(state) is None
    assert next_action(replace(state, n_left=3)) == Suggest()


def test_with_a_lookahead_a_suggestion_waits_for_the_trials_that_it_learns_from() -> None:
    state = replace(RACING, lookahead=2, n_suggested=5, n_left=7, open=(fits(3, running=(0,)), fits(4, running=(0,))))
    assert next_action(state) is None
    assert next_action(replace(state, open=(fits(4, running=(0,)),))) == Suggest()


def test_replicates_come_when_every_trial_has_ended() -> None:
    waiting = replace(OVER, n_left=1, open=(fits(3, running=(2,), finished=(0, 1)),))
    assert next_action(waiting) is None
    assert next_action(OVER) == MakeShortlist()


def test_replicates_are_fitted_in_the_order_of_the_shortlist() -> None:
    listed = (fits(2, replicate=1, running=(0, 1, 2)), fits(0, replicate=1, finished=(0,)))
    assert next_action(replace(OVER, has_shortlist=True, open=listed)) == Fit(0, 1, replicate=1)
    assert next_action(replace(OVER, has_shortlist=True, open=listed[:1])) is None
    assert next_action(replace(OVER, has_shortlist=True)) is None


def too_large(trial: int, running: tuple[int, ...] = ()) -> OpenFits:
    """A trial that needs more memory than the idle worker has."""
    return replace(fits(trial, running=running), fits_worker=False)


def test_a_worker_passes_over_a_trial_that_needs_more_memory() -> None:
    state = replace(RACING, n_left=2, open=(too_large(0), fits(1)))
    assert next_action(state) == Fit(1, 0)
    # Nor does it help with one after the search.
    assert next_action(replace(state, open=(too_large(0, running=(0,)), fits(1, (0, 1, 2))), n_left=2)) is None
    assert next_action(replace(state, has_shortlist=True, open=(too_large(0),))) is None


def test_no_further_trial_begins_while_most_open_trials_wait_for_a_larger_worker() -> None:
    one = replace(RACING, n_left=9, open=(too_large(0),))
    assert next_action(one) is None
    running = fits(1, running=(0,))
    assert next_action(replace(one, open=(too_large(0), running))) == Suggest()
    assert next_action(replace(one, open=(too_large(0), too_large(2), running))) is None
    # A trial that a larger worker is fitting does not wait.
    assert next_action(replace(one, open=(too_large(0, running=(0,)),))) == Suggest()
