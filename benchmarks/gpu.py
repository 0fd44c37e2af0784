"""Measure UNet training on one GPU: images per second, share of peak FLOPS, memory, and small fits.

    python benchmarks/gpu.py                        a few minutes on a recent GPU
    python benchmarks/gpu.py --device cpu --quick   a minute: checks that the program works; ignore its numbers

Requires only torch, torchvision and this repository. The images are random bytes in memory. Every number comes from
`hpsearch.training.loop.fit`, the code that a study runs. It is the median of five epochs after the first two, in
which cuDNN selects its kernels.

    peak        products of square matrices in the same precision, the best of five half seconds
    steps       base 32 and 64 at 572x572 in bf16, with the padding and batch normalisation of `isic2017.toml`, at
                batch size 16 and more: FLOPs of the training step x images/s relative to the peak; predicted and
                measured memory; the fastest one also compiled, if a compiler is installed
    report      1000 training and 50 held-out images at 572x572, base 32, unpadded, without normalisation, batch size
                16: seconds per epoch, including its scores (source report: 11 minutes on an RTX 4060)
    small fits  64x64, base 8, depth 3, batch size 16: one after another, and several at a time in separate processes
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import json
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch

from hpsearch.config import StudyConfig
from hpsearch.config.data import AugmentConfig, DataConfig
from hpsearch.config.model import UNetConfig
from hpsearch.config.train import TrainConfig
from hpsearch.data.batches import DeviceData
from hpsearch.data.cache import Normalization
from hpsearch.errors import DeviceError, OutOfMemoryError
from hpsearch.models.memory import Step, training_memory
from hpsearch.models.shapes import training_flops
from hpsearch.training import runtime as devices
from hpsearch.training.loop import fit
from hpsearch.training.rows import EpochRow
from hpsearch.training.runtime import Runtime
from hpsearch.training.task import FitTask

WARM_UP = 2
"""Epochs that are not counted."""
COUNTED = 5
"""Epochs that are."""


@dataclass(frozen=True)
class Sizes:
    """How large everything is."""

    size: int
    bases: tuple[int, ...]
    depth: int
    batches: tuple[int, ...]
    """The first is the report's; the others are tried for the fastest."""
    steps: int
    """Steps of an epoch."""
    report_images: tuple[int, int]
    report_base: int
    small_images: int
    at_once: tuple[int, ...]


FULL = Sizes(572, (32, 64), 4, (16, 32, 64, 128), 12, (1000, 50), 32, 1240, (1, 2, 4, 8))
QUICK = Sizes(64, (4,), 2, (4, 8), 2, (16, 4), 4, 64, (1, 2))


