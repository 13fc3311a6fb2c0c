from __future__ import annotations

import json
import time
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from pipeline.core.contract.requests import RequestValidators, valid_columns
from pipeline.core.contract.schema import Schema
from pipeline.core.model.encoders import FrameEncoder, RowEncoder
from pipeline.core.model.features import make_vectorizer
from service.answering.core import Core
from service.answering.refusal import MOST_DETAILS, Refusal
from service.answering.served_model import ServedModel
from tests.testkit import PROJECT

SCHEMA = Schema.load(PROJECT / "conf/schema.yaml")
EXAMPLE = SCHEMA.example()
VALIDATORS = RequestValidators.of(SCHEMA)


@pytest.fixture
def model(core: Core) -> ServedModel:
    version = core.version()
    assert version is not None
    return version.model


def refused(model: ServedModel, body: bytes, *, many: bool = False) -> list[tuple[list[Any], str]]:
    """Where and by which rule a body is refused."""
    with pytest.raises(Refusal) as caught:
        model.parse_many(body) if many else model.parse(body)
    assert caught.value.status == 400
    answer = json.loads(caught.value.body)
    assert set(answer) == {"error", "detail"}
    assert all(set(item) == {"loc", "msg", "type"} for item in answer["detail"])
    return [(item["loc"], item["type"]) for item in answer["detail"]]


def with_value(text: str, field: str = "expenses") -> bytes:
    """The example with one value written as given."""
    members = {name: json.dumps(value) for name, value in EXAMPLE.items()} | {field: text}
    return ("{" + ",".join(f'"{name}":{value}' for name, value in members.items()) + "}").encode()


def test_the_example_of_the_contract_is_accepted(model: ServedModel) -> None:
    assert model.parse(json.dumps(EXAMPLE).encode()) == EXAMPLE


@pytest.mark.parametrize(
    ("text", "rule"),
    [
        ('"30"', "float_type"),
        ("true", "float_type"),
        ("null", "float_type"),
        ("[30]", "float_type"),
        ("{}", "float_type"),
        ("-1", "greater_than_equal"),
        ("1001", "less_than_equal"),
        ("1e400", "finite_number"),
        ("NaN", "finite_number"),
        ("Infinity", "finite_number"),
        ("-Infinity", "finite_number"),
        ("1" + "0" * 400, "finite_number"),
    ],
)
def test_a_number_must_be_a_number_in_range(model: ServedModel, text: str, rule: str) -> None:
    assert refused(model, with_value(text)) == [(["expenses"], rule)]


@pytest.mark.parametrize(
    ("field", "text", "rule"),
    [
        ("age", "30.5", "multiple_of"),
        ("age", "30.0000000001", "multiple_of"),
        ("seniority", "1e-300", "multiple_of"),
        ("home", '"castle"', "literal_error"),
        ("home", '"Owner"', "literal_error"),
        ("home", "1", "literal_error"),
        ("home", "null", "literal_error"),
        ("unheard_of", "1", "extra_forbidden"),
    ],
)
def test_other_rules_of_the_contract(model: ServedModel, field: str, text: str, rule: str) -> None:
    assert refused(model, with_value(text, field)) == [([field], rule)]


@pytest.mark.parametrize("absent", SCHEMA.fields)
def test_only_optional_fields_may_be_absent(model: ServedModel, absent: str) -> None:
    body = json.dumps({name: value for name, value in EXAMPLE.items() if name != absent}).encode()
    if SCHEMA.fields[absent].optional:
        assert absent not in model.parse(body)
    else:
        assert refused(model, body) == [([absent], "missing")]


@pytest.mark.parametrize(
    "body",
    [b"", b"{", b"nope", b"[1,2", b'{"age":}', b"\xff\xfe{}", b"\xef\xbb\xbf{}", b'{"age":1}x', b"[" * 5000],
)
def test_what_is_no_json_is_refused(model: ServedModel, body: bytes) -> None:
    assert {rule for _, rule in refused(model, body)} == {"json_invalid"}


@pytest.mark.parametrize("body", [b"[]", b"1", b'"text"', b"null", b"[{}]"])
def test_the_root_must_be_an_object(model: ServedModel, body: bytes) -> None:
    assert refused(model, body) == [([], "dict_type")]


def test_a_repeated_key_is_refused_by_name(model: ServedModel) -> None:
    body = json.dumps(EXAMPLE)[:-1] + ', "income": 900}'
    assert refused(model, body.encode()) == [(["income"], "repeated_key")]
    escaped = json.dumps(EXAMPLE)[:-1] + ', "inc\\u006fme": 900}'
    assert refused(model, escaped.encode()) == [(["income"], "repeated_key")]
    both = f"[{json.dumps(EXAMPLE)}, {body}]"
    assert refused(model, both.encode(), many=True) == [(["income"], "repeated_key")]


def test_ten_thousand_unknown_keys_get_a_short_answer(model: ServedModel) -> None:
    body = json.dumps({"k" * 1000 + str(number): number for number in range(10_000)}).encode()
    details = refused(model, body)
    assert len(details) == MOST_DETAILS
    assert all(len(str(loc)) < 200 for loc, _ in details)


def test_a_batch_is_refused_whole_with_row_and_field(model: ServedModel) -> None:
    rows = [dict(EXAMPLE) for _ in range(50)]
    rows[7]["home"] = "castle"
    rows[31]["age"] = 17
    del rows[31]["job"]
    found = refused(model, json.dumps(rows).encode(), many=True)
    assert sorted(found, key=str) == [
        ([31, "age"], "greater_than_equal"),
        ([31, "job"], "missing"),
        ([7, "home"], "literal_error"),
    ]


def test_a_batch_with_nan_names_its_place(model: ServedModel) -> None:
    body = b"[" + json.dumps(EXAMPLE).encode() + b"," + with_value("NaN") + b"]"
    assert refused(model, body, many=True) == [([1, "expenses"], "finite_number")]


@pytest.mark.parametrize("body", [b"{}", b"1", b"null", b'{"rows": []}'])
def test_a_batch_must_be_an_array(model: ServedModel, body: bytes) -> None:
    assert refused(model, body, many=True) == [([], "list_type")]


def test_a_batch_has_a_limit(model: ServedModel) -> None:
    body = b"[" + b",".join([json.dumps(EXAMPLE).encode()] * 10_001) + b"]"
    assert refused(model, body, many=True) == [([], "too_long")]


@pytest.mark.parametrize("unit", [b"[]", b"{}", b"0", b'""'])
def test_a_bomb_of_small_values_is_refused_before_it_is_parsed(model: ServedModel, unit: bytes) -> None:
    body = b"[" + b",".join([unit] * 2_000_000) + b"]"
    began = time.process_time()
    assert refused(model, body, many=True) == [([], "too_long")]
    assert time.process_time() - began < 0.5


def test_an_empty_batch_is_valid(model: ServedModel) -> None:
    assert model.parse_many(b"[]").rows == []


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


def test_encoding_many_rows_equals_encoding_each(rows: list[dict[str, Any]]) -> None:
    vectorizer = make_vectorizer(SCHEMA)
    sparse = [{name: value for name, value in row.items() if value is not None} for row in rows[:500]]
    for some in (rows, sparse, rows[:1], []):
        columns = valid_columns(some, SCHEMA)
        assert columns is not None
        by_columns = FrameEncoder(SCHEMA, vectorizer).transform_values(columns, len(some))
        by_rows = RowEncoder(SCHEMA, vectorizer).transform(some)
        np.testing.assert_array_equal(by_columns.view(np.uint32), by_rows.view(np.uint32))
