"""Run a study: prepare the data, measure the machine, search, and keep MLflow and Optuna's database up to date."""

import dataclasses
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from hpsearch import paths
from hpsearch.config import StudyConfig
from hpsearch.data import duplicates
from hpsearch.data import folds as fold_making
from hpsearch.data.prepare import PoolCaches, cache_root, count_pool
from hpsearch.errors import CacheError, StorageError, StudyChangedError
from hpsearch.paths import ProjectPaths, StudyPaths
from hpsearch.search.autotune import MachineChoice, first_workers, make_plan
from hpsearch.search.callbacks import NullCallback, StudyCallback
from hpsearch.search.coordinator import Coordinator
from hpsearch.search.new_trials import enqueue
from hpsearch.search.optuna_view import OptunaView
from hpsearch.search.status import forecast
from hpsearch.search.stopping import Stop
from hpsearch.store import lock
from hpsearch.store.record import StudyRecord
from hpsearch.store.trials import count_trials
from hpsearch.views import Tracker, View, ViewThread
from hpsearch.workers import plan as plans
from hpsearch.workers.loop import run
from hpsearch.workers.plan import ExecutionPlan

logger = logging.getLogger(__name__)

SPARE_BYTES = 16 * 2**20
"""Disk space that is reserved for the scores, figures and databases of a study."""
LAST_UPDATE_S = 180.0
URGENT_UPDATE_S = 5.0
"""Maximum time without progress, in seconds, that a study waits for its views before it ends. `URGENT_UPDATE_S`
applies if it must end at once."""


@dataclass(frozen=True)
class StudySummary:
    """Result returned by `run_study`."""

    record: StudyRecord
    """Record of the study: trials, scores, folds."""
    n_counted: int
    """Number of trials that count toward `study.trials`, over all starts of the study."""
    stopped: bool
    """Whether the study was asked to stop before it was finished."""
    undelivered: int
    """Number of incomplete MLflow runs. The missing data is in the study folder."""
    tracking_error: str = ""
    """Reason why MLflow is not up to date; empty if it is up to date."""


def run_study(
    project: ProjectPaths,
    name: str,
    config: StudyConfig,
    *,
    machine: MachineChoice | None = None,
    tracker: Tracker | None = None,
    callback: StudyCallback | None = None,
    stop: Stop | None = None,
    hours: float | None = None,
    enqueued: Sequence[Mapping[str, Any]] = (),
    storage: str | None = None,
) -> StudySummary:
    """Start or continue the study `name` until `config.study.trials` trials are evaluated, over all starts.

    `machine` chooses device, workers and threads. `tracker` copies the results to MLflow. `callback` receives events,
    and `stop` collects requests to stop. After `hours`, the study stops and keeps its checkpoints. `enqueued`
    contains params to try next. Each of them is tried only once over all starts. `storage` is the SQLAlchemy URL of
    Optuna's database, by default `hpsearch.db` in the project folder.

    Raises ConfigError if `storage` is invalid, StudyLockedError if another process runs the study, StudyChangedError
    if settings differ that must not change, DatasetError if the data cannot be used, StorageError if a file cannot be
    written, and WorkerError if workers cannot start.
    """
    config = config.absolute()
    study = project.study(name)
    callback, stop, machine = callback or NullCallback(), stop or Stop(), machine or MachineChoice()
    views: list[View] = [OptunaView(study, storage), *([tracker.view(study)] if tracker is not None else [])]
    if hours is not None:
        stop.limit(hours)

    def check() -> None:
        stop.check("stopped while it was starting; run the same command again to continue")

    with (
        paths.refusals_named(study.root),
        lock.hold(study),
        lock.log_file(study.log),
        machine.open_pool(study, begun := _open_record(study, config), check, callback.message) as pool,
    ):
        for request in (study.stop_request, *study.root.glob("stop-trial-*")):
            request.unlink(missing_ok=True)
        stop.epoch_left_s = pool.epoch_left_s
        # Workers import torch while the images are checked.
        pool.resize(first_workers(begun, machine, pool))
        caches = _prepare(project, config, callback, check)
        record = _require_same_images(study, begun, config, caches, callback)
        # Update the settings only now, so that a folder with other images is never stored as the study's.
        record.update_config(config)
        for text in enqueue(record, enqueued):
            callback.message(f"the configuration {text}")
        if not study.plan.is_file():
            callback.message(f"measuring how fast {'the cluster' if machine.cluster else 'this machine'} trains")
        plan = make_plan(record, caches, machine, pool, check)
        _require_space(record, plan)
        pool.resize(plan.workers)
        with _kept_up_to_date(views, stop, callback.message) as threads:

            def wake_views() -> None:
                for thread in threads:
                    thread.wake()

            coordinator = Coordinator(record, pool, plan, caches, callback, stop, wake_views)
            callback.planned(record, plan, forecast(record, plan, len(caches.scored.index)))
            try:
                coordinator.resume()
                run(pool, coordinator)
            finally:
                pool.close()
        if stop.is_requested:
            logger.info("stopped; run the same command to continue")
        # Workers that were killed while writing may have left temporary files behind.
        paths.remove_stale_temporaries(study.root)
        n_behind, error = (threads[1].n_left, threads[1].error) if tracker is not None else (0, "")
        return StudySummary(record, count_trials(coordinator.trials.values()), stop.is_requested, n_behind, error)