class RandomImages:
    """As much of `hpsearch.data.cache.Cache` as a fit asks for."""

    key = "random"
    has_held_out_view = False

    def __init__(self, n_images: int, size: int) -> None:
        generator = np.random.default_rng(0)
        # Noise is as much work as any image; a few, again and again, so that the host's memory is not needed for it.
        self._images = generator.integers(0, 256, (min(n_images, 32), size, size, 3), np.uint8)
        self._masks = generator.integers(0, 2, (min(n_images, 32), size, size), np.uint8)
        self.size = (size, size)
        self.ids = tuple(str(i) for i in range(n_images))

    def __len__(self) -> int:
        return len(self.ids)

    def read(self, indices: Any, *, held_out: bool = False) -> tuple[Any, Any]:
        rows = indices % len(self._images)
        return self._images[rows], self._masks[rows]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", help="cuda, cuda:N or cpu")
    parser.add_argument("--quick", action="store_true", help="tiny sizes")
    parser.add_argument("--small-fit", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    try:
        runtime = devices.make_runtime(arguments.device, compile="off")
    except DeviceError as error:
        raise SystemExit(str(error)) from error
    sizes = QUICK if arguments.quick else FULL
    if arguments.small_fit:
        serve_small_fit(runtime, arguments.small_fit)
        return
    about = devices.describe(runtime)
    versions = ", ".join(f"{name} {about[name]}" for name in ("torch", "cuda", "cudnn") if name in about)
    print(f"{datetime.date.today()}, {about['device_name']}, {versions}, {about['platform']}, {runtime.precision}")
    peak = measure_peak(runtime)
    print(f"peak: {peak / 1e12:.2f} TFLOP/s in products of matrices\n")
    print_steps(runtime, sizes, peak)
    print_report_epoch(runtime, sizes, peak)
    print_small_fits(arguments, sizes)


def measure_peak(runtime: Runtime) -> float:
    """FLOPs a second of products of square matrices."""
    is_cuda = runtime.device.type == "cuda"
    n = 8192 if is_cuda else 2048
    dtype = torch.float32 if runtime.precision == "float32" else torch.bfloat16
    dtype = torch.float16 if runtime.precision == "fp16" else dtype
    with runtime.active():
        a, b = (torch.randn(n, n, device=runtime.device).to(dtype) for _ in range(2))
        out = torch.mm(a, b)
        best = 0.0
        for _ in range(5):
            torch.cuda.synchronize(runtime.device)
            began, done = time.perf_counter(), 0
            while time.perf_counter() - began < 0.5:
                for _ in range(20 if is_cuda else 1):
                    torch.mm(a, b, out=out)
                    done += 1
                torch.cuda.synchronize(runtime.device)
            best = max(best, 2.0 * n**3 * done / (time.perf_counter() - began))
    return best


def print_steps(runtime: Runtime, sizes: Sizes, peak: float) -> None:
    """The table of training steps."""
    print(f"training at {sizes.size}x{sizes.size}, depth {sizes.depth}")
    print(f"{'base':>4} {'batch':>5} {'compiled':>8} {'images/s':>9} {'TFLOP/s':>8} {'of peak':>8}", end="")
    print(f" {'memory':>10} {'predicted':>10}")
    for base in sizes.bases:
        config = UNetConfig(base_channels=base, depth=sizes.depth)
        rates: dict[int, float] = {}
        for batch_size in sizes.batches:
            try:
                rates[batch_size] = print_step(runtime, sizes, config, batch_size, peak)
            except OutOfMemoryError as error:
                print(f"{base:4} {batch_size:5} {error}")
                break
        # None where not even the smallest batch fits.
        fastest = max(rates, key=rates.__getitem__, default=None)
        if fastest and runtime.device.type == "cuda" and devices.why_no_compile(runtime.device) is None:
            try:
                print_step(dataclasses.replace(runtime, compile="on"), sizes, config, fastest, peak)
            except DeviceError as error:
                # Also OutOfMemoryError: the compiler takes memory of its own.
                print(f"{base:4} {fastest:5} {'yes':>8} {str(error).splitlines()[0]}")
    print()


def print_step(runtime: Runtime, sizes: Sizes, config: UNetConfig, batch_size: int, peak: float) -> float:
    """Train a few epochs and print a line; images a second."""
    n_images = batch_size * sizes.steps
    rate, _, memory = measure_fit(runtime, config, sizes.size, batch_size, n_images, 0)
    flops = training_flops(config, 3, sizes.size, sizes.size) * rate
    device = "cuda" if runtime.device.type == "cuda" else "cpu"
    step = Step(batch_size=batch_size, precision=runtime.precision, device=device)
    predicted = training_memory(config, 3, sizes.size, sizes.size, step).total
    compiled = "yes" if runtime.compile == "on" else "no"
    print(
        f"{config.base_channels:4} {batch_size:5} {compiled:>8} {rate:9.1f} {flops / 1e12:8.2f} {flops / peak:8.1%}"
        f" {memory / 2**30:6.2f} GiB {predicted / 2**30:6.2f} GiB",
        flush=True,
    )
    return rate


def print_report_epoch(runtime: Runtime, sizes: Sizes, peak: float) -> None:
    """The report's epoch: training and scoring in seconds."""
    n_train, n_held_out = sizes.report_images
    config = UNetConfig(
        base_channels=sizes.report_base, depth=sizes.depth, padding="valid", norm="none", input_norm="none"
    )
    rate, seconds, memory = measure_fit(runtime, config, sizes.size, sizes.batches[0], n_train, n_held_out)
    share = training_flops(config, 3, sizes.size, sizes.size) * rate / peak
    print(
        f"the report's epoch ({n_train} + {n_held_out} images, base {sizes.report_base}, batch {sizes.batches[0]}):"
    )
    print(f"{seconds:.2f} s, {rate:.1f} images/s, {share:.1%} of peak, {memory / 2**30:.2f} GiB\n")


def measure_fit(
    runtime: Runtime, config: UNetConfig, size: int, batch_size: int, n_train: int, n_held_out: int
) -> tuple[float, float, int]:
    """Images a second in training, seconds of an epoch (medians), and peak bytes without the images themselves."""
    images = DeviceData(RandomImages(n_train + n_held_out, size), runtime.device)  # type: ignore[arg-type]
    resident = n_train + n_held_out if images.is_resident else 0
    task = fit_task(config, size, batch_size, n_train, n_held_out)
    rows = fit(task, images, runtime).rows[WARM_UP:]
    rate = statistics.median(row.images_per_s for row in rows)
    seconds = statistics.median(row.train_s + row.eval_s for row in rows)
    return rate, seconds, max(row.peak_bytes for row in rows) - resident * size * size * 4


def fit_task(
    network: UNetConfig, size: int, batch_size: int, n_train: int, n_held_out: int, epochs: int = 7
) -> FitTask:
    """The task of a fit to random images."""
    config = StudyConfig(
        data=DataConfig(size=size),
        unet=network,
        # Noise cannot be learnt; a small rate keeps it from diverging.
        train=TrainConfig(epochs=epochs, batch_size=batch_size, lr=1e-4, momentum=0.9),
        augment=AugmentConfig(hflip=0.5, brightness=0.1, contrast=0.1),
    )
    return FitTask(
        config=config,
        train_indices=np.arange(n_train),
        held_out_indices=np.arange(n_train, n_train + n_held_out),
        normalization=Normalization((0.5,) * 3, (0.29,) * 3),
        seed=0,
    )


def print_small_fits(arguments: argparse.Namespace, sizes: Sizes) -> None:
    """Images a second of several processes that train at the same time on one device."""
    print(f"small fits at once, 64x64, base 8, depth 3, batch 16, {sizes.small_images} images an epoch")
    print(f"{'fits':>4} {'images/s in all':>16} {'of one alone':>13}")
    alone = 0.0
    for n_fits in sizes.at_once:
        rate = sum(run_small_fits(arguments, sizes, n_fits))
        alone = alone or rate
        print(f"{n_fits:4} {rate:16.0f} {rate / alone:12.2f}x", flush=True)


def run_small_fits(arguments: argparse.Namespace, sizes: Sizes, n_fits: int) -> Iterator[float]:
    """Images a second of each of `n_fits` processes, all of which are training while any is measured."""
    command = [sys.executable, __file__, "--device", arguments.device, "--small-fit", str(sizes.small_images)]
    processes = [
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for _ in range(n_fits)
    ]
    for process in processes:
        assert process.stdout is not None
        if process.stdout.readline() != "ready\n":
            raise SystemExit("a small fit ended before its time")
    for process in processes:
        assert process.stdin is not None
        process.stdin.write("go\n")
        process.stdin.flush()
    for process in processes:
        assert process.stdout is not None
        yield float(json.loads(process.stdout.readline())["rate"])
    for process in processes:
        # It trains on until it is told that all have been measured.
        assert process.stdin is not None
        process.stdin.close()
        process.wait()


def serve_small_fit(runtime: Runtime, n_images: int) -> None:
    """Warm up, wait, measure some epochs, and train on until the input closes."""
    rates: list[float] = []
    ended = threading.Event()

    def on_epoch(row: EpochRow, _: object) -> Literal["go", "stop"]:
        if row.epoch == WARM_UP:
            print("ready", flush=True)
            sys.stdin.readline()
            threading.Thread(target=lambda: (sys.stdin.read(), ended.set()), daemon=True).start()
        elif row.epoch > WARM_UP and len(rates) < COUNTED:
            rates.append(row.images_per_s)
            if len(rates) == COUNTED:
                print(json.dumps({"rate": statistics.median(rates)}), flush=True)
        return "stop" if ended.is_set() else "go"

    config = UNetConfig(base_channels=8, depth=3)
    images = DeviceData(RandomImages(n_images, 64), runtime.device)  # type: ignore[arg-type]
    fit(fit_task(config, 64, 16, n_images, 0, epochs=100_000), images, runtime, on_epoch=on_epoch)


if __name__ == "__main__":
    main()
