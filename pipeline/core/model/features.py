"""Rows or tables in, one dense float32 matrix out: the only feature code, at training and at serving alike.

The ``DictVectorizer`` is the contract: :func:`feature_dict` makes the mapping that it takes, and
``DictVectorizer.transform`` defines the right answer. :class:`RowEncoder` (requests) and
:class:`FrameEncoder` (tables) are compiled from its ``vocabulary_`` and give the same matrix, bit for bit.
"""

from __future__ import annotations

import ast
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import numpy.typing as npt
from sklearn.feature_extraction import DictVectorizer

from pipeline.core.contract.columns import Table, as_numbers, pick, positions, rows_between
from pipeline.core.contract.schema import Ratio, Schema, Values
from pipeline.core.files import sha256
from pipeline.core.machine import available_cores

Matrix = npt.NDArray[np.float32]
Application = Mapping[str, Any]

FLOAT32_MAX = float(np.finfo(np.float32).max)
_PART = 1 << 16
"""Rows that one thread of `FrameEncoder` encodes at a time; a shorter table needs no second thread."""

_BLOCK = 4096
"""Rows whose part of the matrix is filled at a time: it stays in the cache."""


def make_vectorizer(schema: Schema) -> DictVectorizer:
    """Fit a DictVectorizer on the contract's own categories.

    The columns depend on the contract alone, so every sample, fold and partition of a table gives the same ones.
    """
    numbers: dict[str, Any] = {name: 0.0 for name, field in schema.features.items() if field.is_numeric}
    numbers |= dict.fromkeys(schema.ratios, 0.0)
    one_hots = [{name: category} for name, field in schema.features.items() for category in field.categories]
    return DictVectorizer(dtype=np.float32, sparse=False).fit([numbers, *one_hots])


def feature_dict(application: Application, schema: Schema) -> dict[str, float | str]:
    """Turn one valid application into what ``DictVectorizer.transform`` takes.

    Missing values and codes become NaN, fields of role audit are left out, ratios are added.
    An absent key would become 0 in a DictVectorizer, so every numeric feature is present.
    """
    features: dict[str, float | str] = {}
    for name, field in schema.features.items():
        value = application.get(name)
        if field.is_numeric:
            features[name] = _number(value, field.missing)
        elif isinstance(value, str):
            features[name] = value
    for name, ratio in schema.ratios.items():
        value = _ratio_function(ratio, _quotient)(*(features[used] for used in ratio.names))
        features[name] = value if abs(value) <= FLOAT32_MAX else math.nan
    return features


def feature_names_digest(vectorizer: DictVectorizer) -> str:
    """Sha256 over the column names in order: the booster's columns have no names of their own."""
    return sha256("\n".join(vectorizer.feature_names_).encode())


def monotone_constraints(schema: Schema, vectorizer: DictVectorizer) -> tuple[int, ...]:
    """XGBoost's ``monotone_constraints`` in column order: 1 increasing, -1 decreasing, 0 free."""
    signs = {"increasing": 1, "decreasing": -1, None: 0}
    directions = {name: field.monotone for name, field in schema.features.items()}
    directions |= {name: ratio.monotone for name, ratio in schema.ratios.items()}
    return tuple(signs[directions.get(name)] for name in vectorizer.feature_names_)


def field_shares(schema: Schema, vectorizer: DictVectorizer) -> dict[str, Matrix]:
    """How much of each column belongs to each of the applicant's fields.

    A one-hot belongs to its field; a ratio belongs in equal parts to the fields that it is made of,
    directly or through other ratios.

    Returns
    -------
    dict
        Field name → weights over the columns, shape (k,). For each column the weights sum to 1.
    """
    shares = {name: np.zeros(len(vectorizer.feature_names_), dtype=np.float32) for name in schema.features}
    for position, column in enumerate(vectorizer.feature_names_):
        owners = _owners(column.partition(vectorizer.separator)[0], schema)
        for owner in owners:
            shares[owner][position] = 1 / len(owners)
    return shares


class RowEncoder:
    """Validated applications → matrix, compiled for one contract and one DictVectorizer.

    Parameters
    ----------
    schema
        The contract that validated the applications.
    vectorizer
        Fitted; its ``vocabulary_`` gives the columns.
    """

    def __init__(self, schema: Schema, vectorizer: DictVectorizer) -> None:
        self.width = len(vectorizer.feature_names_)
        self.encode: Callable[[Application], list[float]] = _compile_row(schema, vectorizer)
        """One application → list of `width` floats."""

    def transform(self, applications: Iterable[Application]) -> Matrix:
        """Encode applications: shape (n, k), float32, NaN = missing."""
        encode = self.encode
        matrix = np.array([encode(application) for application in applications], dtype=np.float32)
        # -0.0 becomes 0.0, as in DictVectorizer, which adds onto zeros.
        return matrix.reshape(-1, self.width) + np.float32(0)


