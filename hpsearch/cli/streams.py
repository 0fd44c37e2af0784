"""Make standard output and error safe to write to, even if they are closed or nobody reads them."""

from __future__ import annotations

import contextlib
import errno
import io
import os
import sys
from typing import Any, TextIO

_GONE = frozenset({errno.EPIPE, errno.EIO, errno.EBADF})
"""Errors of a write to a pipe whose reader has ended, or to a closed terminal."""


def protect() -> None:
    """Treat closed standard streams and pipes without a reader as /dev/null.

    A study goes on after the reader of its output has ended. The number of a closed stream must not be reused by the
    next opened file, because everything printed would go into that file.
    """
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            # The system uses the lowest free number, which is this one.
            os.open(os.devnull, os.O_RDWR)
    sys.stdout = _protected(sys.stdout, sys.__stdout__, 1)
    sys.stderr = _protected(sys.stderr, sys.__stderr__, 2)


def write_to_stderr(text: str) -> None:
    """Write a separate line to standard error. This is safe in a signal handler, even during a print."""
    with contextlib.suppress(OSError):
        os.write(2, f"\n{text}\n".encode())


def _protected(stream: TextIO | None, original: TextIO | None, descriptor: int) -> TextIO:
    if not (stream is None or (stream is original and isinstance(stream, io.TextIOWrapper))):
        # Other code has replaced the stream: leave it alone.
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
    """A file descriptor that ignores writes that nobody can read."""

    def write(self, content: Any, /) -> int:
        try:
            return super().write(content)
        except OSError as error:
            if error.errno not in _GONE:
                raise
            return len(content)
