"""`python -m hpsearch` is `hpsearch`."""

import os
import sys

# `python -m` puts the current folder first, so that a `random.py` there would be taken for Python's own.
if sys.path and sys.path[0] in ("", os.getcwd()):
    del sys.path[0]

from hpsearch.cli import main

if __name__ == "__main__":
    main()
