"""The command line: each command has a module that parses its options, calls one function and prints the result.

Heavy libraries are imported only when a command runs, so that `--help` answers quickly.
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

COMMANDS = ("study", "final", "status", "stop", "train", "plan", "predict", "export", "report", "track", "data")
"""Names of the commands and of their modules, in the order of `--help`."""
_USER_ERRORS = (errno.ENAMETOOLONG, errno.ELOOP, errno.EACCES, errno.EPERM, errno.ENOTDIR)
"""System errors about unusable paths. The user can fix the path, so they end as one line without a traceback."""


class CommandGroup(click.Group):
    """A group that suggests the closest command for an unknown one."""

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        known = self.list_commands(ctx)
        if args and args[0] not in known and not args[0].startswith("-"):
            close = difflib.get_close_matches(args[0].lower(), known, n=1, cutoff=0.5)
            hint = f" Did you mean {close[0]!r}?" if close else ""
            ctx.fail(f"No such command {args[0]!r}.{hint} Commands: {', '.join(known)}.")
        return super().resolve_command(ctx, args)


class _LazyGroup(CommandGroup):
    """A group that imports the module of a command only when that command is run."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        command: click.Command = importlib.import_module(f"hpsearch.cli.{cmd_name}").command
        return command


@click.group(cls=_LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="hpsearch")
def group() -> None:
    """Find the best UNet configuration for a segmentation dataset, with a score that can be published.

    \b
        hpsearch study --trials 50 --folds 5      search; run it again to continue
        mlflow ui                                 compare runs
        hpsearch final --best                     retrain, evaluate on the test split
    """


def main(arguments: list[str] | None = None) -> None:
    """Run the command line. Exit codes: 0 done, 1 error in one line, 2 usage, 128 + signal interrupted."""
    streams.protect()
    atexit.register(_skip_cycle_search)
    for stream in (sys.stdout, sys.stderr):
        # A file name that the terminal cannot show must not end the command.
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    code = _run(arguments)
    views = sys.modules.get("hpsearch.views")
    if views is not None and views.is_updating():
        # MLflow's server does not answer. At exit, Python would kill the thread, which aborts inside C++ code.
        logging.shutdown()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


def _skip_cycle_search() -> None:
    """Exclude all objects from Python's last garbage collection, which takes most of a second after MLflow."""
    # Triton, which torch loads, reports its objects as leaked unless they are collected.
    if "torch" not in sys.modules:
        gc.freeze()


def _run(arguments: list[str] | None) -> int:
    """Run a command, show its error as one line, and return the exit code."""
    try:
        result: Any = group.main(args=arguments, prog_name="hpsearch", standalone_mode=False)
    except click.exceptions.Abort:
        return 128 + signal.SIGINT
    except click.NoSuchOption as error:
        # click sorts its suggestions by the alphabet, not by likeness.
        hint = f" Did you mean {' or '.join(map(repr, error.possibilities))}?" if error.possibilities else ""
        click.UsageError(error.message + hint, error.ctx).show()
        return error.exit_code
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
