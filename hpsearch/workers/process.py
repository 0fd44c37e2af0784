"""A worker process: trains one fit at a time and knows neither Optuna nor MLflow.

Started as `python -m hpsearch.workers.process SOCKET SETTINGS`. It reads jobs as JSON, answers with events and
writes a checkpoint after each epoch, so it may be killed at any time. It ends when its socket closes, because then
its coordinator is gone.
"""

from __future__ import annotations

import ctypes
import json
import logging
import os
import queue
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import psutil
import torch

from hpsearch.config import StudyConfig, from_dict
from hpsearch.data.batches import DeviceData
from hpsearch.data.cache import Cache, Normalization, open_cache
from hpsearch.data.decode import read_pair
from hpsearch.data.reading import Reading
from hpsearch.errors import DivergedError, HpsearchError, OutOfMemoryError, StorageError
from hpsearch.inference.postprocessing import Choices
from hpsearch.models.costs import why_impossible
from hpsearch.paths import FitPaths, atomic_write
from hpsearch.training import runtime
from hpsearch.training.checkpoint import load_weights, save_array
from hpsearch.training.evaluation import evaluate
from hpsearch.training.finish import finish_fit, save_examples
from hpsearch.training.loop import (
    FitResult,
    OnEpoch,
    fit,
    microbatches_are_exact,
    part_sizes,
)
from hpsearch.training.metrics import SCORES, PixelCounts
from hpsearch.training.rows import EpochRow
from hpsearch.training.runtime import Runtime
from hpsearch.workers.plan import image_flops

logger = logging.getLogger(__name__)

MEASURE_BUDGET_S = 0.5
"""Seconds after which a measured configuration needs no further step."""

Send = Callable[[dict[str, Any]], None]
Hear = Callable[[], dict[str, Any]]


def main() -> None:
    """Serve jobs until the socket closes."""
    logging.basicConfig(format="%(asctime)s %(levelname)s %(name)s: %(message)s", level=logging.INFO)
    connection = Connection(int(sys.argv[1]))
    settings = json.loads(sys.argv[2])
    for name in (signal.SIGINT, signal.SIGHUP):
        signal.signal(name, signal.SIG_IGN)
    _end_with_parent()
    messages = _listen(connection)

    def send(message: dict[str, Any]) -> None:
        try:
            connection.send_bytes(json.dumps(message).encode())
        except OSError:
            os._exit(0)

    session = Session(settings["device"], settings["threads"], send, messages.get)
    send({"event": "ready"})
    while True:
        session.do(messages.get())


