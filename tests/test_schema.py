from __future__ import annotations

import json
from typing import Any

import pandas as pd
import pytest
from pydantic import ValidationError

from pipeline.core.contract.checks import BrokenRules, check_columns, violations
from pipeline.core.contract.requests import RequestValidators, request_document
from pipeline.core.contract.schema import Schema, load_schema
from pipeline.core.errors import DataError


def validate(schema: Schema, **changes: Any) -> dict[str, Any]:
    return RequestValidators.of(schema).application.validate_json(json.dumps({**schema.example(), **changes}))


def test_example_is_valid(schema: Schema) -> None:
    assert validate(schema) == schema.example()


@pytest.mark.parametrize(
    ("changes", "where", "kind"),
    [
        ({"age": "30"}, "age", "float_type"),
        ({"age": True}, "age", "float_type"),
        ({"age": None}, "age", "float_type"),
        ({"age": 30.5}, "age", "multiple_of"),
        ({"age": 17}, "age", "greater_than_equal"),
        ({"amount": 1e12}, "amount", "less_than_equal"),
        ({"price": float("nan")}, "price", "finite_number"),
        ({"price": float("inf")}, "price", "finite_number"),
        ({"home": "tent"}, "home", "literal_error"),
        ({"home": None}, "home", "literal_error"),
        ({"salary": 3}, "salary", "extra_forbidden"),
    ],
)
def test_request_that_breaks_a_rule_is_refused(
    schema: Schema, changes: dict[str, Any], where: str, kind: str
) -> None:
    with pytest.raises(ValidationError) as error:
        validate(schema, **changes)
    found = [(detail["loc"][0], detail["type"]) for detail in error.value.errors()]
    assert found == [(where, kind)]


def test_every_broken_rule_of_a_request_is_told(schema: Schema) -> None:
    broken = {**schema.example(), "age": "x", "home": "tent", "salary": 1}
    del broken["time"]
    with pytest.raises(ValidationError) as error:
        RequestValidators.of(schema).application.validate_python(broken)
    found = {(detail["loc"][0], detail["type"]) for detail in error.value.errors()}
    assert found == {
        ("age", "float_type"),
        ("home", "literal_error"),
        ("salary", "extra_forbidden"),
        ("time", "missing"),
    }


@pytest.mark.parametrize("absent", ["age", "home"])
def test_required_field_must_be_there(schema: Schema, absent: str) -> None:
    body = schema.example()
    del body[absent]
    with pytest.raises(ValidationError, match="Field required"):
        RequestValidators.of(schema).application.validate_python(body)


@pytest.mark.parametrize("value", [None, 0, 0.0, 120])
def test_optional_field_may_be_null_or_absent(schema: Schema, value: float | None) -> None:
    assert validate(schema, income=value)["income"] == value
    body = schema.example()
    del body["income"]
    assert "income" not in RequestValidators.of(schema).application.validate_python(body)


def test_whole_number_may_be_written_with_a_point(schema: Schema) -> None:
    assert validate(schema, time=36.0)["time"] == 36


def test_documentation_names_unit_range_and_categories(schema: Schema) -> None:
    properties = request_document(schema)["properties"]
    assert properties["time"]["description"] == "Term of the requested loan. Unit: months."
    assert (properties["time"]["minimum"], properties["time"]["maximum"]) == (1, 120)
    assert properties["records"]["enum"] == ["yes", "no"]


def test_table_lists_every_broken_rule_with_rows(schema: Schema, applications: pd.DataFrame) -> None:
    table = applications.head(100).copy()
    table.loc[[3, 7], "age"] = 5
    table["home"] = table["home"].astype(object)
    table.loc[10, "home"] = "tent"
    table["amount"] = table["amount"].astype(object)
    table.loc[20, "amount"] = "much"
    table.loc[30, "time"] = None
    table.loc[40, "seniority"] = 2.5
    broken = BrokenRules()
    broken.add(violations(table, schema))
    assert broken.lines() == [
        "seniority: must be a whole number: 1 row, first at 41",
        "home: must be one of rent, owner, private, ignore, parents, other, unk: 1 row, first at 11",
        "time: must not be missing: 1 row, first at 31",
        "age: must be in [18, 100]: 2 rows, first at 4, 8",
        "amount: must be a number: 1 row, first at 21",
    ]


def test_absent_column_is_named_beside_the_unknown_ones(schema: Schema, applications: pd.DataFrame) -> None:
    table = applications.rename(columns={"time": "duration"})
    with pytest.raises(DataError, match=r"absent: time; columns unknown to the contract: duration"):
        check_columns(table, schema, labelled=True)


def test_contract_survives_the_journey_with_a_model(schema: Schema) -> None:
    rebuilt = load_schema(json.loads(json.dumps(schema.document())))
    assert rebuilt == schema
    assert rebuilt.digest == schema.digest
