"""Compare the training speed of one fit, in images per second, with PyTorch, MONAI and Lightning.

    python benchmarks/throughput.py                 all three sizes, about 15 minutes on two quiet cores
    python benchmarks/throughput.py --sizes 64      one size, about 5 minutes
    python benchmarks/throughput.py --clock cpu --threads 1     on a machine that others use, too
    python benchmarks/throughput.py --quick         a minute: checks that the program works; ignore its numbers

Requires the packages of `pip install "hpsearch[bench]"`. A side whose package is missing is left out.

Every side trains the same network (the UNet of hpsearch) with the same loss (binary cross-entropy), optimizer (SGD
with momentum), batch size (16) and random horizontal flips on the same small JPEGs of the same size. The images are
synthetic (`hpsearch.data.sample`), unless `--data` names a folder in the archive layout of ISIC-2017:

    hpsearch   hpsearch.training.loop.fit with its cache; always channels-last
    plain      a Dataset that decodes, resizes and normalises each JPEG in each epoch, a DataLoader with one
               (persistent) worker per thread, and a loop that reads the loss after each step
    monai      CacheDataset with MONAI's dictionary transforms, in which all but the flip is cached; DataLoader
               without workers and tensors without metadata, which is faster in this benchmark
    lightning  Trainer on decoded, normalised tensors in memory, without logger and checkpoints

    float32    the network with torch's own layers
    bf16       one additional line, as in the tutorials: torch.autocast around the forward pass, or
               precision="bf16-mixed"
    bf16+cl    two more lines: model and images .to(memory_format=torch.channels_last)
    +layers    also the layers of hpsearch, which are made for that layout; the remaining difference is the loop

Each side runs in its own process. The sides alternate, one epoch per round, so that other load on the machine affects
all of them equally. The first round is not counted. The output has the median, minimum and maximum over the rounds,
the speed of hpsearch relative to the side in float32 and bf16 (median of the ratios within a round), and the FLOPs of
the training step x images/s as a share of the measured rate of matrix products in that precision. `--clock cpu`
counts images per CPU second, including the data loaders, instead of per wall-clock second. Use it with one thread on
a shared machine.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil
from setting import describe_machine, draw_images

BATCH_SIZE = 16
LR, MOMENTUM = 0.05, 0.9


@dataclass(frozen=True)
class Problem:
    """One network at one size."""

    size: int
    base_channels: int
    depth: int
    n_images: int
    """Images of an epoch: enough steps to fill every pipeline."""


PROBLEMS = {
    64: Problem(64, 8, 3, 320),
    128: Problem(128, 16, 4, 96),
    256: Problem(256, 16, 4, 48),
}
QUICK = Problem(32, 4, 2, 64)

SIDES = {
    "hpsearch": (None, ("float32", "bf16")),
    "plain": (None, ("float32", "bf16", "bf16+cl")),
    "monai": ("monai", ("float32", "bf16", "bf16+cl", "bf16+cl+layers")),
    "lightning": ("lightning", ("float32", "bf16", "bf16+cl", "bf16+cl+layers")),
    "matmul": (None, ("float32", "bf16")),
}
"""Side to the package it needs and the precisions it runs in."""


@dataclass(frozen=True)
class Job:
    """What a side's process is told."""

    side: str
    precision: str
    problem: Problem
    data: str
    cache: str
    threads: int
    device: str
    rounds: int
    clock: str


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder in the archive layout; default: drawn images")
    parser.add_argument("--sizes", type=int, nargs="+", choices=sorted(PROBLEMS), default=sorted(PROBLEMS))
    parser.add_argument("--rounds", type=int, default=7, help="counted rounds")
    parser.add_argument("--clock", choices=["wall", "cpu"], default="wall")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--job", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.job:
        table = json.loads(arguments.job)
        serve(Job(**{**table, "problem": Problem(**table["problem"])}))
        return
    problems = [QUICK] if arguments.quick else [PROBLEMS[size] for size in arguments.sizes]
    rounds = 1 if arguments.quick else arguments.rounds
    with tempfile.TemporaryDirectory() as work:
        data = arguments.data or draw_images(Path(work) / "ISIC-2017", max(problem.n_images for problem in problems))
        packages = ("torch", "monai", "lightning")
        print(describe_machine(packages, device=arguments.device, threads=arguments.threads))
        images = arguments.data.name if arguments.data else "drawn images"
        print(f"{images}; batch {BATCH_SIZE}; median of {rounds} rounds, {arguments.clock} clock\n")
        for problem in problems:
            machine = {"threads": arguments.threads, "device": arguments.device, "clock": arguments.clock}
            compare(problem, data, Path(work) / "cache", rounds, machine)


