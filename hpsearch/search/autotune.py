"""Choose the devices, workers and threads of a study: as the user requested, or else by measurement."""

import dataclasses
import logging
import math
import re
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from hpsearch.config import StudyConfig
from hpsearch.config.data import DataConfig
from hpsearch.cores import available_cores
from hpsearch.data.prepare import PoolCaches
from hpsearch.data.sample import draw_sample
from hpsearch.errors import ConfigError, RecordError, redact
from hpsearch.paths import ProjectPaths, StudyPaths
from hpsearch.search.status import forecast
from hpsearch.store.record import StudyRecord
from hpsearch.typed_json import from_json, to_json
from hpsearch.workers.jobs import CachePaths, ClusterWorker, Finished, MeasureJob, StepToMeasure, WorkerSettings
from hpsearch.workers.local_pool import LocalPool
from hpsearch.workers.loop import run_job, run_jobs_together
from hpsearch.workers.plan import MEMORY_SHARE, ExecutionPlan, Forecast, measured_configs, predicted_bytes
from hpsearch.workers.pool import WorkerPool

logger = logging.getLogger(__name__)

SHARING = (1, 2, 4)
"""Candidate numbers of workers per device. More than 4 are not tried, because the more workers run at the same time,
the fewer results each suggestion is based on."""
WORTH_SHARING = 1.15
"""Minimum speed-up that justifies more workers per device. For a smaller one, it is not worth giving up the
byte-for-byte reproducibility of a search with one worker."""
SHARING_STEP_S = 1.0
"""Maximum duration of a training step, in seconds, for which sharing a device is measured. With longer steps, one
worker keeps the device busy, and the measurement would take too long."""
MOST_DRAWN = 64
"""Maximum number of synthetic images generated for measurements. Larger batch sizes are measured with smaller
batches."""
WINDOW_S = 0.6
"""Minimum duration of each measurement of workers that share a device, in seconds."""
SCHEDULER = re.compile(r"((tcp|tls|ucxx?|wss?)://)?([\w.-]+|\[[\w.:%]+\]):\d{1,5}", re.ASCII)
"""Address of a Dask scheduler. It has no credentials, because Dask uses certificates."""
Shares = tuple[int, int]
"""Number of workers on a device, and number of threads per worker."""
Check = Callable[[], None]
"""Function that is called repeatedly during a measurement. It raises an exception to end the measurement."""


@dataclass(frozen=True)
class MachineChoice:
    """Device, workers and threads that the user requested. Values that are not given are measured or detected."""

    device: str = "auto"
    """`auto`, `cpu`, `cuda`, `cuda:N`, `mps` or `xla`."""
    n_workers: int = 0
    """Number of worker processes. With 0, the number per GPU, or on the CPU, is chosen by measuring the training
    speed."""
    threads: int = 0
    """Number of threads per worker. With 0, it is measured for a single worker, and several workers share the cores
    equally. If it is given without `n_workers`, there is one worker per device."""
    cluster: str = ""
    """Address of a Dask scheduler, such as `tcp://host:8786`. Each Dask worker is then one worker, and `n_workers` is
    the largest number of workers. Empty: the workers run on this machine."""
    cluster_timeout_s: float = 600.0
    """Time in seconds after which a run ends if the cluster has no scheduler or no workers."""

    def __post_init__(self) -> None:
        has_port = SCHEDULER.fullmatch(self.cluster) and int(self.cluster.rpartition(":")[2]) < 2**16
        # A scheduler in this process has an address without a port.
        if self.cluster and not (has_port or self.cluster.startswith("inproc://")):
            raise ConfigError(f"--cluster {redact(self.cluster)}: expected an address such as tcp://host:8786")

    def open_pool(
        self, study: StudyPaths, record: StudyRecord | None, check: Check, say: Callable[[str], None]
    ) -> WorkerPool:
        """Return the pool that runs the jobs of a study. The caller must hold the study's lock.

        `record` is None if the study is new. `check` is called repeatedly while the pool waits for a cluster, and
        `say` with a line when it begins to wait. Raises ConfigError if Dask is not installed, and WorkerError if the
        cluster cannot be used.
        """
        if not self.cluster:
            return LocalPool(study.root)
        try:
            from hpsearch.workers.dask_pool import DaskPool
        except ModuleNotFoundError as error:
            raise ConfigError(f"--cluster needs Dask ({error}): pip install 'hpsearch[cluster]'") from error
        plan = _read_plan(record) if record is not None else None
        device = plan.device if plan is not None and self.device == "auto" else self.device
        limit, timeout_s = self.n_workers, self.cluster_timeout_s
        pool = DaskPool(self.cluster, study.holder, check, say, device=device, limit=limit, timeout_s=timeout_s)
        if plan is not None:
            lost = {each.address: dataclasses.replace(each, is_connected=False) for each in plan.cluster}
            pool.machines = {**lost, **pool.machines}
        return pool


