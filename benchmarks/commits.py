"""Compare the speed of a study in the working tree with that at another commit.

    python benchmarks/commits.py <commit>               # a few minutes on two quiet cores
    python benchmarks/commits.py <commit> --rounds 7

Both sides run the same study of 12 trials (3 folds, 3 epochs, racing, MLflow) on the built-in sample data, one after
the other, in every round. The images are decoded before the first round, which is not counted. Each line of the
result is one measure: the median of both sides, and the median of the ratios within a round with the lowest and the
highest:

    whole command    wall-clock seconds of `hpsearch study`
    first step       seconds from the command to the first training step
    outside steps    seconds after the first step in which no batch was trained or scored: checkpoints, suggestions,
                     the race, the next network, MLflow
    one image        milliseconds of training, per image
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path

from compare import ROOT, check_out, run_hpsearch
from setting import describe_machine

SETTINGS = (
    *(
        "data.size=64",
        "unet.base_channels=8",
        "unet.depth=2",
        "unet.stacking=2",
        "train.epochs=3",
        "study.startup_trials=4",
    ),
    *("search.unet.base_channels=[4, 8]", "search.train.batch_size=[8, 16]"),
)


def main() -> int:
    """Time both sides in alternation and print the ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base", help="commit to compare with")
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    rounds: list[dict[str, dict[str, float]]] = []
    with tempfile.TemporaryDirectory() as folder:
        base = Path(folder) / "base"
        check_out(arguments.base, base)
        trees = {"base": base, "here": ROOT}
        for number in range(arguments.rounds + 1):
            # Each side is first in every second round.
            order = list(trees) if number % 2 else list(reversed(trees))
            found = {side: time_study(trees[side], Path(folder) / side, f"round{number}") for side in order}
            rounds += [found] if number else []
    print(describe_machine(threads=1))
    print(f"{'':16} {'base':>9} {'here':>9}   here / base, median (lowest to highest of {len(rounds)} rounds)")
    for measure in rounds[0]["base"]:
        ratios = [each["here"][measure] / each["base"][measure] for each in rounds]
        medians = [statistics.median(each[side][measure] for each in rounds) for side in ("base", "here")]
        print(
            f"{measure:16} {medians[0]:9.2f} {medians[1]:9.2f}   "
            f"{statistics.median(ratios):.3f} ({min(ratios):.3f} to {max(ratios):.3f})"
        )
    return 0


def time_study(tree: Path, out: Path, name: str) -> dict[str, float]:
    """Run the study `name` with the code in `tree`, in the project `out`, and return its measures."""
    out.mkdir(exist_ok=True)
    search = ["--data", "sample", "--trials", "12", "--folds", "3", "--confirm", "0", "--seed", "3"]
    machine = ["--workers", "1", "--threads", "1", "--device", "cpu"]
    settings = [part for setting in SETTINGS for part in ("--set", setting)]
    began_at = time.time()
    run_hpsearch(tree, out, "study", "--out", str(out), "--study", name, *search, *machine, *settings)
    whole_s = time.time() - began_at
    lines = [
        line for path in (out / "studies" / name).rglob("epochs.jsonl") for line in path.read_text().splitlines()
    ]
    rows = sorted(map(json.loads, lines), key=lambda row: row["time"])
    steps_s = sum(row["train_s"] + row["eval_s"] for row in rows)
    first_step_s = rows[0]["time"] - rows[0]["train_s"] - rows[0]["eval_s"] - began_at
    return {
        "whole command": whole_s,
        "first step": first_step_s,
        "outside steps": whole_s - first_step_s - steps_s,
        "one image": 1000 / statistics.median(row["images_per_s"] for row in rows),
    }


if __name__ == "__main__":
    sys.exit(main())
