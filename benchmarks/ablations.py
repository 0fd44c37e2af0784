"""Measure the effect of single settings: short fits on real images with one setting changed, several seeds each.

    python benchmarks/ablations.py ISIC-2017 --minutes 5      run fits for five minutes; run it again to continue
    python benchmarks/ablations.py ISIC-2017 --report         print the tables of the finished fits

The images come from the pool (training and validation split). Each seed shuffles the pool. The first images are held
out and the next ones are used for training, in the same way for every arm. Arms differ in one setting and are
compared seed by seed. A fit is scored after its last epoch. Each fit writes one JSON file to `--out`, whose name
depends on everything that determines the result. Groups therefore share fits, a stopped run continues, and a changed
setting is fitted again.

A table shows the mean Dice, Jaccard and pixel accuracy of each arm over the seeds, with the 95 % interval of
Student's t over seeds (other images, other initial weights). It also shows the paired difference in Dice from the
first arm of the group, with its interval. If the interval contains 0, the two arms cannot be distinguished with this
number of seeds.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.stats import t as student

from hpsearch import paths
from hpsearch.config import StudyConfig, digest, load
from hpsearch.data.batches import DeviceData, eval_batches
from hpsearch.data.cache import open_cache
from hpsearch.data.prepare import prepare_pool
from hpsearch.errors import DivergedError
from hpsearch.training.evaluation import evaluate
from hpsearch.training.loop import fit
from hpsearch.training.metrics import SCORES, PixelCounts
from hpsearch.training.runtime import make_runtime
from hpsearch.training.task import FitTask
from hpsearch.typed_json import to_json

BASE = (
    "data.size=64", "unet.base_channels=4", "unet.depth=3", "train.epochs=8", "train.batch_size=16", "train.lr=0.05",
    "unet.input_norm=none", "train.loss=bce",
)  # fmt: skip
"""What all arms start from; for the rest hpsearch's defaults (`same`, batch normalisation, Xavier, flips)."""
LONGER = ("unet.base_channels=8", "train.epochs=10")
"""A network and a fit about as the searches at 64x64 have them, for what became defaults."""
WIDE = ("data.size=96", "unet.depth=2")
"""A `valid` network here loses about the same share as the report's: 96 -> 56, as 572 -> 388."""
N_HELD_OUT = 300


@dataclass(frozen=True)
class Arm:
    """One configuration of a group; the first of a group is what the others are compared with."""

    name: str
    overrides: tuple[str, ...] = ()
    n_train: int = 240

    @property
    def config(self) -> StudyConfig:
        return load(None, [*BASE, *self.overrides])

    def key(self, seed: int) -> str:
        """All that decides the fit, as the stem of its file."""
        table = self.config.to_dict()
        decisive = {name: table[name] for name in ("unet", "train", "augment")}
        decisive |= {name: table["data"][name] for name in ("size", "color", "match")}
        return digest({**decisive, "n_train": self.n_train, "n_held_out": N_HELD_OUT, "seed": seed})


