"""Time and version, as they are recorded."""

from __future__ import annotations

import os
import subprocess
import time
from functools import cache
from pathlib import Path

import hpsearch


@cache
def code_version() -> str:
    """Return the version of hpsearch; in a checkout with its commit and `dirty` after changes."""
    root = Path(hpsearch.__file__).parents[1]
    if not (root / ".git").exists():
        # Installed: a repository further up is somebody else's.
        return hpsearch.__version__
    command = ["git", "-C", str(root), "describe", "--always", "--dirty=.dirty", "--abbrev=40", "--exclude=*"]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=20, env=os.environ | {"GIT_OPTIONAL_LOCKS": "0"}
        )
    except (OSError, subprocess.TimeoutExpired):
        return hpsearch.__version__
    commit = done.stdout.strip()
    return f"{hpsearch.__version__}+{commit}" if done.returncode == 0 and commit else hpsearch.__version__


def now() -> float:
    """Return the Unix time in seconds, rounded to the millisecond that MLflow keeps."""
    return round(time.time(), 3)
