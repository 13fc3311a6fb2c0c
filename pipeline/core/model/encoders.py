"""Encoders of validated applications and tables: a dense float32 matrix, bit for bit the DictVectorizer's."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import numpy.typing as npt
from sklearn.feature_extraction import DictVectorizer

from pipeline.core.contract.columns import Table, as_numbers, pick, positions, rows_between
from pipeline.core.contract.ratios import FLOAT32_MAX
from pipeline.core.contract.requests import Values
from pipeline.core.contract.schema import Schema
from pipeline.core.machine import available_cores
from pipeline.core.model.features import Application, Matrix

_NAN = math.nan

_PART = 1 << 16
"""Rows that one thread of `FrameEncoder` encodes at a time; a shorter table needs no second thread."""

_BLOCK = 4096
"""Rows whose part of the matrix is filled at a time, so that it stays in the cache: a fifth of the time less."""


class RowEncoder:
    """Encodes validated applications, given one by one.

    Parameters
    ----------
    schema
        The contract that validated the applications.
    vectorizer
        Fitted; its ``vocabulary_`` gives the columns.
    """

    def __init__(self, schema: Schema, vectorizer: DictVectorizer) -> None:
        self.width = len(vectorizer.feature_names_)
        self._columns: list[str] = vectorizer.feature_names_
        self._zeros = dict.fromkeys(self._columns, 0.0)
        self._numbers = [(name, field.missing) for name, field in schema.features.items() if field.is_numeric]
        self._one_hots: list[tuple[str, dict[Any, str]]] = [
            (name, {category: f"{name}{vectorizer.separator}{category}" for category in field.categories})
            for name, field in schema.features.items()
            if not field.is_numeric
        ]
        self._ratios = [(name, ratio.of_numbers()) for name, ratio in schema.ratios.items()]

    def encode(self, application: Application) -> list[float]:
        """Encode one application: `width` floats.

        The same as `pipeline.core.model.features.feature_dict`, its ratios prepared and its loops without calls.
        """
        values, value_of = self._zeros.copy(), application.get
        for name, missing in self._numbers:
            value = value_of(name)
            values[name] = _NAN if value is None or value in missing else float(value)
        for name, one_hots in self._one_hots:
            if one_hot := one_hots.get(value_of(name)):
                values[one_hot] = 1.0
        for name, ratio in self._ratios:
            value = ratio(values)
            values[name] = value if -FLOAT32_MAX <= value <= FLOAT32_MAX else _NAN
        return [*map(values.__getitem__, self._columns)]

    def transform(self, applications: Iterable[Application]) -> Matrix:
        """Encode applications: shape (n, k), float32, NaN = missing."""
        matrix = np.array([*map(self.encode, applications)], dtype=np.float32)
        # -0.0 becomes 0.0, as in DictVectorizer, which adds onto zeros.
        return matrix.reshape(-1, self.width) + np.float32(0)


class FrameEncoder:
    """Encodes validated tables (pandas or Arrow), column by column.

    Parameters
    ----------
    schema
        The contract that validated the table.
    vectorizer
        Fitted; its ``vocabulary_`` gives the columns.
    """

    def __init__(self, schema: Schema, vectorizer: DictVectorizer) -> None:
        self._schema = schema
        self._vocabulary: dict[str, int] = vectorizer.vocabulary_
        self._separator: str = vectorizer.separator
        self._ratios = {name: ratio.of_columns() for name, ratio in schema.ratios.items()}
        self.width = len(vectorizer.feature_names_)

    def transform(self, table: Table) -> Matrix:
        """Encode a table: shape (n, k), float32, C order, NaN = missing."""
        rows = len(table)
        matrix = np.zeros((rows, self.width), dtype=np.float32)
        if rows <= _PART:
            self._encode(table, matrix)
            return matrix
        # NumPy and Arrow release the GIL; and the columns of a part stay in the cache from one step to the next.
        starts = range(0, rows, _PART)
        with ThreadPoolExecutor(min(available_cores(), len(starts))) as pool:
            parts = [
                pool.submit(self._encode, rows_between(table, start, start + _PART), matrix[start : start + _PART])
                for start in starts
            ]
            for part in parts:
                part.result()
        return matrix

    def transform_values(self, values: Mapping[str, Values], rows: int) -> Matrix:
        """Encode the values of some applications, as `pipeline.core.contract.requests.valid_columns` gives them.

        From some twenty applications on it is faster than `RowEncoder`; both give the same.

        Parameters
        ----------
        values
            Field name → shape (n,).
        rows
            n.

        Returns
        -------
        Matrix
            Shape (n, k), float32, as of `transform`.
        """
        columns: dict[str, npt.NDArray[Any]] = {}
        for name, field in self._schema.features.items():
            if field.is_numeric:
                columns[name] = np.asarray(values[name], dtype=np.float64)
            else:
                one_hots: dict[Any, int] = dict(zip(field.categories, self._one_hots(name), strict=True))
                one_hots[None] = -1
                columns[name] = np.fromiter(map(one_hots.__getitem__, values[name]), dtype=np.intp, count=rows)
        matrix = np.zeros((rows, self.width), dtype=np.float32)
        self._fill(matrix, columns)
        return matrix

    def _encode(self, table: Table, matrix: Matrix) -> None:
        columns = {
            name: self._numbers(table, name) if field.is_numeric else self._codes(table, name)
            for name, field in self._schema.features.items()
        }
        for start in range(0, len(matrix), _BLOCK):
            block = slice(start, start + _BLOCK)
            self._fill(matrix[block], {name: column[block] for name, column in columns.items()})

    def _fill(self, matrix: Matrix, columns: dict[str, npt.NDArray[Any]]) -> None:
        vocabulary, numbers = self._vocabulary, {}
        for name, field in self._schema.features.items():
            if not field.is_numeric:
                _set_one_hot(matrix, columns[name])
                continue
            values = columns[name]
            for code in field.missing:
                values = np.where(values == code, np.nan, values)
            numbers[name] = values
        with np.errstate(all="ignore"):
            for name, ratio in self._ratios.items():
                values = ratio(numbers)
                numbers[name] = np.where(np.abs(values) <= FLOAT32_MAX, values, np.nan)
            for name, values in numbers.items():
                if name in vocabulary:
                    matrix[:, vocabulary[name]] = values
        # -0.0 becomes 0.0, as in DictVectorizer; here, because small negative numbers become -0.0 in float32.
        matrix += np.float32(0)

    def _numbers(self, table: Table, name: str) -> npt.NDArray[np.float64]:
        column = pick(table, name)
        return np.full(len(table), np.nan) if column is None else as_numbers(column)

    def _codes(self, table: Table, name: str) -> npt.NDArray[np.intp]:
        """Column of the one-hot for each row: shape (n,), -1 = none."""
        categories = self._schema.features[name].categories
        column = pick(table, name)
        if column is None:
            return np.full(len(table), -1, dtype=np.intp)
        return np.array([*self._one_hots(name), -1], dtype=np.intp)[positions(column, categories)]

    def _one_hots(self, name: str) -> list[int]:
        """Column of the one-hot of each category of a field; -1 = the vocabulary has none."""
        categories = self._schema.features[name].categories
        return [self._vocabulary.get(f"{name}{self._separator}{category}", -1) for category in categories]


def _set_one_hot(matrix: Matrix, codes: npt.NDArray[np.intp]) -> None:
    rows = np.arange(len(codes))
    known = codes >= 0
    if not known.all():
        rows, codes = rows[known], codes[known]
    matrix[rows, codes] = 1