def close_view(view: ViewThread, stop: Stop) -> int:
    """Update a view one last time and end its thread. Return the number of recorded items that the view lacks."""
    # A process that must end at once does not wait long for an unresponsive server.
    if stop.is_urgent:
        return view.close(URGENT_UPDATE_S)
    return view.close(LAST_UPDATE_S, lambda: stop.is_urgent)


@contextmanager
def _kept_up_to_date(views: Sequence[View], stop: Stop, say: Callable[[str], None]) -> Iterator[list[ViewThread]]:
    """Keep Optuna's database, the first of `views`, and MLflow up to date in the background during the block."""
    threads = [ViewThread(view) for view in views]
    try:
        yield threads
    finally:
        for thread in threads:
            close_view(thread, stop)
        if error := threads[0].error:
            text = f"Optuna's database is not up to date: {error}"
            logger.warning("%s", text)
            say(f"{text}. Update it with `hpsearch track` (and the same --storage)")


def _open_record(study: StudyPaths, config: StudyConfig) -> StudyRecord | None:
    """Return the verified record of an existing study; None if the study is new.

    Raises DatasetError, before any image is decoded, if the groups are invalid or if there are too few images or
    groups for the number of folds.
    """
    if study.toml.is_file():
        record = StudyRecord.open(study)
        record.verify()
        record.check_config(config)
        record.forget_workers()
        return record
    groups, n_folds = fold_making.load_groups(config.data), config.study.folds
    n_images = count_pool(config.data, cache_root(study.project, config))
    # If there are no images, decoding reports the reason.
    if n_folds != "fixed" and n_images:
        fold_making.require_enough(n_images, n_folds, "images with a mask")
        if groups is not None:
            fold_making.require_enough(len(set(groups.values())), n_folds, "groups")
    return None


def _prepare(
    project: ProjectPaths, config: StudyConfig, callback: StudyCallback, check: Callable[[], None]
) -> PoolCaches:
    """Return the caches of the pool, after decoding the images that are not in them yet."""

    def decoded(done: int, total: int) -> None:
        check()
        callback.preparing(done, total)

    try:
        caches = PoolCaches(config, cache_root(project, config), progress=decoded)
        caches.prepare_listed(config)
    except CacheError:
        # The cause may be a stop signal that also ended the decoding process. `check` then raises StoppedError.
        check()
        raise
    callback.prepared(dataclasses.replace(caches.scored, notes=tuple(caches.notes)))
    for note in caches.notes:
        logger.info("data: %s", note)
    return caches


def _require_same_images(
    study: StudyPaths, record: StudyRecord | None, config: StudyConfig, caches: PoolCaches, callback: StudyCallback
) -> StudyRecord:
    """Start a new study, or check that the images have not changed since the study's folds were made."""
    pool = caches.scored.index
    if record is None or not study.folds.is_file():
        pairs = None
        if config.data.group_duplicates:
            found = duplicates.find_in_dataset(config.data, cache_root(study.project, config), with_test=False)
            logger.info("%d near-duplicate pairs are kept in one fold each", len(found))
            pairs = [(pair.a, pair.b) for pair in found]
        folds = fold_making.make_folds(
            pool.ids,
            [sample.split for sample in pool.samples],
            [stats.image_sha256 for stats in pool.stats],
            folds=config.study.folds,
            seed=config.study.seed,
            groups=fold_making.load_groups(config.data),
            duplicates=pairs,
        )
        for note in fold_making.lesion_notes(folds, [each.view_foreground > 0 for each in pool.stats]):
            callback.message(f"note: {note}")
        # Create the study only now, so that a first start that fails because of its data leaves no study behind.
        record = record or StudyRecord.create(study, config)
        record.write_folds(folds, pool.key)
    if record.folds.ids != pool.ids or record.data_key() != pool.key:
        before, after = set(record.folds.ids), set(pool.ids)
        what = f"{len(before - after)} are missing, {len(after - before)} are new" if before != after else "content"
        raise StudyChangedError(
            f"the images in {config.data.images or config.data.root} differ from those with which study "
            f"{record.name!r} was started ({what}): restore the old ones, or start another study with --study NAME"
        )
    return record


def _require_space(record: StudyRecord, plan: ExecutionPlan) -> None:
    """Raise StorageError if the disk has less free space than the rest of the study may need."""
    root, n_left = record.paths.root, record.config.study.trials - count_trials(record.trials())
    there = sum(
        path.stat().st_size for path in root.glob("trials/*/fold*/*.*") if path.suffix in (".pt", ".safetensors")
    )
    needed = plans.disk_bytes(record.config, record.n_folds, len(plan.workers)) + SPARE_BYTES - there
    free = paths.free_bytes(root)
    if n_left > 0 and free < needed:
        raise StorageError(
            f"{root} has {free / 2**20:.0f} MiB free, but the study may need {needed / 2**20:.0f} MiB more for "
            "weights and checkpoints: free some space, or choose another folder with --out"
        )
