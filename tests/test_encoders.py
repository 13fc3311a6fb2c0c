"""One meaning of the features: every encoder gives DictVectorizer's matrix, bit for bit."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.feature_extraction import DictVectorizer

from pipeline.core.contract.requests import valid_columns
from pipeline.core.contract.schema import Field, Schema, load_schema
from pipeline.core.model.encoders import FrameEncoder, RowEncoder
from pipeline.core.model.features import Matrix, feature_dict, make_vectorizer
from tests.testkit import PROJECT

SCHEMA = Schema.load(PROJECT / "conf/schema.yaml")


VECTORIZER = make_vectorizer(SCHEMA)


def reference(rows: list[dict[str, Any]], vectorizer: DictVectorizer = VECTORIZER) -> Matrix:
    matrix: Matrix = vectorizer.transform([feature_dict(row, SCHEMA) for row in rows])
    return matrix


def assert_same_bits(found: Matrix, expected: Matrix) -> None:
    assert found.dtype == expected.dtype == np.float32
    assert found.shape == expected.shape
    np.testing.assert_array_equal(found.view(np.uint32), expected.view(np.uint32))


def values(field: Field) -> st.SearchStrategy[Any]:
    """Valid values, edges first, and what the encoders must survive beyond the contract."""
    if not field.is_numeric:
        return st.sampled_from([*field.categories, "never seen"]) | st.none()
    low, high = field.bounds
    edges = st.sampled_from([low, high, *field.missing, 0.0, -0.0, 1e-300, 5e-324])
    return edges | st.floats(low, high) | st.integers(int(low), int(high)) | st.none()


def application() -> st.SearchStrategy[dict[str, Any]]:
    fields = {name: values(field) for name, field in SCHEMA.fields.items()}
    return st.fixed_dictionaries({}, optional=fields)


def as_table(rows: list[dict[str, Any]]) -> pa.Table:
    columns = {
        name: pa.array(
            [None if row.get(name) is None else float(row[name]) for row in rows]
            if field.is_numeric
            else [row.get(name) for row in rows],
            type=pa.float64() if field.is_numeric else pa.string(),
        )
        for name, field in SCHEMA.fields.items()
    }
    return pa.table(columns)


@settings(max_examples=300, deadline=None)
@given(st.lists(application(), min_size=1, max_size=6))
def test_encoders_equal_dictvectorizer_bit_for_bit(rows: list[dict[str, Any]]) -> None:
    expected = reference(rows)
    table = as_table(rows)
    frames = FrameEncoder(SCHEMA, VECTORIZER)
    assert_same_bits(RowEncoder(SCHEMA, VECTORIZER).transform(rows), expected)
    assert_same_bits(frames.transform(table), expected)
    assert_same_bits(frames.transform(table.to_pandas()), expected)


def test_a_vocabulary_learnt_from_few_rows_is_followed_too() -> None:
    """A DictVectorizer that never saw a category ignores it; so do the encoders."""
    rows = [SCHEMA.example(), {**SCHEMA.example(), "home": "rent", "job": "fixed"}]
    few = DictVectorizer(dtype=np.float32, sparse=False).fit([feature_dict(SCHEMA.example(), SCHEMA)])
    expected = reference(rows, few)
    assert expected.shape[1] < len(VECTORIZER.feature_names_)
    assert_same_bits(RowEncoder(SCHEMA, few).transform(rows), expected)
    assert_same_bits(FrameEncoder(SCHEMA, few).transform(as_table(rows)), expected)


@pytest.mark.parametrize("form", ["plain", "categorical", "arrow", "dictionary"])
def test_every_row_of_the_data_in_every_form_of_table(applications: pd.DataFrame, form: str) -> None:
    expected = reference(json.loads(applications.to_json(orient="records")))
    categories = [name for name, field in SCHEMA.fields.items() if not field.is_numeric]
    categorical = applications.astype(dict.fromkeys(categories, "category"))
    table = {
        "plain": applications,
        "categorical": categorical,
        "arrow": pa.Table.from_pandas(applications),
        "dictionary": pa.Table.from_pandas(categorical),
    }[form]
    assert_same_bits(FrameEncoder(SCHEMA, VECTORIZER).transform(table), expected)


@pytest.mark.parametrize("code", [0, 0.0, None])
def test_unstated_income_means_the_same_in_every_spelling(code: float | None) -> None:
    absent = SCHEMA.example()
    del absent["income"]
    assert_same_bits(reference([{**SCHEMA.example(), "income": code}]), reference([absent]))


def test_marital_status_does_not_enter_the_model() -> None:
    assert not any("marital" in name for name in VECTORIZER.feature_names_)
    single, married = ({**SCHEMA.example(), "marital": value} for value in ("single", "married"))
    assert_same_bits(reference([single]), reference([married]))


def test_encoder_takes_every_representation(applications: pd.DataFrame) -> None:
    encode = FrameEncoder(SCHEMA, make_vectorizer(SCHEMA)).transform
    expected = encode(applications)
    arrow = pa.Table.from_pandas(applications, preserve_index=False)
    text = pa.table({name: arrow[name].cast(pa.string()) for name in arrow.column_names})
    coded = pa.table(
        {
            name: arrow[name].dictionary_encode() if pa.types.is_large_string(arrow[name].type) else arrow[name]
            for name in arrow.column_names
        }
    )
    for table in (arrow, text, coded, arrow.to_batches(max_chunksize=5000)[0]):
        assert table.num_rows == len(expected)
        np.testing.assert_array_equal(encode(table), expected)


def test_long_tables_are_encoded_as_their_parts_are(applications: pd.DataFrame) -> None:
    encode = FrameEncoder(SCHEMA, make_vectorizer(SCHEMA)).transform
    frame = pd.concat([applications] * 40, ignore_index=True)  # 178,160 rows: several threads
    expected = np.tile(encode(applications), (40, 1))
    np.testing.assert_array_equal(encode(frame), expected)
    np.testing.assert_array_equal(encode(pa.Table.from_pandas(frame, preserve_index=False)), expected)


def test_encoding_many_rows_equals_encoding_each(rows: list[dict[str, Any]]) -> None:
    vectorizer = make_vectorizer(SCHEMA)
    sparse = [{name: value for name, value in row.items() if value is not None} for row in rows[:500]]
    for some in (rows, sparse, rows[:1], []):
        columns = valid_columns(some, SCHEMA)
        assert columns is not None
        by_columns = FrameEncoder(SCHEMA, vectorizer).transform_values(columns, len(some))
        by_rows = RowEncoder(SCHEMA, vectorizer).transform(some)
        np.testing.assert_array_equal(by_columns.view(np.uint32), by_rows.view(np.uint32))


def test_a_category_that_is_not_stated_has_no_column() -> None:
    document = SCHEMA.document()
    document["fields"]["home"]["optional"] = True
    schema = load_schema(document)
    rows = [{**schema.example(), "home": home} for home in (None, "rent", None, "owner")]
    vectorizer = make_vectorizer(schema)
    expected = vectorizer.transform([feature_dict(row, schema) for row in rows])
    assert expected[:, vectorizer.vocabulary_["home=rent"]].tolist() == [0, 1, 0, 0]
    assert_same_bits(RowEncoder(schema, vectorizer).transform(rows), expected)
    columns = valid_columns(rows, schema)
    assert columns is not None
    assert_same_bits(FrameEncoder(schema, vectorizer).transform_values(columns, len(rows)), expected)
