"""Run the command `hpsearch` as `python -m hpsearch`."""

import os
import sys

# `python -m` searches the current folder first, so a `random.py` there would be imported instead of Python's own.
if sys.path and sys.path[0] in ("", os.getcwd()):
    del sys.path[0]

from hpsearch.cli import main

if __name__ == "__main__":
    main()
