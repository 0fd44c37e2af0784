"""Compare the duration of a study: hpsearch with and without racing, and a loop of Optuna and MONAI.

    python benchmarks/study.py --data DIR             DIR in the archive layout; about 8 minutes on two cores
    python benchmarks/study.py --data DIR --rounds 5  five alternating rounds, and the median of each side
    python benchmarks/study.py --data DIR --trials 50 --sides race monai
                                                      a longer search, without the side that is already known
    python benchmarks/study.py --quick                synthetic images, a minute or two: checks that the program works

All sides evaluate the same configurations on the same images at 64x64 by cross-validation, with the same numbers of
folds and epochs, and log to MLflow in an SQLite file. `hpsearch --sampler random` suggests the configurations, and
the other side gets them by `enqueue_trial`.

    hpsearch   the command `hpsearch study`, including decoding, checkpoints and the record, without refits
               (`--confirm 0`), first with `--pruner none`, then with `--pruner race`
    monai      what users write: an Optuna study in SQLite, a CacheDataset that is filled once for all folds, a
               DataLoader, the UNet with torch's own layers in bf16 and channels-last, SGD with a cosine schedule,
               DiceMetric on the held-out images, and mlflow.log_metrics after each epoch; no checkpoints

The output has wall-clock seconds, CPU seconds, the duration relative to hpsearch without and with racing, the best
value and its trial, and the differences between the values of the same configurations. The side of Optuna and MONAI
needs the packages of `pip install "hpsearch[bench]"`. Without them, it is left out.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from setting import describe_machine, draw_images

from hpsearch.cores import available_cores
from hpsearch.paths import ProjectPaths
from hpsearch.store.record import StudyRecord
from hpsearch.training import runtime as devices

SIZE = 64
NAME = "study"
SIDES = ("none", "race", "monai")
TITLES = {"none": "hpsearch, no racing", "race": "hpsearch, racing", "monai": "Optuna + MONAI"}


@dataclass(frozen=True)
class Result:
    """How one side did once."""

    wall_s: float
    cpu_s: float
    values: dict[int, float]
    """Trial to value, of those evaluated on all folds."""

    @property
    def best(self) -> int:
        return max(self.values, key=self.values.__getitem__)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder in the archive layout; default: drawn images")
    parser.add_argument("--images", type=int, default=300)
    parser.add_argument("--trials", type=int, default=8)
    parser.add_argument("--folds", type=int, default=5)
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--threads", type=int, default=0, help="one worker of so many; default: each side's choice")
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=SIDES)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--monai", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.monai:
        run_monai(arguments, json.loads(arguments.monai))
        return
    if arguments.sides == ["monai"]:
        parser.error("the configurations are those that hpsearch suggests: give one of its sides as well")
    if "monai" in arguments.sides and importlib.util.find_spec("monai") is None:
        arguments.sides = [side for side in arguments.sides if side != "monai"]
        print('Without Optuna + MONAI: monai is not installed (pip install "hpsearch[bench]").')
    if arguments.quick:
        arguments.images, arguments.trials, arguments.folds, arguments.epochs = 40, 2, 2, 2
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        data = arguments.data or draw_images(work / "ISIC-2017", arguments.images)
        print(describe_machine(("torch", "optuna", "mlflow", "monai"), threads=arguments.threads or None))
        images = data.name if arguments.data else "drawn images"
        print(f"{images}, {arguments.images} of them at {SIZE}x{SIZE}; {arguments.trials} trials,", end=" ")
        print(f"{arguments.folds} folds, {arguments.epochs} epochs, {arguments.rounds} round(s)\n", flush=True)
        results: dict[str, list[Result]] = {side: [] for side in SIDES if side in arguments.sides}
        params: list[dict[str, Any]] = []
        for number in range(arguments.rounds):
            for side in results:
                project = work / f"{side}{number}"
                if side == "monai":
                    results[side].append(time_monai(arguments, data, project, params))
                else:
                    results[side].append(time_hpsearch(arguments, data, project, side))
                    params = params or read_params(project)
                print(f"round {number + 1}, {TITLES[side]}: {results[side][-1].wall_s:.1f} s", flush=True)
        print_table(results)


def print_table(results: dict[str, list[Result]]) -> None:
    """One line a side, medians over rounds."""
    wall = {side: statistics.median(each.wall_s for each in found) for side, found in results.items()}
    cpu = {side: statistics.median(each.cpu_s for each in found) for side, found in results.items()}

    def ratio(seconds: dict[str, float], side: str, to: str) -> str:
        return f"{seconds[side] / seconds[to]:.2f}x" if to in seconds else "-"

    print(f"\n{'':22}{'clock':>9}{'CPU':>9}{'of no racing':>14}{'of racing':>11}{'by CPU':>14}  best value")
    for side, found in results.items():
        best = found[0].best
        print(
            f"{TITLES[side]:22}{wall[side]:8.1f}s{cpu[side]:8.1f}s{ratio(wall, side, 'none'):>14}"
            f"{ratio(wall, side, 'race'):>11}{ratio(cpu, side, 'none'):>8}{ratio(cpu, side, 'race'):>6}"
            f"  {found[0].values[best]:.4f} (trial {best})"
        )
    if "monai" not in results or len(results) == 1:
        return
    ours = results.get("none", results.get("race", []))[0].values
    theirs = results["monai"][0].values
    apart = [theirs[trial] - ours[trial] for trial in sorted(set(ours) & set(theirs))]
    spread = statistics.stdev(apart) if len(apart) > 1 else math.nan
    print(f"values of {len(apart)} configurations, MONAI minus hpsearch: mean {statistics.mean(apart):+.4f}", end=" ")
    print(f"(standard error {spread / math.sqrt(len(apart)):.4f}), standard deviation {spread:.4f}")


def timed(command: list[str], log: Path) -> tuple[float, float]:
    """Seconds of the clock and of the processors that a command takes, with all processes it starts and ends."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    began = time.perf_counter()
    with log.open("w") as output:
        done = subprocess.run(command, stdout=output, stderr=subprocess.STDOUT)
    wall_s = time.perf_counter() - began
    if done.returncode != 0:
        raise SystemExit(f"{' '.join(command[:6])} ... ended with {done.returncode}:\n{log.read_text()[-3000:]}")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return wall_s, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def time_hpsearch(arguments: argparse.Namespace, data: Path, project: Path, pruner: str) -> Result:
    """`hpsearch study`, once."""
    project.mkdir()
    command = [sys.executable, "-m", "hpsearch", "study", "--config", "isic2017-64", "--study", NAME]
    command += ["--data", str(data), "--out", str(project), "--seed", str(arguments.seed), "--confirm", "0"]
    command += ["--trials", str(arguments.trials), "--folds", str(arguments.folds), "--sampler", "random"]
    command += ["--pruner", pruner]
    if arguments.threads:
        command += ["--workers", "1", "--threads", str(arguments.threads)]
    # The loss and the images as the other side has them.
    values = [
        "train.loss=bce",
        "unet.input_norm=none",
        "data.color=rgb",
        f"data.size={SIZE}",
        f"train.epochs={arguments.epochs}",
    ]
    values += [f"data.n_search_train={arguments.images}", "data.n_search_validation=1"]
    wall_s, cpu_s = timed(command + [part for value in values for part in ("--set", value)], project / "output.txt")
    record = StudyRecord.open(ProjectPaths(project).study(NAME))
    return Result(wall_s, cpu_s, {t.number: t.value for t in record.trials() if t.outcome == "complete" and t.value})


