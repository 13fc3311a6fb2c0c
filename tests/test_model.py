from __future__ import annotations

import json
import os
import random
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import url2pathname

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
from pipeline.registry.logged_model import log_model, open_model
from pipeline.registry.seal import DIGESTS_TAG
from tests.testkit import DATA

NAME = "models:/credit_risk_model/1"


@pytest.fixture(scope="module")
def booster(schema: Schema, applications: pd.DataFrame) -> xgb.Booster:
    """A small real booster."""
    matrix = FrameEncoder(schema, make_vectorizer(schema)).transform(applications)
    return xgb.train({"objective": "binary:logistic"}, xgb.DMatrix(matrix, label=schema.labels(applications)), 10)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory, booster: xgb.Booster, schema: Schema) -> Iterator[str]:
    """A tracking store of this module's own, which holds one version of the model."""
    folder = tmp_path_factory.mktemp("models")
    address = f"sqlite:///{folder}/mlflow.db"
    mlflow.set_tracking_uri(address)
    artifacts = (folder / "artifacts").as_uri()
    mlflow.set_experiment(experiment_id=mlflow.create_experiment("models", artifact_location=artifacts))
    with mlflow.start_run():
        log_model(booster, make_vectorizer(schema), schema, metadata={"colour": "blue"})
    yield address
    mlflow.set_tracking_uri(None)


@pytest.fixture(scope="module")
def expected(booster: xgb.Booster, schema: Schema, applications: pd.DataFrame) -> np.ndarray:
    """Probabilities of all rows, as the booster itself gives them."""
    matrix = FrameEncoder(schema, make_vectorizer(schema)).transform(applications)
    return np.asarray(booster.inplace_predict(matrix))


@pytest.mark.parametrize("uri", [NAME, "models:/credit_risk_model@candidate"])
def test_parts_come_back_as_they_were_logged(store: str, uri: str, schema: Schema, booster: xgb.Booster) -> None:
    opened = open_model(uri)
    parts = opened.parts
    assert parts.schema == schema
    assert parts.vectorizer.vocabulary_ == make_vectorizer(schema).vocabulary_
    assert parts.booster.save_raw("ubj") == booster.save_raw("ubj")
    assert opened.uri == NAME
    assert opened.golden["probabilities"] == pytest.approx(
        parts.probabilities(opened.golden["rows"]).tolist(), abs=0
    )


@pytest.mark.parametrize(
    ("uri", "said"),
    [
        ("models:/credit_risk_model/9", "name a model that is registered"),
        ("models:/other@candidate", "name a model that is registered"),
        ("runs:/0/model", "name a model that is registered"),
        ("nowhere", "must be models:/NAME/VERSION"),
        ("models:/", "must be models:/NAME/VERSION"),
    ],
)
def test_an_absent_model_is_one_readable_error(store: str, uri: str, said: str) -> None:
    with pytest.raises(TrackingError, match=said):
        open_model(uri)


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


@pytest.fixture
def logged(store: str) -> Iterator[Path]:
    """Folder of the logged model in the artifact store; put back as it was afterwards."""
    client = mlflow.MlflowClient()
    folder = Path(url2pathname(urlsplit(client.get_model_version_download_uri("credit_risk_model", "1")).path))
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    yield folder
    for path in set(folder.rglob("*")) - set(before):
        if path.is_file():
            path.unlink()
    for path, content in before.items():
        path.write_bytes(content)


def test_one_changed_byte_in_any_file_of_the_model_is_refused_and_named(logged: Path) -> None:
    files = sorted(path for path in logged.rglob("*") if path.is_file() and path.name != "registered_model_meta")
    code = [file for file in files if "code" in file.parts]
    others = [file for file in files if "code" not in file.parts]
    names = {file.name for file in others}
    assert names >= {"MLmodel", "pyfunc.py", "booster.ubj", "vectorizer.skops", "golden_rows.json"}
    for file in [*others, *random.Random(0).sample(code, 5)]:
        content = bytearray(file.read_bytes() or b"x")
        content[len(content) // 2] ^= 1
        whole = file.read_bytes()
        file.write_bytes(content)
        name = file.relative_to(logged).as_posix()
        with pytest.raises(TrackingError, match=rf"{re.escape(name)} was changed"):
            open_model(NAME)
        file.write_bytes(whole)
    assert open_model(NAME).uri == NAME


def test_a_file_that_is_added_or_missing_is_refused_and_named(logged: Path) -> None:
    (logged / "code/sitecustomize.py").write_text("raise SystemExit('this ran')")
    with pytest.raises(TrackingError, match=r"code/sitecustomize\.py was added"):
        open_model(NAME)
    (logged / "code/sitecustomize.py").unlink()
    (logged / "artifacts/golden_rows.json").unlink()
    with pytest.raises(TrackingError, match=r"artifacts/golden_rows\.json is missing"):
        open_model("models:/credit_risk_model@candidate")


def test_a_model_without_recorded_digests_is_refused_with_the_cure(store: str) -> None:
    client = mlflow.MlflowClient()
    model_id = client.get_model_version("credit_risk_model", "1").source.removeprefix("models:/")
    tags = client.get_logged_model(model_id).tags
    client.delete_logged_model_tag(model_id, DIGESTS_TAG)
    with pytest.raises(TrackingError, match="Run `python -m pipeline train` again"):
        open_model(NAME)
    client.set_logged_model_tags(model_id, {DIGESTS_TAG: tags[DIGESTS_TAG]})
    assert open_model(NAME).uri == NAME
