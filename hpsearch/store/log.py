"""The log file of a study."""

import contextlib
import logging
from collections.abc import Iterator
from pathlib import Path


class _LenientHandler(logging.FileHandler):
    """Log handler that ignores write errors: on a full disk, what matters fails elsewhere with a clear message."""

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802 - logging's name
        pass


@contextlib.contextmanager
def log_file(path: Path) -> Iterator[None]:
    """Append one line per event of hpsearch to `path` for the time of the block."""
    handler = _LenientHandler(path, encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    root = logging.getLogger("hpsearch")
    level = root.level
    root.addHandler(handler)
    root.setLevel(logging.INFO)
    try:
        yield
    finally:
        root.removeHandler(handler)
        root.setLevel(level)
        with contextlib.suppress(OSError):
            handler.close()
