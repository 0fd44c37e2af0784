"""Check that the working tree gives the same results as another commit, to the byte.

    make compare BASE=<commit>
    python benchmarks/compare.py <commit>                    # four studies, a few minutes on two cores
    python benchmarks/compare.py <commit> --study tpe-race   # one of them
    python benchmarks/compare.py <commit> --tolerance 1e-6   # accept differences of floats up to this

Runs the same small fixed-seed studies and their `final` with the code of both trees: each sampler with and without
racing, with replicate fits, one worker, one thread, on the built-in sample data. Compares parameters, outcomes,
values, decisions, epochs, per-image scores, weights and test results, and exits with 1 if anything differs. A
refactoring must not change any of these.

The files of a study are read here without `hpsearch`, because the two trees may read them differently.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
STUDIES = tuple(f"{sampler}-{pruner}" for sampler in ("tpe", "random") for pruner in ("race", "none"))
CONFIG = """
[data]
root = "sample"
size = 32
n_search_train = 60
n_search_validation = 12
n_final_train = 60
n_final_test = 20

[unet]
base_channels = 4
depth = 2
stacking = 1
norm = "batch"

[train]
epochs = 3
batch_size = 4
lr = 0.05

[augment]
hflip = 0.5
brightness = 0.2

[search]
"unet.base_channels" = [4, 8]
"unet.stacking" = { low = 1, high = 2 }
"train.lr" = { low = 1e-3, high = 3e-1, log = true }
"train.batch_size" = [4, 8, 16]
"data.color" = ["rgb", "grayscale"]

[study]
trials = 6
folds = 3
startup_trials = 3
confirm = 2
seed = 5
"""
CLOCK = ("began_at", "ended_at", "time", "seconds", "train_s", "eval_s", "images_per_s")
MACHINE = ("runtime", "machine", "peak_bytes", "code")
REPEATED = ("sha256", "crc", "scores_sha256", "weights_sha256", "config", "format")
"""Checksums of what is compared itself, and the settings, which gain keys."""
REMOVED = ("micro_batch", "n_held_out", "allow_microbatch")
"""Fields that are no longer written."""
IGNORED = frozenset([*CLOCK, *MACHINE, *REPEATED, *REMOVED, "reason", "source", "test_set", "look"])
"""Also texts, and the random id of an evaluation of the test images."""
OUTCOMES_OF_0_1 = {"full": "complete", "dropped": "pruned", "lost": "orphaned"}
"""Outcomes that had other names."""


def main() -> int:
    """Compare the working tree with the commit on the command line and print every difference."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base", help="commit to compare with")
    parser.add_argument("--study", choices=STUDIES, action="append", help="only this study; may be repeated")
    parser.add_argument("--tolerance", type=float, default=0.0, help="largest accepted difference of two floats")
    arguments = parser.parse_args()
    n_different = 0
    with tempfile.TemporaryDirectory() as folder:
        base = Path(folder) / "base"
        check_out(arguments.base, base)
        for name in arguments.study or STUDIES:
            results = [run_study(tree, name, Path(folder) / side) for side, tree in (("b", base), ("w", ROOT))]
            differences = list(compare(*results, tolerance=arguments.tolerance))
            n_different += len(differences)
            print(f"{name}: {len(results[0])} results, {len(differences)} differ", flush=True)
            for line in differences:
                print(f"  {line}")
    return 1 if n_different else 0


def run_study(tree: Path, name: str, out: Path) -> dict[str, Any]:
    """Run one study and its final with the code in `tree`, and return its results by name."""
    sampler, pruner = name.split("-")
    out.mkdir(exist_ok=True)
    config = out / "compare.toml"
    config.write_text(CONFIG, encoding="utf-8")
    where = ["--out", str(out), "--study", name, "--tracking", "none", "--device", "cpu"]
    search = ["--config", str(config), "--sampler", sampler, "--pruner", pruner, "--workers", "1", "--threads", "1"]
    run_hpsearch(tree, out, "study", *search, *where)
    run_hpsearch(tree, out, "final", "--best", *where)
    return dict(read_study(out / "studies" / name))


def read_study(folder: Path) -> Iterator[tuple[str, Any]]:
    """Yield (name, value) of every result in the folder of a study; arrays as their shape, type and SHA-256."""
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if path.suffix == ".json" and path.name != "plan.json":
            yield from _flatten(name, json.loads(path.read_text(encoding="utf-8")))
        elif path.suffix == ".jsonl":
            for number, line in enumerate(path.read_text(encoding="utf-8").splitlines()):
                yield from _flatten(f"{name}:{number + 1}", json.loads(line))
        elif path.suffix == ".npy":
            yield name, _digest(np.load(path))
        elif path.suffix == ".safetensors":
            content = path.read_bytes()
            # The header holds the names of the tensors and free text; what follows are the tensors.
            yield name, hashlib.sha256(content[8 + int.from_bytes(content[:8], "little") :]).hexdigest()
        elif path.suffix == ".png" and path.parent.name == "masks":
            with Image.open(path) as image:
                yield name, _digest(np.asarray(image))
        elif path.name == "config.toml":
            yield from _flatten(name, tomllib.loads(path.read_text(encoding="utf-8")))


def compare(base: Mapping[str, Any], work: Mapping[str, Any], *, tolerance: float) -> Iterator[str]:
    """Yield one line for every result that differs by more than `tolerance`, or that only one side has."""
    for name in sorted({*base, *work}):
        if name not in work or name not in base:
            yield f"{name}: only in {'the base' if name in base else 'the working tree'}"
            continue
        old, new = base[name], work[name]
        both_floats = isinstance(old, float) and isinstance(new, float)
        if old != new and not (both_floats and abs(old - new) <= tolerance):
            yield f"{name}: {old} in the base, {new} in the working tree"


def _flatten(name: str, value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict):
        for key, inner in value.items():
            if key not in IGNORED:
                yield from _flatten(f"{name}/{key}", inner)
    elif isinstance(value, list):
        for number, inner in enumerate(value):
            yield from _flatten(f"{name}/{number}", inner)
    elif name.endswith("/outcome"):
        yield name, OUTCOMES_OF_0_1.get(value, value)
    else:
        yield name, value


def _digest(array: np.ndarray[Any, Any]) -> str:
    return f"{array.shape} {array.dtype} {hashlib.sha256(array.tobytes()).hexdigest()[:16]}"


def check_out(commit: str, folder: Path) -> None:
    """Write the files of a commit into a new folder."""
    folder.mkdir()
    archive = subprocess.run(["git", "archive", commit], cwd=ROOT, stdout=subprocess.PIPE, check=True)
    subprocess.run(["tar", "-x", "-C", str(folder)], input=archive.stdout, check=True)


def run_hpsearch(tree: Path, out: Path, *arguments: str) -> None:
    """Run the command with the code in `tree`; end with its output if it fails."""
    # The account of test-set evaluations is kept per user, too: both sides begin with an empty one.
    environment = {**os.environ, "PYTHONPATH": str(tree), "XDG_STATE_HOME": str(out / "state")}
    # Not in this folder: workers of older versions import from the current one.
    done = subprocess.run(
        [sys.executable, "-P", "-m", "hpsearch", *arguments],
        cwd=out,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        sys.exit(f"hpsearch {' '.join(arguments)} of {tree} failed:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")


if __name__ == "__main__":
    sys.exit(main())
