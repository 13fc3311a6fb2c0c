from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
import yaml

from pipeline.core.contract.schema import Schema, load_schema
from pipeline.core.errors import ConfigError

NO_CATEGORIES = "^a field of kind category needs a list of distinct categories$"
NO_NUMBER = "^min, max, missing and monotone belong to numbers, not to kind category$"
COLON = r"^categories must not contain ':' \(repeated keys are found by counting colons\)$"


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
        ("home", {"categories": []}, NO_CATEGORIES),
        (
            "home",
            {"categories": ["rent", "rent", "owner"]},
            NO_CATEGORIES,
        ),
        ("home", {"min": 0}, NO_NUMBER),
        ("home", {"max": 0}, NO_NUMBER),
        ("home", {"missing": [0]}, NO_NUMBER),
        (
            "home",
            {"monotone": "increasing"},
            NO_NUMBER,
        ),
        ("home", {"example": "tent"}, "^the example must be one of the categories$"),
        (
            "home",
            {"categories": ["owner", "a:b"]},
            COLON,
        ),
    ],
)
def test_incoherent_field_is_refused(schema: Schema, field: str, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        load_schema(changed(schema, field, **changes))
    where, _, said = str(error.value).removeprefix("the model's contract: ").partition(": ")
    assert where.startswith(f"fields.{field}")
    assert re.search(message, said)


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


@pytest.mark.parametrize(
    "table", [pd.DataFrame({"status": ["ok", "default"]}), pa.table({"status": ["ok", "default"]})]
)
def test_the_positive_label_counts_as_one(schema: Schema, table: Any) -> None:
    labels = schema.labels(table)
    assert labels.dtype == np.float32
    assert labels.tolist() == [0, 1]


def test_a_contract_travels_as_plain_values_without_its_defaults() -> None:
    document = {
        "name": "small",
        "target": {"name": "label", "negative": 0, "positive": 1},
        "fields": {
            "age": {
                "kind": "integer",
                "min": 18.0,
                "max": 100.0,
                "description": "A.",
                "example": 30,
                "missing": [99],
            },
            "home": {"kind": "category", "categories": ["own", "rent"], "description": "H.", "example": "own"},
        },
        "ratios": {"half": {"expression": "age / 2", "description": "Half."}},
    }
    found = load_schema(document).document()
    assert found == document
    assert type(found["fields"]["home"]["categories"]) is list


def test_an_error_in_a_models_contract_says_where_it_is(schema: Schema) -> None:
    with pytest.raises(ConfigError, match=r"^the model's contract: fields\.age: "):
        load_schema(changed(schema, "age", min=101))


def test_several_reserved_names_are_all_told(schema: Schema, tmp_path: Path) -> None:
    document = schema.document()
    document["fields"] |= dict.fromkeys(["model", "decision"], document["fields"]["price"])
    (tmp_path / "schema.yaml").write_text(yaml.safe_dump(document, sort_keys=False))
    with pytest.raises(ConfigError) as error:
        Schema.load(tmp_path / "schema.yaml")
    assert str(error.value) == (
        f"{tmp_path}/schema.yaml: model, decision: "
        "`score` adds columns of the names probability, decision, model, "
        "rejected_row, rejected_because; rename the column, in the table and here"
    )


def test_a_table_without_labels_has_none(schema: Schema) -> None:
    with pytest.raises(KeyError, match="status"):
        schema.labels(pa.table({"age": [1]}))


def test_contract_survives_the_journey_with_a_model(schema: Schema) -> None:
    rebuilt = load_schema(json.loads(json.dumps(schema.document())))
    assert rebuilt == schema
    assert rebuilt.digest == schema.digest
