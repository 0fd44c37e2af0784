"""Entry point of a model that `mlflow_model` has packed. MLflow runs this file to load the model."""

import warnings
from pathlib import Path
from typing import Any

from mlflow.models import set_model
from mlflow.pyfunc import PythonModel

from hpsearch.inference.predictor import load_predictor
from hpsearch.tracking.mlflow_model import ARTIFACT, predict_masks

with warnings.catch_warnings():
    # MLflow warns that it does not check the items of a `list[Any]`. `predict_masks` checks them.
    warnings.filterwarnings("ignore", message=".*Any type hint")

    class LesionMasks(PythonModel):  # type: ignore[misc]
        """MLflow model that predicts lesion masks from image paths or arrays."""

        def load_context(self, context: Any) -> None:
            self._predictor = load_predictor(Path(context.artifacts[ARTIFACT]))

        def predict(self, context: Any, model_input: list[Any], params: dict[str, Any] | None = None) -> list[Any]:
            return predict_masks(self._predictor, model_input)


set_model(LesionMasks())
