"""Find the best UNet configuration for a segmentation dataset, and a number for it that can be published.

What each command does is one function; the names below lead there, and load what they need when they are first used.
docs/api.md describes them.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hpsearch.config import StudyConfig as StudyConfig
    from hpsearch.config import load as load_config  # noqa: F401
    from hpsearch.config.data import DataConfig as DataConfig
    from hpsearch.data.torch_datasets import RoleDataset as RoleDataset
    from hpsearch.final import run_final as run_final
    from hpsearch.inference.export import export_onnx as export_onnx
    from hpsearch.inference.export import export_toml as export_toml
    from hpsearch.inference.predictor import Predictor as Predictor
    from hpsearch.inference.predictor import find_images as find_images
    from hpsearch.inference.predictor import find_model as find_model
    from hpsearch.inference.predictor import predict_files as predict_files
    from hpsearch.paths import ProjectPaths as ProjectPaths
    from hpsearch.report.final_record import FinalResult as FinalResult
    from hpsearch.report.page import write_report as write_report
    from hpsearch.search.autotune import MachineChoice as MachineChoice
    from hpsearch.search.status import study_status as study_status
    from hpsearch.store.record import study_record as study_record
    from hpsearch.study import StudySummary as StudySummary
    from hpsearch.study import run_study as run_study
    from hpsearch.tracking.mlflow_view import make_tracker as make_tracker

__version__ = "0.1.0"

EXPORTS = {
    "load_config": "hpsearch.config.study.load",
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
"""Name here to the full name of what it is."""
__all__ = ["EXPORTS", "__version__", *EXPORTS]


def __getattr__(name: str) -> Any:
    if name not in EXPORTS:
        raise AttributeError(f"module 'hpsearch' has no attribute {name!r}")
    module, _, attribute = EXPORTS[name].rpartition(".")
    return getattr(importlib.import_module(module), attribute)


def __dir__() -> list[str]:
    return __all__
