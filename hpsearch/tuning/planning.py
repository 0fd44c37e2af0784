"""Makes a study's execution plan: devices, workers and threads, by what the user wants and what a worker measures."""

from __future__ import annotations

import dataclasses
import logging
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from hpsearch import plan as plans
from hpsearch.config import StudyConfig
from hpsearch.cores import available_cores
from hpsearch.data.config import DataConfig
from hpsearch.data.sample import draw_sample
from hpsearch.errors import ConfigError, RecordError
from hpsearch.paths import ProjectPaths
from hpsearch.plan import MEMORY_SHARE, ExecutionPlan
from hpsearch.tuning.caches import PoolCaches
from hpsearch.tuning.record import StudyRecord
from hpsearch.tuning.workers import Workers, WorkerSettings, do, do_each

logger = logging.getLogger(__name__)

MOST_SHARING = 4
"""Workers that may share a device: the more there are, the less a trial has learnt from those before it."""
WORTH_SHARING = 1.15
"""How many times the images a second more workers must make: with one, a search is repeatable to the byte."""
SHARING_STEP_S = 1.0
"""A step that takes one thread longer fills a device by itself; and to measure it would hold up the search."""
MOST_DRAWN = 64
"""Images that are drawn to measure by, at most; larger batches are measured by smaller ones."""
WINDOW_S = 0.6
"""Seconds, at least, in which workers that share a device are watched."""


@dataclass(frozen=True)
class MachineChoice:
    """What the user wants of the machine; what is left open is measured or found out."""

    device: str = "auto"
    n_workers: int = 0
    """0: as many for each GPU, or for the CPU, as were measured to train most images a second."""
    threads: int = 0
    """Threads a worker; 0: all cores, shared among the workers. Given without `n_workers`: one a device."""


