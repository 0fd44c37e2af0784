"""Start Python subprocesses that import this package, and nothing from the current folder.

A `random.py` or a folder `hpsearch` in the user's folder must not be imported in place of the real one. A subprocess
therefore runs this file, isolated from the current folder by `-P`. It loads the package from its folder and runs one
of its modules like `python -m`.
"""

import os
import sys

_FILE = os.path.abspath(__file__)


def command(module: str, *arguments: str) -> list[str]:
    """Return the command that runs a module of this package, such as `hpsearch.workers.process`, with arguments."""
    return [sys.executable, "-P", _FILE, module, *arguments]


def environment(**changes: str) -> dict[str, str]:
    """Return this process's environment with `changes`, so that no Python process imports from the current folder.

    This includes subprocesses of the subprocess. Relative entries of PYTHONPATH become absolute. Entries that name
    the current folder (`.` or nothing) are removed.
    """
    entries = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    others = [os.path.abspath(entry) for entry in entries if os.path.normpath(entry) != "."]
    return {**os.environ, "PYTHONSAFEPATH": "1", "PYTHONPATH": os.pathsep.join(others), **changes}


def _main() -> None:
    import importlib.util
    import runpy

    folder = os.path.dirname(_FILE)
    spec = importlib.util.spec_from_file_location(
        "hpsearch", os.path.join(folder, "__init__.py"), submodule_search_locations=[folder]
    )
    assert spec is not None
    assert spec.loader is not None
    package = importlib.util.module_from_spec(spec)
    sys.modules["hpsearch"] = package
    spec.loader.exec_module(package)
    del sys.argv[0]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    _main()
