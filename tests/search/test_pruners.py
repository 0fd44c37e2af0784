"""Every pruner through one contract, and Optuna's against Optuna itself."""

from __future__ import annotations

import json
import logging
import warnings
from collections.abc import Callable

import numpy as np
import optuna
import pytest
from numpy.typing import NDArray
from optuna.pruners import BasePruner, HyperbandPruner, MedianPruner, SuccessiveHalvingPruner, WilcoxonPruner

from hpsearch.config import StudyConfig
from hpsearch.config.search import StudySettings
from hpsearch.config.train import TrainConfig
from hpsearch.data.folds import Folds
from hpsearch.search.optuna_pruner import OptunaPruner, epochs_of_first_fold, images
from hpsearch.search.pruners import Pruner, make_pruner
from hpsearch.search.pruners.none import NoPruner
from hpsearch.search.racing import Race, TrialScores
from hpsearch.store.trials import PruneDecision
from hpsearch.typed_json import from_json, to_json

N_EPOCHS = 4
# Fold 0 holds the images at even places out, fold 1 those at odd places.
FOLDS = Folds(ids=tuple("abcdefghijklmnopqrst"), fold_of=tuple(i % 2 for i in range(20)), k=2, seed=0, method="kfold")
NAMES = ("race", "median", "hyperband", "wilcoxon", "none")


def pruner_of(name: str) -> Pruner:
    settings = StudySettings(pruner=name)  # type: ignore[arg-type]
    return make_pruner(StudyConfig(train=TrainConfig(epochs=N_EPOCHS), study=settings))


def trials(n: int, *, seed: int = 0) -> list[TrialScores]:
    """Full trials whose means differ, with curves that rise and jump."""
    rng = np.random.default_rng(seed)
    easy = rng.standard_normal((2, 1, 10)) * 0.1
    result = []
    for number in range(n):
        curve = (0.8 + 0.05 * rng.standard_normal()) * np.array([0.6, 0.8, 0.95, 1.0]) + 0.03 * rng.standard_normal(4)
        scores = curve[None, :, None] + easy + 0.03 * rng.standard_normal((2, N_EPOCHS, 10))
        result.append(TrialScores(number, {f: scores[f].astype(np.float32) for f in (0, 1)}, N_EPOCHS))
    return result


def stages(whole: TrialScores) -> list[TrialScores]:
    """The trial after every epoch."""
    seen: dict[int, NDArray[np.float32]] = {}
    result = []
    for fold in (0, 1):
        for epoch in range(1, N_EPOCHS + 1):
            seen = {**seen, fold: whole.scores[fold][:epoch]}
            result.append(TrialScores(whole.number, seen, N_EPOCHS))
    return result


def run(pruner: Pruner, whole: list[TrialScores]) -> list[tuple[TrialScores, PruneDecision | None]]:
    """Each trial as far as it came, and the last that was said of it."""
    ended: list[tuple[TrialScores, PruneDecision | None]] = []
    for each in whole:
        last = None
        for candidate in stages(each):
            verdict = pruner.should_prune(candidate, [trial for trial, _ in ended], FOLDS)
            last = verdict or last
            if verdict is not None and verdict.drop:
                break
        ended.append((candidate, last))
    return ended