def first_workers(record: StudyRecord | None, choice: MachineChoice) -> tuple[WorkerSettings, ...]:
    """The workers that `make_plan` will want first, to be started while there is other work: they import torch."""
    plan = _stored_plan(record, choice) if record is not None else None
    if plan is not None:
        return plan.workers
    cores = available_cores()
    if choice.n_workers or choice.threads:
        return (WorkerSettings(choice.device, choice.threads or max(1, cores // max(1, choice.n_workers))),)
    # The first keeps its threads if it stays alone.
    most = _counts(cores)[-1]
    return (WorkerSettings(choice.device, cores), *[WorkerSettings(choice.device, cores // most)] * (most - 1))


def make_plan(
    record: StudyRecord,
    caches: PoolCaches,
    choice: MachineChoice,
    workers: Workers,
    check: Callable[[], None] = lambda: None,
) -> ExecutionPlan:
    """The stored plan, or one that is measured now; what the user asks for explicitly overrides either.

    `check` is called again and again meanwhile, and ends it by raising.
    """
    plan = _stored_plan(record, choice)
    if plan is None:
        plan = _measure_plan(record, caches, choice, workers, check)
    if plan.to_dict() != record.plan():
        record.write_plan(plan.to_dict())
    return plan


def measure_drawn(config: StudyConfig, choice: MachineChoice) -> ExecutionPlan:
    """The plan that a study of `config` would have here, measured on drawn images; nothing of it is kept."""
    batch_sizes = [each.train.batch_size for each in plans.measured_configs(config)]
    if not batch_sizes:
        raise ConfigError("no configuration of this search can exist at this size, so there is no step to measure")
    with tempfile.TemporaryDirectory(prefix="hpsearch-") as name, Workers(Path(name)) as workers:
        folder = Path(name)
        draw_sample(folder / "drawn", n_train=min(MOST_DRAWN, max(batch_sizes)), n_val=1, n_test=1)
        # Of the data only what decides how large the images are.
        kept = ("size", "color", "match", "cache_size")
        data = DataConfig(root=str(folder / "drawn"), **{name: getattr(config.data, name) for name in kept})
        drawn = dataclasses.replace(config, data=data)
        workers.become(first_workers(None, choice))
        caches = PoolCaches(drawn, folder / "cache")
        return make_plan(StudyRecord.create(ProjectPaths(folder).study("drawn"), drawn), caches, choice, workers)


def _stored_plan(record: StudyRecord, choice: MachineChoice) -> ExecutionPlan | None:
    """The plan on record as `choice` changes it; None if there is none, or only one for another kind of device."""
    try:
        stored = record.plan()
        plan = ExecutionPlan.from_dict(stored) if stored is not None else None
    except (RecordError, KeyError, TypeError, ValueError, AttributeError) as error:
        raise RecordError(f"{record.paths.plan} is damaged ({error}): delete it, and it is measured anew") from error
    if plan is None:
        return None
    wanted = choice.device.partition(":")[0]
    if wanted not in ("auto", plan.device):
        logger.info("the study moves from %s to %s", plan.device, wanted)
        return None
    if choice.n_workers or choice.threads:
        settings = _share_out(plan.device, choice, len({worker.device for worker in plan.workers}))
        plan = dataclasses.replace(plan, workers=settings)
    return plan


def _measure_plan(
    record: StudyRecord, caches: PoolCaches, choice: MachineChoice, workers: Workers, check: Callable[[], None]
) -> ExecutionPlan:
    first = first_workers(None, choice)
    # The workers that measure are the first of those that train: they have torch loaded and the images open.
    workers.become(first)
    threads = first[0].threads
    configs = plans.measured_configs(record.config)
    sharing = 1
    rates: dict[int, float] = {}
    if configs and not choice.n_workers and not choice.threads:
        rates = _sharing_rates({"config": configs[0].to_dict(), **caches.job(configs[0])}, workers, check)
        sharing = choose_sharing(rates)
        threads = max(1, available_cores() // sharing)
    job = {
        "job": "measure",
        "config": record.config.with_params({}).to_dict(),
        "threads": threads,
        "steps": [{"config": config.to_dict(), **caches.job(config)} for config in configs],
    }
    message = do(workers, job, check=check)
    assert message is not None
    device = message["device"]
    found = choice.device if ":" in choice.device else device
    n_devices = 1 if ":" in found else message["n_devices"]
    plan = ExecutionPlan(
        device=device,
        precision=message["precision"],
        workers=_share_out(found, choice, n_devices),
        memory_bytes=message["memory_bytes"] // max(1, choice.n_workers // n_devices),
        steps=tuple(plans.MeasuredStep(**step) for step in message["steps"]),
        machine=message["machine"],
    )
    while sharing > 1:
        shared = dataclasses.replace(
            plan,
            workers=_share_out(found, dataclasses.replace(choice, n_workers=sharing * n_devices), n_devices),
            memory_bytes=plan.memory_bytes // sharing,
        )
        # All that the search may suggest shall still fit, as far as it fits the device at all.
        if all(_fits(config, shared) or not _fits(config, plan) for config in configs):
            plan = shared
            break
        sharing //= 2
    for worker in workers:
        # What was told `auto` has found its device.
        workers.settle(plan.workers[0].device, worker)
    if rates:
        measured = ", ".join(f"{n} x {max(1, available_cores() // n)}: {rate:.1f}" for n, rate in rates.items())
        logger.info("images a second by workers x threads on a device: %s", measured)
        plan = dataclasses.replace(plan, machine={**plan.machine, "images_per_s": measured})
    return plan


def choose_sharing(rates: dict[int, float]) -> int:
    """How many workers shall share a device, given the images a second that so many make together."""
    chosen = min(rates, default=1)
    for n in sorted(rates):
        if rates[n] >= WORTH_SHARING * rates[chosen]:
            chosen = n
    return chosen


def _counts(cores: int) -> list[int]:
    """How many workers might share a device."""
    return [n for n in (1, 2, 4) if n <= min(cores, MOST_SHARING)]


def _sharing_rates(step: dict[str, object], workers: Workers, check: Callable[[], None]) -> dict[int, float]:
    """Images a second that 1, 2, ... workers make of one configuration on one device, in all; empty if unknown.

    They are watched in the same window of time, so that what they take from each other counts, and what other
    programs take from threads that wait for each other.
    """
    cores = available_cores()
    counts = _counts(cores)
    job = {"job": "rate", **step}
    first = do_each(workers, [{**job, "threads": 1, "begin": 0.0, "end": 0.0}] * counts[-1], check=check)
    if first is None or max(float(message["step_s"]) for message in first) > SHARING_STEP_S:
        return {}
    window_s = max(WINDOW_S, 6 * max(float(message["step_s"]) for message in first))
    rates = {}
    for n in counts:
        begin = time.time() + 0.2
        window = {"threads": cores // n, "begin": begin, "end": begin + window_s}
        messages: Sequence[dict[str, object]] | None = do_each(workers, [{**job, **window}] * n, check=check)
        if messages is not None:
            rates[n] = sum(float(str(message["images_per_s"])) for message in messages)
    return rates


def _fits(config: StudyConfig, plan: ExecutionPlan) -> bool:
    return plans.predicted_bytes(config, plan) <= plan.memory_bytes * MEMORY_SHARE


def _share_out(device: str, choice: MachineChoice, n_devices: int) -> tuple[WorkerSettings, ...]:
    """A worker for each device, or as many as wanted, taking turns on the devices; the cores shared among them."""
    kind, _, index = device.partition(":")
    n_workers = choice.n_workers or (n_devices if kind == "cuda" and not index else 1)
    threads = choice.threads or max(1, available_cores() // n_workers)
    names = [device] if kind != "cuda" or index else [f"cuda:{number}" for number in range(n_devices)]
    return tuple(WorkerSettings(names[number % len(names)], threads) for number in range(n_workers))
