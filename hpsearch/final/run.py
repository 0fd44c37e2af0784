"""`run_final`: retrain one configuration on the whole pool and evaluate it on the test split.

The estimates come from the search (`report.estimates`), the post-processing from out-of-fold predictions
(`inference.postprocessing`). Every evaluation of test images is entered into the test-set log before it begins.
"""

from __future__ import annotations

import dataclasses
import logging
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from hpsearch import paths
from hpsearch.config import stable_seed
from hpsearch.data.build import Progress
from hpsearch.data.pool_caches import PoolCaches, cache_root
from hpsearch.data.prepare import prepare_test
from hpsearch.errors import StudyChangedError, StudyError
from hpsearch.final.fold_networks import choose_trial, fold_networks, why_no_ensemble
from hpsearch.final.jobs import count_job, members, official_job, samples, score_job, select_job
from hpsearch.final.result import (
    FinalResult,
    draw,
    evaluate,
    is_stored,
    leaks,
    pack_submission,
    stored_evaluation,
    write_table,
)
from hpsearch.inference.postprocessing import Postprocessing, SelectedPostprocessing
from hpsearch.paths import ProjectPaths
from hpsearch.report.page import model_card
from hpsearch.search.autotune import MachineChoice, plan_for_one_fit
from hpsearch.search.evaluation import pool_job
from hpsearch.search.stopping import Stop
from hpsearch.store import lock
from hpsearch.store.log import log_file
from hpsearch.store.record import StudyRecord, study_record
from hpsearch.store.test_set_log import (
    LoggedEvaluation,
    TestImages,
    begin_evaluation,
    end_evaluation,
    evaluations_of,
)
from hpsearch.store.trials import TrialRecord
from hpsearch.store.versions import now
from hpsearch.study import close_view
from hpsearch.training.rows import EpochRow
from hpsearch.views import Tracker, ViewThread
from hpsearch.workers.jobs import (
    Finished,
    KeepJob,
    WeightsCopy,
)
from hpsearch.workers.local_pool import LocalPool
from hpsearch.workers.loop import run_job

logger = logging.getLogger(__name__)

OnEpoch = Callable[[int, EpochRow], bool]
"""Called with (index of the seed, row) after every epoch; returns whether to go on."""


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
) -> FinalResult | None:
    """Train the winner of a study (or `trial`) on all pool images and score the test images.

    Data and settings are those of the study. `cheapest_tied` selects the fastest of the trials that cannot be
    distinguished from the best. Each of `n_seeds` networks is trained for as many epochs as the trial. If
    `on_epoch` returns False, the result is None, and the next call continues from there. `ensemble` also evaluates
    the ensemble of the fold networks. No other function reads the test split, and every evaluation is recorded
    before it begins. The masks at each image's own resolution, as `predict` would write them, stay in the final's
    folder. If the result is stored already, it is returned without another evaluation. `submission` packs the masks
    into a zip for the challenge. `on_decoded(done, total)` reports the progress of decoding, and `on_step(text)`
    the next step. A request of `stop` ends the call after the current epoch, or at once if no network is being
    trained.

    Raises StudyError if there is no such study or trial, or no networks for an ensemble; DatasetError if the data
    cannot be used; StoppedError if `stop` ended the call.
    """
    stop = stop or Stop()
    record = study_record(project, name)
    with paths.refusals_named(record.paths.root), lock.hold(record.paths), log_file(record.paths.log):
        record.paths.stop_request.unlink(missing_ok=True)
        record.verify()
        chosen = choose_trial(record, trial, cheapest_tied)
        progress = _Progress(record, stop, on_epoch, on_decoded, on_step)
        final = _Final(record, chosen, n_seeds, ensemble, progress)
        if (result := final.stored()) is None:
            result = final.run(machine or MachineChoice())
        if result is None:
            return None
        if submission:
            pack_submission(final.folder, final.test)
        if tracker is not None and not final.was_stored:
            progress.say("delivering to MLflow")
            undelivered, error = close_view(ViewThread(tracker.view(record.paths)), stop)
            result = dataclasses.replace(result, undelivered=undelivered, tracking_error=error)
        return result


