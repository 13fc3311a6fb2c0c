from __future__ import annotations

import json
import time
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.core.contract.requests import request_validator
from pipeline.core.contract.schema import Schema, load_schema
from service.answering.bodies import BodyParser
from service.answering.core import Core
from service.answering.refusal import MOST_DETAILS, Refusal
from service.answering.served_model import ServedModel
from service.settings import LimitSettings
from tests.testkit import PROJECT

SCHEMA = Schema.load(PROJECT / "conf/schema.yaml")
EXAMPLE = SCHEMA.example()
LIMITS = yaml.safe_load((PROJECT / "conf/serve.yaml").read_text())["limits"]


def body_parser(schema: Schema) -> BodyParser:
    """The parser of a contract's bodies, within the shipped limits."""
    return BodyParser(schema, LimitSettings(**LIMITS), request_validator(schema))


@pytest.fixture
def model(core: Core) -> ServedModel:
    version = core.version()
    assert version is not None
    return version.model


def refused(model: ServedModel, body: bytes, *, many: bool = False) -> list[tuple[list[Any], str]]:
    """Where and by which rule a body is refused."""
    with pytest.raises(Refusal) as caught:
        list(model.parse_many(body)) if many else model.parse(body)
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
    [b"", b"{", b"nope", b"[1,2", b'{"age":}', b"\xff\xfe{}", b"\xef\xbb\xbf{}", b'{"age":1}x', b"[" * 4000],
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
    assert refused(model, both.encode(), many=True) == [([1, "income"], "repeated_key")]


def test_hundreds_of_unknown_keys_get_a_short_answer(model: ServedModel) -> None:
    body = json.dumps({f"k{number}": number for number in range(300)}).encode()
    assert len(refused(model, body)) == MOST_DETAILS
    ((loc, rule),) = refused(model, json.dumps(EXAMPLE)[:-1].encode() + b', "%b": 1}' % (b"k" * 60_000))
    assert rule == "extra_forbidden"
    assert len(str(loc)) < 200


def test_more_values_than_the_contract_can_hold_are_not_even_parsed(model: ServedModel) -> None:
    body = json.dumps({f"k{number}": number for number in range(5000)}).encode()
    assert refused(model, body) == [([], "too_long")]


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
    began = time.thread_time()
    details = refused(model, body, many=True)
    assert time.thread_time() - began < 0.2
    assert len(details) == MOST_DETAILS
    assert all(loc[0] < MOST_DETAILS for loc, _ in details)


def many(count: int) -> list[bytes]:
    """The example, so many times, as JSON: a batch of several parts."""
    return [json.dumps(EXAMPLE).encode()] * count


@pytest.mark.parametrize("separator", [b",", b", ", b"\n ,\r\n\t"])
@pytest.mark.parametrize("count", [1, 2, 1000, 10_000])
def test_a_batch_is_taken_in_parts(model: ServedModel, separator: bytes, count: int) -> None:
    parts = list(model.parse_many(b" [ " + separator.join(many(count)) + b" ]\n"))
    assert [row for part in parts for row in part.rows] == [EXAMPLE] * count
    assert all(part.columns is not None for part in parts)
    assert len(parts) <= 1 + count / 800


@pytest.mark.parametrize("index", [0, 1, 600, 1999, 2999])
@pytest.mark.parametrize(
    ("row", "where", "rule"),
    [
        (b'{"age": 1', [], "json_invalid"),
        (json.dumps(EXAMPLE).encode() + b"}", [], "json_invalid"),
        (b"[{}]", [], "dict_type"),
        (b"", [], "json_invalid"),
        (b"nope", [], "json_invalid"),
        (b'{"\xff": 1}', [], "json_invalid"),
        (b"[" * 3000 + b"]" * 3000, [], "json_invalid"),
        (with_value('"},{"', "home"), ["home"], "literal_error"),
        (with_value("NaN"), ["expenses"], "finite_number"),
        (with_value("1" + "0" * 400), ["expenses"], "finite_number"),
        (json.dumps(EXAMPLE).encode()[:-1] + b', "age": 30}', ["age"], "repeated_key"),
        (b'{"%b": 1}' % (b"k" * 600_000), [], "json_invalid"),
    ],
)
def test_a_bad_row_is_found_wherever_it_stands(
    model: ServedModel, index: int, row: bytes, where: list[str], rule: str
) -> None:
    rows = many(3000)
    rows[index] = row
    assert ([index, *where], rule) in refused(model, b"[" + b",".join(rows) + b"]", many=True)


@pytest.mark.parametrize("end", [b"", b",", b",]", b"]]", b"] x", b"}"])
def test_a_batch_must_end_as_an_array(model: ServedModel, end: bytes) -> None:
    for count in (0, 1, 3000):
        ((_, rule),) = refused(model, b"[" + b",".join(many(count)) + end, many=True)
        assert rule == "json_invalid" if count else {"json_invalid", "dict_type"}


def test_a_category_may_look_like_the_border_of_two_rows(model: ServedModel) -> None:
    document = SCHEMA.model_dump(mode="json")
    document["fields"]["home"]["categories"] = ["a},{b", "owner"]
    parser = body_parser(load_schema(document))
    rows = [{**EXAMPLE, "home": "a},{b"} for _ in range(3000)]
    parts = parser.batch(json.dumps(rows, separators=(",", ":")).encode())
    assert [row for part in parts for row in part.rows] == rows


@settings(max_examples=300, deadline=None)
@given(
    rows=st.lists(st.tuples(st.integers(0, 3), st.sampled_from(["", " ", "\n"])), max_size=8),
    cut=st.integers(20, 400),
)
def test_where_a_batch_is_cut_changes_nothing(rows: list[tuple[int, str]], cut: int) -> None:
    texts = [
        json.dumps(EXAMPLE),
        json.dumps({**EXAMPLE, "home": "},{"}),
        json.dumps({**EXAMPLE, "x": [{}, {}]}),
        "{}",
    ]
    body = ("[" + ",".join(blank + texts[kind] + blank for kind, blank in rows) + "]").encode()
    parser = body_parser(SCHEMA)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("service.answering.bodies._PART", cut)
        patch.setattr("service.answering.bodies._LONGEST_ROW", 2000)
        found = outcome(parser, body)
    assert found == [index for index, (kind, _) in enumerate(rows) if kind]


def outcome(parser: BodyParser, body: bytes) -> list[int]:
    """Rows of a batch that are refused."""
    try:
        list(parser.batch(body))
    except Refusal as refusal:
        return sorted({item["loc"][0] for item in refusal.detail})
    return []


def test_an_empty_batch_is_valid(model: ServedModel) -> None:
    assert list(model.parse_many(b"[]")) == []
