"""MLflow: what its runs contain, how they are kept up to date, and the model that it serves."""

from hpsearch.tracking.mlflow_view import MlflowTracker as MlflowTracker
from hpsearch.tracking.mlflow_view import MlflowView as MlflowView
from hpsearch.tracking.mlflow_view import make_tracker as make_tracker