class Session:
    """What a worker keeps from job to job: the device and the images on it."""

    def __init__(self, device: str, threads: int, send: Send, hear: Hear) -> None:
        self._device = device
        self._threads = threads
        self._send = send
        self._hear = hear
        self._data: dict[tuple[str, ...], DeviceData] = {}
        self._caches: dict[str, Cache] = {}

    def do(self, job: dict[str, Any]) -> None:
        """Do one job and send how it ended: never an exception, unless the coordinator is gone."""
        jobs = {
            "fit": self._fit,
            "measure": self._measure,
            "rate": self._rate,
            "score": self._score,
            "official": self._official,
            "choose": self._choose,
            "keep": self._keep,
            "count": self._count,
        }
        try:
            message = jobs[job["job"]](job)
        except DivergedError as error:
            message = {"event": "diverged", "epoch": error.epoch, "text": str(error)}
        except OutOfMemoryError as error:
            message = {"event": "out_of_memory", "text": str(error)}
            self._data.clear()
        except Exception as error:
            known = isinstance(error, HpsearchError)
            text = str(error) if known else f"{type(error).__name__}: {error}"
            message = {
                "event": "error",
                "text": text,
                "is_storage": isinstance(error, StorageError),
                "is_known": known,
                "traceback": "" if known else traceback.format_exc(),
            }
        self._send(message)

    def _fit(self, job: dict[str, Any]) -> dict[str, Any]:
        config = from_dict(job["config"])
        folder = FitPaths(Path(job["folder"]))
        folder.root.mkdir(parents=True, exist_ok=True)
        train, held_out = _indices(job["train"]), _indices(job["held_out"])
        data = self._device_data(job, config)
        normalization = data.cache.normalization(train, config.data.color)
        size = config.data.height, config.data.width

        def fit_in_parts(micro_batch: int | None) -> FitResult:
            return fit(
                model_config=config.unet,
                in_channels=config.data.n_channels,
                data=data,
                train_indices=train,
                held_out_indices=held_out,
                train=config.train,
                augment=config.augment,
                normalization=normalization,
                size=size,
                eval_size=config.eval_size,
                stretch=not config.sees_windows,
                metric=config.study.metric,
                seed=job["seed"],
                runtime=self._runtime(config),
                paths=folder,
                keep_best=job["keep_best"],
                micro_batch=micro_batch,
                on_epoch=self._report_epoch,
            )

        result, micro_batch = fit_within_memory(fit_in_parts, config, folder)
        if result.stopped:
            return {"event": "stopped"}
        summary = finish_fit(
            result,
            folder,
            data=data,
            held_out_indices=held_out,
            normalization=normalization,
            size=size,
            runtime=self._runtime(config),
            extra={
                "threshold": 0.5,
                "color": config.data.color,
                "match": config.data.match,
                "reading": data.cache.index.preparation.reading.for_images(),
                **_frame(config),
            },
            micro_batch=micro_batch,
        )
        return {"event": "finished", "summary": summary}

    def _report_epoch(self, row: EpochRow, scores: npt.NDArray[np.float32]) -> Literal["go", "stop"]:
        self._send({"event": "epoch", "row": row.to_dict()})
        return "go" if self._hear()["go"] else "stop"

    def _score(self, job: dict[str, Any]) -> dict[str, Any]:
        """Per-image counts of a finished fit's weights on all images of a cache, and a few examples."""
        config = from_dict(job["config"])
        chosen = self._runtime(config)
        model, info = load_weights(Path(job["weights"]), chosen.device)
        data = self._device_data(job, config)
        images = np.arange(len(data), dtype=np.int64)
        found = evaluate(model, data, images, normalization=info.normalization, size=info.size, runtime=chosen)
        save_array(Path(job["counts"]), found.counts)
        scores = SCORES[config.study.metric](PixelCounts.from_columns(found.counts))
        save_examples(
            Path(job["examples"]),
            model,
            data,
            images,
            np.asarray(scores, np.float32),
            normalization=info.normalization,
            size=info.size,
            runtime=chosen,
        )
        return {"event": "finished", "summary": {"n_images": len(images)}}

    def _official(self, job: dict[str, Any]) -> dict[str, Any]:
        """Masks of images at their own resolution, written, and their counts against the true masks."""
        # They bring pandas along, which no other job needs.
        from hpsearch.inference.predictor import Ensemble
        from hpsearch.inference.scoring import count_mask, encode_mask, mask_name

        predictor = Ensemble.load([Path(path) for path in job["weights"]], device=self._device, threads=self._threads)
        folder, reading = Path(job["masks"]), Reading.from_table(job["reading"])
        counts = []
        for name, image_path, mask_path in job["samples"]:
            image, mask = read_pair(Path(image_path), Path(mask_path), reading)
            pred = predictor.mask(predictor.logits(image))
            counts.append(count_mask(pred, mask.numpy() > 0, name=name))
            if job["masks"]:
                with atomic_write(folder / mask_name(name)) as temporary:
                    temporary.write_bytes(encode_mask(pred))
            # Before the next is decoded: one image alone may take hundreds of megabytes.
            del image, mask, pred
        save_array(Path(job["counts"]), np.array(counts, np.int64))
        return {"event": "finished", "summary": {"n_images": len(counts)}}

    def _choose(self, job: dict[str, Any]) -> dict[str, Any]:
        """Threshold, flips, cleaning and ensemble by out-of-fold predictions."""
        from hpsearch.inference import select_postprocessing as choosing

        config = from_dict(job["config"])
        with (chosen := self._runtime(config)).active():
            choosing.choose(job, self._device_data(job, config), chosen)
        return {"event": "finished", "summary": {}}

    def _keep(self, job: dict[str, Any]) -> dict[str, Any]:
        """Copies of weights that know the choices made for them."""
        from hpsearch.inference import select_postprocessing as choosing

        for source, target in job["copies"]:
            choosing.keep_model(Path(source), Path(target), Choices.from_table(job["choices"]))
        return {"event": "finished", "summary": {}}

    def _count(self, job: dict[str, Any]) -> dict[str, Any]:
        """Per-image counts by one network, or several together, under choices."""
        from hpsearch.inference import select_postprocessing as choosing

        config = from_dict(job["config"])
        with (chosen := self._runtime(config)).active():
            choosing.count_by(
                job,
                self._device_data(job, config),
                chosen,
                Choices.from_table(job["choices"]),
                [Path(path) for path in job["weights"]],
            )
        return {"event": "finished", "summary": {}}

    def _measure(self, job: dict[str, Any]) -> dict[str, Any]:
        """Seconds of an image at each configuration, and what the machine is."""
        chosen = self._runtime(from_dict(job["config"]), job["threads"])
        steps = []
        for step in job["steps"]:
            config = from_dict(step["config"])
            try:
                train_s, eval_s = self._measure_step({**step, "threads": job["threads"]}, config)
            except OutOfMemoryError as error:
                # A search may well know networks that are too large; in the study they end as infeasible.
                logger.info("not measured: %s", error)
                continue
            steps.append({"flops": image_flops(config), "train_s": train_s, "eval_s": eval_s})
        memory = psutil.virtual_memory().available
        if chosen.device.type == "cuda":
            memory = torch.cuda.mem_get_info(chosen.device)[0]
        return {
            "event": "finished",
            "device": chosen.device.type,
            "n_devices": torch.cuda.device_count() if chosen.device.type == "cuda" else 1,
            "precision": chosen.precision,
            "memory_bytes": memory,
            "steps": steps,
            "machine": runtime.describe(chosen),
        }

    def _measure_step(self, job: dict[str, Any], config: StudyConfig) -> tuple[float, float]:
        """Seconds of an image in training and in evaluation."""
        data = self._device_data(job, config)
        # One image first: at full size on a CPU even that takes seconds, and then it has to do.
        alone = self._time_batch(config, data, 1, job["threads"])
        if alone[0] > MEASURE_BUDGET_S or len(data) < config.train.batch_size:
            return alone
        try:
            return self._time_batch(config, data, config.train.batch_size, job["threads"])
        except OutOfMemoryError:
            return alone

    def _time_batch(self, config: StudyConfig, data: DeviceData, n_images: int, threads: int) -> tuple[float, float]:
        """Seconds of an image in batches of `n_images`: the best of at least two steps after the first."""
        seconds: list[tuple[float, float]] = []
        began = time.perf_counter()

        def stop_in_time(row: EpochRow, _: object) -> Literal["go", "stop"]:
            seconds.append((row.train_s, row.eval_s))
            return "stop" if len(seconds) > 2 and time.perf_counter() - began > MEASURE_BUDGET_S else "go"

        self._step_repeatedly(config, data, n_images, threads, stop_in_time, max_steps=8)
        return min(each[0] for each in seconds[1:]) / n_images, min(each[1] for each in seconds[1:]) / n_images

    def _rate(self, job: dict[str, Any]) -> dict[str, Any]:
        """Images a second of training between two instants, and the seconds of the fastest step.

        Steps that ended between `begin` and `end` (Unix times) count, and later ones until there are two.
        """
        config = from_dict(job["config"])
        data = self._device_data(job, config)
        n_images = min(config.train.batch_size, len(data))
        ends: list[float] = []
        seconds: list[float] = []

        def watch(row: EpochRow, _: object) -> Literal["go", "stop"]:
            seconds.append(row.train_s)
            if row.time >= job["begin"] and (row.time <= job["end"] or len(ends) < 2):
                ends.append(row.time)
            return "stop" if len(ends) > 1 and row.time > job["end"] else "go"

        self._step_repeatedly(config, data, n_images, job["threads"], watch, max_steps=100_000)
        rate = n_images * (len(ends) - 1) / max(ends[-1] - ends[0], 1e-3)
        return {"event": "finished", "images_per_s": rate, "step_s": min(seconds)}

    def _step_repeatedly(
        self,
        config: StudyConfig,
        data: DeviceData,
        n_images: int,
        threads: int,
        on_epoch: OnEpoch,
        *,
        max_steps: int,
    ) -> None:
        """Fit `config` to the first `n_images` in one batch, again and again, until `on_epoch` stops it."""
        changes: dict[str, Any] = {
            "train.batch_size": n_images,
            "train.epochs": max_steps,
            "train.compile": "off",
            # What diverges in training must not do so here: only the time is wanted.
            "train.lr": 1e-9,
        }
        if n_images == 1 and config.unet.norm in ("batch", "instance"):
            # Their statistics need more than one value a channel.
            changes["unet.norm"] = "group"
        config = config.with_params(changes)
        images = np.arange(n_images, dtype=np.int64)
        fit(
            model_config=config.unet,
            in_channels=config.data.n_channels,
            data=data,
            train_indices=images,
            held_out_indices=images,
            train=config.train,
            augment=config.augment,
            normalization=Normalization((0.5,) * config.data.n_channels, (0.25,) * config.data.n_channels),
            size=(config.data.height, config.data.width),
            eval_size=config.eval_size,
            stretch=not config.sees_windows,
            metric=config.study.metric,
            seed=0,
            runtime=self._runtime(config, threads),
            on_epoch=on_epoch,
        )

    def _runtime(self, config: StudyConfig, threads: int = 0) -> Runtime:
        """How the worker computes; with other `threads` than its own only to measure."""
        return runtime.make_runtime(
            self._device, amp=config.train.amp, compile=config.train.compile, threads=threads or self._threads
        )

    def _device_data(self, job: dict[str, Any], config: StudyConfig) -> DeviceData:
        key = (job["cache"], job.get("truth") or "", config.data.color)
        if key not in self._data:
            # Another size or colour is another copy of the images on the device: keep one.
            self._data.clear()
            self._caches = {path: cache for path, cache in self._caches.items() if path in key}
            self._data[key] = DeviceData(
                self._cache(job["cache"]),
                runtime.choose_device(self._device),
                color=config.data.color,
                truth=self._cache(job["truth"]) if job.get("truth") else None,
            )
        return self._data[key]

    def _cache(self, path: str) -> Cache:
        if path not in self._caches:
            self._caches[path] = open_cache(Path(path))
        return self._caches[path]


