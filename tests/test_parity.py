"""One feature path: every encoder gives DictVectorizer's matrix, bit for bit."""

from __future__ import annotations

import json
from typing import Any

import httpx
import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.feature_extraction import DictVectorizer

from pipeline.core.contract.schema import Field, Schema
from pipeline.core.model.encoders import FrameEncoder, RowEncoder
from pipeline.core.model.features import Matrix, feature_dict, make_vectorizer
from tests.testkit import DATA, PROJECT
from tests.testkit.projects import Project

SCHEMA = Schema.load(PROJECT / "conf/schema.yaml")
VECTORIZER = make_vectorizer(SCHEMA)


def reference(rows: list[dict[str, Any]], vectorizer: DictVectorizer = VECTORIZER) -> Matrix:
    matrix: Matrix = vectorizer.transform([feature_dict(row, SCHEMA) for row in rows])
    return matrix


def assert_same_bits(found: Matrix, expected: Matrix) -> None:
    assert found.dtype == expected.dtype == np.float32
    assert found.shape == expected.shape
    np.testing.assert_array_equal(found.view(np.uint32), expected.view(np.uint32))


def values(field: Field) -> st.SearchStrategy[Any]:
    """Valid values, edges first, and what the encoders must survive beyond the contract."""
    if not field.is_numeric:
        return st.sampled_from([*field.categories, "never seen"]) | st.none()
    low, high = field.bounds
    edges = st.sampled_from([low, high, *field.missing, 0.0, -0.0, 1e-300, 5e-324])
    return edges | st.floats(low, high) | st.integers(int(low), int(high)) | st.none()


def application() -> st.SearchStrategy[dict[str, Any]]:
    fields = {name: values(field) for name, field in SCHEMA.fields.items()}
    return st.fixed_dictionaries({}, optional=fields)


def as_table(rows: list[dict[str, Any]]) -> pa.Table:
    columns = {
        name: pa.array(
            [None if row.get(name) is None else float(row[name]) for row in rows]
            if field.is_numeric
            else [row.get(name) for row in rows],
            type=pa.float64() if field.is_numeric else pa.string(),
        )
        for name, field in SCHEMA.fields.items()
    }
    return pa.table(columns)


@settings(max_examples=300, deadline=None)
@given(st.lists(application(), min_size=1, max_size=6))
def test_encoders_equal_dictvectorizer_bit_for_bit(rows: list[dict[str, Any]]) -> None:
    expected = reference(rows)
    table = as_table(rows)
    frames = FrameEncoder(SCHEMA, VECTORIZER)
    assert_same_bits(RowEncoder(SCHEMA, VECTORIZER).transform(rows), expected)
    assert_same_bits(frames.transform(table), expected)
    assert_same_bits(frames.transform(table.to_pandas()), expected)


def test_a_vocabulary_learnt_from_few_rows_is_followed_too() -> None:
    """A DictVectorizer that never saw a category ignores it; so do the encoders."""
    rows = [SCHEMA.example(), {**SCHEMA.example(), "home": "rent", "job": "fixed"}]
    few = DictVectorizer(dtype=np.float32, sparse=False).fit([feature_dict(SCHEMA.example(), SCHEMA)])
    expected = reference(rows, few)
    assert expected.shape[1] < len(VECTORIZER.feature_names_)
    assert_same_bits(RowEncoder(SCHEMA, few).transform(rows), expected)
    assert_same_bits(FrameEncoder(SCHEMA, few).transform(as_table(rows)), expected)


@pytest.mark.parametrize("form", ["plain", "categorical", "arrow", "dictionary"])
def test_every_row_of_the_data_in_every_form_of_table(applications: pd.DataFrame, form: str) -> None:
    expected = reference(json.loads(applications.to_json(orient="records")))
    categories = [name for name, field in SCHEMA.fields.items() if not field.is_numeric]
    categorical = applications.astype(dict.fromkeys(categories, "category"))
    table = {
        "plain": applications,
        "categorical": categorical,
        "arrow": pa.Table.from_pandas(applications),
        "dictionary": pa.Table.from_pandas(categorical),
    }[form]
    assert_same_bits(FrameEncoder(SCHEMA, VECTORIZER).transform(table), expected)


@pytest.mark.parametrize("code", [0, 0.0, None])
def test_unstated_income_means_the_same_in_every_spelling(code: float | None) -> None:
    absent = SCHEMA.example()
    del absent["income"]
    assert_same_bits(reference([{**SCHEMA.example(), "income": code}]), reference([absent]))


def test_marital_status_does_not_enter_the_model() -> None:
    assert not any("marital" in name for name in VECTORIZER.feature_names_)
    single, married = ({**SCHEMA.example(), "marital": value} for value in ("single", "married"))
    assert_same_bits(reference([single]), reference([married]))


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
