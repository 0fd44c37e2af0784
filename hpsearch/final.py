"""Retrain one configuration on the whole pool and evaluate it on the test split, with what that is worth.

The predictions come from `report.estimates`, the choices about threshold, flips, cleaning and
ensemble from out-of-fold predictions (`choices`), and every evaluation of test images is entered into an account
before it begins (`looks`).
"""

from __future__ import annotations

import csv
import dataclasses
import io
import logging
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from hpsearch import paths
from hpsearch.config import stable_seed
from hpsearch.config.data import DataConfig
from hpsearch.data.build import Progress
from hpsearch.data.duplicates import DuplicatePair, find_in_dataset
from hpsearch.data.pool_caches import PoolCaches, cache_root
from hpsearch.data.prepare import Prepared, locate, prepare_test
from hpsearch.errors import RecordError, StoppedError, StudyChangedError, StudyError
from hpsearch.inference.postprocessing import Choices, Chosen, FoldNetwork
from hpsearch.inference.scoring import COLUMNS, mask_name, read_mask, score_table, write_submission
from hpsearch.paths import FinalPaths, FitPaths, ProjectPaths
from hpsearch.report import trial_rows
from hpsearch.report.card import model_card
from hpsearch.report.estimates import Estimates
from hpsearch.report.finals import EnsembleResult, FinalScores
from hpsearch.search.autotune import MachineChoice, plan_for_one_fit
from hpsearch.search.fit_jobs import pool_job
from hpsearch.search.stopping import Stop
from hpsearch.stats.intervals import Interval, Paired, bootstrap_mean, paired_difference
from hpsearch.stats.selection import Corrected
from hpsearch.store import lock
from hpsearch.store.log import log_file
from hpsearch.store.record import FORMAT, StudyRecord, TrialRecord, load_array, now, study_record
from hpsearch.store.test_set_log import (
    Look,
    TestImages,
    begin_look,
    end_look,
    find_look,
    first_look_of,
    looks_at,
    n_looks_before,
)
from hpsearch.study import close_view
from hpsearch.training.metrics import SCORES, PixelCounts
from hpsearch.training.rows import EpochRow
from hpsearch.views import Tracker, ViewThread
from hpsearch.workers.jobs import (
    CachePaths,
    CountJob,
    ImageFiles,
    KeepJob,
    OfficialScoreJob,
    ScoreJob,
    SelectPostprocessingJob,
    WeightsCopy,
)
from hpsearch.workers.local_pool import LocalPool
from hpsearch.workers.loop import run_job

logger = logging.getLogger(__name__)

OnEpoch = Callable[[int, EpochRow], bool]
"""Called with (index of the seed, row) after every epoch; returns whether to go on."""


@dataclass(frozen=True, kw_only=True)
class FinalResult(FinalScores):
    """Test scores of a retrained configuration beside the estimates of the search."""

    study: str
    """Name of the study."""
    trial: TrialRecord
    """The trial whose configuration was retrained."""
    paths: FinalPaths
    """The files of the final: model, masks, table of scores, figures."""
    metric: str
    """The study's metric, `dice` or `jaccard`."""
    cv: Interval
    """Mean of the out-of-fold scores, over both fits if it was replicated, with its 95 % interval."""
    cv_fold_std: float
    """Standard deviation of the fold means."""
    is_confirmed: bool
    """Whether the trial was fitted twice, so that `cv` is the mean over both fits."""
    corrected: Corrected | None
    """The winner's mean, corrected for selection; None if this is another trial."""
    eval_size: tuple[int, int]
    """Height and width at which `test` is scored, as all trials were (`study.eval_size`, else `data.size`)."""
    per_seed: dict[str, tuple[float, ...]]
    """Score by name: the mean of each seed's network."""
    against_default: Paired | None
    """Its gain over trial 0, corrected for selection; None for trial 0, or if that is not complete."""
    winner: int
    """Number of the study's best trial."""
    winner_against_default: Paired | None
    """The gain of the best trial over trial 0, likewise."""
    is_default: bool
    """Whether it has the default configuration."""
    undelivered: int = 0
    """Number of MLflow runs that lack something; it is on record."""
    tracking_error: str = ""
    """Why MLflow could not be brought up to date; empty if it is."""

    @property
    def n_leaked(self) -> int:
        """Number of test images that are in `leaks`."""
        sides = [(pair.a, pair.split_a) for pair in self.leaks] + [(pair.b, pair.split_b) for pair in self.leaks]
        return len({name for name, split in sides if split == "test"})

    def to_dict(self) -> dict[str, Any]:
        """Return the content of final.json, without its times."""
        table = dataclasses.asdict(self)
        return {
            "format": FORMAT,
            "trial": self.trial.number,
            "params": self.trial.params,
            "test_set": self.look.test_set,
            "look": self.look.id,
            "n_looks": len(self.looks),
            **{name: table[name] for name in STORED},
        }


