"""Which tables and rows keep the contract, and what is said of those that do not."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest

from pipeline.core.contract.checks import BrokenRules, check_columns, column_notes, label_violations, violations
from pipeline.core.contract.schema import Schema
from pipeline.core.errors import DataError


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


def test_a_misspelt_column_is_told_with_the_name_that_is_meant(schema: Schema, applications: pd.DataFrame) -> None:
    table = applications.rename(columns={"income": "incom", "time": "Time_", "debt": "DEBT"}).assign(
        branch="north"
    )
    with pytest.raises(DataError, match=r"absent: time; .*: Time_ \(did you mean time\?\), incom, DEBT, branch;"):
        check_columns(table, schema, labelled=True)
    assert column_notes(table.rename(columns={"Time_": "time"}), schema) == [
        "ignored columns that the contract does not know: "
        "incom (did you mean income?), DEBT (did you mean debt?), branch",
        "optional columns are absent, so their values count as missing: income, debt",
    ]


def test_a_table_with_all_columns_and_no_others_needs_no_note(schema: Schema, applications: pd.DataFrame) -> None:
    assert column_notes(applications, schema) == []
    assert column_notes(applications.drop(columns="status"), schema) == []


def test_an_absent_target_matters_only_where_labels_are_needed(schema: Schema, applications: pd.DataFrame) -> None:
    table = applications.drop(columns="status")
    check_columns(table, schema, labelled=False)
    with pytest.raises(DataError, match="absent: status; rename them"):
        check_columns(table, schema, labelled=True)


def test_broken_rules_are_collected_over_batches(schema: Schema, applications: pd.DataFrame) -> None:
    broken = BrokenRules()
    assert not broken
    broken.raise_any("table.csv")
    first, second = applications.head(10).copy(), applications.head(10).copy()
    first.loc[[1, 2, 3], "age"] = 5
    second.loc[[0, 4, 5, 6], "age"] = 200
    second.loc[9, "time"] = 0.5
    broken.add(violations(first, schema), np.arange(1, 11))
    broken.add(violations(second, schema), np.arange(101, 111))
    broken.add_rows("the line must have 14 cells, received 3", [77])
    with pytest.raises(DataError) as error:
        broken.raise_any("table.csv")
    assert str(error.value).splitlines() == [
        "table.csv: breaks the contract (rows are counted from 1, without the header)",
        "  age: must be in [18, 100]: 7 rows, first at 2, 3, 4, 101, 105",
        "  time: must be in [1, 120]: 1 row, first at 110",
        "  time: must be a whole number: 1 row, first at 110",
        "  the line must have 14 cells, received 3: 1 row, first at 77",
    ]


@pytest.mark.parametrize(
    ("values", "rule", "rows"),
    [
        (["ok", "default"], "", []),
        (["ok", "Default", "", "default"], "status: must be ok or default", [False, True, True, False]),
        (["ok", None], "status: must be ok or default", [False, True]),
    ],
)
def test_strange_labels_are_found(schema: Schema, values: list[str | None], rule: str, rows: list[bool]) -> None:
    found = list(label_violations(pa.array(values), schema.target))
    assert [(str(item), item.rows.tolist()) for item in found] == ([(rule, rows)] if rule else [])
    assert all(item.column == "status" for item in found)


@pytest.mark.parametrize("kind", [pd.DataFrame, pa.table])
def test_truth_values_are_no_numbers(schema: Schema, kind: Any) -> None:
    rows = [True, False, None] if kind is pa.table else [True, False, True]
    (found,) = violations(kind({"age": rows}), schema)
    assert str(found) == "age: must be a number, not true or false"
    assert found.rows.tolist() == [row is not None for row in rows]


def test_absent_columns_do_not_hide_what_is_wrong_with_the_others(schema: Schema) -> None:
    found = violations(pa.table({"seniority": [1, 61], "price": [0.0, 5.0]}), schema)
    assert [(str(item), item.rows.tolist()) for item in found] == [
        ("seniority: must be in [0, 60]", [False, True]),
        ("price: must be in [1, 1e+06]", [True, False]),
    ]


@pytest.mark.parametrize(
    ("column", "value", "rule"),
    [
        ("age", 18, ""),
        ("age", 100, ""),
        ("age", 17.999, "must be in [18, 100]"),
        ("age", 100.001, "must be in [18, 100]"),
        ("age", float("inf"), "must be in [18, 100]"),
        ("age", 18.5, "must be a whole number"),
        ("age", None, "must not be missing"),
        ("expenses", 18.5, ""),
        ("income", None, ""),
        ("income", -0.1, "must be in [0, 100000]"),
        ("home", "rent", ""),
        ("home", None, "must not be missing"),
        ("job", "astronaut", "must be one of fixed, partime, freelance, others, unk"),
    ],
)
def test_each_rule_of_a_column(schema: Schema, column: str, value: Any, rule: str) -> None:
    found = [item.rule for item in violations(pa.table({column: [value]}), schema)]
    expected = [rule] if rule else []
    assert [item for item in found if item != "must be a whole number" or value == 18.5] == expected


def test_absent_columns_are_all_told(schema: Schema) -> None:
    with pytest.raises(DataError) as error:
        check_columns(pa.table({"home": ["rent"]}), schema, labelled=True)
    assert str(error.value) == (
        "required columns are absent: seniority, time, age, marital, records, job, expenses, amount, price, "
        "status; rename them, or adapt the schema file"
    )
