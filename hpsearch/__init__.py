"""Find the best UNet configuration for a segmentation dataset, with a score that can be published.

Each command calls one function. These functions and the classes that they use can be imported from `hpsearch`. They
are loaded when they are first used. docs/api.md describes them, and `__init__.pyi` lists them for type checkers.
"""

import importlib
from typing import Any

__version__ = "0.1.0"

_MODULES = {
    "hpsearch.config.study": ("load_config", "StudyConfig"),
    "hpsearch.config.data": ("DataConfig",),
    "hpsearch.paths": ("ProjectPaths",),
    "hpsearch.search.autotune": ("MachineChoice",),
    "hpsearch.study": ("run_study", "StudySummary"),
    "hpsearch.search.status": ("study_status",),
    "hpsearch.store.record": ("study_record",),
    "hpsearch.final.run": ("run_final",),
    "hpsearch.report.final_record": ("FinalResult",),
    "hpsearch.report.page": ("write_report",),
    "hpsearch.tracking.mlflow_view": ("make_tracker",),
    "hpsearch.inference.predictor": ("find_model", "find_images", "Predictor", "predict_files"),
    "hpsearch.data.torch_datasets": ("RoleDataset",),
    "hpsearch.inference.export": ("export_onnx", "export_toml"),
}
EXPORTS = {name: f"{module}.{name}" for module, names in _MODULES.items() for name in names}
"""Maps each public name to the full dotted name of the object."""
__all__ = ["EXPORTS", "__version__", *EXPORTS]


def __getattr__(name: str) -> Any:
    if name not in EXPORTS:
        raise AttributeError(f"module 'hpsearch' has no attribute {name!r}")
    module, _, attribute = EXPORTS[name].rpartition(".")
    return getattr(importlib.import_module(module), attribute)


def __dir__() -> list[str]:
    return __all__
