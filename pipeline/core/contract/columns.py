"""Columns of pandas and Arrow tables as NumPy arrays: numbers, gaps, positions of categories.

Checks and features are written once, over these arrays.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc

Table: TypeAlias = "pd.DataFrame | pa.Table | pa.RecordBatch"
Positions: TypeAlias = npt.NDArray[np.intp]
Column: TypeAlias = "pd.Series[Any] | pa.Array"

_NUMBER = r"^[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?$"


def names(table: Table) -> list[str]:
    """Names of the columns, in order."""
    return [str(name) for name in (table.columns if isinstance(table, pd.DataFrame) else table.schema.names)]


def pick(table: Table, name: str) -> Column | None:
    """One column, None if it is absent; an Arrow column in several chunks becomes one."""
    if name not in names(table):
        return None
    if isinstance(table, pd.DataFrame):
        return table[name]
    column = table.column(name)
    return column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column


def rows_between(table: Table, start: int, stop: int) -> Table:
    """Rows from `start` to before `stop`, without copying."""
    if isinstance(table, pd.DataFrame):
        return table.iloc[start:stop]
    return table.slice(start, stop - start)


def is_boolean(column: Column) -> bool:
    """Whether the column's type is true or false."""
    if isinstance(column, pd.Series):
        return pd.api.types.is_bool_dtype(column)
    return bool(pa.types.is_boolean(column.type))


def is_empty(column: Column) -> npt.NDArray[np.bool_]:
    """Which rows hold nothing: null or NaN. Shape (n,)."""
    if isinstance(column, pd.Series):
        return column.isna().to_numpy(dtype=bool)
    empty: npt.NDArray[np.bool_] = column.is_null(nan_is_null=True).to_numpy(zero_copy_only=False)
    return empty


def as_numbers(column: Column) -> npt.NDArray[np.float64]:
    """Numbers of a column: shape (n,), float64; absent and unreadable values are NaN."""
    if isinstance(column, pa.Array):
        return _arrow_numbers(column)
    if pd.api.types.is_numeric_dtype(column) and not pd.api.types.is_bool_dtype(column):
        return column.to_numpy(dtype=np.float64, na_value=np.nan)
    return pd.to_numeric(column, errors="coerce").to_numpy(dtype=np.float64, na_value=np.nan)


def positions(column: Column, values: Sequence[str]) -> Positions:
    """Position of each row's text among `values`: shape (n,), -1 = empty, no text, or none of them."""
    if isinstance(column, pa.Array):
        return _arrow_positions(column, values)
    try:
        arrow = pa.Array.from_pandas(column)
    except pa.ArrowException:  # text and other things in one column
        known = {value: position for position, value in enumerate(values)}
        return np.array([known.get(item, -1) for item in column], dtype=np.intp)
    return _arrow_positions(arrow.combine_chunks() if isinstance(arrow, pa.ChunkedArray) else arrow, values)


def equals(column: Column, value: str | int) -> npt.NDArray[np.bool_]:
    """Which rows hold a value: shape (n,). A number may stand there as text, as all values of a CSV file do."""
    found = positions(column, (value,)) == 0 if isinstance(value, str) else as_numbers(column) == value
    return np.asarray(found, dtype=bool)


def _arrow_positions(column: pa.Array, values: Sequence[str]) -> Positions:
    if pa.types.is_dictionary(column.type):
        known = np.append(_arrow_positions(column.dictionary, values), -1)
        indices = column.indices.cast(pa.int64()).fill_null(len(known) - 1)
        return np.asarray(known[indices.to_numpy(zero_copy_only=False)], dtype=np.intp)
    if not _is_text(column.type):
        return np.full(len(column), -1, dtype=np.intp)
    found = pc.index_in(column, value_set=pa.array(values, type=column.type))
    return np.asarray(found.fill_null(-1).to_numpy(zero_copy_only=False), dtype=np.intp)


def _arrow_numbers(column: pa.Array) -> npt.NDArray[np.float64]:
    kind = column.type
    if pa.types.is_dictionary(kind):
        return _arrow_numbers(column.dictionary_decode())
    if _is_text(kind):
        column = _parsed(column)
    elif _is_number(kind):
        column = column.cast(pa.float64(), safe=False)
    elif pa.types.is_boolean(kind):
        column = column.cast(pa.int8()).cast(pa.float64())
    else:
        return np.full(len(column), np.nan)
    values: npt.NDArray[np.float64] = column.to_numpy(zero_copy_only=False)
    return values


def _parsed(text: pa.Array) -> pa.Array:
    try:
        return text.cast(pa.float64())
    except pa.ArrowInvalid:  # one unreadable value fails the whole column: blank those, and parse the rest
        trimmed = pc.utf8_trim_whitespace(text)
        numeric = pc.match_substring_regex(trimmed, _NUMBER)
        return pc.if_else(numeric, trimmed, pa.scalar(None, type=trimmed.type)).cast(pa.float64())


def _is_number(kind: pa.DataType) -> bool:
    return bool(pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_decimal(kind))


def _is_text(kind: pa.DataType) -> bool:
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind))
