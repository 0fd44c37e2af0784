"""Time and version, as they are recorded."""

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
    environment = os.environ | {"GIT_OPTIONAL_LOCKS": "0"}
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, env=environment, check=True)
    except (OSError, subprocess.SubprocessError):
        return hpsearch.__version__
    return f"{hpsearch.__version__}+{done.stdout.strip()}"


def now() -> float:
    """Return the Unix time in seconds, rounded to the millisecond that MLflow keeps."""
    return round(time.time(), 3)
