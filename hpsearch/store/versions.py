"""Return the time and the code version in their recorded form."""

import os
import subprocess
import time
from functools import cache
from pathlib import Path

import hpsearch


@cache
def code_version() -> str:
    """Return the version of hpsearch.

    In a checkout, it includes the commit, and `dirty` if there are uncommitted changes.
    """
    root = Path(hpsearch.__file__).parents[1]
    if not (root / ".git").exists():
        # hpsearch is not run from a checkout. A repository in a parent folder would belong to another project.
        return hpsearch.__version__
    command = ["git", "-C", str(root), "describe", "--always", "--dirty=.dirty", "--abbrev=40", "--exclude=*"]
    environment = os.environ | {"GIT_OPTIONAL_LOCKS": "0"}
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, env=environment, check=True)
    except (OSError, subprocess.SubprocessError):
        return hpsearch.__version__
    return f"{hpsearch.__version__}+{done.stdout.strip()}"


def now() -> float:
    """Return the Unix time in seconds, rounded to milliseconds, which is the resolution of MLflow."""
    return round(time.time(), 3)
