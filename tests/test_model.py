from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import mlflow
import numpy as np
import pandas as pd
import pytest
import xgboost as xgb
from fastapi.testclient import TestClient

from pipeline.core.contract.schema import Schema
from pipeline.core.errors import TrackingError
from pipeline.core.model.encoders import FrameEncoder
from pipeline.core.model.features import make_vectorizer
from pipeline.registry.logged_model import load_parts, log_model, pinned
from tests.conftest import DATA

NAME = "models:/credit_risk_model/1"


@pytest.fixture(scope="module")
def booster(schema: Schema, applications: pd.DataFrame) -> xgb.Booster:
    """A small real booster."""
    matrix = FrameEncoder(schema, make_vectorizer(schema)).transform(applications)
    return xgb.train({"objective": "binary:logistic"}, xgb.DMatrix(matrix, label=schema.labels(applications)), 10)


@pytest.fixture(scope="module")
def store(tracking_store: str, booster: xgb.Booster, schema: Schema) -> str:
    """A tracking store that holds one version of the model."""
    with mlflow.start_run():
        log_model(booster, make_vectorizer(schema), schema, metadata={"colour": "blue"})
    return tracking_store


@pytest.fixture(scope="module")
def expected(booster: xgb.Booster, schema: Schema, applications: pd.DataFrame) -> np.ndarray:
    """Probabilities of all rows, as the booster itself gives them."""
    matrix = FrameEncoder(schema, make_vectorizer(schema)).transform(applications)
    return np.asarray(booster.inplace_predict(matrix))


@pytest.mark.parametrize("uri", [NAME, "models:/credit_risk_model@candidate"])
def test_parts_come_back_as_they_were_logged(store: str, uri: str, schema: Schema, booster: xgb.Booster) -> None:
    parts = load_parts(uri)
    assert parts.schema == schema
    assert parts.vectorizer.vocabulary_ == make_vectorizer(schema).vocabulary_
    assert parts.booster.save_raw("ubj") == booster.save_raw("ubj")
    assert pinned(uri) == NAME


@pytest.mark.parametrize(
    "uri", ["models:/credit_risk_model/9", "models:/other@candidate", "runs:/0/model", "nowhere"]
)
def test_an_absent_model_is_one_readable_error(store: str, uri: str) -> None:
    with pytest.raises(TrackingError, match="name a model that is registered"):
        load_parts(uri)


def test_raw_rows_of_any_numeric_type_are_scored(store: str, expected: np.ndarray) -> None:
    model = mlflow.pyfunc.load_model(NAME)
    raw = pd.read_csv(DATA).drop(columns="status")
    assert raw["age"].dtype == np.int64
    assert np.array_equal(model.predict(raw), expected)
    typed = raw.astype({"home": "category", "job": object, "age": np.float32})
    assert np.array_equal(model.predict(typed), expected)


def test_rows_that_break_the_contract_are_refused(store: str, schema: Schema) -> None:
    model = mlflow.pyfunc.load_model(NAME)
    with pytest.raises(Exception, match=r"age: must be in \[18, 100\]: 1 row"):
        model.predict(pd.DataFrame([{**schema.example(), "age": 7}]))


def test_mlflow_serves_it_over_http(store: str, schema: Schema) -> None:
    from mlflow.pyfunc import scoring_server

    client = TestClient(scoring_server.init(mlflow.pyfunc.load_model(NAME)))
    rows = [schema.example(), {**schema.example(), "income": None}]
    answer = client.post("/invocations", json={"dataframe_records": rows})
    assert answer.status_code == 200
    assert [0 < p < 1 for p in answer.json()["predictions"]] == [True, True]
    assert client.post("/invocations", json={"dataframe_records": [{"age": 7}]}).status_code == 400


def test_it_loads_elsewhere_without_this_project_and_without_pickle(
    store: str, tmp_path: Path, schema: Schema, expected: np.ndarray
) -> None:
    rows = tmp_path / "rows.csv"
    pd.read_csv(DATA).head(20).drop(columns="status").to_csv(rows, index=False)
    code = f"""
import json, mlflow, pandas as pd
print(json.dumps(mlflow.pyfunc.load_model({NAME!r}).predict(pd.read_csv({str(rows)!r})).tolist()))
import pipeline
print(pipeline.__file__)
"""
    env = {**os.environ, "MLFLOW_TRACKING_URI": store, "MLFLOW_ALLOW_PICKLE_DESERIALIZATION": "false"}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=env, capture_output=True, text=True, check=True
    )
    probabilities, module = done.stdout.splitlines()[-2:]
    assert json.loads(probabilities) == pytest.approx(expected[:20].tolist())
    assert "artifacts" in module  # the code came with the model


def test_an_altered_booster_is_refused_before_it_is_read(store: str, tmp_path: Path) -> None:
    folder = Path(mlflow.artifacts.download_artifacts(artifact_uri=NAME, dst_path=str(tmp_path)))
    booster = folder / "artifacts/booster.ubj"
    content = bytearray(booster.read_bytes())
    content[len(content) // 2] ^= 1
    booster.write_bytes(content)
    with pytest.raises(TrackingError, match=r"booster\.ubj is absent or altered"):
        load_parts(str(folder))
