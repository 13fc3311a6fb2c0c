"""What the model sees of an application, and what each of its columns means."""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np
import pytest

from pipeline.core.contract.schema import Schema, load_schema
from pipeline.core.model.features import (
    feature_dict,
    feature_names_digest,
    field_shares,
    make_vectorizer,
    monotone_constraints,
)

FIELD = {"kind": "number", "min": 0, "max": 1000, "description": "A number.", "example": 1}


@pytest.fixture(scope="module")
def small() -> Schema:
    """A contract with one of everything."""
    return load_schema(
        {
            "name": "small",
            "target": {"name": "label", "negative": "good", "positive": "bad"},
            "fields": {
                "loan": {**FIELD, "monotone": "increasing"},
                "pay": {**FIELD, "monotone": "decreasing", "optional": True, "missing": [0, 999]},
                "months": {**FIELD, "kind": "integer"},
                "home": {"kind": "category", "categories": ["rent", "own"], "description": "H.", "example": "own"},
                "sex": {
                    "kind": "category", "categories": ["f", "m"], "description": "S.", "example": "f",
                    "role": "audit", "optional": True,
                },
                "branch": {**FIELD, "role": "audit"},
            },
            "ratios": {
                "rate": {"expression": "loan / months", "description": "R.", "monotone": "increasing"},
                "left": {"expression": "pay - rate", "description": "L.", "monotone": "decreasing"},
                "double": {"expression": "2 * loan", "description": "D."},
            },
        }
    )  # fmt: skip


def application(**changes: Any) -> dict[str, Any]:
    return {"loan": 120, "pay": 50, "months": 12, "home": "own", "sex": "m", "branch": 3, **changes}


def test_the_columns_come_from_the_contract_alone(small: Schema) -> None:
    vectorizer = make_vectorizer(small)
    assert vectorizer.feature_names_ == [
        "double", "home=own", "home=rent", "left", "loan", "months", "pay", "rate",
    ]  # fmt: skip
    matrix = vectorizer.transform([{}])
    assert (type(matrix), matrix.dtype) == (np.ndarray, np.float32)


def test_features_are_fields_and_ratios_and_nothing_audited(small: Schema) -> None:
    assert feature_dict(application(), small) == {
        "loan": 120.0, "pay": 50.0, "months": 12.0, "home": "own", "rate": 10.0, "left": 40.0, "double": 240.0,
    }  # fmt: skip
    assert all(type(value) in (float, str) for value in feature_dict(application(), small).values())


@pytest.mark.parametrize("changes", [{"pay": None}, {"pay": 0}, {"pay": 999.0}])
def test_what_is_not_stated_is_missing_and_so_is_what_is_made_of_it(
    small: Schema, changes: dict[str, Any]
) -> None:
    features = feature_dict(application(**changes), small)
    assert {name for name, value in features.items() if value != value} == {"pay", "left"}
    assert (features["loan"], features["rate"]) == (120, 10)


def test_an_absent_number_is_missing_and_an_absent_category_has_no_column(small: Schema) -> None:
    features = feature_dict({"loan": 1}, small)
    assert set(features) == {"loan", "pay", "months", "rate", "left", "double"}
    assert [name for name, value in features.items() if value == value] == ["loan", "double"]


@pytest.mark.parametrize(("loan", "seen"), [(3.4028234e38, True), (3.4028236e38, False), (-1e39, False)])
def test_a_ratio_beyond_float32_is_missing(small: Schema, loan: float, seen: bool) -> None:
    found = feature_dict(application(loan=loan, months=1), small)["rate"]
    assert (found == loan) if seen else (found != found)


def test_directions_of_fields_and_ratios_stand_at_their_columns(small: Schema) -> None:
    vectorizer = make_vectorizer(small)
    directions = dict(zip(vectorizer.feature_names_, monotone_constraints(small, vectorizer), strict=True))
    assert directions == {
        "loan": 1, "pay": -1, "months": 0, "home=own": 0, "home=rent": 0, "rate": 1, "left": -1, "double": 0,
    }  # fmt: skip


def test_the_shipped_contract_holds_these_directions(schema: Schema) -> None:
    vectorizer = make_vectorizer(schema)
    directions = dict(zip(vectorizer.feature_names_, monotone_constraints(schema, vectorizer), strict=True))
    assert {name for name, sign in directions.items() if sign == 1} == {
        "debt", "amount", "amount_to_price", "installment_to_income", "debt_to_assets", "expenses_to_income",
    }  # fmt: skip
    assert {name for name, sign in directions.items() if sign == -1} == {
        "seniority", "income", "assets", "coverage", "surplus", "net_worth",
    }  # fmt: skip


def test_a_column_is_shared_by_the_fields_that_it_is_made_of(small: Schema) -> None:
    vectorizer = make_vectorizer(small)
    shares = field_shares(small, vectorizer)
    by_column = {
        column: {name: round(float(share[position]), 6) for name, share in shares.items() if share[position]}
        for position, column in enumerate(vectorizer.feature_names_)
    }
    third = round(float(np.float32(1 / 3)), 6)
    assert by_column == {
        "loan": {"loan": 1}, "pay": {"pay": 1}, "months": {"months": 1},
        "home=own": {"home": 1}, "home=rent": {"home": 1}, "double": {"loan": 1},
        "rate": {"loan": 0.5, "months": 0.5}, "left": {"pay": third, "loan": third, "months": third},
    }  # fmt: skip
    assert {share.dtype for share in shares.values()} == {np.dtype(np.float32)}


def test_the_digest_of_the_columns_knows_their_order(small: Schema) -> None:
    vectorizer = make_vectorizer(small)
    digest = feature_names_digest(vectorizer)
    names = b"double\nhome=own\nhome=rent\nleft\nloan\nmonths\npay\nrate"
    assert digest == hashlib.sha256(names).hexdigest()
    vectorizer.feature_names_ = vectorizer.feature_names_[::-1]
    assert feature_names_digest(vectorizer) != digest