@dataclass(frozen=True)
class _Progress:
    """What the caller is told, and how it stops the run."""

    record: StudyRecord
    stop: Stop
    on_epoch: OnEpoch | None
    on_decoded: Progress | None
    on_step: Callable[[str], None] | None

    def check(self) -> None:
        """Raise StoppedError if a stop was requested and no network is being trained."""
        self.stop.poll(self.record.paths)
        if self.stop.is_urgent or self.stop.epoch_left_s() is None:
            self.stop.check("stopped; run the same command again to continue")

    def decoded(self, done: int, total: int) -> None:
        self.check()
        if self.on_decoded is not None:
            self.on_decoded(done, total)

    def epoch(self, index: int, row: EpochRow) -> bool:
        """Return whether training goes on."""
        return (self.on_epoch is None or self.on_epoch(index, row)) and not self.stop.is_requested

    def say(self, text: str) -> None:
        logger.info(text)
        if self.on_step is not None:
            self.on_step(text)


class _Final:
    """One final: its images, its folder, and its steps."""

    def __init__(
        self, record: StudyRecord, trial: TrialRecord, n_seeds: int, ensemble: bool, progress: _Progress
    ) -> None:
        self.was_stored = False
        self._record = record
        self._trial = trial
        self._n_seeds = n_seeds
        self._progress = progress
        # A trial remembers where the images were when it began.
        config = trial.study_config
        self._config = dataclasses.replace(config, data=config.data.located_as(record.config.data))
        self.folder = record.paths.final(f"trial-{trial.number:04d}")
        self._networks = fold_networks(record, trial.number)
        if ensemble and self._networks is None:
            raise StudyError(why_no_ensemble(record, trial.number))
        self._uses_ensemble = ensemble
        self._root = cache_root(record.paths.project, self._config)
        decoded = progress.decoded
        self._caches = PoolCaches(record.config, self._root, role="final", progress=decoded)
        self.test = prepare_test(self._config.scored_data, self._root, progress=decoded)
        """The test images at the size at which they are scored."""
        self._seen = self.test
        if self._config.scored_data != self._config.data:
            self._seen = prepare_test(self._config.data, self._root, progress=decoded)
        for note in self.test.notes:
            progress.say(f"note on the test split: {note}")

    def stored(self) -> FinalResult | None:
        """Return the result that the folder holds already; None if it has to be computed."""
        folder, pool = self.folder, self._caches.scored
        evaluation = stored_evaluation(self._record.paths.project, folder)
        if evaluation is None or not is_stored(
            folder, pool, self.test, n_seeds=self._n_seeds, ensemble=self._uses_ensemble
        ):
            return None
        self.was_stored = True
        text = f"trial {self._trial.number} was evaluated on these images before; this is the stored result"
        self._progress.say(text)
        n_members = len(list(folder.ensemble.glob("*.safetensors"))) if self._uses_ensemble else 0
        return self._evaluate(n_members, evaluation)

    def run(self, machine: MachineChoice) -> FinalResult | None:
        """Train, select post-processing, score, and write the result; None if the caller stopped the training."""
        began_at = now()
        paths.write_text(self.folder.config, self._config.to_toml())
        # One network after another on the first device of the plan, which no other worker shares here.
        with LocalPool(self._record.paths.root) as pool:
            plan = plan_for_one_fit(self._record, self._caches, machine, pool, self._progress.check)
            pool.resize(plan.workers)
            self._progress.stop.epoch_left_s = pool.epoch_left_s
            do = partial(run_job, pool, check=self._progress.check)
            if not self._train(do):
                return None
            # Before the test split is read.
            choices = self._select(do)
            networks = members(self.folder, self._networks if self._uses_ensemble else None)
            copies = (WeightsCopy(self.folder.seed(0).weights, self.folder.model), *networks)
            do(KeepJob(copies=copies, postprocessing=choices))
            evaluation = self._begin_evaluation()
            self._score(do, choices, [copy.target for copy in networks])
        result = self._evaluate(len(networks), evaluation)
        evaluation = end_evaluation(self._record.paths.project, evaluation, result.test[result.metric].mean)
        result = dataclasses.replace(
            result, evaluation=evaluation, evaluations=evaluations_of(self._record.paths.project, evaluation)
        )
        self._write(result, began_at, plan.machine)
        return result

    def _train(self, do: Callable[..., Finished | None]) -> bool:
        """Train the network of each seed; return False if the caller stopped one."""
        for index in range(self._n_seeds):
            fit = self.folder.seed(index)
            if fit.fit.is_file():
                self._progress.say(f"network {index + 1} of {self._n_seeds} has been trained")
                continue
            n_images = self._caches.scored.n
            self._progress.say(f"training network {index + 1} of {self._n_seeds} on {n_images} images")
            seed = stable_seed(self._config.study.seed, "final", index)
            job = pool_job(self._trial, self._config, fit, self._caches, seed=seed)
            if do(job, on_epoch=partial(self._progress.epoch, index)) is None:
                self._progress.check()
                return False
        return True

    def _select(self, do: Callable[..., Finished | None]) -> Postprocessing:
        """Select post-processing by out-of-fold predictions, if the networks of the folds were kept."""
        record = self._record
        if self._networks is not None:
            self._progress.say("selecting threshold, flips and cleaning by out-of-fold predictions")
            searched = PoolCaches(record.config, self._root)
            if searched.scored.ids != record.folds.ids:
                raise StudyChangedError(
                    f"the images of study {record.name!r} have changed since it was begun: put the old ones back"
                )
            do(select_job(record, self._trial, self.folder, self._networks, searched, ensemble=self._uses_ensemble))
        chosen = self._chosen()
        return chosen.choices if chosen is not None else Postprocessing()

    def _chosen(self) -> SelectedPostprocessing | None:
        path = self.folder.choices
        return SelectedPostprocessing.from_table(paths.read_json(path)) if path.is_file() else None

    def _score(self, do: Callable[..., Finished | None], choices: Postprocessing, together: list[Path]) -> None:
        """Write counts and masks of the test images, by the retrained networks and by those of the folds together."""
        trial, folder, seen, test = self._trial, self.folder, self._seen, self.test
        for index in range(self._n_seeds):
            do(score_job(trial, folder.seed(index), seen, test))
        shutil.rmtree(folder.masks, ignore_errors=True)
        self._progress.say(f"scoring the masks of {test.n} test images at their own resolution")
        images = samples(self._config.data, self._root, test)
        if choices != Postprocessing():
            do(count_job(trial, choices, [folder.model], folder.chosen_counts, seen, test))
        by_ensemble = choices.ensemble and bool(together)
        masks = None if by_ensemble else folder.masks
        do(official_job([folder.model], test, images, masks, folder.official_counts))
        if together:
            do(count_job(trial, choices, together, folder.ensemble_counts, seen, test))
            masks = folder.masks if by_ensemble else None
            do(official_job(together, test, images, masks, folder.ensemble_official_counts))

    def _begin_evaluation(self) -> LoggedEvaluation:
        """Enter the evaluation into the test-set log."""
        project = self._record.paths.project
        return begin_evaluation(
            project,
            TestImages.in_cache(self.test.cache_path),
            at=now(),
            study=self._record.name,
            study_began_at=self._record.trial(self._record.trial_numbers()[0]).began_at,
            trial=self._trial.number,
            folder=str(project.root.absolute()),
            metric=self._record.config.study.metric,
        )

    def _evaluate(self, n_members: int, evaluation: LoggedEvaluation) -> FinalResult:
        pool = self._caches.scored
        found = leaks(self._config.data, self._root, pool, self.test)
        return evaluate(
            self._record,
            self._trial,
            self.folder,
            self._n_seeds,
            pool,
            self.test,
            self._chosen(),
            n_members,
            found,
            evaluation,
        )

    def _write(self, result: FinalResult, began_at: float, machine: Mapping[str, Any]) -> None:
        """Write tables and figures, then final.json, then the model card."""
        folder = self.folder
        write_table(folder, self._n_seeds, self.test)
        folder.submission.unlink(missing_ok=True)
        draw(self._record, folder, self._n_seeds, result, self.test)
        finished = {**result.to_dict(), "began_at": began_at, "ended_at": now()}
        finished |= {"pool_key": self._caches.scored.key, "test_key": self.test.key}
        paths.write_json(folder.result, {**finished, "n_seeds": self._n_seeds, "runtime": machine})
        paths.write_text(folder.card, model_card(self._record, folder.root.name))
        text = "final of trial %d: test %s %.4f"
        logger.info(text, result.trial.number, result.metric, result.test[result.metric].mean)