def read_params(project: Path) -> list[dict[str, Any]]:
    """The params of all trials in their order."""
    return [dict(trial.params) for trial in StudyRecord.open(ProjectPaths(project).study(NAME)).trials()]


def time_monai(arguments: argparse.Namespace, data: Path, project: Path, params: list[dict[str, Any]]) -> Result:
    """The loop of Optuna and MONAI, once, in a process of its own."""
    project.mkdir()
    told = {"data": str(data), "project": str(project), "params": params}
    command = [sys.executable, __file__, "--monai", json.dumps(told), "--images", str(arguments.images)]
    command += ["--folds", str(arguments.folds), "--epochs", str(arguments.epochs), "--seed", str(arguments.seed)]
    command += ["--threads", str(arguments.threads)]
    wall_s, cpu_s = timed(command, project / "output.txt")
    values = json.loads((project / "values.json").read_text())
    return Result(wall_s, cpu_s, {int(trial): value for trial, value in values.items()})


def run_monai(arguments: argparse.Namespace, told: dict[str, Any]) -> None:
    """What people write."""
    warnings.simplefilter("ignore")
    import mlflow
    import numpy as np
    import optuna
    import torch
    from alternatives import find_pairs, monai_flips, monai_pairs, plain_unet, train_epoch
    from monai.data import DataLoader, Dataset
    from monai.metrics import DiceMetric
    from sklearn.model_selection import KFold
    from torch.utils.data import Subset

    from hpsearch.config.model import UNetConfig

    threads = arguments.threads or available_cores()
    torch.set_num_threads(threads)
    torch.manual_seed(arguments.seed)
    use_bf16 = devices.cpu_computes_bf16()
    pairs = find_pairs(told["data"], "train", arguments.images) + find_pairs(told["data"], "val", 1)
    cached = monai_pairs(pairs, SIZE, threads)
    folds = list(KFold(arguments.folds, shuffle=True, random_state=arguments.seed).split(np.arange(len(pairs))))
    mlflow.set_tracking_uri(f"sqlite:///{told['project']}/mlflow.db")
    mlflow.set_experiment(NAME)

    def train_fold(trial: optuna.Trial, fold: int, lr: float, batch_size: int, config: UNetConfig) -> list[float]:
        train, held_out = (Subset(cached, indices.tolist()) for indices in folds[fold])
        train_loader = DataLoader(
            Dataset(train, monai_flips()), batch_size=batch_size, shuffle=True, drop_last=True, num_workers=0
        )
        held_out_loader = DataLoader(held_out, batch_size=32, num_workers=0)
        # Each fit starts from weights of its own, as ours do: one start for all would be one piece of luck for all.
        seed = (arguments.seed * 1000 + trial.number) * arguments.folds + fold
        model = plain_unet(config, seed=seed).to(memory_format=torch.channels_last)
        optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, arguments.epochs * len(train_loader))
        scores: list[float] = []
        for epoch in range(arguments.epochs):
            batches = ((batch["image"], batch["mask"]) for batch in train_loader)
            mean_loss, _ = train_epoch(
                model, batches, optimizer, schedule=schedule, layout=torch.channels_last, bf16=use_bf16
            )
            model.eval()
            metric = DiceMetric(reduction="none", ignore_empty=False)
            with torch.no_grad():
                for batch in held_out_loader:
                    images = batch["image"].to(memory_format=torch.channels_last)
                    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=use_bf16):
                        logits = model(images)
                    metric((logits > 0).float(), batch["mask"])
            scores = metric.aggregate().flatten().tolist()
            mlflow.log_metrics(
                {f"fold{fold}_loss": mean_loss, f"fold{fold}_dice": float(np.mean(scores))},
                step=epoch,
            )
        return scores

    def objective(trial: optuna.Trial) -> float:
        config = UNetConfig(
            base_channels=trial.suggest_categorical("unet.base_channels", [4, 8, 16]),
            depth=trial.suggest_int("unet.depth", 2, 4),
            stacking=trial.suggest_int("unet.stacking", 1, 3),
            input_norm="none",
        )
        lr = trial.suggest_float("train.lr", 1e-3, 3e-1, log=True)
        batch_size = trial.suggest_categorical("train.batch_size", [8, 16, 32])
        with mlflow.start_run():
            mlflow.log_params(trial.params)
            scores = [
                score for fold in range(arguments.folds) for score in train_fold(trial, fold, lr, batch_size, config)
            ]
            mlflow.log_metric("dice", float(np.mean(scores)))
        return float(np.mean(scores))

    study = optuna.create_study(storage=f"sqlite:///{told['project']}/optuna.db", direction="maximize")
    for params in told["params"]:
        study.enqueue_trial(params)
    study.optimize(objective, n_trials=len(told["params"]))
    values = {trial.number: trial.value for trial in study.trials}
    (Path(told["project"]) / "values.json").write_text(json.dumps(values))


if __name__ == "__main__":
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    main()