STORED = (
    *("study", "winner", "metric", "n_pool", "n_test", "cv", "cv_fold_std", "is_confirmed", "corrected", "predicted"),
    *("eval_size", "test", "official", "per_seed", "chosen", "chosen_test", "ensemble", "leaks", "without_leaks"),
    "against_default",
)
"""Fields of `FinalResult` that final.json holds under their own names."""


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

    def check() -> None:
        stop.poll(record.paths)
        if stop.is_urgent or (stop.is_requested and stop.epoch_left_s() is None):
            raise StoppedError("stopped; run the same command again to continue", stop.signal)

    def decoded(done: int, total: int) -> None:
        check()
        if on_decoded is not None:
            on_decoded(done, total)

    def go_on(index: int, row: EpochRow) -> bool:
        return (on_epoch is None or on_epoch(index, row)) and not stop.is_requested

    def say(text: str) -> None:
        logger.info(text)
        if on_step is not None:
            on_step(text)

    record = study_record(project, name)
    with paths.refusals_named(record.paths.root), lock.hold(record.paths), log_file(record.paths.log):
        record.paths.stop_request.unlink(missing_ok=True)
        record.verify()
        chosen = _choose(record, trial, cheapest_tied)
        config = chosen.study_config
        # A trial remembers where the images were when it began.
        config = dataclasses.replace(config, data=config.data.located_as(record.config.data))
        folder = record.paths.final(f"trial-{chosen.number:04d}")
        began_at = now()
        root = cache_root(project, config)
        networks = fold_networks(record, chosen.number)
        if ensemble and networks is None:
            raise StudyError(_why_no_ensemble(record, chosen.number))
        caches = PoolCaches(record.config, root, role="final", progress=decoded)
        pool = caches.scored
        test = prepare_test(config.scored_data, root, progress=decoded)
        for note in test.notes:
            say(f"note on the test split: {note}")
        seen = test if config.scored_data == config.data else prepare_test(config.data, root, progress=decoded)
        stored_look = _stored_look(project, folder)
        if stored_look is not None and _is_stored(folder, pool, test, n_seeds=n_seeds, ensemble=ensemble):
            say(f"trial {chosen.number} was evaluated on these images before; this is the stored result")
            decided = Chosen.read(folder.choices) if folder.choices.is_file() else None
            n_members = len(list(folder.ensemble.glob("*.safetensors"))) if ensemble else 0
            leaks = _leaks(config.data, root, pool, test)
            if submission:
                _write_submission(folder, test)
            return _evaluate(record, chosen, folder, n_seeds, pool, test, decided, n_members, leaks, stored_look)
        paths.write_text(folder.config, config.to_toml())
        # One network after another on the first device of the plan, which no other worker shares here.
        with LocalPool(record.paths.root) as pool_of_one:
            plan = plan_for_one_fit(record, caches, machine or MachineChoice(), pool_of_one, check)
            pool_of_one.resize(plan.workers)
            stop.epoch_left_s = pool_of_one.epoch_left_s
            do = partial(run_job, pool_of_one, check=check)
            for index in range(n_seeds):
                seed = stable_seed(config.study.seed, "final", index)
                job = pool_job(chosen, config, folder.seed(index), caches, seed=seed)
                if folder.seed(index).fit.is_file():
                    say(f"network {index + 1} of {n_seeds} has been trained")
                    continue
                say(f"training network {index + 1} of {n_seeds} on {pool.n} images")
                if do(job, on_epoch=partial(go_on, index)) is None:
                    check()
                    return None
            # Before the test split is looked at.
            if networks is not None:
                say("choosing threshold, flips and cleaning by out-of-fold predictions")
                searched = PoolCaches(record.config, root)
                if searched.scored.ids != record.folds.ids:
                    raise StudyChangedError(
                        f"the images of study {record.name!r} have changed since it was begun: put the old ones back"
                    )
                do(_select_job(record, chosen, folder, networks, searched, ensemble=ensemble))
            decided = Chosen.read(folder.choices) if folder.choices.is_file() else None
            choices = decided.choices if decided is not None else Choices()
            members = _members(folder, networks if ensemble else None)
            copies = (WeightsCopy(folder.seed(0).weights, folder.model), *members)
            do(KeepJob(copies=copies, postprocessing=choices))
            look = _begin_look(record, chosen, test)
            for index in range(n_seeds):
                do(_score_job(chosen, folder.seed(index), seen, test))
            together = [copy.target for copy in members]
            uses_ensemble = choices.ensemble and bool(together)
            shutil.rmtree(folder.masks, ignore_errors=True)
            say(f"scoring the masks of {test.n} test images at their own resolution")
            samples = _samples(config.data, root, test)
            if choices != Choices():
                do(_count_job(chosen, choices, [folder.model], folder.chosen_counts, seen, test))
            masks = None if uses_ensemble else folder.masks
            do(_official_job([folder.model], test, samples, masks, folder.official_counts))
            if together:
                do(_count_job(chosen, choices, together, folder.ensemble_counts, seen, test))
                masks = folder.masks if uses_ensemble else None
                do(_official_job(together, test, samples, masks, folder.ensemble_official_counts))
        leaks = _leaks(config.data, root, pool, test)
        result = _evaluate(record, chosen, folder, n_seeds, pool, test, decided, len(together), leaks, look)
        look = end_look(project, look, result.test[result.metric].mean)
        result = dataclasses.replace(result, look=look, looks=looks_at(project, look))
        _write_table(folder, n_seeds, test)
        folder.submission.unlink(missing_ok=True)
        if submission:
            _write_submission(folder, test)
        _draw(record, folder, n_seeds, result, test)
        finished = {**result.to_dict(), "began_at": began_at, "ended_at": now()}
        finished |= {"pool_key": pool.key, "test_key": test.key}
        paths.write_json(folder.result, {**finished, "n_seeds": n_seeds, "runtime": plan.machine})
        paths.write_text(folder.card, model_card(record, folder.root.name))
        logger.info("final of trial %d: test %s %.4f", chosen.number, result.metric, result.test[result.metric].mean)
        if tracker is not None:
            say("delivering to MLflow")
            undelivered, error = close_view(ViewThread(tracker.view(record.paths)), stop)
            result = dataclasses.replace(result, undelivered=undelivered, tracking_error=error)
        return result