@pytest.mark.parametrize("name", NAMES)
class TestEveryPruner:
    def test_the_first_trial_is_evaluated_on_all_folds(self, name: str) -> None:
        ((first, _),) = run(pruner_of(name), trials(1))
        assert first.is_full(2)

    def test_a_restart_changes_nothing(self, name: str) -> None:
        lived, whole = pruner_of(name), trials(12)
        ended = [trial for trial, _ in run(lived, whole)]
        for candidate in stages(TrialScores(len(whole), trials(1, seed=5)[0].scores, N_EPOCHS)):
            said = lived.should_prune(candidate, ended, FOLDS)
            assert pruner_of(name).should_prune(candidate, ended, FOLDS) == said
            if said is not None and said.drop:
                break

    def test_the_order_of_the_others_does_not_matter(self, name: str) -> None:
        ended = [trial for trial, _ in run(pruner_of(name), trials(8))]
        candidate = stages(TrialScores(8, trials(1, seed=6)[0].scores, N_EPOCHS))[2]
        there = pruner_of(name).should_prune(candidate, ended, FOLDS)
        back = pruner_of(name).should_prune(candidate, ended[::-1], FOLDS)
        assert there == back

    def test_a_full_trial_is_not_judged(self, name: str) -> None:
        whole = trials(7)
        assert pruner_of(name).should_prune(whole[-1], whole[:-1], FOLDS) is None

    def test_numbers_without_scores_are_no_obstacle(self, name: str) -> None:
        whole = [TrialScores(3 * trial.number + 2, trial.scores, N_EPOCHS) for trial in trials(8)]
        assert len(run(pruner_of(name), whole)) == 8

    def test_verdicts_name_the_place_and_a_finite_estimate(self, name: str) -> None:
        said = [(trial, verdict) for trial, verdict in run(pruner_of(name), trials(12)) if verdict is not None]
        for trial, verdict in said:
            fold = max(trial.scores)
            assert 0 <= verdict.fold <= fold
            assert np.isfinite(verdict.estimate)
            if verdict.drop:
                assert (verdict.fold, verdict.epoch) == (fold, len(trial.scores[fold]))
        assert bool(said) == (name != "none")

    def test_decisions_can_be_recorded(self, name: str) -> None:
        decisions = [decision for _, decision in run(pruner_of(name), trials(12)) if decision is not None]
        stored = json.loads(json.dumps([to_json(decision) for decision in decisions]))
        assert [from_json(PruneDecision, each) for each in stored] == decisions

    def test_using_one_is_silent(self, name: str, caplog: pytest.LogCaptureFixture) -> None:
        optuna.logging.enable_propagation()
        before = optuna.logging.get_verbosity()
        try:
            with caplog.at_level(logging.INFO), warnings.catch_warnings():
                warnings.simplefilter("error")
                run(pruner_of(name), trials(6))
        finally:
            optuna.logging.disable_propagation()
        assert not caplog.records
        assert optuna.logging.get_verbosity() == before


@pytest.mark.parametrize("name", [name for name in NAMES if name != "none"])
def test_a_hopeless_trial_is_dropped(name: str) -> None:
    good = trials(6)
    hopeless = TrialScores(9, {fold: scores - np.float32(0.5) for fold, scores in good[0].scores.items()}, N_EPOCHS)
    pruner = pruner_of(name)
    said = [pruner.should_prune(candidate, good, FOLDS) for candidate in stages(hopeless)]
    assert any(verdict is not None and verdict.drop for verdict in said)


def test_each_name_makes_its_rule() -> None:
    assert isinstance(pruner_of("race"), Race)
    assert isinstance(pruner_of("none"), NoPruner)
    assert all(isinstance(pruner_of(name), OptunaPruner) for name in ("median", "hyperband", "wilcoxon"))
    expected = {"race": "as needed", "none": "all", **dict.fromkeys(("median", "hyperband", "wilcoxon"), "in order")}
    assert {name: pruner_of(name).folds for name in NAMES} == expected


def test_hyperband_knows_how_many_epochs_a_fit_has() -> None:
    whole = trials(30)

    def dropped(pruner: Pruner) -> dict[int, int]:
        return {trial.number: len(trial.scores[0]) for trial, _ in run(pruner, whole) if not trial.is_full(2)}

    def of(max_resource: int) -> Pruner:
        return OptunaPruner(lambda: HyperbandPruner(max_resource=max_resource), epochs_of_first_fold)

    assert dropped(pruner_of("hyperband")) == dropped(of(N_EPOCHS)) != dropped(of(1))


