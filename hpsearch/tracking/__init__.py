"""Tracking in MLflow: the content of runs, their updates, and the registered models."""

from hpsearch.tracking.mlflow_view import MlflowTracker, MlflowView, make_tracker

__all__ = ("MlflowTracker", "MlflowView", "make_tracker")