@dataclass(frozen=True)
class FoldNetworks:
    """For each fold a network that has not seen its held-out images, and maybe another of other seeds."""

    source: str
    """Which they are, for people."""
    weights: tuple[Path, ...]
    others: tuple[Path, ...]
    """Empty where there is one network a fold."""


def fold_networks(record: StudyRecord, number: int) -> FoldNetworks | None:
    """Those of a trial's second fits, or of its first where the second were not kept; None if neither were."""
    found = []
    for source, fit_of in (("second fits", record.second_fit), ("first fits", record.fit)):
        weights = tuple(fit_of(number, fold).paths.weights for fold in range(record.n_folds))
        finished = all(fit_of(number, fold).is_finished for fold in range(record.n_folds))
        if finished and all(path.is_file() for path in weights):
            found.append((source, weights))
    if not found:
        return None
    source, weights = found[0]
    return FoldNetworks(f"{source} of trial {number}", weights, found[1][1] if len(found) > 1 else ())


def _why_no_ensemble(record: StudyRecord, number: int) -> str:
    having = [trial.number for trial in record.full_trials() if fold_networks(record, trial.number) is not None]
    others = f"take --trial {' or '.join(map(str, having))}, or " if having else ""
    return (
        f"the networks of the folds of trial {number} were not kept, as they are for the best trials only: {others}"
        f"fit its folds again (`hpsearch export --toml FILE --trial {number}`, then `hpsearch train --config FILE "
        f"--folds {record.config.study.folds}`) and take the final of that study"
    )


