"""`run_final`: retrain one configuration on the whole pool and evaluate it on the test split.

The pool consists of all training and validation images. One call of `run_final` is named a `final` run. The estimates
come from the search (`report.estimates`). The post-processing is selected on out-of-fold predictions
(`inference.postprocessing`). Every evaluation of test images is recorded in the test-set log before it begins.
"""

import dataclasses
import logging
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np

from hpsearch import paths
from hpsearch.config import stable_seed
from hpsearch.data.decode_pool import Progress
from hpsearch.data.prepare import PoolCaches, Prepared, cache_root, locate, prepare_test
from hpsearch.errors import StudyChangedError, StudyError
from hpsearch.final import result as results
from hpsearch.inference.postprocessing import FoldNetwork, Postprocessing, SelectedPostprocessing
from hpsearch.inference.scoring import mask_name, write_submission
from hpsearch.paths import ProjectPaths
from hpsearch.report.estimates import Estimates
from hpsearch.report.final_record import EnsembleResult, FinalRecord, FinalResult, evaluation_facts, final_result
from hpsearch.report.page import model_card
from hpsearch.report.rows import study_rows
from hpsearch.search.autotune import MachineChoice, plan_for_one_fit
from hpsearch.search.evaluation import pool_job
from hpsearch.search.stopping import Stop
from hpsearch.stats.intervals import paired_difference
from hpsearch.store import lock, test_set_log
from hpsearch.store.record import StudyRecord, study_record
from hpsearch.store.test_set_log import LoggedEvaluation
from hpsearch.store.trials import TrialRecord, read_record
from hpsearch.store.versions import now
from hpsearch.study import close_view
from hpsearch.training.metrics import SCORES
from hpsearch.training.rows import EpochRow
from hpsearch.typed_json import to_json
from hpsearch.views import Tracker, ViewThread
from hpsearch.workers import jobs
from hpsearch.workers.loop import run_job

logger = logging.getLogger(__name__)

OnEpoch = Callable[[int, EpochRow], object]
"""Callback after every epoch, called with (index of the network, epoch row)."""
STOPPED = "stopped; run the same command again to continue"
RunJob = Callable[..., jobs.Finished | None]
"""`run_job` with the worker pool and the stop check already bound."""


def run_final(
    project: ProjectPaths,
    name: str | None = None,
    *,
    trial: int | None = None,
    cheapest_tied: bool = False,
    n_seeds: int = 1,
    ensemble: bool = False,
    machine: MachineChoice | None = None,
    tracker: Tracker | None = None,
    on_epoch: OnEpoch | None = None,
    on_decoded: Progress | None = None,
    on_step: Callable[[str], None] | None = None,
    submission: bool = False,
    stop: Stop | None = None,
) -> FinalResult:
    """Train the winner of a study (or `trial`) on all pool images and score the test images.

    The data and settings are those of the study. `cheapest_tied` selects the fastest of the trials that cannot be
    distinguished from the best. Each of the `n_seeds` networks is trained for as many epochs as the trial. `ensemble`
    also evaluates the ensemble of the fold networks. `machine` overrides the device and threads of the study's plan.

    Every evaluation of the test split is recorded before it begins. If the result is already stored, it is returned
    without another evaluation. The masks are kept in the folder of the result, at the original resolution of each
    image, as `predict` would write them. `submission` packs them into a zip file for the challenge. `tracker` adds
    the result to MLflow.

    `on_epoch(index, row)` is called after every epoch, `on_decoded(done, total)` while images are decoded, and
    `on_step(text)` at the start of each step. A stop request ends the call after the current epoch, or immediately if
    no network is being trained. The next call continues from there.

    Raises StudyError if the study or trial does not exist, or if `ensemble` is set and the fold networks were not
    kept. Raises DatasetError if the data cannot be used, and StoppedError if `stop` ended the call.
    """
    stop = stop or Stop()
    record = study_record(project, name)
    with paths.refusals_named(record.paths.root), lock.hold(record.paths), lock.log_file(record.paths.log):
        record.paths.stop_request.unlink(missing_ok=True)
        record.verify()
        record.forget_workers()
        chosen = choose_trial(record, trial, cheapest_tied)
        callbacks = on_epoch or _ignore, on_decoded or _ignore, on_step or _ignore
        final = _Final(record, chosen, n_seeds, ensemble, stop, *callbacks)
        stored = final.stored()
        result = stored or final.run(machine or MachineChoice())
        if submission:
            masks = [final.folder.masks / mask_name(image) for image in final.test.index.ids]
            write_submission(final.folder.submission, masks)
        if tracker is not None and stored is None:
            final.say("updating MLflow")
            view = ViewThread(tracker.view(record.paths))
            result = dataclasses.replace(result, undelivered=close_view(view, stop), tracking_error=view.error)
        return result


