"""Settings whose values are the names of modules in a folder of the package, such as losses and samplers."""

from __future__ import annotations

import difflib
import functools
from dataclasses import dataclass
from pathlib import Path

from hpsearch.errors import ConfigError

_PACKAGE = Path(__file__).parents[1]


@functools.cache
def module_names(folder: str) -> tuple[str, ...]:
    """Return the names of the modules in `folder` of the package, sorted, without importing them.

    Modules whose names begin with an underscore are helpers and are left out.
    """
    names = sorted(path.stem for path in (_PACKAGE / folder).glob("*.py") if not path.stem.startswith("_"))
    return tuple(names)


@dataclass(frozen=True)
class ModuleName:
    """Annotation of a setting that names a module in a folder of the package, or a sum of several."""

    folder: str
    """Path of the folder inside the package."""
    is_sum: bool = False
    """Whether several names may be joined by `+`."""

    def check(self, setting: str, name: str) -> None:
        """Raise ConfigError, with the valid names and the nearest one, if `name` is not a module of the folder."""
        names = module_names(self.folder)
        if name not in names:
            close = difflib.get_close_matches(name, names, n=1)
            hint = f" (did you mean {close[0]}?)" if close else ""
            raise ConfigError(f"{setting} must be {self.describe()}, got {name!r}{hint}")

    def describe(self) -> str:
        """Return the valid values in words."""
        names = " or ".join(map(repr, module_names(self.folder)))
        return f"{names} or a sum such as 'bce+dice'" if self.is_sum else names
