"""Terminal input and output: tables, counters, stop signals, and standard streams that tolerate a closed reader."""

import contextlib
import errno
import io
import math
import os
import signal
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import click

from hpsearch.report.formats import duration
from hpsearch.search.stopping import Stop

WIDTH = 200
"""Width of tables in characters if the output is not a terminal."""
_GONE = frozenset({errno.EPIPE, errno.EIO, errno.EBADF})
"""Values of `errno` when writing to a pipe whose reader has exited, or to a closed terminal."""


def echo_table(head: Sequence[str], rows: Iterable[Sequence[str]], *, n_left: int = 99, title: str = "") -> None:
    """Print a table of plain text cells. Columns after the first `n_left` are aligned to the right."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, title=title or None, title_justify="left")
    for index, name in enumerate(head):
        table.add_column(Text(name), justify="left" if index < n_left else "right", no_wrap=index == 0)
    for row in rows:
        # Use Text to disable markup, because names and reasons may contain brackets.
        table.add_row(*map(Text, row))
    if table.row_count:
        console = Console(highlight=False, width=None if sys.stdout.isatty() else WIDTH)
        with console.capture() as capture:
            console.print(table)
        # Rich fills the last column with spaces.
        click.echo("\n".join(line.rstrip() for line in capture.get().splitlines()))


def counter(text: str) -> Callable[[int, int], None]:
    """Return a progress callback, called with (done, total), that writes to standard error.

    On a terminal, it shows `TEXT 12/200, 3 min left` on one line. Otherwise, it writes about five lines in all.
    """
    is_terminal, began = sys.stderr.isatty(), time.monotonic()

    def show(done: int, total: int) -> None:
        nonlocal began
        if done <= 1:
            began = time.monotonic()
        if is_terminal:
            left = duration((time.monotonic() - began) / max(done, 1) * (total - done))
            click.echo(f"\r{text} {done}/{total}, {left} left\x1b[K", nl=done >= total, err=True)
        elif done == 1 or done * 4 // total > (done - 1) * 4 // total:
            click.echo(f"{text} {done}/{total}", err=True)

    return show


def write_to_stderr(text: str) -> None:
    """Write a line to standard error. This is safe in a signal handler, even if it has interrupted a print."""
    with contextlib.suppress(OSError):
        os.write(2, f"\n{text}\n".encode())


@contextlib.contextmanager
def stop_on_signals(stop: Stop, show: Callable[[str], None] = write_to_stderr) -> Iterator[None]:
    """Convert SIGINT, SIGTERM and SIGHUP to stop requests while the `with` block runs.

    `show` is called in the signal handler with a message for the user. It must not use buffered output, because the
    handler may have interrupted a print.
    """

    def request(number: int, _frame: object) -> None:
        left_s = stop.epoch_left_s()
        # A cluster kills a process soon after SIGTERM, so do not wait for the end of the epoch.
        stop.request(number, at_once=number != signal.SIGINT)
        if stop.is_urgent or left_s is None:
            show("Stopping now" if stop.is_urgent else "Stopping")
            return
        # The time left is NaN until the first epoch of this configuration has ended.
        about = "" if math.isnan(left_s) else f" (about {max(1, round(left_s))} s)"
        show(f"Finishing the current epoch{about}; press Ctrl-C again to stop now")

    # If SIGHUP is already ignored (by `nohup`), it must remain ignored.
    is_ignored = signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    numbers = (signal.SIGINT, signal.SIGTERM, *(() if is_ignored else (signal.SIGHUP,)))
    before = {number: signal.signal(number, request) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def protect_streams() -> None:
    """Treat closed standard streams and pipes without a reader like /dev/null.

    With this, a study continues after the reader of its output has exited. The descriptor of a closed stream is
    occupied, because otherwise the next file that is opened would get it, and all printed text would be written to
    that file. Characters that the terminal cannot show are escaped.
    """
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            # The system assigns the lowest free descriptor, which is this one.
            os.open(os.devnull, os.O_RDWR)
    for name, descriptor in (("stdout", 1), ("stderr", 2)):
        stream = getattr(sys, name)
        # Do not replace a stream that other code has installed.
        if stream is None or (stream is getattr(sys, f"__{name}__") and isinstance(stream, io.TextIOWrapper)):
            protected = io.TextIOWrapper(
                io.BufferedWriter(_Output(descriptor, "w", closefd=False)),
                encoding=getattr(stream, "encoding", "utf-8"),
                errors="backslashreplace",
                line_buffering=stream is not None and (stream.line_buffering or stream.write_through),
            )
            setattr(sys, name, protected)


class _Output(io.FileIO):
    """Raw output stream that ignores write errors after its reader has exited."""

    def write(self, content: Any, /) -> int:
        try:
            return super().write(content)
        except OSError as error:
            if error.errno not in _GONE:
                raise
            return len(content)