def _ignore(*_event: object) -> None:
    """Default of the callbacks."""


@dataclass
class _Final:
    """State and steps of a `final` run in progress."""

    record: StudyRecord
    trial: TrialRecord
    n_seeds: int
    ensemble: bool
    stop: Stop
    on_epoch: OnEpoch
    on_decoded: Progress
    on_step: Callable[[str], None]

    def __post_init__(self) -> None:
        record, trial = self.record, self.trial
        self.project, self.folder = record.paths.project, record.paths.final(f"trial-{trial.number:04d}")
        self.source, self.networks = fold_networks(record, trial.number)
        if self.ensemble and not self.networks:
            raise StudyError(
                f"the fold networks of trial {trial.number} were not kept: fit it again with `hpsearch export --toml "
                f"FILE --trial {trial.number}` and `hpsearch train --config FILE --folds {record.config.study.folds}`"
            )
        of_trial = trial.study_config
        # The trial's configuration has the image paths from the trial's start. The images may have moved since then.
        self.config = dataclasses.replace(of_trial, data=of_trial.data.located_as(record.config.data))
        self.root = cache_root(self.project, self.config)

    # Images are decoded on first access, after a cluster has been reached.
    @cached_property
    def caches(self) -> PoolCaches:
        """Images of the pool."""
        return PoolCaches(self.record.config, self.root, role="final", progress=self._decoded)

    @cached_property
    def test(self) -> Prepared:
        """Test images at the size at which they are scored."""
        test = prepare_test(self.config.scored_data, self.root, progress=self._decoded)
        for note in test.notes:
            self.say(f"note on the test split: {note}")
        return test

    @cached_property
    def seen(self) -> Prepared:
        """Test images at the size that the network gets."""
        is_same = self.config.scored_data == self.config.data
        return self.test if is_same else prepare_test(self.config.data, self.root, progress=self._decoded)

    def say(self, text: str) -> None:
        logger.info(text)
        self.on_step(text)

    def _check(self) -> None:
        """Raise StoppedError if a stop was requested and no network is being trained."""
        self.stop.poll(self.record.paths)
        if self.stop.is_urgent or self.stop.epoch_left_s() is None:
            self.stop.check(STOPPED)

    def _decoded(self, done: int, total: int) -> None:
        self._check()
        self.on_decoded(done, total)

    def _epoch_ended(self, index: int, row: EpochRow) -> bool:
        """Report the end of an epoch, and return whether to continue training."""
        self.on_epoch(index, row)
        return not self.stop.is_requested

    def stored(self) -> FinalResult | None:
        """Return the stored result; None if it must be computed."""
        if not self.folder.result.is_file():
            return None
        pool, test = self.caches.scored.index, self.test.index
        stored = results.stored_result(self.folder, pool, test, n_seeds=self.n_seeds, ensemble=self.ensemble)
        if stored is None or test_set_log.find_evaluation(self.project, stored.look) is None:
            return None
        self.say(f"trial {self.trial.number} was evaluated on these images before; this is the stored result")
        return final_result(self.record, self.folder.root.name, Estimates.of(self.record))

    def run(self, machine: MachineChoice) -> FinalResult:
        """Train the networks, select post-processing, score the test images and write the result."""
        began_at, folder = now(), self.folder
        # Train one network at a time on the first device of the plan. No other worker uses this device now.
        with machine.open_pool(self.record.paths, self.record, self._check, self.on_step) as pool:
            # Decode all images first: a problem with one of them must end the run before the training.
            _ = self.caches, self.test, self.seen
            paths.write_text(folder.config, self.config.to_toml())
            plan = plan_for_one_fit(self.record, self.caches, machine, pool, self._check)
            pool.resize(plan.workers)
            self.stop.epoch_left_s = pool.epoch_left_s
            do = partial(run_job, pool, check=self._check)
            self._train(do)
            # Select the post-processing before the test split is read.
            chosen = self._select(do)
            choices = Postprocessing() if chosen is None else chosen.choices
            shutil.rmtree(folder.ensemble, ignore_errors=True)
            sources = [network.weights for network in self.networks] if self.ensemble else []
            members = tuple(folder.ensemble / f"fold{fold}.safetensors" for fold in range(len(sources)))
            copies = zip((folder.seed(0).weights, *sources), (folder.model, *members), strict=True)
            do(jobs.KeepJob(copies=tuple(copies), postprocessing=choices))
            hashes = test_set_log.hashes_in_cache(self.test.cache_path)
            facts = evaluation_facts(self.record, self.trial.number)
            evaluation = test_set_log.begin_evaluation(self.project, hashes, at=now(), **facts)
            self._score(do, choices, members)
        result = self._evaluate(evaluation, chosen, began_at=began_at, runtime=dict(plan.machine))
        score = result.test[result.metric].mean
        test_set_log.end_evaluation(self.project, evaluation, score)
        paths.write_json(folder.result, to_json(result))
        rows = study_rows(self.record)
        final = next(each for each in rows.finals if each.paths == folder)
        paths.write_text(folder.card, model_card(rows, final))
        logger.info("final of trial %d: test %s %.4f", self.trial.number, result.metric, score)
        return final

    def _train(self, do: RunJob) -> None:
        """Train one network per seed on the pool. Networks that are already trained are skipped."""
        for index in range(self.n_seeds):
            fit, network = self.folder.seed(index), f"network {index + 1} of {self.n_seeds}"
            if fit.fit.is_file():
                self.say(f"{network} is already trained")
                continue
            self.say(f"training {network} on {len(self.caches.scored.index)} images")
            seed = stable_seed(self.config.study.seed, "final", index)
            job = pool_job(self.trial, self.config, fit, self.caches, seed=seed)
            if do(job, on_epoch=partial(self._epoch_ended, index)) is None:
                self.stop.check(STOPPED)

    def _select(self, do: RunJob) -> SelectedPostprocessing | None:
        """Select post-processing on out-of-fold predictions; return None if no fold networks were kept."""
        record, config, out = self.record, self.trial.study_config, self.folder.choices
        if self.networks:
            self.say("selecting threshold, flips and cleaning by out-of-fold predictions")
            searched = PoolCaches(record.config, self.root)
            if searched.scored.index.ids != record.folds.ids:
                raise StudyChangedError(f"the images of study {record.name!r} have changed: restore the old ones")
            caches = jobs.CachePaths(*searched.paths(config))
            select = partial(jobs.SelectPostprocessingJob, config=config, caches=caches)
            do(select(networks=self.networks, source=self.source, ensemble=self.ensemble, out=out))
        return read_record(SelectedPostprocessing, out) if out.is_file() else None

    def _score(self, do: RunJob, choices: Postprocessing, members: tuple[Path, ...]) -> None:
        """Predict the test images with the retrained networks and the fold ensemble. Write pixel counts and masks."""
        folder, test, config = self.folder, self.test, self.trial.study_config
        truth = test.cache_path if test.cache_path != self.seen.cache_path else None
        caches = jobs.CachePaths(self.seen.cache_path, truth)
        count = partial(jobs.CountJob, config=config, caches=caches)
        for fit in map(folder.seed, range(self.n_seeds)):
            score = partial(count, postprocessing=Postprocessing(), counts=fit.test_counts, examples=fit.examples)
            do(score(weights=(fit.weights,)))
        shutil.rmtree(folder.masks, ignore_errors=True)
        self.say(f"scoring the masks of {len(test.index)} test images at their own resolution")
        # The dataset may have moved since the cache was built, so locate the files again.
        samples = {sample.id: sample for sample in locate(self.config.data, self.root).split("test")}
        images = tuple(samples[image] for image in test.index.ids)
        by_ensemble = choices.ensemble and bool(members)
        official = partial(jobs.OfficialScoreJob, reading=test.index.preparation.reading, images=images)
        if choices != Postprocessing():
            do(count(weights=(folder.model,), postprocessing=choices, counts=folder.chosen_counts))
        masks, masks_of_ensemble = (None, folder.masks) if by_ensemble else (folder.masks, None)
        do(official(weights=(folder.model,), masks=masks, counts=folder.official_counts))
        if members:
            do(count(weights=members, postprocessing=choices, counts=folder.ensemble_counts))
            do(official(weights=members, masks=masks_of_ensemble, counts=folder.ensemble_official_counts))

    def _evaluate(
        self, evaluation: LoggedEvaluation, chosen: SelectedPostprocessing | None, **facts: Any
    ) -> FinalRecord:
        """Compute the result from the pixel counts, and write test.csv and the figures.

        test.csv contains two sets of scores for every test image: the means over the retrained networks, and the
        scores of the ISIC-2017 challenge for the first network. `facts` are additional fields of the result.
        """
        record, folder, test, pool = self.record, self.folder, self.test.index, self.caches.scored.index
        metric, number = record.config.study.metric, self.trial.number
        estimates = Estimates.of(record)
        assert estimates is not None
        leaks = results.find_leaks(self.config.data, self.root, pool, test)
        leaked = np.isin(np.array(test.ids), [name for pair in leaks for name in (pair.a, pair.b)])
        tables = [results.read_scores(folder.seed(index).test_counts) for index in range(self.n_seeds)]
        means = {name: np.mean([table[name] for table in tables], axis=0) for name in SCORES}
        official = results.read_official_scores(folder.official_counts, test)
        is_processed = chosen is not None and chosen.choices != Postprocessing()
        final = FinalRecord(
            **estimates.of_final(number, n_test=len(test), n_runs=self.n_seeds),
            **facts,
            study=record.name,
            metric=metric,
            n_pool=len(pool),
            n_test=len(test),
            eval_size=record.config.eval_size,
            test=results.intervals(means),
            per_seed={name: tuple(float(table[name].mean()) for table in tables) for name in SCORES},
            official=results.intervals(official),
            chosen=chosen,
            chosen_test=results.intervals(results.read_scores(folder.chosen_counts)) if is_processed else {},
            ensemble=self._evaluate_ensemble(is_processed) if self.ensemble else None,
            leaks=leaks,
            without_leaks=float(means[metric][~leaked].mean()) if leaks and not leaked.all() else None,
            trial=number,
            params=self.trial.params,
            n_seeds=self.n_seeds,
            ended_at=now(),
            pool_key=pool.key,
            test_key=test.key,
            test_set=evaluation.test_set,
            look=evaluation.id,
            n_looks=len(test_set_log.evaluations_of(self.project, evaluation)),
        )
        columns = means | {f"official_{name}": values for name, values in official.items()}
        results.write_table(folder, test.ids, columns)
        results.draw_figures(record, folder, final)
        # A zip file that exists already contains the masks of an earlier evaluation.
        folder.submission.unlink(missing_ok=True)
        return final

    def _evaluate_ensemble(self, is_processed: bool) -> EnsembleResult:
        folder, metric = self.folder, self.record.config.study.metric
        alone = folder.chosen_counts if is_processed else folder.seed(0).test_counts
        scores = results.read_scores(folder.ensemble_counts)
        official = results.read_official_scores(folder.ensemble_official_counts, self.test.index)
        return EnsembleResult(
            n_networks=self.record.n_folds,
            test=results.intervals(scores),
            official=results.intervals(official),
            gain=paired_difference(scores[metric], results.read_scores(alone)[metric]),
        )