def _choose(record: StudyRecord, number: int | None, cheapest_tied: bool) -> TrialRecord:
    if number is None:
        best = record.best()
        if best is None:
            raise StudyError(f"study {record.name!r} has no fully evaluated trial yet: run `hpsearch study` first")
        if cheapest_tied and (estimates := Estimates.of(record)) is not None:
            return record.trial(estimates.cheapest_tied(record))
        return best
    trial = record.known_trial(number)
    if not trial.can_win:
        what = {"full": "was changed by memory that ran out", None: "is still open"}.get(
            trial.outcome, f"ended as {trial.outcome}"
        )
        raise StudyError(
            f"trial {number} of study {record.name!r} {what}: only trials that were evaluated on all folds can be "
            "final"
        )
    configuration = record.configuration(trial.params)
    same = next(each for each in record.full_trials() if record.configuration(each.params) == configuration)
    if same.number != number:
        raise StudyError(
            f"trial {number} of study {record.name!r} is a copy of trial {same.number}, which stands for both: take "
            f"--trial {same.number}"
        )
    return trial


def _is_stored(folder: FinalPaths, pool: Prepared, test: Prepared, *, n_seeds: int, ensemble: bool) -> bool:
    """Whether the folder holds the whole result of these images, for so many seeds."""
    if not folder.result.is_file():
        return False
    table = paths.read_json(folder.result)
    wanted = {"pool_key": pool.key, "test_key": test.key, "n_seeds": n_seeds}
    if any(table.get(key) != value for key, value in wanted.items()):
        return False
    if (table.get("ensemble") is not None) != ensemble:
        return False
    files = [
        folder.model,
        folder.table,
        folder.official_counts,
        *(folder.seed(i).test_counts for i in range(n_seeds)),
    ]
    files += [folder.chosen_counts] if table.get("chosen_test") else []
    files += [folder.ensemble_counts, folder.ensemble_official_counts] if ensemble else []
    return all(path.is_file() for path in (*files, *(folder.masks / mask_name(image) for image in test.ids)))


def _members(folder: FinalPaths, networks: FoldNetworks | None) -> list[WeightsCopy]:
    """Return the networks of an ensemble and where they go; those of an earlier one are removed."""
    shutil.rmtree(folder.ensemble, ignore_errors=True)
    sources = networks.weights if networks is not None else ()
    return [WeightsCopy(source, folder.ensemble / f"fold{fold}.safetensors") for fold, source in enumerate(sources)]


def _score_job(trial: TrialRecord, fit: FitPaths, seen: Prepared, test: Prepared) -> ScoreJob:
    return ScoreJob(
        config=trial.study_config,
        weights=fit.weights,
        caches=_test_caches(seen, test),
        counts=fit.test_counts,
        examples=fit.examples,
    )


def _test_caches(seen: Prepared, test: Prepared) -> CachePaths:
    """Return the test images as the network sees them, and at the size at which they are scored."""
    return CachePaths(seen.cache_path, test.cache_path if seen.key != test.key else None)


def _select_job(
    record: StudyRecord,
    trial: TrialRecord,
    folder: FinalPaths,
    networks: FoldNetworks,
    caches: PoolCaches,
    *,
    ensemble: bool,
) -> SelectPostprocessingJob:
    others: tuple[Path | None, ...] = networks.others or (None,) * len(networks.weights)
    return SelectPostprocessingJob(
        config=trial.study_config,
        metric=record.config.study.metric,
        caches=CachePaths(*caches.paths(trial.study_config)),
        networks=tuple(
            FoldNetwork(weights, other, tuple(record.folds.held_out(fold).tolist()))
            for fold, (weights, other) in enumerate(zip(networks.weights, others, strict=True))
        ),
        source=networks.source,
        ensemble=ensemble,
        out=folder.choices,
    )


