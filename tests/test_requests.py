"""Which request bodies keep the contract."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from pipeline.core.contract.requests import RequestValidators, request_document, valid_columns
from pipeline.core.contract.schema import Schema
from tests.testkit import PROJECT

SCHEMA = Schema.load(PROJECT / "conf/schema.yaml")
EXAMPLE = SCHEMA.example()
VALIDATORS = RequestValidators.of(SCHEMA)


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
        validated = VALIDATORS.batch.validator.validate_json(json.dumps(rows))
    except ValidationError as error:
        raise AssertionError(f"accepted too much: {rows}") from error
    assert validated == rows


def test_the_quick_check_accepts_the_shipped_data(rows: list[dict[str, Any]]) -> None:
    assert valid_columns(rows, SCHEMA) is not None