GROUPS: dict[str, tuple[Arm, ...]] = {
    "padding": (
        Arm("valid, stretched (the report's)", (*WIDE, "unet.padding=valid")),
        Arm("same", WIDE),
    ),
    "init": (
        Arm("no norm, xavier + bilinear (the report's)", ("unet.norm=none",)),
        Arm("no norm, torch's", ("unet.norm=none", "unet.init=torch")),
    ),
    "init with norm": (
        Arm("batch norm, xavier + bilinear"),
        Arm("batch norm, torch's", ("unet.init=torch",)),
    ),
    "norm": (
        Arm("none (the report's)", ("unet.norm=none",)),
        Arm("batch"),
        Arm("group", ("unet.norm=group",)),
        Arm("instance", ("unet.norm=instance",)),
    ),
    "defaults": (
        Arm("bce", LONGER, n_train=1000),
        Arm("bce+dice", (*LONGER, "train.loss=bce+dice"), n_train=1000),
        Arm("bce, each image standardised", (*LONGER, "unet.input_norm=image"), n_train=1000),
        Arm(
            "bce+dice, each image standardised",
            (*LONGER, "unet.input_norm=image", "train.loss=bce+dice"),
            n_train=1000,
        ),
    ),
    "loss": (
        Arm("bce"),
        Arm("dice", ("train.loss=dice",)),
        Arm("jaccard", ("train.loss=jaccard",)),
        Arm("bce+dice", ("train.loss=bce+dice",)),
    ),
    "images": (
        Arm("120 images", n_train=120),
        Arm("240 images"),
        Arm("480 images", n_train=480),
    ),
    "epochs": (
        Arm("4 epochs", ("train.epochs=4",)),
        Arm("8 epochs"),
        Arm("16 epochs", ("train.epochs=16",)),
    ),
    "color": (
        Arm("rgb"),
        Arm("grayscale", ("data.color=grayscale",)),
    ),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", help="folder of the dataset, or sample")
    parser.add_argument("--out", type=Path, default=Path("ablations"), help="folder of the results and the cache")
    parser.add_argument("--only", nargs="+", choices=GROUPS, metavar="GROUP", help=", ".join(GROUPS))
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--minutes", type=float, default=np.inf, help="begin no further fit after so long")
    parser.add_argument("--threads", type=int, help="of the processor (default: all cores)")
    parser.add_argument("--report", action="store_true", help="fit nothing, print the tables")
    arguments = parser.parse_args()
    groups = {name: GROUPS[name] for name in arguments.only or GROUPS}
    if not arguments.report:
        n_left = run(groups, arguments.data, arguments.out, arguments.seeds, arguments.minutes, arguments.threads)
        print(f"{n_left} fits are left: run the same command again" if n_left else "all fits are done")
    for name, arms in groups.items():
        print("\n".join(["", f"{name}:", "", *table(arms, arguments.out, arguments.seeds)]))


def run(
    groups: dict[str, tuple[Arm, ...]], root: str, out: Path, n_seeds: int, minutes: float, threads: int | None
) -> int:
    """Do the fits that are missing, seed by seed, until `minutes` are over; gives how many are still to be done."""
    missing = {
        arm.key(seed): (arm, seed)
        for seed in range(n_seeds)
        for arms in groups.values()
        for arm in arms
        if not result_path(out, arm, seed).is_file()
    }
    began = time.monotonic()
    for n_done, (arm, seed) in enumerate(missing.values()):
        if time.monotonic() - began > 60 * minutes:
            return len(missing) - n_done
        if result_path(out, arm, seed).is_file():
            # Another process did it meanwhile.
            continue
        result = fit_arm(arm, seed, root, out, threads)
        paths.write_json(result_path(out, arm, seed), result)
        print(f"{arm.name}, seed {seed}: {result['dice']:.4f}, {result['seconds']:.0f} s", flush=True)
    return 0


def fit_arm(arm: Arm, seed: int, root: str, out: Path, threads: int | None = None) -> dict[str, Any]:
    """One fit: mean Dice, Jaccard, accuracy of its held-out images, its training curves, its seconds."""
    config = load(None, [*BASE, *arm.overrides, f"data.root={root}"])
    prepared = prepare_pool(config.data, out / "cache")
    order = np.random.default_rng(seed).permutation(len(prepared.index))
    if len(prepared.index) < N_HELD_OUT + arm.n_train:
        raise SystemExit(f"{root} has {len(prepared.index)} pool images, {arm.name} needs {N_HELD_OUT + arm.n_train}")
    held_out, train = np.sort(order[:N_HELD_OUT]), np.sort(order[N_HELD_OUT : N_HELD_OUT + arm.n_train])
    runtime = make_runtime(amp=config.train.amp, compile=config.train.compile, threads=threads)
    data = DeviceData(open_cache(prepared.cache_path), runtime.device)
    normalization = data.cache.normalization(train, config.data.color)
    began = time.monotonic()
    setting = {"arm": arm.name, "overrides": list(arm.overrides), "n_train": arm.n_train, "seed": seed}
    try:
        task = FitTask(
            config=config,
            train_indices=train,
            held_out_indices=np.zeros(0, np.int64),
            normalization=normalization,
            seed=seed,
        )
        found = fit(task, data, runtime)
    except DivergedError:
        # A diverged network is worth what predicting nothing is: 0 wherever there is a lesion.
        return {**setting, "diverged": True, "dice": 0.0, "jaccard": 0.0, "accuracy": 0.0, "rows": [], "seconds": 0.0}
    batches = eval_batches(data, held_out, batch_size=16, normalization=normalization, size=task.size)
    counts = PixelCounts.from_columns(evaluate(found.model, batches, runtime).counts)
    scores = {name: float(np.mean(SCORES[name](counts))) for name in ("dice", "jaccard", "accuracy")}
    rows = [to_json(row) for row in found.rows]
    return {**setting, "diverged": False, **scores, "rows": rows, "seconds": time.monotonic() - began}


def result_path(out: Path, arm: Arm, seed: int) -> Path:
    return out / "fits" / f"{arm.key(seed)}.json"


def table(arms: Sequence[Arm], out: Path, n_seeds: int) -> Iterator[str]:
    """A Markdown table of a group, over the seeds that all of its arms have."""
    seeds = [seed for seed in range(n_seeds) if all(result_path(out, arm, seed).is_file() for arm in arms)]
    if len(seeds) < 2:
        yield f"{len(seeds)} seeds so far: no table"
        return
    yield f"| {len(seeds)} seeds | Dice | Jaccard | accuracy | Dice against the first | training ahead by |"
    yield "| --- | ---: | ---: | ---: | ---: | ---: |"
    reference: NDArray[np.float64] | None = None
    for arm in arms:
        results = [paths.read_json(result_path(out, arm, seed)) for seed in seeds]
        scores = {name: np.array([each[name] for each in results]) for name in ("dice", "jaccard", "accuracy")}
        cells = [interval(values) for values in scores.values()]
        cells.append("" if reference is None else interval(scores["dice"] - reference, signed=True))
        reference = scores["dice"] if reference is None else reference
        ahead = [each["rows"][-1]["train"]["dice"] - each["dice"] for each in results if each["rows"]]
        gap = np.mean(ahead) if ahead else np.nan
        n_diverged = sum(each["diverged"] for each in results)
        yield f"| {arm.name}{f' ({n_diverged} diverged)' if n_diverged else ''} | {' | '.join(cells)} | {gap:+.4f} |"


def interval(values: NDArray[np.float64], *, signed: bool = False) -> str:
    """Mean and 95 % interval of Student's t."""
    mean, half = values.mean(), student.ppf(0.975, len(values) - 1) * values.std(ddof=1) / np.sqrt(len(values))
    sign = "+" if signed else ""
    return f"{mean:{sign}.4f} [{mean - half:{sign}.4f}, {mean + half:{sign}.4f}]"


if __name__ == "__main__":
    main()
