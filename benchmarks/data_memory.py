"""Measure the peak anonymous memory of every process of `data check`, `data cache` and a short `train`.

    python benchmarks/data_memory.py ISIC-2017 --size 572

For resize and crop, RGB and grayscale: one row per command with the peak of its largest process and of all of them
together. Anonymous memory is RssAnon of /proc/PID/status (Linux), sampled every 50 ms; mapped files are not in it.
"""

from __future__ import annotations

import argparse
import itertools
import subprocess
import sys
import tempfile
import time
from pathlib import Path

INTERVAL_S = 0.05


def main() -> None:
    """Run the commands and print their peaks; exit code 1 if one of them failed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", help="folder of the dataset")
    parser.add_argument("--size", type=int, default=572)
    parser.add_argument("--base", type=int, default=16)
    parser.add_argument("--batch", type=int, default=4)
    arguments = parser.parse_args()
    failed = False
    print(f"{'command':44}{'seconds':>9}{'largest process':>17}{'all together':>14}")
    with tempfile.TemporaryDirectory() as out:
        common = ["--data", arguments.data, "--size", str(arguments.size), "--out", out]
        rows = [("data check", ["data", "check", *common])]
        for match in ("resize", "crop"):
            matched = [*common, "--set", f"data.match={match}"]
            rows.append((f"data cache, {match}", ["data", "cache", *matched]))
        for match, color in itertools.product(("resize", "crop"), ("rgb", "grayscale")):
            settings = [f"data.match={match}", f"unet.base_channels={arguments.base}", "train.epochs=1"]
            settings.append(f"train.batch_size={arguments.batch}")
            flags = [flag for setting in settings for flag in ("--set", setting)]
            name = ["--study", f"{match}-{color}", "--color", color, "--tracking", "none"]
            rows.append((f"train, {match}, {color}", ["train", *common, *flags, *name]))
        for title, command in rows:
            began = time.monotonic()
            code, largest, together = peak_anonymous_bytes([sys.executable, "-m", "hpsearch", *command])
            failed = failed or code != 0
            note = "" if code == 0 else f"  exit code {code}"
            seconds = time.monotonic() - began
            print(
                f"{title:44}{seconds:9.1f}{largest / 2**20:13.0f} MiB{together / 2**20:10.0f} MiB{note}", flush=True
            )
    sys.exit(failed)


def peak_anonymous_bytes(command: list[str]) -> tuple[int, int, int]:
    """Exit code, peak of the largest process, and peak of the sum over the command's processes."""
    with tempfile.TemporaryFile() as output:
        largest = together = 0
        with subprocess.Popen(command, stdout=output, stderr=output) as process:
            while process.poll() is None:
                sizes = [anonymous_bytes(pid) for pid in _tree(process.pid)]
                largest, together = max(largest, *sizes), max(together, sum(sizes))
                time.sleep(INTERVAL_S)
        if process.returncode != 0:
            output.seek(0)
            print(output.read().decode(errors="replace"), file=sys.stderr)
    return process.returncode, largest, together


def anonymous_bytes(pid: int) -> int:
    """RssAnon of a process; 0 if it is gone."""
    try:
        status = Path(f"/proc/{pid}/status").read_text(encoding="ascii", errors="replace")
    except OSError:
        return 0
    found = [line.split()[1] for line in status.splitlines() if line.startswith("RssAnon")]
    return int(found[0]) * 1024 if found else 0


def _tree(pid: int) -> list[int]:
    """The process and all that it started, directly or not; cheaper than looking through all processes there are."""
    children: list[int] = []
    for path in Path(f"/proc/{pid}/task").glob("*/children"):
        try:
            children += map(int, path.read_text(encoding="ascii").split())
        except OSError:
            # The thread has ended.
            continue
    return [pid, *(each for child in children for each in _tree(child))]


if __name__ == "__main__":
    main()
