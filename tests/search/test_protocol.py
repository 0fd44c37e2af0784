"""What no change may break: who is trained on what, by which normalisation and seed, and that the last epoch counts.

A whole study with second fits, then its final, whose fits are real but for the scores of the held-out images: those
rise, then fall in the last epoch, so that the best epoch is never the last.
"""

from __future__ import annotations

import csv
import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import optuna
import pytest

from hpsearch.config import StudyConfig, stable_seed
from hpsearch.config.search import SearchSpace
from hpsearch.data.batches import DeviceData, eval_batches
from hpsearch.data.cache import open_cache
from hpsearch.data.folds import Folds
from hpsearch.final import FinalResult, run_final
from hpsearch.models.unet import UNet
from hpsearch.paths import ProjectPaths
from hpsearch.report.estimates import Estimates
from hpsearch.report.rows import study_rows
from hpsearch.search import pruners
from hpsearch.search.evaluation import fit_seed
from hpsearch.search.racing import FoldOrder, TrialScores
from hpsearch.store.fits import load_array
from hpsearch.store.record import StudyRecord
from hpsearch.training import loop
from hpsearch.training.checkpoint import load_checkpoint, load_weights
from hpsearch.training.evaluation import Evaluation, evaluate
from hpsearch.workers.jobs import CountJob, FitJob, SelectPostprocessingJob
from tests.cached import images_of
from tests.data.conftest import tiny_pairs, write_pairs
from tests.search.in_process import Watched, run_planned, workers_in_process
from tests.search.studies import tiny_config

QUALITY = (0.5, 0.9, 0.7)
"""Mean Dice of the held-out images after each epoch."""
POOL = set(range(11))
SETTINGS = (
    "study.pruner=none",
    "study.sampler=random",
    "study.folds=3",
    "study.trials=3",
    "study.confirm=3",
    f"train.epochs={len(QUALITY)}",
    "train.loss=dice",
    # Else each image would be standardised again, and the pool's normalisation would hardly matter.
    "unet.input_norm=none",
    "augment.vflip=0.25",
)


@dataclass
class FallingScores:
    """Stands for `evaluate` inside the training loop."""

    counts: list[list[npt.NDArray[np.int64]]] = field(default_factory=list)
    """Of each fit in turn those after each epoch, (held-out images, 4)."""

    def install(self, patch: pytest.MonkeyPatch) -> None:
        """Have the loop pass the indices and the size of the images instead of batches."""
        patch.setattr(loop, "evaluate", self)
        patch.setattr(loop, "eval_batches", lambda data, indices, **given: (indices, given["size"]))

    def __call__(self, model: UNet, batches: tuple[npt.NDArray[np.int64], tuple[int, int]], *_: object) -> Evaluation:
        indices, (height, width) = batches
        if not hasattr(model, "times_scored"):
            model.times_scored = 0  # type: ignore[assignment]
            self.counts.append([])
        rng = np.random.default_rng([len(self.counts), model.times_scored])  # type: ignore[list-item]
        n_lesion = 100 + indices
        found = QUALITY[model.times_scored] + rng.uniform(-0.08, 0.08, len(indices))  # type: ignore[index]
        tp = np.round(found * n_lesion).astype(np.int64)
        missed = n_lesion - tp
        self.counts[-1].append(np.stack([tp, missed, missed, height * width - tp - 2 * missed], axis=1))
        model.times_scored += 1  # type: ignore[operator]
        return Evaluation(self.counts[-1][-1], 0.5)


