"""The short form of `benchmarks/cluster.py`: a study on two real Dask workers and on twenty simulated ones."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_two_workers_train_nearly_twice_as_much_and_the_coordinator_keeps_up() -> None:
    command = [sys.executable, str(ROOT / "benchmarks" / "cluster.py"), "--quick"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    linear = dict(re.findall(r"^ +(\d+) +[\d.]+ +([\d.]+)%", done.stdout, re.MULTILINE))
    assert linear.keys() == {"1", "2"}
    assert float(linear["2"]) > 80
    longest = dict(re.findall(r"^then, (answer|next job), s .* ([\d.]+)$", done.stdout, re.MULTILINE))
    assert longest.keys() == {"answer", "next job"}
    assert max(map(float, longest.values())) < 1