def fold_networks(record: StudyRecord, number: int) -> tuple[str, tuple[FoldNetwork, ...]]:
    """Return a description of the fold networks that were kept for a trial, and the networks.

    The networks of the refits are preferred to those of the first fits. Both values are empty if no networks were
    kept.
    """
    held_out = [tuple(record.folds.held_out(fold).tolist()) for fold in range(record.n_folds)]
    others: list[Path] | list[None] = [None] * record.n_folds
    found: tuple[str, tuple[FoldNetwork, ...]] = ("", ())
    for replicate, source in enumerate(("first fits", "refits")):
        fits = record.fits(number, replicate)
        if all(fit.is_finished and fit.paths.weights.is_file() for fit in fits):
            weights = [fit.paths.weights for fit in fits]
            found = f"{source} of trial {number}", tuple(map(FoldNetwork, weights, others, held_out))
            others = weights
    return found


def choose_trial(record: StudyRecord, number: int | None, cheapest_tied: bool) -> TrialRecord:
    """Return the trial to retrain: trial `number` if it is given, else the best trial.

    With `cheapest_tied`, the best trial is replaced by the fastest trial that is tied with it.

    Raises StudyError if no trial is complete, if trial `number` was not evaluated on all folds with its own settings,
    or if an earlier trial has the same configuration as trial `number`.
    """
    if number is None:
        estimates = Estimates.of(record)
        if estimates is None:
            raise StudyError(f"study {record.name!r} has no complete trial yet: run `hpsearch study` first")
        return record.trial(estimates.cheapest_tied if cheapest_tied else estimates.winner)
    trial, named = record.known_trial(number), f"trial {number} of study {record.name!r}"
    if not trial.can_win:
        special = {"complete": "ran out of memory and was trained with smaller batches", None: "is still open"}
        what = special.get(trial.outcome, f"ended as {trial.outcome}")
        raise StudyError(f"{named} {what}: only complete trials can be retrained")
    configuration, contenders = record.configuration(trial.params), record.contenders(record.trials())
    same = next(each for each in contenders if record.configuration(each.params) == configuration)
    if same.number != number:
        raise StudyError(f"{named} has the same configuration as trial {same.number}: use --trial {same.number}")
    return trial
