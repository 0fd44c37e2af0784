"""The command line: each command parses its options, calls one function and prints the result.

Large libraries are imported only when a command runs, so that `--help` is fast.
"""

import atexit
import errno
import gc
import logging
import os
import signal
import sys
from typing import Any

import click

from hpsearch import __version__
from hpsearch.cli import data, final, models, plan, report, status, study
from hpsearch.cli.options import OrderedGroup
from hpsearch.cli.terminal import protect_streams
from hpsearch.errors import HpsearchError, StoppedError
from hpsearch.user_files import printable

_USER_ERRORS = (errno.ENAMETOOLONG, errno.ELOOP, errno.EACCES, errno.EPERM, errno.ENOTDIR)
"""Values of `errno` for unusable paths. The user can correct the path, so these errors are shown as one line."""


@click.group(cls=OrderedGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="hpsearch")
def group() -> None:
    """Find the best UNet configuration for a segmentation dataset, and estimate its score,
    corrected for selection bias.

    \b
        hpsearch study --trials 50 --folds 5      search; run it again to continue
        mlflow ui                                 compare runs
        hpsearch final --best                     retrain, evaluate on the test split
    """


STEPS = study.study, final.final, status.status, status.stop, study.train, plan.plan
for _command in (*STEPS, models.predict, models.export, report.report, report.track, data.data):
    group.add_command(_command)


def main(arguments: list[str] | None = None) -> None:
    """Run the command line and exit.

    Exit codes: 0 for success, 1 for an error (shown as one line), 2 for wrong usage, and 128 plus
    the number of the signal if a signal stopped it.
    """
    protect_streams()
    code = _run(arguments)
    views = sys.modules.get("hpsearch.views")
    if views is not None and views.is_updating():
        # The MLflow server does not respond, so the thread that updates it is still running. At a normal exit, Python
        # would kill this thread, and the process would abort inside C++ code.
        logging.shutdown()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    if "torch" not in sys.modules:
        # Once MLflow is imported, the garbage collection at exit takes most of a second, so skip it. With torch it is
        # needed, because Triton reports its objects as leaked unless they are collected.
        atexit.register(gc.freeze)
    sys.exit(code)


def _run(arguments: list[str] | None) -> int:
    """Run a command, show an expected error as one line, and return the exit code."""
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
