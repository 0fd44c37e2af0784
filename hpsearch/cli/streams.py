"""Make standard output and error safe to write to, whether they are open or anybody reads them."""

from __future__ import annotations

import contextlib
import errno
import io
import os
import sys
from typing import Any, TextIO

_GONE = frozenset({errno.EPIPE, errno.EIO, errno.EBADF})
"""How writing fails when the reader of a pipe has ended, or the terminal is gone."""


def protect() -> None:
    """Treat closed standard streams, and pipes that nobody reads any more, as /dev/null.

    A study must not end with its reader. And a closed descriptor must not be given to the next file that is opened,
    into which anything printed would then go.
    """
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            # The system hands out the lowest free number, which is this one.
            os.open(os.devnull, os.O_RDWR)
    sys.stdout = _protected(sys.stdout, sys.__stdout__, 1)
    sys.stderr = _protected(sys.stderr, sys.__stderr__, 2)


def write_to_stderr(text: str) -> None:
    """Write a line of its own to standard error; safe in a signal handler, even one that interrupts a print."""
    with contextlib.suppress(OSError):
        os.write(2, f"\n{text}\n".encode())


def _protected(stream: TextIO | None, original: TextIO | None, descriptor: int) -> TextIO:
    if not (stream is None or (stream is original and isinstance(stream, io.TextIOWrapper))):
        # Somebody else has taken its place, and knows why.
        return stream
    raw = _Output(descriptor, "w", closefd=False)
    if stream is None:
        return io.TextIOWrapper(io.BufferedWriter(raw), encoding="utf-8")
    return io.TextIOWrapper(
        io.BufferedWriter(raw),
        encoding=stream.encoding,
        errors=stream.errors,
        line_buffering=stream.line_buffering or stream.write_through,
    )


class _Output(io.FileIO):
    """A file descriptor that drops what nobody can read."""

    def write(self, content: Any, /) -> int:
        try:
            return super().write(content)
        except OSError as error:
            if error.errno not in _GONE:
                raise
            return len(content)
