"""The MLflow model as code: its ``predict`` takes raw rows as a DataFrame and returns probabilities of default.

MLflow stores this file with each model and runs it when the model is loaded, so no model holds a pickle.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from mlflow.exceptions import MlflowException
from mlflow.models import set_model
from mlflow.pyfunc import PythonModel

from pipeline.core.contract.checks import BrokenRules, check_columns, violations
from pipeline.core.errors import DataError
from pipeline.core.model.encoders import FrameEncoder
from pipeline.core.model.features import Matrix
from pipeline.registry.logged_model import BOOSTER, SCHEMA, VECTORIZER, read_parts


class CreditRiskModel(PythonModel):
    """Contract, encoder and booster behind MLflow's ``predict``."""

    def load_context(self, context: Any) -> None:
        """Load the parts from the model's artifacts."""
        folders = {Path(context.artifacts[name]).parent for name in (BOOSTER, VECTORIZER, SCHEMA)}
        self._booster, vectorizer, self._schema = read_parts(folders.pop())
        self._encoder = FrameEncoder(self._schema, vectorizer)

    def predict(self, context: Any, model_input: pd.DataFrame, params: dict[str, Any] | None = None) -> Matrix:
        """Probabilities of default in [0, 1]: shape (n,), float32.

        Raises
        ------
        MlflowException
            Rows break the contract (a bad request, when served by ``mlflow models serve``).
        """
        self._check(model_input)
        matrix = self._encoder.transform(model_input)
        return np.asarray(self._booster.inplace_predict(matrix), dtype=np.float32)

    def _check(self, rows: pd.DataFrame) -> None:
        try:
            check_columns(rows, self._schema, labelled=False)
        except DataError as error:
            raise MlflowException.invalid_parameter_value(str(error)) from None
        broken = BrokenRules()
        broken.add(violations(rows, self._schema))
        if broken:
            raise MlflowException.invalid_parameter_value("; ".join(broken.lines()))


set_model(CreditRiskModel())