class FrameEncoder:
    """Validated tables (pandas or Arrow) → matrix, column by column, without a Python loop over rows.

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
        # Compiled here: a ratio finds its names by parsing its expression.
        self._ratios = {
            name: (ratio.names, _ratio_function(ratio, _column_quotient)) for name, ratio in schema.ratios.items()
        }
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
        """Encode the values of some applications, as `pipeline.core.contract.schema.valid_columns` gives them.

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
            for name, (names, ratio) in self._ratios.items():
                values = ratio(*(numbers[used] for used in names))
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


def _number(value: Any, missing: Sequence[float]) -> float:
    if value is None or value in missing:
        return math.nan
    return float(value)


def _ratio_source(node: ast.expr) -> str:
    """A ratio as Python source over its names: the one meaning that rows and columns share."""
    match node:
        case ast.Constant(value=value):
            return repr(float(value))  # type: ignore[arg-type]
        case ast.Name(id=name):
            return f"v_{name}"
        case ast.UnaryOp(operand=operand):
            return f"(-{_ratio_source(operand)})"
        case ast.BinOp(left=left, op=op, right=right):
            a, b = _ratio_source(left), _ratio_source(right)
        case _:
            raise AssertionError("the contract admits arithmetic only")
    if isinstance(op, ast.Div):
        return f"quotient({a}, {b})"
    symbol = {ast.Add: "+", ast.Sub: "-", ast.Mult: "*"}[type(op)]
    return f"({a} {symbol} {b})"


def _ratio_function(ratio: Ratio, quotient: Callable[[Any, Any], Any]) -> Callable[..., Any]:
    """Compile a ratio to a function of its names; they are identifiers, as the contract checks."""
    arguments = ", ".join(f"v_{name}" for name in ratio.names)
    function: Callable[..., Any] = eval(  # noqa: S307
        f"lambda {arguments}: {_ratio_source(ratio.tree)}", {"quotient": quotient}
    )
    return function


def _quotient(a: float, b: float) -> float:
    return a / b if b else math.nan


def _column_quotient(a: Any, b: Any) -> Any:
    return np.where(b == 0, np.nan, a / b)


def _compile_row(schema: Schema, vectorizer: DictVectorizer) -> Callable[[Application], list[float]]:
    """Write the encoder of one application as a Python function without loops, and compile it.

    Names come from the contract, which admits identifiers only; values enter as constants of the function's
    namespace. A loop over the same tables costs three times as much a row.
    """
    vocabulary, separator = vectorizer.vocabulary_, vectorizer.separator
    namespace: dict[str, Any] = {"nan": math.nan, "top": FLOAT32_MAX, "quotient": _quotient}
    lines = ["def encode(row):", " get = row.get", f" out = [0.0] * {len(vocabulary)}"]
    for name, field in schema.features.items():
        lines.append(f" v_{name} = get({name!r})")
        if field.is_numeric:
            unstated = "".join(f" or v_{name} == {code!r}" for code in field.missing)
            lines.append(f" if v_{name} is None{unstated}: v_{name} = nan")
            if name in vocabulary:
                lines.append(f" out[{vocabulary[name]}] = v_{name}")
            continue
        namespace[f"columns_{name}"] = {
            category: vocabulary[f"{name}{separator}{category}"]
            for category in field.categories
            if f"{name}{separator}{category}" in vocabulary
        }
        lines.append(f" c_{name} = columns_{name}.get(v_{name})")
        lines.append(f" if c_{name} is not None: out[c_{name}] = 1.0")
    for name, ratio in schema.ratios.items():
        lines.append(f" v_{name} = {_ratio_source(ratio.tree)}")
        lines.append(f" if not -top <= v_{name} <= top: v_{name} = nan")
        if name in vocabulary:
            lines.append(f" out[{vocabulary[name]}] = v_{name}")
    lines.append(" return out")
    exec(compile("\n".join(lines), "<row encoder>", "exec"), namespace)  # noqa: S102
    encode: Callable[[Application], list[float]] = namespace["encode"]
    return encode


def _owners(name: str, schema: Schema) -> tuple[str, ...]:
    if name in schema.features:
        return (name,)
    used = [owner for part in schema.ratios[name].names for owner in _owners(part, schema)]
    return tuple(dict.fromkeys(used))
