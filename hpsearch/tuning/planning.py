"""Makes a study's execution plan: devices, workers and threads, by what the user wants and what a worker measures."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable
from dataclasses import dataclass

from hpsearch import plan as plans
from hpsearch.errors import RecordError
from hpsearch.plan import ExecutionPlan
from hpsearch.tuning.caches import PoolCaches
from hpsearch.tuning.record import StudyRecord
from hpsearch.tuning.workers import Workers, WorkerSettings, do

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class MachineChoice:
    """What the user wants of the machine; what is left open is measured or found out."""

    device: str = "auto"
    n_workers: int = 0
    """0: one per GPU, or one on the CPU."""
    threads: int = 0
    """Threads a worker; 0: all cores, shared among the workers."""


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
    try:
        stored = record.plan()
        plan = ExecutionPlan.from_dict(stored) if stored is not None else None
    except (RecordError, KeyError, TypeError, ValueError, AttributeError) as error:
        raise RecordError(f"{record.paths.plan} is damaged ({error}): delete it, and it is measured anew") from error
    if plan is not None:
        wanted = choice.device.partition(":")[0]
        if wanted not in ("auto", plan.device):
            logger.info("the study moves from %s to %s", plan.device, wanted)
        elif not choice.n_workers and not choice.threads:
            return plan
        elif wanted in ("auto", plan.device):
            settings = _share_out(plan.device, choice, len({worker.device for worker in plan.workers}))
            plan = dataclasses.replace(plan, workers=settings)
            record.write_plan(plan.to_dict())
            return plan
    plan = _measure_plan(record, caches, choice, workers, check)
    record.write_plan(plan.to_dict())
    return plan


def _measure_plan(
    record: StudyRecord, caches: PoolCaches, choice: MachineChoice, workers: Workers, check: Callable[[], None]
) -> ExecutionPlan:
    threads = choice.threads or max(1, plans.available_cores() // max(1, choice.n_workers))
    # The worker that measures is the first of those that train: it has torch loaded and the images open.
    workers.become([WorkerSettings(choice.device, threads)])
    job = {
        "job": "measure",
        "config": record.config.with_params({}).to_dict(),
        "steps": [
            {"config": config.to_dict(), **caches.job(config)} for config in plans.measured_configs(record.config)
        ],
    }
    message = do(workers, job, check=check)
    assert message is not None
    device = message["device"]
    settings = _share_out(choice.device if ":" in choice.device else device, choice, message["n_devices"])
    workers.settle(settings[0].device)
    n_sharing = max(1, len(settings) // message["n_devices"])
    return ExecutionPlan(
        device=device,
        precision=message["precision"],
        workers=settings,
        memory_bytes=message["memory_bytes"] // n_sharing,
        steps=tuple(plans.MeasuredStep(**step) for step in message["steps"]),
        machine=message["machine"],
    )


def _share_out(device: str, choice: MachineChoice, n_devices: int) -> tuple[WorkerSettings, ...]:
    """A worker for each device, or as many as wanted, taking turns on the devices; the cores shared among them."""
    kind, _, index = device.partition(":")
    n_workers = choice.n_workers or (n_devices if kind == "cuda" and not index else 1)
    threads = choice.threads or max(1, plans.available_cores() // n_workers)
    names = [device] if kind != "cuda" or index else [f"cuda:{number}" for number in range(n_devices)]
    return tuple(WorkerSettings(names[number % len(names)], threads) for number in range(n_workers))