@pytest.mark.parametrize(
    "make",
    [
        lambda: MedianPruner(n_startup_trials=2),
        lambda: SuccessiveHalvingPruner(min_resource=1, reduction_factor=2),
        lambda: HyperbandPruner(max_resource=N_EPOCHS, reduction_factor=2),
    ],
    ids=["median", "successive halving", "hyperband"],
)
def test_on_epochs_the_same_trials_are_dropped_as_in_a_study_of_optunas(make: Callable[[], BasePruner]) -> None:
    whole = trials(30)
    study = optuna.create_study(study_name="pruner", direction="maximize", pruner=make())

    def objective(trial: optuna.Trial) -> float:
        mine = whole[trial.number]
        for epoch, mean in enumerate(mine.curves[0], start=1):
            trial.report(mean, epoch)
            if trial.should_prune():
                raise optuna.TrialPruned
        return mine.value

    study.optimize(objective, n_trials=30)
    theirs = {trial.number: trial.last_step for trial in study.trials if trial.state.name == "PRUNED"}
    ours = {
        trial.number: len(trial.scores[0])
        for trial, _ in run(OptunaPruner(make, epochs_of_first_fold), whole)
        if not trial.is_full(2)
    }
    assert ours == theirs
    assert 3 < len(ours) < 29


def test_wilcoxon_drops_the_same_trials_as_in_a_study_of_optunas() -> None:
    whole = trials(20)

    def make() -> BasePruner:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return WilcoxonPruner(p_threshold=0.3)

    study = optuna.create_study(direction="maximize", pruner=make())

    def objective(trial: optuna.Trial) -> float:
        for fold in (0, 1):
            scores = {f: whole[trial.number].scores[f] for f in range(fold + 1)}
            for step, value in images(TrialScores(trial.number, scores, N_EPOCHS), FOLDS)[-1].items():
                trial.report(value, step)
            if trial.should_prune() and fold == 0:
                raise optuna.TrialPruned
        return whole[trial.number].value

    study.optimize(objective, n_trials=20)
    theirs = {trial.number for trial in study.trials if trial.state.name == "PRUNED"}
    ours = {trial.number for trial, _ in run(OptunaPruner(make, images), whole) if not trial.is_full(2)}
    assert ours == theirs
    assert ours


def test_images_are_reported_under_their_place_in_the_pool() -> None:
    whole = trials(1)[0]
    first, second = images(whole, FOLDS)
    assert list(first) == list(range(0, 20, 2))
    assert list(second) == list(range(1, 20, 2))
    assert first[4] == whole.scores[0][-1][2]


def test_an_unfinished_fold_is_reported_by_its_epochs_alone() -> None:
    partly = stages(trials(1)[0])[1]
    assert [list(report) for report in epochs_of_first_fold(partly, FOLDS)] == [[1], [2]]
    assert images(partly, FOLDS) == []


def falling(number: int = 0) -> TrialScores:
    """A full trial whose last epoch is worse than the one before."""
    curve = np.array([0.5, 0.6, 0.9, 0.7])[None, :, None]
    scores = (curve + 0.01 * np.arange(20).reshape(2, 1, 10)).astype(np.float32)
    return TrialScores(number, {0: scores[0], 1: scores[1]}, N_EPOCHS)


def test_the_last_epoch_of_a_fold_is_reported_though_an_earlier_one_was_better() -> None:
    whole = falling()
    first, second = images(whole, FOLDS)
    assert list(first.values()) == pytest.approx(whole.scores[0][3].tolist())
    assert list(second.values()) == pytest.approx(whole.scores[1][3].tolist())


def test_a_trial_without_a_full_one_beside_it_is_worth_its_last_epoch() -> None:
    verdict = pruner_of("median").should_prune(TrialScores(0, {0: falling().scores[0]}, N_EPOCHS + 1), [], FOLDS)
    assert verdict is not None
    assert verdict.estimate == pytest.approx(0.745)
