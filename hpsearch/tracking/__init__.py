"""Tracking in MLflow: the content of runs, their updates, and the registered models."""

from hpsearch.tracking.mlflow_view import MlflowTracker as MlflowTracker
from hpsearch.tracking.mlflow_view import MlflowView as MlflowView
from hpsearch.tracking.mlflow_view import make_tracker as make_tracker
