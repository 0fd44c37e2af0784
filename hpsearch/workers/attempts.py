"""Attempts at a fit: on a cluster, only the latest attempt may write into the fit's folder.

A worker that lost its connection or was suspended may continue a fit that another worker has taken over. Before the
coordinator submits a fit, it therefore writes the name of the new attempt to the file `attempt` in the fit's folder.
Every write of the fit is checked against that file.

A check alone is not enough, because a worker may be suspended between the check and the rename. `begin` therefore
also removes the temporary files of the folder: a rename that was checked before `begin` then fails, because its
temporary file is gone. A line that was about to be appended goes to a file that the next attempt has replaced. The
next coordinator of a study does the same with all fits when it takes the study's lock (`store.lock`).
"""

import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from hpsearch.errors import WorkerError
from hpsearch.paths import CHECK_WRITE, FitPaths, remove_stale_temporaries, write_text


def begin(fit: FitPaths) -> str:
    """Register a new attempt at a fit, and return its name. Earlier attempts can no longer write."""
    attempt = secrets.token_hex(8)
    write_text(fit.attempt, attempt)
    remove_stale_temporaries(fit.root)
    return attempt


@contextmanager
def writing(fit: FitPaths, attempt: str) -> Iterator[None]:
    """During the block, refuse writes to a fit's folder if another attempt has been registered since.

    No write is refused if `attempt` is empty. A refused write raises WorkerError.
    """

    def check(path: Path) -> None:
        if path.parent != fit.root or not attempt:
            return
        accepted = fit.attempt.read_text(encoding="utf-8") if fit.attempt.exists() else ""
        if accepted != attempt:
            raise WorkerError(f"{path} is not written: another worker has taken over this fit")

    token = CHECK_WRITE.set(check)
    try:
        yield
    finally:
        CHECK_WRITE.reset(token)
