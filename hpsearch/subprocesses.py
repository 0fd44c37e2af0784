"""Start Python subprocesses that import this package, and nothing from the current folder.

A `random.py` or a folder `hpsearch` in the user's folder must not be imported in place of the real one. A subprocess
therefore runs this file, isolated from the current folder by `-P`. This file loads the package from the folder that
contains it, and runs one of the package's modules like `python -m`.
"""

import os
import sys

_FILE = os.path.abspath(__file__)


def command(module: str, *arguments: str) -> list[str]:
    """Return the command that runs a module of this package, such as `hpsearch.workers.process`, with arguments."""
    return [sys.executable, "-P", _FILE, module, *arguments]


def environment(**changes: str) -> dict[str, str]:
    """Return this process's environment with `changes` made, and with nothing imported from the current folder.

    This applies to every Python process that inherits the environment. Relative entries of PYTHONPATH become
    absolute. Entries that name the current folder (`.` or nothing) are removed.
    """
    entries = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    others = [os.path.abspath(entry) for entry in entries if os.path.normpath(entry) != "."]
    return {**os.environ, "PYTHONSAFEPATH": "1", "PYTHONPATH": os.pathsep.join(others), **changes}


def _main() -> None:
    import importlib
    import runpy

    # Import this package, even if another one has the same name. Then remove the folder from the path, so that
    # nothing else is imported from it.
    folder = os.path.dirname(os.path.dirname(_FILE))
    sys.path.insert(0, folder)
    importlib.import_module("hpsearch")
    sys.path.remove(folder)
    del sys.argv[0]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    _main()
