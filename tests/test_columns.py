"""Checks and features see the same in a pandas frame and in an Arrow table."""

from __future__ import annotations

from decimal import Decimal
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.core.contract.checks import violations
from pipeline.core.contract.columns import as_numbers, equals, is_empty, names, pick, positions, rows_between
from pipeline.core.contract.schema import Field, Schema
from tests.testkit import PROJECT

SCHEMA = Schema.load(PROJECT / "conf/schema.yaml")


def cells(field: Field) -> st.SearchStrategy[Any]:
    """Valid and broken values of one field, as text: how every value arrives from a CSV file."""
    if not field.is_numeric:
        return st.sampled_from([*field.categories, "castle", "", None])
    return (
        st.floats(-10, 1e9).map(repr)
        | st.integers(-10, 200).map(str)
        | st.sampled_from(["x", "1e400", "-0", ".5", "5.", "1e3", " 7 ", "nan", "true", None])
    )


def rows() -> st.SearchStrategy[list[dict[str, Any]]]:
    return st.lists(
        st.fixed_dictionaries({name: cells(field) for name, field in SCHEMA.fields.items()}),
        min_size=1,
        max_size=5,
    )


@settings(max_examples=150, deadline=None)
@given(rows())
def test_frames_and_arrow_break_the_same_rules(applications: list[dict[str, Any]]) -> None:
    frame = pd.DataFrame(applications, columns=list(SCHEMA.fields))
    arrow = pa.table({name: pa.array([row[name] for row in applications], pa.string()) for name in SCHEMA.fields})
    found = [(item.column, item.rule, item.rows.tolist()) for item in violations(arrow, SCHEMA)]
    assert found == [(item.column, item.rule, item.rows.tolist()) for item in violations(frame, SCHEMA)]


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (pa.array([1, None, 3], pa.int8()), [1, np.nan, 3]),
        (pa.array([2**53 + 1], pa.int64()), [2.0**53]),
        (pa.array([0.5, float("nan")], pa.float32()), [0.5, np.nan]),
        (pa.array([Decimal("1.50")]), [1.5]),
        (pa.array(["1", " 2 ", "x", None, "+4", "1e3"]), [1, 2, np.nan, np.nan, 4, 1000]),
        (pa.array(["7", "8", "7"]).dictionary_encode(), [7, 8, 7]),
        (pa.array([None, None]), [np.nan, np.nan]),
        (pa.array([0], pa.timestamp("s")), [np.nan]),
        (pd.Series([1, None], dtype="Int64"), [1, np.nan]),
    ],
)
def test_numbers_of_every_type(values: Any, expected: list[float]) -> None:
    found = as_numbers(values)
    assert found.dtype == np.float64
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize(
    "values",
    [
        pa.array(["b", None, "z", "a"]),
        pa.array(["b", None, "z", "a"], pa.large_string()),
        pa.array(["b", None, "z", "a"]).dictionary_encode(),
        pd.Series(["b", None, "z", "a"]),
        pd.Series(["b", None, "z", "a"], dtype="category"),
        pd.Series(["b", None, 3, "a"], dtype=object),
    ],
)
def test_positions_among_categories(values: Any) -> None:
    assert positions(values, ("a", "b")).tolist() == [1, -1, -1, 0]


@pytest.mark.parametrize(
    ("values", "value", "expected"),
    [
        (pa.array(["ok", "bad", None]), "bad", [False, True, False]),
        (pd.Series(["ok", "bad", None]), "bad", [False, True, False]),
        (pa.array(["0", "1", "1.0", " 1", "x", None]), 1, [False, True, True, True, False, False]),
        (pa.array([0, 1, None], pa.int8()), 1, [False, True, False]),
        (pa.array([0.0, 1.0, float("nan")]), 0, [True, False, False]),
        (pa.array([True, False, None]), 1, [True, False, False]),
        (pd.Series([True, False]), 0, [False, True]),
        (pd.Series([0, 1]), 0, [True, False]),
        (pa.array([0, 1]), "1", [False, False]),
    ],
)
def test_rows_that_hold_a_value(values: Any, value: str | int, expected: list[bool]) -> None:
    found = equals(values, value)
    assert found.dtype == bool
    assert found.tolist() == expected


def test_number_is_no_category() -> None:
    assert positions(pa.array([1, 2]), ("1", "2")).tolist() == [-1, -1]


def test_nan_is_empty() -> None:
    assert is_empty(pa.array([1.0, float("nan"), None])).tolist() == [False, True, True]


def test_column_in_chunks_is_one_column() -> None:
    table = pa.table({"a": pa.chunked_array([[1, 2], [3]])})
    assert names(table) == ["a"]
    assert as_numbers(pick(table, "a")).tolist() == [1, 2, 3]
    assert pick(table, "b") is None


@pytest.mark.parametrize("table", [pd.DataFrame({"a": range(6)}), pa.table({"a": list(range(6))})])
def test_rows_between_two_positions(table: Any) -> None:
    column = pick(rows_between(table, 2, 4), "a")
    assert column is not None
    assert as_numbers(column).tolist() == [2, 3]
