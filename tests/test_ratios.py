"""The grammar of ratios: what a contract may ask for, and that it means the same for a row and for a table."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from pipeline.core.contract.ratios import FLOAT32_MAX, MOST_CHARACTERS, MOST_LEVELS, Ratio
from pipeline.core.contract.schema import Schema
from pipeline.core.model.encoders import FrameEncoder, RowEncoder
from pipeline.core.model.features import Matrix, feature_dict, make_vectorizer

NAMES = ("a", "b", "c")


def ratio(expression: str) -> Ratio:
    return Ratio(expression=expression, description="A ratio.")


def contract(*expressions: str) -> Schema:
    number = {"kind": "number", "min": -FLOAT32_MAX, "max": FLOAT32_MAX, "description": "A number.", "example": 1}
    ratios = {
        f"r{position}": {"expression": text, "description": "A ratio."}
        for position, text in enumerate(expressions)
    }
    return Schema.model_validate(
        {
            "name": "numbers",
            "target": {"name": "label", "negative": 0, "positive": 1},
            "fields": {name: {**number, "optional": True, "missing": [7.0]} for name in NAMES},
            "ratios": ratios,
        }
    )


def as_table(values: list[dict[str, Any]]) -> pa.Table:
    return pa.table(
        {
            name: pa.array([None if row[name] is None else float(row[name]) for row in values], pa.float64())
            for name in NAMES
        }
    )


def encoded(schema: Schema, values: list[dict[str, Any]]) -> Matrix:
    """The matrix of some applications, which every encoder must give bit for bit."""
    vectorizer = make_vectorizer(schema)
    expected: Matrix = vectorizer.transform([feature_dict(row, schema) for row in values])
    frames = FrameEncoder(schema, vectorizer)
    columns = {name: [math.nan if row[name] is None else row[name] for row in values] for name in NAMES}
    for found in (
        RowEncoder(schema, vectorizer).transform(values),
        frames.transform(as_table(values)),
        frames.transform_values(columns, len(values)),
    ):
        np.testing.assert_array_equal(found.view(np.uint32), expected.view(np.uint32))
    return expected


@pytest.mark.parametrize(
    ("expression", "values", "expected"),
    [
        ("a + b * c", (1, 2, 3), 7),
        ("(a + b) * c", (1, 2, 3), 9),
        ("a - b - c", (1, 2, 3), -4),
        ("a / b / c", (12, 2, 3), 2),
        ("-a", (2, 0, 0), -2),
        ("a * -2.5", (2, 0, 0), -5),
        ("a * 1_000", (2, 0, 0), 2000),
        ("a / b", (1, 0, 0), math.nan),
        ("a / b", (1, -0.0, 0), math.nan),
        ("a + 1 / 0", (1, 0, 0), math.nan),
        ("a * 1e308 * 1e308", (1, 0, 0), math.nan),
        ("a * (1e308 * 1e308)", (1, 0, 0), math.nan),
        ("a * b", (1e30, 1e30, 0), math.nan),
        ("a * a", (None, 0, 0), math.nan),
        ("a * a * a / a", (3 * 10**38, 0, 0), math.nan),  # whole numbers overflow as floats do
        (
            "a * b - a * c",
            (10**17 + 1, 10**17 + 1, 10**17),
            0,
        ),
        ("b - a", (7, 0, 0), math.nan),  # 7 is the code for "not stated"
    ],
)
def test_arithmetic(expression: str, values: tuple[Any, ...], expected: float) -> None:
    found = encoded(contract(expression), [dict(zip(NAMES, values, strict=True))])
    assert found[0, -1] == pytest.approx(expected, nan_ok=True)


def test_a_ratio_may_use_the_ratios_above_it() -> None:
    assert feature_dict({"a": 6, "b": 3, "c": 4}, contract("a / b", "r0 * c"))["r1"] == 8


@pytest.mark.parametrize(
    ("expression", "message"),
    [
        ("a * 1e999", "a number beyond 1.8e308"),
        ("a - -1e400", ", the expression holds a number beyond 1.8e308, the largest there is; use a smaller one "),
        (f"a * {'9' * 400}", "a number beyond 1.8e308"),
        ("a * 1j", "only names, numbers"),
        ("a * True", "only names, numbers"),
        ("a * 'x'", "only names, numbers"),
        ("a * b'x'", "only names, numbers"),
        ("a * None", "only names, numbers"),
        ("a * ...", "only names, numbers"),
        ("a ** 2", "only names, numbers"),
        ("a // b", "only names, numbers"),
        ("a % b", "only names, numbers"),
        ("+a", "only names, numbers"),
        ("~a", "only names, numbers"),
        ("not a", "only names, numbers"),
        ("a < b", "only names, numbers"),
        ("a if b else c", "only names, numbers"),
        ("a and b", "only names, numbers"),
        ("abs(a)", "only names, numbers"),
        ("a.real", "only names, numbers"),
        ("a[0]", "only names, numbers"),
        ("[a]", "only names, numbers"),
        ("lambda: a", "only names, numbers"),
        ("(a := b)", "only names, numbers"),
        ("f'{a}'", "only names, numbers"),
        ("__import__('os')", "only names, numbers"),
        ("", "not arithmetic"),
        ("a +", "not arithmetic"),
        ("a; b", "not arithmetic"),
        ("a\0", "not arithmetic"),
        ("\ud800", "not arithmetic"),
        ("(" * 300 + "a" + ")" * 300, "not arithmetic"),
        ("1 / 2", "uses no field"),
        ("-" * (MOST_LEVELS + 1) + "a", f"over {MOST_LEVELS} operations inside one another"),
        ("-" * (MOST_CHARACTERS - 1) + "a", f"over {MOST_LEVELS} operations inside one another"),
        (" + ".join(["a"] * (MOST_LEVELS + 2)), f"over {MOST_LEVELS} operations inside one another"),
        ("a" + " " * MOST_CHARACTERS, f"{MOST_CHARACTERS + 1} characters, of at most {MOST_CHARACTERS}"),
        ("(" * 100_000, "100000 characters"),
    ],
)
def test_what_is_no_arithmetic_is_refused(expression: str, message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        ratio(expression)


def test_the_longest_and_the_deepest_expression_work() -> None:
    deep = "-" * (MOST_LEVELS - 2) + "a"
    long = f"a * 1.{'0' * (MOST_CHARACTERS - 6)}"
    schema = contract(deep, long)
    features = feature_dict({"a": 3}, schema)
    assert (features["r0"], features["r1"]) == (3, 3)
    matrix = FrameEncoder(schema, make_vectorizer(schema)).transform(pa.table({"a": [3.0]}))
    assert matrix[0, -2:].tolist() == [3, 3]


@pytest.mark.parametrize("text", ["0", "1", "2.5", "1e-300", "1e308", "5e-324", "1e999", "9" * 400, "1j", "True"])
def test_a_constant_is_accepted_only_if_it_is_a_finite_number(text: str) -> None:
    number = complex(text) if "j" in text else float(eval(text)) if len(text) < 300 else math.inf
    accepted = isinstance(number, float) and math.isfinite(number) and text != "True"
    if accepted:
        assert ratio(f"a * {text}").names == ("a",)
    else:
        with pytest.raises(ValidationError):
            ratio(f"a * {text}")


# Any expression: of the grammar, near it, or of another planet.

constants = (
    st.floats(allow_nan=False, allow_infinity=False).map(repr)
    | st.integers().map(str)
    | st.sampled_from(["0", "1e308", "9" * 310])
)
names, operators = st.sampled_from(NAMES), st.sampled_from("+-*/")
leaves = names | constants
expressions = st.recursive(
    leaves,
    lambda inner: (
        st.builds("({} {} {})".format, inner, operators, inner)
        | st.builds("{} {} {}".format, inner, operators, inner)
        | inner.map("-({})".format)
    ),
    max_leaves=12,
)
odd = st.text(alphabet="abc0123456789.e+-*/() \t_j'[]:=<>!%&|^~@,\n\0é", max_size=40) | st.text(max_size=20)
numbers = (
    st.none()
    | st.floats(-FLOAT32_MAX, FLOAT32_MAX)
    | st.integers(-(10**18), 10**18)
    | st.sampled_from([0, -0.0, 7, 7.0, 1e-300, 5e-324, FLOAT32_MAX, -FLOAT32_MAX, 3 * 10**38])
)
rows = st.lists(st.fixed_dictionaries(dict.fromkeys(NAMES, numbers)), min_size=1, max_size=4)


@settings(max_examples=300, deadline=None)
@given(st.lists(st.builds("{} {} ({})".format, names, operators, expressions), min_size=1, max_size=2), rows)
def test_an_accepted_expression_means_the_same_by_rows_and_by_columns(
    texts: list[str], values: list[dict[str, Any]]
) -> None:
    try:
        schema = contract(*texts)
    except ValidationError:  # it uses no field, or a number is too large
        return
    assert not np.isinf(encoded(schema, values)).any()


@settings(max_examples=500, deadline=None)
@given(odd)
def test_odd_text_is_refused_or_means_the_same_by_rows_and_by_columns(text: str) -> None:
    try:
        schema = contract(text)
    except ValidationError:
        return
    encoded(schema, [{"a": 3, "b": 0.0, "c": None}])
