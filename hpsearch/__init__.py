"""Find the best UNet configuration for a segmentation dataset, and a number for it that can be published.

What each command does is one function. The names in `__init__.pyi` lead there, and load what they need when they are
first used. docs/api.md describes them.
"""

import ast
import importlib
from pathlib import Path
from typing import Any

__version__ = "0.1.0"


def _read_exports() -> dict[str, str]:
    """Return the full name of each public function and class, read from the imports in `__init__.pyi`."""
    stub = ast.parse(Path(__file__).with_suffix(".pyi").read_text(encoding="utf-8"))
    imports = [node for node in stub.body if isinstance(node, ast.ImportFrom)]
    return {alias.name: f"{node.module}.{alias.name}" for node in imports for alias in node.names}


EXPORTS = _read_exports()
"""Name here to the full name of what it is."""
__all__ = ["EXPORTS", "__version__", *EXPORTS]


def __getattr__(name: str) -> Any:
    if name not in EXPORTS:
        raise AttributeError(f"module 'hpsearch' has no attribute {name!r}")
    module, _, attribute = EXPORTS[name].rpartition(".")
    return getattr(importlib.import_module(module), attribute)


def __dir__() -> list[str]:
    return __all__
