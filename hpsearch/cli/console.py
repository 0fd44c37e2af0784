"""Print tables and counters on the terminal."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Sequence

import click

WIDTH = 200
"""Characters of a line where the output is no terminal."""


def echo_table(head: Sequence[str], rows: Iterable[Sequence[str]], *, n_left: int = 99, title: str = "") -> None:
    """Print a table of plain texts; columns after the first `n_left` are aligned to the right."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, title=title or None, title_justify="left")
    for index, name in enumerate(head):
        table.add_column(Text(name), justify="left" if index < n_left else "right", no_wrap=index == 0)
    for row in rows:
        # Text, not markup: names and reasons may contain brackets.
        table.add_row(*map(Text, row))
    if table.row_count:
        Console(highlight=False, width=None if sys.stdout.isatty() else WIDTH).print(table)


def counter(text: str) -> Callable[[int, int], None] | None:
    """Return a progress callback that shows `TEXT 12/200` on one line; None if standard error is no terminal."""
    if not sys.stderr.isatty():
        return None

    def show(done: int, total: int) -> None:
        click.echo(f"\r{text} {done}/{total}", nl=done >= total, err=True)

    return show
