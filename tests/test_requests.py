"""Which request bodies keep the contract."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from pipeline.core.contract.requests import request_document, request_validator, valid_columns
from pipeline.core.contract.schema import Schema, load_schema
from tests.testkit import PROJECT

SCHEMA = Schema.load(PROJECT / "conf/schema.yaml")
EXAMPLE = SCHEMA.example()
VALIDATOR = request_validator(SCHEMA)


def validate(schema: Schema, **changes: Any) -> dict[str, Any]:
    valid: dict[str, Any] = request_validator(schema).validate_json(json.dumps({**schema.example(), **changes}))
    return valid


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
        request_validator(schema).validate_python(broken)
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
        request_validator(schema).validate_python(body)


@pytest.mark.parametrize("value", [None, 0, 0.0, 120])
def test_optional_field_may_be_null_or_absent(schema: Schema, value: float | None) -> None:
    assert validate(schema, income=value)["income"] == value
    body = schema.example()
    del body["income"]
    assert "income" not in request_validator(schema).validate_python(body)


def test_a_fraction_is_told_what_it_must_be(schema: Schema) -> None:
    with pytest.raises(ValidationError, match="should be a multiple of 1 "):
        validate(schema, age=30.5)


def test_whole_number_may_be_written_with_a_point(schema: Schema) -> None:
    assert validate(schema, time=36.0)["time"] == 36


def test_the_documentation_says_all_that_the_contract_does(schema: Schema) -> None:
    document = schema.document()
    document["fields"]["home"] |= {"optional": True}
    described = request_document(load_schema(document))
    assert (described["title"], described["type"], described["additionalProperties"]) == (
        "Application",
        "object",
        False,
    )
    assert described["required"] == [
        "seniority", "time", "age", "marital", "records", "job", "expenses", "amount", "price",
    ]  # fmt: skip
    properties = described["properties"]
    assert list(properties) == list(schema.fields)
    assert properties["time"] == {
        "title": "Time", "description": "Term of the requested loan. Unit: months.", "example": 36,
        "type": "integer", "minimum": 1, "maximum": 120,
    }  # fmt: skip
    assert properties["debt"] == {
        "title": "Debt", "description": "Debt outstanding. Unit: thousand pesetas.", "example": 3000,
        "type": "number", "minimum": 0, "maximum": 10000000, "nullable": True,
    }  # fmt: skip
    assert properties["home"] == {
        "title": "Home", "description": "Housing of the applicant.", "example": "owner", "type": "string",
        "enum": ["rent", "owner", "private", "ignore", "parents", "other", "unk"], "nullable": True,
    }  # fmt: skip


@pytest.mark.parametrize("changes", [{"age": 17.123}, {"age": "secret"}, {"odd": "secret"}, {"home": "secret"}])
def test_an_error_does_not_show_the_applicants_value(schema: Schema, changes: dict[str, Any]) -> None:
    with pytest.raises(ValidationError) as error:
        validate(schema, **changes)
    assert "17.123" not in str(error.value)
    assert "secret" not in str(error.value)
    assert "input" not in str(error.value).casefold().replace("input should", "").replace("extra inputs", "")


ROW = {"age": 30, "debt": 5.5, "home": "own"}


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        ([], {"age": [], "debt": [], "home": []}),
        ([ROW], {"age": [30], "debt": [5.5], "home": ["own"]}),
        ([ROW, {**ROW, "debt": None}], {"age": [30, 30], "debt": [5.5, None], "home": ["own", "own"]}),
        ([ROW, {"age": 18, "home": "rent"}], {"age": [30, 18], "debt": [5.5, None], "home": ["own", "rent"]}),
        ([{"age": 100.0, "home": None}, ROW], {"age": [100, 30], "debt": [None, 5.5], "home": [None, "own"]}),
        ([{"debt": 0, "age": 18, "home": "own"}], {"age": [18], "debt": [0], "home": ["own"]}),
        ([{"debt": 10}], None),
        ([ROW, {**ROW, "age": None}], None),
        ([{**ROW, "age": 17.99}], None),
        ([{**ROW, "age": 101}, ROW], None),
        ([ROW, {**ROW, "age": 30.5}], None),
        ([{**ROW, "debt": -0.01}], None),
        ([{**ROW, "debt": 10.01}, ROW], None),
        ([ROW, {**ROW, "debt": "5"}], None),
        ([ROW, {**ROW, "debt": True}], None),
        ([{**ROW, "debt": 10**400}], None),
        ([{**ROW, "debt": [5]}], None),
        ([{**ROW, "debt": float("nan")}], None),
        ([ROW, {**ROW, "debt": float("inf")}], None),
        ([{**ROW, "home": "tent"}], None),
        ([{**ROW, "home": ["own"]}], None),
        ([{**ROW, "home": 1}], None),
        ([ROW, {**ROW, "odd": 1}], None),
        ([{"age": 30, "home": "own", "odd": 1}], None),
        ([ROW, [1, 2, 3]], None),
        ([ROW, None], None),
        (["abc"], None),
    ],
)
def test_batches_are_checked_by_columns(rows: list[Any], expected: dict[str, list[Any]] | None) -> None:
    number = {"kind": "number", "min": 0, "max": 10, "optional": True, "description": "D.", "example": 1}
    contract = load_schema(
        {
            "name": "small",
            "target": {"name": "label", "negative": 0, "positive": 1},
            "fields": {
                "age": {"kind": "integer", "min": 18, "max": 100, "description": "A.", "example": 30},
                "debt": number,
                "home": {
                    "kind": "category", "categories": ["own", "rent"], "description": "H.", "example": "own",
                    "optional": True,
                },
            },
        }
    )  # fmt: skip
    found = valid_columns(rows, contract)
    if expected is None:
        assert found is None
        return
    assert found is not None
    plain = {name: [None if value != value else value for value in values] for name, values in found.items()}
    assert plain == expected
    assert all(np.asarray(found[name]).dtype == np.float64 for name in ("age", "debt"))


def test_a_contract_of_one_field_is_checked_by_columns_too() -> None:
    field = {"kind": "number", "min": 0, "max": 10, "description": "D.", "example": 1}
    target = {"name": "label", "negative": 0, "positive": 1}
    contract = load_schema({"name": "one", "target": target, "fields": {"debt": field}})
    found = valid_columns([{"debt": 1}, {"debt": 2}], contract)
    assert found is not None
    assert list(found["debt"]) == [1, 2]
    assert valid_columns([{"debt": 1}, {}], contract) is None


def values() -> st.SearchStrategy[Any]:
    """Valid and almost valid values."""
    edges: st.SearchStrategy[Any] = st.sampled_from(
        [0, -0.0, 1, 18, 0.5, 30.0000000001, 1e300, 2**63, 2**64, -1, True, None, "30", [], {}]
    )
    categories = st.sampled_from([name for field in SCHEMA.fields.values() for name in field.categories])
    return edges | categories | st.integers(-1, 200) | st.floats(allow_nan=False, allow_infinity=False)


def almost_valid() -> st.SearchStrategy[list[dict[str, Any]]]:
    changes = st.dictionaries(st.sampled_from([*SCHEMA.fields, "odd"]), values(), max_size=2)
    return st.lists(st.builds(lambda changed: {**EXAMPLE, **changed}, changes), max_size=4)


@settings(max_examples=500, deadline=None)
@given(rows=almost_valid(), absent=st.sampled_from([*SCHEMA.fields]))
def test_the_quick_check_accepts_only_what_the_validator_accepts(rows: list[dict[str, Any]], absent: str) -> None:
    for row in rows[:1]:
        row.pop(absent)
    if valid_columns(rows, SCHEMA) is None:
        return
    try:
        validated = [VALIDATOR.validate_json(json.dumps(row)) for row in rows]
    except ValidationError as error:
        raise AssertionError(f"accepted too much: {rows}") from error
    assert validated == rows


def test_the_quick_check_accepts_the_shipped_data(rows: list[dict[str, Any]]) -> None:
    assert valid_columns(rows, SCHEMA) is not None
