"""The version in MLflow, the one in the store and the one that answers are the same model."""

from __future__ import annotations

import json

import httpx
import numpy as np
import pandas as pd

from tests.testkit import DATA
from tests.testkit.projects import Project


def test_mlflow_bentoml_and_http_agree_on_every_row(promoted: Project, served: str) -> None:
    """The version in MLflow, the one in the BentoML store and the one that answers give the same probabilities."""
    code = """
import sys, numpy as np, pandas as pd, mlflow, bentoml, xgboost
from pipeline.core.model.encoders import FrameEncoder
from pipeline.core.contract.schema import load_schema
rows = pd.read_csv("data/credit_risk.csv")
tracked = mlflow.pyfunc.load_model("models:/credit_risk_model@champion").predict(rows)
stored = bentoml.xgboost.get("credit_risk_model:v1")
booster, objects = bentoml.xgboost.load_model(stored), stored.custom_objects
encoder = FrameEncoder(load_schema(objects["schema"]), objects["DictVectorizer"])
np.savez("parity.npz", tracked=tracked, stored=booster.inplace_predict(encoder.transform(rows)))
"""
    promoted.run("python", "-c", code)
    found = np.load(promoted.folder / "parity.npz")
    rows = json.loads(pd.read_csv(DATA).drop(columns="status").to_json(orient="records"))
    answers = httpx.post(f"{served}/classify_batch", json=rows, timeout=60).json()
    single = [httpx.post(f"{served}/classify", json=row).json()["probability"] for row in rows[::50]]
    batch = np.array([answer["probability"] for answer in answers])
    assert len(batch) == len(rows) == len(found["tracked"])
    np.testing.assert_allclose(found["stored"], found["tracked"], rtol=0, atol=1e-6)
    np.testing.assert_allclose(batch, found["tracked"], rtol=0, atol=1e-6)
    np.testing.assert_allclose(single, found["tracked"][::50], rtol=0, atol=1e-6)