def compare(problem: Problem, data: Path, cache: Path, rounds: int, machine: dict[str, Any]) -> None:
    """Run all sides at one size in turn and print their table."""
    processes = {}
    for side, (package, precisions) in SIDES.items():
        if package is not None and importlib.util.find_spec(package) is None:
            print(f"{side} is left out: {package} is not installed")
            continue
        for precision in precisions:
            job = Job(side, precision, problem, str(data), str(cache), rounds=rounds, **machine)
            process = Process(job)
            # One after another, so that the cache is built once; the reply comes after the uncounted round.
            process.ask()
            processes[side, precision] = process
    rates: dict[tuple[str, str], list[float]] = {key: [] for key in processes}
    for _ in range(rounds):
        for key, process in processes.items():
            rates[key].append(process.ask())
    for process in processes.values():
        process.end()

    from hpsearch.config.model import UNetConfig
    from hpsearch.models.shapes import training_flops

    config = UNetConfig(base_channels=problem.base_channels, depth=problem.depth, input_norm="none")
    flops = training_flops(config, 3, problem.size, problem.size)
    median = {key: statistics.median(values) for key, values in rates.items()}
    print(f"{problem.size}x{problem.size}, base {problem.base_channels}, depth {problem.depth}, ", end="")
    print(f"{flops / 1e9:.2f} GFLOP an image, {problem.n_images} images an epoch")
    for precision in ("float32", "bf16"):
        print(f"matrix products in {precision}: {median['matmul', precision] / 1e9:.0f} GFLOP/s")
    print(f"{'':27}{'images/s':>10}{'lowest':>9}{'highest':>9}{'ours f32':>10}{'ours bf16':>11}{'of matmul':>11}")
    for (side, precision), values in rates.items():
        if side == "matmul":
            continue
        rate = median[side, precision]
        ratios = [
            statistics.median(a / b for a, b in zip(rates["hpsearch", ours], values, strict=True))
            for ours in ("float32", "bf16")
        ]
        share = rate * flops / median["matmul", precision.partition("+")[0]]
        print(
            f"{side:12}{precision:15}{rate:10.1f}{min(values):9.1f}{max(values):9.1f}"
            f"{ratios[0]:9.2f}x{ratios[1]:10.2f}x{share:10.0%}"
        )
    print()


