"""The public names for type checkers, in the order of docs/api.md. `__init__.py` loads them on first use."""
# ruff: noqa: I001

from hpsearch.config.study import load_config as load_config
from hpsearch.config.study import StudyConfig as StudyConfig
from hpsearch.config.data import DataConfig as DataConfig
from hpsearch.paths import ProjectPaths as ProjectPaths
from hpsearch.search.autotune import MachineChoice as MachineChoice
from hpsearch.study import run_study as run_study
from hpsearch.study import StudySummary as StudySummary
from hpsearch.search.status import study_status as study_status
from hpsearch.store.record import study_record as study_record
from hpsearch.final.run import run_final as run_final
from hpsearch.report.final_record import FinalResult as FinalResult
from hpsearch.report.page import write_report as write_report
from hpsearch.tracking.mlflow_view import make_tracker as make_tracker
from hpsearch.inference.predictor import find_model as find_model
from hpsearch.inference.predictor import find_images as find_images
from hpsearch.inference.predictor import Predictor as Predictor
from hpsearch.inference.predictor import predict_files as predict_files
from hpsearch.data.torch_datasets import RoleDataset as RoleDataset
from hpsearch.inference.export import export_onnx as export_onnx
from hpsearch.inference.export import export_toml as export_toml

__version__: str
EXPORTS: dict[str, str]