def first_workers(record: StudyRecord | None, choice: MachineChoice, pool: WorkerPool) -> tuple[WorkerSettings, ...]:
    """Return the settings of the workers that `make_plan` needs first.

    The caller can start these workers early, because importing torch takes seconds.
    """
    plan = _stored_plan(record, choice, pool) if record is not None else None
    if plan is not None:
        return plan.workers
    if pool.machines:
        # Results depend on the number of threads, so it is the same on all machines.
        return _one_each(choice, pool, min(machine.threads for machine in _connected(pool)))
    cores = available_cores()
    if choice.n_workers or choice.threads:
        return (WorkerSettings(choice.device, choice.threads or max(1, cores // max(1, choice.n_workers))),)
    # The first worker gets all cores, because it may remain the only one.
    most, _ = _equal_shares(cores)[-1]
    return (WorkerSettings(choice.device, cores), *[WorkerSettings(choice.device, cores // most)] * (most - 1))


def make_plan(
    record: StudyRecord, caches: PoolCaches, choice: MachineChoice, pool: WorkerPool, check: Check = lambda: None
) -> ExecutionPlan:
    """Return the stored plan, or measure one if there is none. Values that the user requested override both.

    `check` is called repeatedly during a measurement, and may raise an exception to end it.
    """
    plan = _stored_plan(record, choice, pool) or _measure_plan(record, caches, choice, pool, check)
    plan = dataclasses.replace(plan, cluster=tuple(pool.machines.values()), scheduler=choice.cluster)
    if to_json(plan) != record.plan():
        record.write_plan(to_json(plan))
    return plan


def plan_for_one_fit(
    record: StudyRecord, caches: PoolCaches, choice: MachineChoice, pool: WorkerPool, check: Check = lambda: None
) -> ExecutionPlan:
    """Return the study's plan reduced to one worker, with the number of threads that trained a single fit fastest.

    If the study has no plan, measure one and store it. `choice` overrides device and threads for this fit only.
    """
    choice = dataclasses.replace(choice, n_workers=0)
    plan = _stored_plan(record, choice, pool) or _measure_plan(record, caches, choice, pool, check)
    if record.plan() is None:
        record.write_plan(to_json(plan))
    machine = {**plan.machine, "threads": str(plan.alone.threads)}
    return dataclasses.replace(plan, workers=(plan.alone,), machine=machine)


def measure_drawn(config: StudyConfig, choice: MachineChoice, n_images: int) -> tuple[ExecutionPlan, Forecast]:
    """Return the plan for a study of `config` on this machine, and the study's expected cost with `n_images` images.

    The plan is based on measurements with synthetic images. Nothing is stored.
    """
    batch_sizes = [each.train.batch_size for each in measured_configs(config)]
    if not batch_sizes:
        raise ConfigError("no configuration of this search can exist at this size, so there is no step to measure")
    with tempfile.TemporaryDirectory(prefix="hpsearch-") as name, LocalPool(Path(name)) as pool:
        folder = Path(name)
        draw_sample(folder / "drawn", n_train=min(MOST_DRAWN, max(batch_sizes)), n_val=1, n_test=1)
        # Keep only the data settings that determine the size of the images.
        kept = ("size", "color", "match", "cache_size")
        data = DataConfig(root=str(folder / "drawn"), **{name: getattr(config.data, name) for name in kept})
        drawn = dataclasses.replace(config, data=data)
        record = StudyRecord.create(ProjectPaths(folder).study("drawn"), drawn)
        plan = make_plan(record, PoolCaches(drawn, folder / "cache"), choice, pool)
        return plan, forecast(record, plan, n_images)


def _stored_plan(record: StudyRecord, choice: MachineChoice, pool: WorkerPool) -> ExecutionPlan | None:
    """Return the stored plan with `choice` applied; None if there is no plan for this kind of device."""
    plan = _read_plan(record)
    wanted = choice.device.partition(":")[0]
    if plan is None or wanted not in ("auto", plan.device):
        return None
    if pool.machines:
        threads = (plan.alone if choice.n_workers == 1 else plan.workers[0]).threads
        return dataclasses.replace(plan, workers=_one_each(choice, pool, threads))
    if plan.cluster:
        # This machine continues a study of a cluster.
        plan = dataclasses.replace(plan, workers=plan.workers[:1], cluster=())
    if choice.n_workers == 1 and not choice.threads:
        return dataclasses.replace(plan, workers=(plan.alone,))
    if choice.threads or choice.n_workers not in (0, len(plan.workers)):
        devices = list(dict.fromkeys(worker.device for worker in plan.workers))
        return dataclasses.replace(plan, workers=_share_out(devices, choice.n_workers, choice.threads))
    return plan


def _read_plan(record: StudyRecord) -> ExecutionPlan | None:
    """Return the plan as it is stored; None if there is none."""
    try:
        stored = record.plan()
        return from_json(ExecutionPlan, stored) if stored is not None else None
    except (RecordError, KeyError, TypeError, ValueError, AttributeError) as error:
        raise RecordError(f"{record.paths.plan} is damaged: delete it, and it is measured anew") from error


def _measure_plan(
    record: StudyRecord, caches: PoolCaches, choice: MachineChoice, pool: WorkerPool, check: Check
) -> ExecutionPlan:
    first, cores = first_workers(None, choice, pool), available_cores()
    # Measure with the workers that will train: they have torch loaded and the images open.
    pool.resize(first)
    config = record.config.with_params({})
    steps = [StepToMeasure(each, CachePaths(*caches.paths(each))) for each in measured_configs(record.config)]
    rates: dict[Shares, float] = {}
    if steps and choice.n_workers <= 1 and not choice.threads and not pool.machines:
        # Try a single worker with all cores, half of them, and so on down to one core.
        alone_shares = [(1, cores >> halvings) for halvings in range(cores.bit_length())]
        rates = _rates(config, steps[0], alone_shares if choice.n_workers else _equal_shares(cores), pool, check)
    alone = fastest_alone(rates, first[0].threads)
    sharing = 1 if choice.n_workers else choose_sharing(rates)
    threads = cores // sharing if sharing > 1 else alone
    finished = run_job(pool, MeasureJob(config=config, threads=threads, steps=tuple(steps)), check=check)
    assert finished is not None
    assert finished.measurement is not None
    measured = finished.measurement
    listed = ", ".join(f"{n} x {n_threads}: {rate:.1f}" for (n, n_threads), rate in rates.items())
    if listed:
        logger.info("images per second by workers x threads on a device: %s", listed)
    plan = ExecutionPlan(
        device=measured.device,
        precision=measured.precision,
        workers=(),
        memory_bytes=measured.memory_bytes,
        steps=measured.steps,
        machine={**measured.machine, **({"images_per_s": listed} if rates else {})},
        alone_threads=alone,
    )
    if pool.machines:
        return dataclasses.replace(plan, workers=first)
    # Every configuration that fits with one worker on the device must also fit when workers share it.
    needed = [predicted_bytes(step.config, plan) for step in steps]
    largest = max((each for each in needed if each <= plan.memory_bytes * MEMORY_SHARE), default=0)
    while sharing > 1 and largest > plan.memory_bytes // sharing * MEMORY_SHARE:
        sharing //= 2
    devices = [choice.device if ":" in choice.device else measured.device]
    if devices == ["cuda"]:
        devices = [f"cuda:{index}" for index in range(measured.n_devices)]
    if sharing > 1:
        workers = _share_out(devices, sharing * len(devices))
    else:
        workers = _share_out(devices, choice.n_workers, choice.threads, most_threads=alone)
    pool.set_device(workers[0].device)
    memory_bytes = plan.memory_bytes // max(1, len(workers) // len(devices))
    return dataclasses.replace(plan, workers=workers, memory_bytes=memory_bytes)


def _one_each(choice: MachineChoice, pool: WorkerPool, threads: int) -> tuple[WorkerSettings, ...]:
    """Return one worker for each Dask worker, or `choice.n_workers` if there are more Dask workers."""
    machines = _connected(pool)[: choice.n_workers or None]
    # A numbered device of a stored plan need not exist on other machines.
    device = choice.device if ":" in choice.device else machines[0].capacity.device
    return (WorkerSettings(device, choice.threads or threads),) * len(machines)


def _connected(pool: WorkerPool) -> list[ClusterWorker]:
    """Return the connected Dask workers. If none is connected now, return all that have been."""
    machines = list(pool.machines.values())
    return [machine for machine in machines if machine.is_connected] or machines


def choose_sharing(rates: Mapping[Shares, float]) -> int:
    """Return how many workers should share a device.

    `rates` maps each pair (number of workers, threads per worker) to the images per second that these workers train
    in total. A larger number of workers is chosen only if it is faster by at least the factor `WORTH_SHARING`.
    """
    chosen, fastest = 1, 0.0
    for (n, _), rate in sorted(rates.items()):
        if rate >= WORTH_SHARING * fastest:
            chosen, fastest = n, rate
    return chosen


def fastest_alone(rates: Mapping[Shares, float], default: int) -> int:
    """Return the number of threads with which a single fit trains fastest; `default` if nothing was measured.

    `rates` is as in `choose_sharing`. Measurements with several workers are included with their rate per worker.
    """
    return max(rates, key=lambda share: (rates[share] / share[0], share[1]), default=(1, default))[1]


def _equal_shares(cores: int) -> list[Shares]:
    """Return equal shares of the cores for each number of workers in `SHARING`, up to the number of cores."""
    return [(n, cores // n) for n in SHARING if n <= cores]


def _rates(
    config: StudyConfig, step: StepToMeasure, shares: Sequence[Shares], pool: WorkerPool, check: Check
) -> dict[Shares, float]:
    """Return, for each of `shares`, the images per second that the workers of a device train in total.

    All workers are measured at the same time, so the result includes contention between them and with other programs.
    Shares for which a worker failed are left out. The result is empty if the first measurement failed or if a step
    takes longer than `SHARING_STEP_S`.
    """

    def measure(n_workers: int, threads: int, seconds: float) -> list[float]:
        """Return the seconds per image of each worker; empty if a worker failed."""
        job = MeasureJob(config=config, threads=threads, steps=(step,), seconds=seconds)
        reports = run_jobs_together(pool, [job] * n_workers, check)
        found = [each.measurement for each in reports if isinstance(each, Finished) and each.measurement]
        image_s = [measured.train_s for measurement in found for measured in measurement.steps]
        return image_s if len(image_s) == n_workers else []

    # The first round loads the images and shows how long a step takes.
    step_s = max(measure(max(n for n, _ in shares), 1, 0.0), default=math.inf) * step.config.train.batch_size
    if step_s > SHARING_STEP_S:
        return {}
    measured = {share: measure(*share, max(WINDOW_S, 6 * step_s)) for share in shares}
    return {share: sum(1 / each for each in image_s) for share, image_s in measured.items() if image_s}


def _share_out(
    devices: Sequence[str], n_workers: int = 0, threads: int = 0, *, most_threads: int = 0
) -> tuple[WorkerSettings, ...]:
    """Return `n_workers` workers, or one per device, distributed evenly over the devices.

    Each worker gets `threads` threads. If `threads` is 0, it gets an equal share of the cores, but at most
    `most_threads` threads (0: no limit).
    """
    n_workers, cores = n_workers or len(devices), available_cores()
    threads = threads or max(1, min(cores // n_workers, most_threads or cores))
    return tuple(WorkerSettings(devices[number % len(devices)], threads) for number in range(n_workers))