class Process:
    """One side, waiting for its turn."""

    def __init__(self, job: Job) -> None:
        command = [sys.executable, __file__, "--job", json.dumps(asdict(job))]
        self._errors = tempfile.TemporaryFile("w+")  # noqa: SIM115 (open as long as the process)
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._errors, text=True
        )
        self._name = f"{job.side} {job.precision}"

    def ask(self) -> float:
        """Let it train one epoch; images (for matmul: FLOPs) a second."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write("go\n")
        self._process.stdin.flush()
        for line in self._process.stdout:
            # Libraries print what they like; only this is ours.
            if line.startswith("rate "):
                return float(line.split()[1])
        self._errors.seek(0)
        raise SystemExit(f"{self._name} ended before its time:\n{self._errors.read()}")

    def end(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()


# --- in a side's own process -------------------------------------------------------------------------------------


class Turn:
    """Waits until the side may work and tells how fast it did."""

    def __init__(self, job: Job) -> None:
        self._device = job.device
        self._by_cpu = job.clock == "cpu"
        self._process = psutil.Process()
        self._began = 0.0

    def now(self) -> float:
        """Seconds: of the clock, or of the processor for this process and those it started."""
        if not self._by_cpu:
            return time.perf_counter()
        children = [child.cpu_times() for child in self._process.children(recursive=True)]
        return time.process_time() + sum(times.user + times.system for times in children)

    def begin(self) -> None:
        if not sys.stdin.readline():
            os._exit(0)
        self._began = self.now()

    def end(self, amount: float) -> None:
        import torch

        if self._device == "cuda":
            torch.cuda.synchronize()
        print(f"rate {amount / (self.now() - self._began)}", flush=True)


def serve(job: Job) -> None:
    """Do the side's work, an epoch for every line read."""
    warnings.simplefilter("ignore")
    import torch

    torch.set_num_threads(job.threads)
    torch.manual_seed(0)
    sides: dict[str, Callable[[Job, Turn], None]] = {
        "hpsearch": run_hpsearch,
        "plain": run_plain,
        "monai": run_monai,
        "lightning": run_lightning,
        "matmul": run_matmul,
    }
    sides[job.side](job, Turn(job))


def run_hpsearch(job: Job, turn: Turn) -> None:
    import numpy as np

    from hpsearch.config import StudyConfig
    from hpsearch.config.data import AugmentConfig, DataConfig
    from hpsearch.config.model import UNetConfig
    from hpsearch.config.train import TrainConfig
    from hpsearch.data.batches import DeviceData
    from hpsearch.data.cache import open_cache
    from hpsearch.data.prepare import prepare_pool
    from hpsearch.training.loop import fit
    from hpsearch.training.runtime import make_runtime
    from hpsearch.training.task import FitTask

    problem = job.problem
    config = DataConfig(root=job.data, size=problem.size, n_search_train=problem.n_images, exclude_bad=True)
    cache = open_cache(prepare_pool(config, Path(job.cache)).cache_path)
    indices = np.arange(problem.n_images, dtype=np.int64)
    n_trained = problem.n_images // BATCH_SIZE * BATCH_SIZE

    def on_epoch(*_: Any) -> Any:
        turn.end(n_trained)
        turn.begin()
        return "go"

    turn.begin()
    study = StudyConfig(
        data=config,
        unet=UNetConfig(base_channels=problem.base_channels, depth=problem.depth, input_norm="none"),
        # One epoch more than is asked for: the last turn ends by the closed input.
        train=TrainConfig(epochs=job.rounds + 2, batch_size=BATCH_SIZE, lr=LR, momentum=MOMENTUM, loss="bce"),
        augment=AugmentConfig(hflip=0.5),
    )
    task = FitTask(
        config=study,
        train_indices=indices,
        held_out_indices=indices[:0],
        normalization=cache.normalization(indices, "rgb"),
        seed=0,
    )
    runtime = make_runtime(job.device, amp="bf16" if job.precision == "bf16" else "off", threads=job.threads)
    fit(task, DeviceData(cache, job.device), runtime, on_epoch=on_epoch)


def run_plain(job: Job, turn: Turn) -> None:
    from alternatives import JpegDataset, find_pairs
    from torch.utils.data import DataLoader

    loader = DataLoader(
        JpegDataset(find_pairs(job.data, "train", job.problem.n_images), job.problem.size),  # type: ignore[arg-type]
        batch_size=BATCH_SIZE,
        shuffle=True,
        drop_last=True,
        num_workers=job.threads,
        persistent_workers=True,
        pin_memory=job.device == "cuda",
    )
    train_plainly(job, turn, lambda: iter(loader))


def run_monai(job: Job, turn: Turn) -> None:
    import torch
    from alternatives import find_pairs, monai_flips, monai_pairs
    from monai.data import DataLoader, Dataset

    pairs = find_pairs(job.data, "train", job.problem.n_images)
    dataset = Dataset(monai_pairs(pairs, job.problem.size, job.threads), monai_flips())
    loader = DataLoader(dataset, batch_size=BATCH_SIZE, shuffle=True, drop_last=True, num_workers=0)

    def batches() -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        for batch in loader:
            yield batch["image"], batch["mask"]

    train_plainly(job, turn, batches)


