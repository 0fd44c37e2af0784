"""Check that speed does not cost accuracy: compare test scores with those of a plain float32 training loop.

    python benchmarks/accuracy.py --data DIR          DIR in the archive layout; about 10 minutes on one core

Both sides train the same network from the same initial weights on all pool images, with the same loss, optimizer,
schedule, batch size, flips and number of epochs. Both are scored on the test images:

    fast     `hpsearch.training.loop.fit` as in a study: bf16 if the processor supports it, channels-last, hpsearch's
             own layers, whole batches flipped
    plain    torch's layers in float32 and the default memory layout, each image flipped separately, torch's SGD and
             loss; also scored in float32

The output has the mean scores of each seed, their mean and standard deviation over seeds, and the difference of the
means with twice its standard error.
"""

from __future__ import annotations

import argparse
import math
import os
import statistics
import tempfile
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from alternatives import plain_unet, train_epoch
from setting import describe_machine

from hpsearch.config import StudyConfig
from hpsearch.config.data import AugmentConfig, DataConfig
from hpsearch.config.model import UNetConfig
from hpsearch.config.train import TrainConfig
from hpsearch.data.batches import DeviceData, eval_batches
from hpsearch.data.cache import Cache, Normalization, open_cache
from hpsearch.data.prepare import prepare_pool, prepare_test
from hpsearch.training.evaluation import evaluate
from hpsearch.training.loop import fit
from hpsearch.training.metrics import PixelCounts, dice, jaccard
from hpsearch.training.runtime import Runtime, make_runtime
from hpsearch.training.task import FitTask

FLIP = 0.5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="folder in the archive layout")
    parser.add_argument("--size", type=int, default=64)
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--images", type=int, help="so many of the pool only")
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    fast = make_runtime("cpu", threads=arguments.threads)
    train = TrainConfig(epochs=arguments.epochs, batch_size=16, lr=0.05, momentum=0.9, loss="bce")
    network = UNetConfig(base_channels=8, depth=3, input_norm="none")
    with tempfile.TemporaryDirectory() as folder:
        config = DataConfig(root=arguments.data, size=arguments.size, exclude_bad=True)
        pool = open_cache(prepare_pool(config, Path(folder)).cache_path)
        test = open_cache(prepare_test(config, Path(folder)).cache_path)
        indices = np.arange(min(len(pool), arguments.images or len(pool)), dtype=np.int64)
        print(describe_machine(threads=fast.threads))
        print(
            f"{Path(arguments.data).name}: {len(indices)} trained on, {len(test)} scored, {arguments.size} pixels,",
            end=" ",
        )
        print(f"base {network.base_channels}, depth {network.depth}, {train.epochs} epochs")
        print(f"{'seed':>4} {'fast ' + fast.precision:>22} {'plain float32':>22}   (Dice, Jaccard)", flush=True)
        scores: dict[str, list[tuple[float, float]]] = {"fast": [], "plain": []}
        for seed in range(arguments.seeds):
            scores["fast"].append(train_fast(pool, test, indices, network, train, fast, seed))
            scores["plain"].append(train_plain(pool, test, indices, network, train, fast.threads, seed))
            print(
                f"{seed:4} " + " ".join(f"{a:12.4f} {b:9.4f}" for a, b in (scores["fast"][-1], scores["plain"][-1]))
            )
    for i, name in enumerate(("Dice", "Jaccard")):
        compare(name, *([pair[i] for pair in scores[side]] for side in ("fast", "plain")))


def compare(name: str, fast: list[float], plain: list[float]) -> None:
    """Print both sides' mean and spread over seeds and the difference."""
    spreads = [statistics.stdev(side) if len(side) > 1 else math.nan for side in (fast, plain)]
    means = [statistics.mean(side) for side in (fast, plain)]
    margin = 2 * math.sqrt(sum(spread**2 for spread in spreads) / len(fast))
    print(f"{name}: fast {means[0]:.4f} (sd {spreads[0]:.4f}), plain {means[1]:.4f} (sd {spreads[1]:.4f});", end=" ")
    print(f"difference {means[0] - means[1]:+.4f}, twice its standard error {margin:.4f}")


def train_fast(
    pool: Cache,
    test: Cache,
    indices: npt.NDArray[np.int64],
    network: UNetConfig,
    train: TrainConfig,
    runtime: Runtime,
    seed: int,
) -> tuple[float, float]:
    """Mean Dice and Jaccard on the test images of what a study would train."""
    size = pool.size[0], pool.size[1]
    normalization = pool.normalization(indices, "rgb")
    config = StudyConfig(data=DataConfig(size=size), unet=network, train=train, augment=AugmentConfig(hflip=FLIP))
    task = FitTask(
        config=config,
        train_indices=indices,
        held_out_indices=indices[:0],
        normalization=normalization,
        seed=seed,
    )
    model = fit(task, DeviceData(pool), runtime).model
    batches = eval_batches(
        DeviceData(test), np.arange(len(test)), batch_size=16, normalization=normalization, size=size
    )
    with runtime.active():
        found = evaluate(model, batches, runtime)
    counts = PixelCounts.from_columns(found.counts)
    return float(dice(counts).mean()), float(jaccard(counts).mean())


def train_plain(
    pool: Cache,
    test: Cache,
    indices: npt.NDArray[np.int64],
    network: UNetConfig,
    train: TrainConfig,
    threads: int,
    seed: int,
) -> tuple[float, float]:
    """The same by a loop as anyone writes it."""
    torch.set_num_threads(threads)
    torch.manual_seed(seed)
    normalization = pool.normalization(indices, "rgb")
    images, masks = to_tensors(pool, indices, normalization)
    model = plain_unet(network, seed=seed)
    optimizer = torch.optim.SGD(model.parameters(), lr=train.lr, momentum=train.momentum)
    n_steps = len(indices) // train.batch_size
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, train.epochs * n_steps)
    for _ in range(train.epochs):
        order = torch.randperm(len(indices))
        batches = (flipped(images, masks, rows) for rows in order.split(train.batch_size)[:n_steps])
        train_epoch(model, batches, optimizer, schedule=schedule)
    model.eval()
    images, masks = to_tensors(test, np.arange(len(test)), normalization)
    scores = []
    with torch.no_grad():
        for x, y in zip(images.split(16), masks.split(16), strict=True):
            pred, mask = model(x).flatten(1) > 0, y.flatten(1) > 0
            both, either = (pred & mask).sum(1), (pred | mask).sum(1)
            iou = torch.where(either > 0, both / either, 1.0)
            scores.append(torch.stack((2 * iou / (1 + iou), iou), 1))
    mean = torch.cat(scores).double().mean(0)
    return float(mean[0]), float(mean[1])


def flipped(images: torch.Tensor, masks: torch.Tensor, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """A batch of these rows, about half of its pairs mirrored left to right."""
    pairs = [
        (images[i].flip(-1), masks[i].flip(-1)) if torch.rand(()) < FLIP else (images[i], masks[i]) for i in rows
    ]
    x, y = zip(*pairs, strict=True)
    return torch.stack(x), torch.stack(y)


def to_tensors(
    cache: Cache, indices: npt.NDArray[np.int64], normalization: Normalization
) -> tuple[torch.Tensor, torch.Tensor]:
    """Normalised images (N, 3, H, W) and masks (N, 1, H, W), float32."""
    images, masks = (torch.from_numpy(array).float() for array in cache.read(indices))
    mean, std = torch.tensor(normalization.mean), torch.tensor(normalization.std)
    return ((images / 255 - mean) / std).permute(0, 3, 1, 2).contiguous(), masks.unsqueeze(1)


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main()