def fit_within_memory(
    fit_in_parts: Callable[[int | None], FitResult], config: StudyConfig, folder: FitPaths
) -> tuple[FitResult, int | None]:
    """A fit by whole batches, or by the largest halves of halves that fit; and how many images at once, None: all.

    Parts are taken where the result is the same, or where `study.allow_microbatch` allows another one and they are
    not too small for batch normalisation. Otherwise the OutOfMemoryError is the caller's.
    """
    is_exact = microbatches_are_exact(config.unet)
    micro_batch: int | None = None
    while True:
        try:
            return fit_in_parts(micro_batch), micro_batch
        except OutOfMemoryError as error:
            n_images = micro_batch or config.train.batch_size
            if n_images == 1 or not (is_exact or config.study.allow_microbatch):
                raise
            micro_batch = n_images // 2
            smallest = min(part_sizes(config.train.batch_size, micro_batch))
            size = config.data.height, config.data.width
            if why_impossible(config.unet, config.data.n_channels, *size, batch_size=smallest):
                raise
            logger.warning("%s; going on by parts of %d images", error, micro_batch)
        if not is_exact:
            # What was trained with other parts is another fit.
            for path in (folder.last, folder.previous, folder.best, folder.epochs, folder.scores):
                path.unlink(missing_ok=True)


def _frame(config: StudyConfig) -> dict[str, Any]:
    """The size of the whole frames from which fresh crops were taken, where it is another than their own."""
    is_frame = config.augment.crop and config.data.match == "resize"
    return {"frame": list(config.data.cached_size)} if is_frame else {}


def _indices(values: list[int]) -> npt.NDArray[np.int64]:
    return np.asarray(values, dtype=np.int64)


def _end_with_parent() -> None:
    """Have the system kill this process when the coordinator dies, also while it is stopped and can hear nothing."""
    if sys.platform == "linux":
        pr_set_pdeathsig = 1
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)


def _listen(connection: Connection) -> queue.Queue[dict[str, Any]]:
    """Messages of the coordinator in order, read by a thread of its own, so that its end is noticed at once."""
    messages: queue.Queue[dict[str, Any]] = queue.Queue()

    def read() -> None:
        while True:
            try:
                messages.put(json.loads(connection.recv_bytes()))
            except (EOFError, OSError):
                # Whatever was being done is on disk up to the last epoch.
                os._exit(0)

    threading.Thread(target=read, daemon=True).start()
    return messages


if __name__ == "__main__":
    main()