def train_plainly(job: Job, turn: Turn, batches: Callable[[], Iterator[Any]]) -> None:
    """Epoch after epoch of the loop of the tutorials; `bf16` adds autocast, `+cl` channels_last."""
    import torch
    from alternatives import train_epoch

    model = make_model(job)
    optimizer = torch.optim.SGD(model.parameters(), lr=LR, momentum=MOMENTUM)
    layout = torch.channels_last if "+cl" in job.precision else torch.contiguous_format
    model.to(memory_format=layout)
    while True:
        turn.begin()
        _, n_images = train_epoch(
            model, batches(), optimizer, device=job.device, layout=layout, bf16=job.precision.startswith("bf16")
        )
        turn.end(n_images)


def run_lightning(job: Job, turn: Turn) -> None:
    import logging

    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    import lightning
    import torch
    from alternatives import JpegDataset, find_pairs
    from torch.utils.data import DataLoader, TensorDataset

    channels_last = "+cl" in job.precision

    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = make_model(job)
            if channels_last:
                self.model.to(memory_format=torch.channels_last)
            self.loss = torch.nn.BCEWithLogitsLoss()

        def training_step(self, batch: Any, _: int) -> Any:
            images, masks = batch
            flip = torch.rand(len(images), 1, 1, 1, device=images.device) < 0.5
            images = torch.where(flip, images.flip(3), images)
            masks = torch.where(flip, masks.flip(3), masks)
            if channels_last:
                images = images.to(memory_format=torch.channels_last)
            loss = self.loss(self.model(images), masks)
            self.log("loss", loss)
            return loss

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=LR, momentum=MOMENTUM)

    class Turns(lightning.Callback):
        def on_train_epoch_start(self, *_: Any) -> None:
            turn.begin()

        def on_train_epoch_end(self, *_: Any) -> None:
            turn.end(job.problem.n_images // BATCH_SIZE * BATCH_SIZE)

    pairs = find_pairs(job.data, "train", job.problem.n_images)
    decoded = JpegDataset(pairs, job.problem.size, flips=False)
    images, masks = zip(*(decoded[i] for i in range(len(decoded))), strict=True)
    dataset = TensorDataset(torch.stack(images), torch.stack(masks))
    trainer = lightning.Trainer(
        accelerator="gpu" if job.device == "cuda" else "cpu",
        devices=1,
        precision="bf16-mixed" if job.precision.startswith("bf16") else "32-true",
        max_epochs=-1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[Turns()],
    )
    trainer.fit(Module(), DataLoader(dataset, batch_size=BATCH_SIZE, shuffle=True, drop_last=True))


def run_matmul(job: Job, turn: Turn) -> None:
    """Products of square matrices, for half a second a turn."""
    import torch

    n = 8192 if job.device == "cuda" else 2048
    dtype = torch.bfloat16 if job.precision == "bf16" else torch.float32
    a, b, out = (torch.randn(n, n, device=job.device, dtype=dtype) for _ in range(3))
    while True:
        turn.begin()
        began, done = time.perf_counter(), 0
        while time.perf_counter() - began < 0.5:
            for _ in range(50 if job.device == "cuda" else 1):
                torch.mm(a, b, out=out)
                done += 1
        turn.end(2.0 * n**3 * done)


def make_model(job: Job) -> Any:
    """The network of torch's own layers, or of hpsearch's where they are added."""
    from alternatives import plain_unet

    from hpsearch.config.model import UNetConfig
    from hpsearch.models.unet import UNet

    config = UNetConfig(base_channels=job.problem.base_channels, depth=job.problem.depth, input_norm="none")
    model = UNet(config, 3) if job.precision.endswith("+layers") else plain_unet(config)
    return model.to(job.device)


if __name__ == "__main__":
    main()
