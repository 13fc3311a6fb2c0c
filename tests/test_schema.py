from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import yaml
from pydantic import ValidationError

from pipeline.core.contract.checks import BrokenRules, check_columns, column_notes, violations
from pipeline.core.contract.requests import RequestValidators, request_document
from pipeline.core.contract.schema import Schema, load_schema
from pipeline.core.errors import ConfigError, DataError


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


def changed(schema: Schema, field: str, **changes: Any) -> dict[str, Any]:
    document = schema.document()
    document["fields"][field] |= changes
    return document


@pytest.mark.parametrize(
    ("field", "changes", "message"),
    [
        ("age", {"min": None}, "needs min <= max"),
        ("age", {"min": float("nan")}, "needs min <= max"),
        ("age", {"max": float("inf")}, "needs min <= max"),
        ("age", {"max": 1e39}, r"needs min <= max, both within .*: min is 18.0, max is 1e\+39"),
        ("age", {"min": 101}, "needs min <= max"),
        ("age", {"categories": ["old"]}, "only a field of kind category has categories; this one is integer"),
        ("age", {"example": 26.5}, r"the example must be a whole number in \[18, 100\]"),
        ("age", {"example": 17}, r"the example must be a whole number in \[18, 100\]"),
        ("age", {"example": 101}, r"the example must be a whole number in \[18, 100\]"),
        ("income", {"example": "much"}, r"the example must be a number in \[0, 100000\]"),
        ("income", {"missing": [-1]}, "codes in missing must lie within"),
        ("income", {"missing": [0, 100001]}, "codes in missing must lie within"),
        ("home", {"categories": "rent"}, "Input should be a valid list, received 'rent'"),
        ("home", {"categories": []}, "needs a list of distinct categories"),
        ("home", {"categories": ["rent", "rent", "owner"]}, "needs a list of distinct categories"),
        ("home", {"min": 0}, "belong to numbers"),
        ("home", {"max": 0}, "belong to numbers"),
        ("home", {"missing": [0]}, "belong to numbers"),
        ("home", {"monotone": "increasing"}, "belong to numbers"),
        ("home", {"example": "tent"}, "the example must be one of the categories"),
        ("home", {"categories": ["owner", "a:b"]}, "must not contain ':'"),
    ],
)
def test_incoherent_field_is_refused(schema: Schema, field: str, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=rf"fields\.{field}.*: .*{message}"):
        load_schema(changed(schema, field, **changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"fields": {"per cent": {}}}, "'per cent': names are letters, digits and underscores"),
        ({"ratios": {"2nd": {}}}, "'2nd': names are letters, digits and underscores"),
        ({"target": {"name": "age"}}, "fields.age: the target must not be a field"),
        ({"target": {"positive": "ok"}}, "target: negative and positive must be two different labels"),
        ({"ratios": {"age": {}}}, "ratios.age: a field or the target has that name"),
        ({"ratios": {"status": {}}}, "ratios.status: a field or the target has that name"),
        ({"ratios": {"rent": {"expression": "home * 2"}}}, "ratios.rent: home is neither a numeric feature nor"),
        ({"ratios": {"r": {"expression": "wealth + r"}}}, "ratios.r: wealth, r is neither a numeric feature nor"),
    ],
)
def test_incoherent_contract_is_refused(schema: Schema, changes: dict[str, Any], message: str) -> None:
    document = schema.document()
    new = {"fields": document["fields"]["price"], "ratios": {"expression": "amount", "description": "A ratio."}}
    for part, values in changes.items():
        if part == "target":
            document["target"] |= values
        else:
            document[part] |= {name: {**new[part], **value} for name, value in values.items()}
    with pytest.raises(ConfigError, match=re.escape(message)):
        load_schema(document)


def test_a_contract_of_audited_fields_alone_is_refused(schema: Schema) -> None:
    document = {**schema.document(), "ratios": {}}
    document["fields"] = {"marital": document["fields"]["marital"]}
    with pytest.raises(ConfigError, match="at least one must have the role feature"):
        load_schema(document)


@pytest.mark.parametrize("name", ["probability", "decision", "model", "rejected_row", "rejected_because"])
@pytest.mark.parametrize("place", ["field", "target"])
def test_a_contract_must_not_use_the_names_of_the_columns_that_score_adds(
    schema: Schema, tmp_path: Path, name: str, place: str
) -> None:
    document = schema.document()
    if place == "field":
        document["fields"][name] = document["fields"]["price"]
    else:
        document["target"]["name"] = name
    (tmp_path / "schema.yaml").write_text(yaml.safe_dump(document, sort_keys=False))
    with pytest.raises(ConfigError, match=f"schema.yaml: {name}: `score` adds columns of the names .*; rename"):
        Schema.load(tmp_path / "schema.yaml")
    # A model that was trained before the names were reserved still serves.
    assert load_schema(document).document() == document


def test_contract_survives_the_journey_with_a_model(schema: Schema) -> None:
    rebuilt = load_schema(json.loads(json.dumps(schema.document())))
    assert rebuilt == schema
    assert rebuilt.digest == schema.digest
