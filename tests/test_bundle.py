"""A model answers as it did when it was stored, or it is refused."""

from __future__ import annotations

import math

import numpy as np
import pandas as pd
import pytest
import xgboost as xgb

from pipeline.core.contract.schema import Schema
from pipeline.core.errors import StoreError
from pipeline.core.model.bundle import Bundle
from pipeline.core.model.encoders import FrameEncoder
from pipeline.core.model.features import make_vectorizer


@pytest.fixture(scope="module")
def bundle(schema: Schema, applications: pd.DataFrame) -> Bundle:
    """A small model, with the answers that it gives for two applications."""
    vectorizer = make_vectorizer(schema)
    matrix = FrameEncoder(schema, vectorizer).transform(applications)
    data = xgb.DMatrix(matrix, schema.labels(applications), nthread=1)
    booster = xgb.train({"objective": "binary:logistic", "max_depth": 2, "nthread": 1}, data, 5)
    rows = [schema.example(), {**schema.example(), "records": "yes"}]
    answers = booster.inplace_predict(FrameEncoder(schema, vectorizer).transform(pd.DataFrame(rows)))
    return Bundle(booster, vectorizer, schema, {"rows": rows, "probabilities": answers.tolist()})


def with_golden(bundle: Bundle, probabilities: list[float]) -> Bundle:
    golden = {"rows": bundle.golden["rows"], "probabilities": probabilities}
    return Bundle(bundle.booster, bundle.vectorizer, bundle.schema, golden)


def test_a_model_that_answers_as_recorded_is_accepted(bundle: Bundle) -> None:
    bundle.check_golden()
    assert bundle.golden_difference() == 0
    first, second = bundle.golden["probabilities"]
    assert first != second
    with_golden(bundle, [first + 0.9e-6, second]).check_golden()


@pytest.mark.parametrize("position", [0, 1])
@pytest.mark.parametrize("difference", [2e-6, -2e-6, 0.5, math.nan, math.inf])
def test_a_model_that_answers_otherwise_is_refused(bundle: Bundle, position: int, difference: float) -> None:
    recorded = list(bundle.golden["probabilities"])
    recorded[position] += difference
    with pytest.raises(StoreError, match=r"golden rows: .*promote the version again"):
        with_golden(bundle, recorded).check_golden()


def test_a_model_that_answers_nan_is_refused(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    nothing = np.full(2, np.nan, dtype=np.float32)
    monkeypatch.setattr(Bundle, "probabilities", lambda *_: nothing)
    with pytest.raises(StoreError, match="differ by nan"):
        bundle.check_golden()