def dice_of(counts: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
    tp, fp, fn, _ = counts.T
    return np.asarray(2 * tp / (2 * tp + fp + fn))


@dataclass
class Run:
    """All that was seen of a study and its final."""

    record: StudyRecord
    watched: Watched
    fits: list[dict[str, Any]]
    """Arguments of `fit`, those of the study: every one has held-out images."""
    counts: list[list[npt.NDArray[np.int64]]]
    """Of each of them, those after each epoch."""
    final: FinalResult
    final_fits: list[dict[str, Any]]

    def of(self, trial: int, fold: int, *, second: bool) -> int:
        """Index of a fit among `fits`."""
        record = self.record.fit(trial, fold, replicate=int(second))
        (found,) = (index for index, fit in enumerate(self.fits) if fit["paths"].root == record.paths.root.absolute())
        return found


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Test image 12 is nearly training image 3."""
    root = tmp_path_factory.mktemp("data") / "ISIC-2017"
    pairs = tiny_pairs()
    pairs[12] = dataclasses.replace(pairs[12], image=pairs[3].image // 4 * 4, mask=pairs[3].mask)
    write_pairs(root, "archive", pairs)
    return root


@pytest.fixture(scope="module")
def config(dataset: Path) -> StudyConfig:
    return tiny_config(dataset, *SETTINGS, f'data.cache_dir="{dataset.parent / "cache"}"')


@pytest.fixture(scope="module")
def seen(config: StudyConfig, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Run]:
    project = tmp_path_factory.mktemp("protocol")
    falling = FallingScores()
    with workers_in_process() as watched, pytest.MonkeyPatch.context() as patch:
        falling.install(patch)
        record = run_planned(project, config).record
        fits = list(watched.fits)
        final = run_final(ProjectPaths(project), n_seeds=2, ensemble=True)
        assert final is not None
        yield Run(record, watched, fits, falling.counts, final, watched.fits[len(fits) :])


def test_every_configuration_is_fitted_to_each_fold_twice(seen: Run) -> None:
    assert [trial.outcome for trial in seen.record.trials()] == ["complete"] * 3
    assert seen.record.standing().confirmed == (0, 1, 2)
    assert len(seen.fits) == len(seen.counts) == 2 * 3 * 3


def test_no_fit_is_trained_on_an_image_that_scores_it(seen: Run) -> None:
    jobs = seen.watched.of(FitJob)[: len(seen.fits)]
    for job, fit in zip(jobs, seen.fits, strict=True):
        train, held_out = fit["train_indices"].tolist(), fit["held_out_indices"].tolist()
        assert (train, held_out) == (list(job.train), list(job.held_out))
        assert len(set(train)) == len(train)
        assert set(train).isdisjoint(held_out)
        assert set(train) | set(held_out) == POOL
        assert held_out == seen.record.folds.held_out(job.fold).tolist()
    for second in (False, True):
        for trial in range(3):
            held_out = [
                image
                for fold in range(3)
                for image in seen.fits[seen.of(trial, fold, second=second)]["held_out_indices"].tolist()
            ]
            assert sorted(held_out) == sorted(POOL)


def test_every_fit_has_the_configuration_of_its_trial(seen: Run) -> None:
    jobs = seen.watched.of(FitJob)
    assert len({trial.params["train.lr"] for trial in seen.record.trials()}) == 3
    for job, fit in zip(jobs, (*seen.fits, *seen.final_fits), strict=False):
        config = seen.record.trial(job.trial).study_config
        assert (fit["config"], fit["micro_batch"]) == (config, None)
    assert {job.trial for job in jobs[len(seen.fits) :]} == {seen.final.trial.number}


def test_images_are_normalised_by_those_trained_on(seen: Run) -> None:
    for fit in (*seen.fits, *seen.final_fits):
        pixels = images_of(fit["data"].cache).astype(np.float64) / 255
        ours = pixels[fit["train_indices"]].reshape(-1, 3)
        assert fit["normalization"].mean == pytest.approx(ours.mean(0), abs=1e-9)
        assert fit["normalization"].std == pytest.approx(ours.std(0), abs=1e-9)
        if len(fit["held_out_indices"]):
            assert fit["normalization"].mean != pytest.approx(pixels.reshape(-1, 3).mean(0), abs=1e-4)
        if fit["paths"].weights.is_file():
            assert load_weights(fit["paths"].weights)[1].normalization == fit["normalization"]


def test_no_two_fits_of_a_study_share_a_seed(seen: Run) -> None:
    """Not those of two trials, of two folds, of a fold's first and second fit, nor the final ones."""
    seeds = [fit["seed"] for fit in (*seen.fits, *seen.final_fits)]
    assert len(seeds) == 20
    assert len(set(seeds)) == len(seeds)


def test_all_fits_of_a_study_with_another_seed_have_other_seeds(seen: Run, config: StudyConfig) -> None:
    other = dataclasses.replace(config, study=dataclasses.replace(config.study, seed=1))
    seeds = {
        fit_seed(other, trial, fold, replicate) for replicate in (0, 1) for trial in range(3) for fold in range(3)
    }
    assert seeds.isdisjoint(fit["seed"] for fit in seen.fits)
    assert [fit["seed"] for fit in seen.final_fits] == [stable_seed(0, "final", index) for index in range(2)]


def test_the_last_epoch_counts_though_an_earlier_one_was_better(seen: Run) -> None:
    record = seen.record
    told = optuna.load_study(study_name="tiny", storage=f"sqlite:///{record.paths.project.optuna_db}").trials
    estimates = Estimates.of(record)
    assert estimates is not None
    rows = study_rows(record)
    for trial in range(3):
        scores = np.full((2, 11), np.nan)
        for second in (False, True):
            for fold in range(3):
                index = seen.of(trial, fold, second=second)
                means = [float(dice_of(counts).mean()) for counts in seen.counts[index]]
                assert max(means) == means[1] > means[2] + 0.1
                fit = record.fit(trial, fold, replicate=int(second))
                summary = fit.summary()
                assert summary is not None
                assert summary.value == pytest.approx(means[2], abs=1e-6)
                assert [row.held_out.dice for row in fit.epochs()] == pytest.approx(means, abs=1e-6)
                scores[int(second), record.folds.held_out(fold)] = dice_of(seen.counts[index][-1])
        np.testing.assert_allclose(record.out_of_fold(trial), scores[0], atol=1e-6)
        np.testing.assert_allclose(record.out_of_fold(trial, replicate=1), scores[1], atol=1e-6)
        assert record.trial(trial).value == pytest.approx(scores[0].mean(), abs=1e-6)
        assert record.standing().values[trial] == told[trial].value == pytest.approx(scores.mean(), abs=1e-6)
        np.testing.assert_allclose(estimates.scores.joint[trial], scores.mean(0), atol=1e-6)
        assert rows.trial(trial).value == pytest.approx(scores.mean(), abs=1e-6)


def test_the_network_that_is_kept_is_that_of_the_last_epoch(seen: Run) -> None:
    kept = [fit["paths"] for fit in seen.fits if fit["keep_best"] and fit["paths"].best.is_file()]
    assert len(kept) == 2 * 3
    for paths in kept:
        best = load_checkpoint(paths.best)
        assert best["epoch"] == 2
        model, _ = load_weights(paths.weights)
        assert any(not bool((tensor == best["model"][name]).all()) for name, tensor in model.state_dict().items())


def test_the_second_networks_of_the_two_best_are_kept_and_no_others(seen: Run) -> None:
    record = seen.record
    worth = {number: record.standing().values[number] for number in record.standing().confirmed}
    best = sorted(worth, key=lambda number: -worth[number])[:2]
    for number in worth:
        kept = [record.fit(number, fold, replicate=1).paths.weights.is_file() for fold in range(3)]
        assert kept == [number in best] * 3


def test_choices_are_made_on_images_that_no_network_asked_has_been_trained_on(seen: Run) -> None:
    record, trial = seen.record, seen.final.trial.number
    (job,) = seen.watched.of(SelectPostprocessingJob)
    assert seen.final.chosen is not None
    assert seen.final.chosen.n_images == len(POOL)
    trained_on = {str(fit["paths"].weights): set(fit["train_indices"].tolist()) for fit in seen.fits}
    assert len(job.networks) == 3
    for fold, network in enumerate(job.networks):
        assert list(network.held_out) == record.folds.held_out(fold).tolist()
        second, first = (record.fit(trial, fold, replicate).paths.weights for replicate in (1, 0))
        assert (network.weights, network.other) == (second.absolute(), first.absolute())
        for weights in (network.weights, network.other):
            assert trained_on[str(weights)] == POOL - set(network.held_out)


def test_the_final_is_trained_on_the_whole_pool_and_scored_on_the_test_split(seen: Run) -> None:
    assert [sorted(fit["train_indices"].tolist()) for fit in seen.final_fits] == [sorted(POOL)] * 2
    assert [len(fit["held_out_indices"]) for fit in seen.final_fits] == [0, 0]
    pool = open_cache(seen.watched.of(FitJob)[-1].caches.images).ids
    scored = {job.caches.images for job in seen.watched.of(CountJob)}
    (test,) = (open_cache(cache).ids for cache in scored)
    assert len(test) == 4
    assert set(pool).isdisjoint(test)
    for index, fit in enumerate(seen.final_fits):
        model, _ = load_weights(fit["paths"].weights)
        batches = eval_batches(
            DeviceData(open_cache(*scored)),
            np.arange(4),
            batch_size=16,
            normalization=fit["normalization"],
            size=(32, 32),
        )
        expected = evaluate(model, batches, fit["runtime"])
        assert np.array_equal(load_array(seen.final.paths.seed(index).test_counts, ndim=2), expected.counts)


def test_the_mean_without_leaked_images_is_that_of_the_others(seen: Run) -> None:
    leaked = {name for pair in seen.final.leaks for name in (pair.a, pair.b)}
    assert {"ISIC_0000003", "ISIC_0000012"} <= leaked
    with seen.final.paths.table.open() as file:
        scores = {row["image"]: float(row["dice"]) for row in csv.DictReader(file)}
    clean = [score for image, score in scores.items() if image not in leaked]
    assert 0 < len(clean) < len(scores) == 4
    assert seen.final.without_leaks == pytest.approx(np.mean(clean), abs=1e-5)
    assert seen.final.test["dice"].mean == pytest.approx(np.mean(list(scores.values())), abs=1e-5)
    assert seen.final.without_leaks != pytest.approx(seen.final.test["dice"].mean, abs=1e-3)


def test_the_gain_over_the_default_is_that_of_any_other_trial(seen: Run) -> None:
    estimates = Estimates.of(seen.record)
    assert estimates is not None
    assert estimates.gain(0) is None
    assert estimates.gain(1) is not None
    assert (seen.final.against_default is None) == (seen.final.trial.number == 0)


def test_a_fit_that_is_raced_is_judged_by_all_its_epochs_in_their_order(seen: Run) -> None:
    for trial in range(3):
        for fold in range(3):
            counts = seen.counts[seen.of(trial, fold, second=False)]
            stored = TrialScores(trial, {fold: seen.record.fit(trial, fold).scores()}, len(QUALITY))
            assert stored.curves[fold] == pytest.approx([dice_of(each).mean() for each in counts], abs=1e-6)


class _Notes:
    """A pruner that drops nothing and notes what it was asked."""

    folds: FoldOrder = "in order"

    def __init__(self) -> None:
        self.asked: list[tuple[TrialScores, list[int]]] = []

    def should_prune(self, candidate: TrialScores, others: Sequence[TrialScores], folds: Folds) -> None:
        self.asked.append((candidate, [trial.number for trial in others]))


class _RaceNotes(_Notes):
    """The same for folds that are fitted as needed. It is asked about all open trials."""

    folds: FoldOrder = "as needed"

    def order(self, trials: Sequence[TrialScores], folds: Folds) -> list[int]:
        return []


def noted(notes: _Notes, config: StudyConfig, project: Path, lookahead: int) -> FallingScores:
    """Run a study of 4 trials and 2 folds with one worker."""
    falling = FallingScores()
    settings = dataclasses.replace(config.study, pruner="race", lookahead=lookahead, folds=2, trials=4, confirm=0)
    with workers_in_process(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(pruners, "make_pruner", lambda _: notes)
        falling.install(patch)
        run_planned(project, dataclasses.replace(config, study=settings))
    return falling


@pytest.mark.parametrize("lookahead", [0, 2])
def test_a_trial_is_judged_after_every_epoch_beside_the_ended_trials_that_its_lookahead_shows(
    config: StudyConfig, tmp_path: Path, lookahead: int
) -> None:
    notes = _Notes()
    falling = noted(notes, config, tmp_path, lookahead)
    seen = iter(notes.asked)
    for trial in range(4):
        for fold in range(2):
            for epoch in range(1, len(QUALITY) + 1):
                candidate, others = next(seen)
                assert (candidate.number, candidate.latest) == (trial, fold)
                assert others == list(range(trial if lookahead == 0 else max(0, trial - lookahead + 1)))
                assert candidate.finished == tuple(range(fold + (epoch == len(QUALITY))))
                scripted = [dice_of(each) for each in falling.counts[2 * trial + fold][:epoch]]
                np.testing.assert_allclose(candidate.scores[fold], scripted, atol=1e-6)
    assert next(seen, None) is None


@pytest.mark.parametrize("lookahead", [0, 2])
def test_in_a_race_a_trial_is_judged_beside_all_first_folds_and_again_when_another_has_finished_a_fold(
    config: StudyConfig, tmp_path: Path, lookahead: int
) -> None:
    notes = _RaceNotes()
    falling = noted(notes, config, tmp_path, lookahead)
    seen, counts = iter(notes.asked), iter(falling.counts)
    # Trial 0 is completed first. With a lookahead, its second fold is not judged.
    for trial, fold in ((0, 0), (0, 1), (1, 0), (2, 0), (3, 0)):
        scripted = [dice_of(each) for each in next(counts)]
        for epoch in range(1, len(QUALITY) + 1 if fold == 0 or lookahead == 0 else 0):
            candidate, others = next(seen)
            assert (candidate.number, candidate.latest) == (trial, fold)
            assert others == list(range(trial if lookahead == 0 else max(0, trial - lookahead + 1)))
            np.testing.assert_allclose(candidate.scores[fold], scripted[:epoch], atol=1e-6)
        if lookahead == 0 or trial == 3:
            for waiting in [0] if (trial, fold) == (0, 0) else range(1, trial + 1):
                candidate, others = next(seen)
                assert (candidate.number, candidate.finished) == (waiting, (0,))
                assert others == [each for each in range(trial + 1) if each != waiting]
    left = {1, 2, 3}
    while left:
        if lookahead == 0:
            second = [next(seen) for _ in QUALITY]
            (chosen,) = {candidate.number for candidate, _ in second}
            for epoch, (candidate, others) in enumerate(second, start=1):
                assert (candidate.latest, len(candidate.scores[1])) == (1, epoch)
                assert candidate.finished == ((0, 1) if epoch == len(QUALITY) else (0,))
                assert others == [each for each in range(4) if each != chosen]
            left.remove(chosen)
        else:
            left.pop()
        waiting = [next(seen) for _ in left]
        assert [candidate.finished for candidate, _ in waiting] == [(0,)] * len(left)
        if lookahead == 0:
            assert [candidate.number for candidate, _ in waiting] == sorted(left)
        assert all(others == [n for n in range(4) if n != each.number] for each, others in waiting)
    assert next(seen, None) is None


def test_the_images_of_a_group_are_never_in_two_folds(config: StudyConfig, tmp_path: Path) -> None:
    groups = tmp_path / "patients.csv"
    groups.write_text("image,patient\n" + "".join(f"ISIC_{i:07d},{i % 4}\n" for i in sorted(POOL)))
    settings = dataclasses.replace(config.study, trials=1, confirm=0)
    grouped = dataclasses.replace(
        config, study=settings, data=dataclasses.replace(config.data, groups=str(groups)), search=SearchSpace()
    )
    with workers_in_process() as watched, pytest.MonkeyPatch.context() as patch:
        FallingScores().install(patch)
        record = run_planned(tmp_path, grouped).record
    assert record.folds.method == "groups"
    for fit in watched.fits:
        train, held_out = ({image % 4 for image in fit[f"{of}_indices"].tolist()} for of in ("train", "held_out"))
        assert train.isdisjoint(held_out)
        assert train | held_out == set(range(4))