def _count_job(
    trial: TrialRecord, choices: Choices, weights: Sequence[Path], counts: Path, seen: Prepared, test: Prepared
) -> CountJob:
    return CountJob(
        config=trial.study_config,
        caches=_test_caches(seen, test),
        weights=tuple(weights),
        postprocessing=choices,
        counts=counts,
    )


def _samples(data: DataConfig, caches: Path, test: Prepared) -> tuple[ImageFiles, ...]:
    """Return the files of every test image, where they lie now: a cache outlives its dataset's folder."""
    samples = {sample.id: sample for sample in locate(data, caches).split("test")}
    return tuple(ImageFiles(image, samples[image].image, samples[image].mask) for image in test.ids)


def _official_job(
    weights: Sequence[Path], test: Prepared, images: tuple[ImageFiles, ...], masks: Path | None, counts: Path
) -> OfficialScoreJob:
    return OfficialScoreJob(weights=tuple(weights), reading=test.reading, images=images, masks=masks, counts=counts)


def _evaluate(
    record: StudyRecord,
    trial: TrialRecord,
    folder: FinalPaths,
    n_seeds: int,
    pool: Prepared,
    test: Prepared,
    chosen: Chosen | None,
    n_members: int,
    leaks: tuple[DuplicatePair, ...],
    look: Look,
) -> FinalResult:
    metric = record.config.study.metric
    estimates = Estimates.of(record)
    assert estimates is not None
    scores = {name: np.stack([_scores(folder.seed(index), name) for index in range(n_seeds)]) for name in SCORES}
    by_choices = _means(folder.chosen_counts) if chosen is not None and chosen.choices != Choices() else {}
    leaked = np.isin(np.array(test.ids), [name for pair in leaks for name in (pair.a, pair.b)])
    trials, looks = record.trials(), looks_at(record.paths.project, look)
    first = first_look_of(looks, record.name, trials[0].began_at) or look
    return FinalResult(
        study=record.name,
        trial=trial,
        paths=folder,
        metric=metric,
        cv=estimates.statistics[trial.number].total,
        cv_fold_std=estimates.statistics[trial.number].sd_folds,
        is_confirmed=trial.number in record.confirmed(),
        corrected=estimates.corrected if trial.number == estimates.winner else None,
        predicted=estimates.predicted(trial.number, n_test=test.n, n_runs=n_seeds),
        eval_size=record.config.eval_size,
        test={name: bootstrap_mean(values.mean(axis=0)) for name, values in scores.items()},
        per_seed={name: tuple(float(value) for value in values.mean(axis=1)) for name, values in scores.items()},
        official=_official(folder.official_counts, test),
        chosen=chosen,
        chosen_test=by_choices,
        ensemble=_ensemble(folder, test, metric, n_members, has_choices=bool(by_choices)) if n_members else None,
        look=look,
        looks=looks,
        n_looks_before=n_looks_before(looks, trials[0].began_at),
        n_trials_after=sum(each.began_at > first.at for each in trials),
        leaks=leaks,
        without_leaks=float(scores[metric].mean(axis=0)[~leaked].mean()) if leaks and not leaked.all() else None,
        against_default=estimates.gain(trial.number),
        winner=estimates.winner,
        winner_against_default=estimates.gain(estimates.winner),
        is_default=record.is_default(trial),
        n_test=test.n,
        n_pool=pool.n,
    )


def _leaks(data: DataConfig, root: Path, pool: Prepared, test: Prepared) -> tuple[DuplicatePair, ...]:
    """Duplicates and near-duplicates across pool and test. Found once per dataset: thousands take minutes."""
    known = root / f"near-duplicates-{pool.key}-{test.key}.json"
    if known.is_file():
        try:
            return tuple(DuplicatePair(**pair) for pair in paths.read_json(known)["across"])
        except (RecordError, KeyError, TypeError) as error:
            logger.warning("%s; looked for anew", error)
    logger.info("looking for near-duplicates across pool and test")
    pairs = find_in_dataset(data, root, with_test=True, role="final")
    across = tuple(pair for pair in pairs if pair.across and {pair.a, pair.b} & set(test.ids))
    paths.write_json(known, {"across": [dataclasses.asdict(pair) for pair in across]})
    return across


