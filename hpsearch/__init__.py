"""Find the best UNet configuration for a segmentation dataset, with a score that can be published.

Each command calls one function. These functions and the classes that they use can be imported from `hpsearch`. They
are loaded when they are first used. docs/api.md describes them, and `__init__.pyi` lists them for type checkers.
"""

import importlib
from typing import Any

__version__ = "0.1.0"

EXPORTS = {
    "load_config": "hpsearch.config.study.load_config",
    "StudyConfig": "hpsearch.config.study.StudyConfig",
    "DataConfig": "hpsearch.config.data.DataConfig",
    "ProjectPaths": "hpsearch.paths.ProjectPaths",
    "MachineChoice": "hpsearch.search.autotune.MachineChoice",
    "run_study": "hpsearch.study.run_study",
    "StudySummary": "hpsearch.study.StudySummary",
    "study_status": "hpsearch.search.status.study_status",
    "study_record": "hpsearch.store.record.study_record",
    "run_final": "hpsearch.final.run.run_final",
    "FinalResult": "hpsearch.report.final_record.FinalResult",
    "write_report": "hpsearch.report.page.write_report",
    "make_tracker": "hpsearch.tracking.mlflow_view.make_tracker",
    "find_model": "hpsearch.inference.predictor.find_model",
    "find_images": "hpsearch.inference.predictor.find_images",
    "Predictor": "hpsearch.inference.predictor.Predictor",
    "predict_files": "hpsearch.inference.predictor.predict_files",
    "RoleDataset": "hpsearch.data.torch_datasets.RoleDataset",
    "export_onnx": "hpsearch.inference.export.export_onnx",
    "export_toml": "hpsearch.inference.export.export_toml",
}
"""Maps each public name to the full dotted name of the object."""
__all__ = ["EXPORTS", "__version__", *EXPORTS]


def __getattr__(name: str) -> Any:
    if name not in EXPORTS:
        raise AttributeError(f"module 'hpsearch' has no attribute {name!r}")
    module, _, attribute = EXPORTS[name].rpartition(".")
    return getattr(importlib.import_module(module), attribute)


def __dir__() -> list[str]:
    return __all__
