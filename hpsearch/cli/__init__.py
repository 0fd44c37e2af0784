"""The command line: one module per command, each parses, calls one function, prints.

Nothing heavy is imported before a command runs, so that `--help` answers at once.
"""

from __future__ import annotations

import atexit
import difflib
import errno
import gc
import importlib
import io
import logging
import os
import signal
import sys
from typing import Any

import click

from hpsearch import __version__
from hpsearch.cli import streams
from hpsearch.errors import HpsearchError, StoppedError
from hpsearch.user_files import printable

COMMANDS = {
    "study": "Search for the best configuration; run again to continue.",
    "final": "Retrain the best configuration on the whole pool and evaluate it on the test split.",
    "status": "Studies here: trials, outcomes, best so far, what runs now.",
    "stop": "Ask a running study to stop, from another terminal or machine.",
    "train": "Train one configuration, without a search.",
    "plan": "Shapes, parameters, memory and time of a configuration, before anything runs.",
    "predict": "Masks of any images at their own resolution, from a final model.",
    "export": "A final model as ONNX, or the best configuration as a TOML that runs again.",
    "report": "One HTML file of what a study found, with its figures.",
    "track": "Bring MLflow up to date with the record.",
    "data": "Check, cache, augment, draw or download datasets.",
}


_USER_ERRORS = (errno.ENAMETOOLONG, errno.ELOOP, errno.EACCES, errno.EPERM, errno.ENOTDIR)
"""System errors about unusable paths. The user can fix the path, so they end as one line without a traceback."""


class Suggesting(click.Group):
    """A group that names the closest command where there is none of that name."""

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        known = self.list_commands(ctx)
        if args and args[0] not in known and not args[0].startswith("-"):
            close = difflib.get_close_matches(args[0].lower(), known, n=1, cutoff=0.5)
            hint = f" Did you mean {close[0]!r}?" if close else ""
            ctx.fail(f"No such command {args[0]!r}.{hint} Commands: {', '.join(known)}.")
        return super().resolve_command(ctx, args)


class _Lazy(Suggesting):
    """Imports a command's module only when that command is run."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        module = importlib.import_module(f"hpsearch.cli.{cmd_name}")
        command: click.Command = module.command
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))


@click.group(cls=_Lazy, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="hpsearch")
def group() -> None:
    """Find the best UNet configuration for a segmentation dataset, and a number for it that can be published.

    \b
        hpsearch study --trials 50 --folds 5      search; again = continue
        mlflow ui                                 compare runs
        hpsearch final --best                     retrain, evaluate on the test split
    """


def main(arguments: list[str] | None = None) -> None:
    """Run the command line: exit code 0 done, 1 an error in one line, 2 usage, 128 + signal if interrupted."""
    streams.protect()
    atexit.register(_leave_cycles)
    for stream in (sys.stdout, sys.stderr):
        # A name that the terminal cannot show is no reason to fail.
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    code = _run(arguments)
    views = sys.modules.get("hpsearch.views")
    if views is not None and views.is_updating():
        # A server does not answer. Python would interrupt the thread anywhere, and within C++ code that is an abort.
        logging.shutdown()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


def _leave_cycles() -> None:
    """Spare Python, as it ends, the search for cycles among all that MLflow has loaded: most of a second."""
    # What torch brings along (triton) reports its own objects as leaked unless they are found.
    if "torch" not in sys.modules:
        gc.freeze()


def _run(arguments: list[str] | None) -> int:
    try:
        result: Any = group.main(args=arguments, prog_name="hpsearch", standalone_mode=False)
    except click.exceptions.Abort:
        return 128 + signal.SIGINT
    except click.ClickException as error:
        error.show()
        return error.exit_code
    except HpsearchError as error:
        click.echo(f"hpsearch: {error}", err=True)
        return 128 + error.signal if isinstance(error, StoppedError) and error.signal else 1
    except OSError as error:
        if error.errno not in _USER_ERRORS or error.filename is None:
            raise
        click.echo(f"hpsearch: {printable(str(error.filename))}: {error.strerror}", err=True)
        return 1
    return result if isinstance(result, int) else 0