def _stored_look(project: ProjectPaths, folder: FinalPaths) -> Look | None:
    """Return the evaluation that the result in `folder` comes from; None without a result or an account of it."""
    return find_look(project, str(paths.read_json(folder.result).get("look"))) if folder.result.is_file() else None


def _begin_look(record: StudyRecord, trial: TrialRecord, test: Prepared) -> Look:
    project = record.paths.project
    return begin_look(
        project,
        TestImages.in_cache(test.cache_path),
        at=now(),
        study=record.name,
        study_began_at=record.trial(record.trial_numbers()[0]).began_at,
        trial=trial.number,
        folder=str(project.root.absolute()),
        metric=record.config.study.metric,
    )


def _ensemble(
    folder: FinalPaths, test: Prepared, metric: str, n_networks: int, *, has_choices: bool
) -> EnsembleResult:
    alone = folder.chosen_counts if has_choices else folder.seed(0).test_counts
    scores = [_score(load_array(path, ndim=2), metric) for path in (folder.ensemble_counts, alone)]
    return EnsembleResult(
        n_networks=n_networks,
        test=_means(folder.ensemble_counts),
        official=_official(folder.ensemble_official_counts, test),
        gain=paired_difference(*scores),
    )


def _means(counts: Path) -> dict[str, Interval]:
    """Every score's mean over the images of a file of counts."""
    table = load_array(counts, ndim=2)
    return {name: bootstrap_mean(_score(table, name)) for name in SCORES}


def _official(counts: Path, test: Prepared) -> dict[str, Interval]:
    table = score_table(test.ids, load_array(counts, ndim=2))
    return {name: bootstrap_mean(table[name].to_numpy(np.float64)) for name in COLUMNS}


def _score(counts: npt.NDArray[np.int64], name: str) -> npt.NDArray[np.float64]:
    return np.asarray(SCORES[name](PixelCounts.from_columns(counts)), np.float64)


def _scores(fit: FitPaths, name: str) -> npt.NDArray[np.float64]:
    return _score(load_array(fit.test_counts, ndim=2), name)


def _write_table(folder: FinalPaths, n_seeds: int, test: Prepared) -> None:
    """test.csv: every test image with its scores, means over the seeds, and the official ones of the model kept."""
    columns = {
        name: np.mean([_scores(folder.seed(index), name) for index in range(n_seeds)], axis=0) for name in SCORES
    }
    official = score_table(test.ids, load_array(folder.official_counts, ndim=2))
    columns |= {f"official_{name}": official[name].to_numpy(np.float64) for name in COLUMNS}
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerow(["image", *columns])
    for row, image in enumerate(test.ids):
        writer.writerow([image, *(f"{values[row]:.6f}" for values in columns.values())])
    paths.write_text(folder.table, text.getvalue())


def _write_submission(folder: FinalPaths, test: Prepared) -> None:
    pairs = ((image, read_mask(folder.masks / mask_name(image))) for image in test.ids)
    write_submission(folder.submission, pairs)


def _draw(record: StudyRecord, folder: FinalPaths, n_seeds: int, result: FinalResult, test: Prepared) -> None:
    """curves.png and panels.png."""
    from hpsearch.report import figures

    title = f"{result.study}, trial {result.trial.number}, retrained"
    curves = figures.draw_curves(trial_rows.final_curves(folder, n_seeds), title=title)
    cases = trial_rows.final_cases(record, folder, test.key)
    panels = figures.draw_panels(cases, metric=result.metric, title=f"{title}: test images")
    for path, figure in ((folder.curves, curves), (folder.panels, panels)):
        with paths.atomic_write(path) as temporary:
            temporary.write_bytes(figures.to_png(figure))
