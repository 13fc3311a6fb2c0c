"""What the tricks in the code save: each against the plain way, measured in turns.

    python -m benchmarks.tricks

A trick (a private interface, generated code, a second way to do the same) stays only where it saves 5 % of a
request or a run. Each function below measures one; both ways must give the same, which the tests check.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from time import perf_counter
from typing import Any

import numpy as np
import orjson
import pyarrow as pa
import xgboost as xgb

from pipeline.core.contract.requests import request_validator, valid_columns
from pipeline.core.contract.schema import Schema
from pipeline.core.model import encoders
from pipeline.core.model.encoders import FrameEncoder, RowEncoder
from pipeline.core.model.features import Matrix, feature_dict, make_vectorizer
from pipeline.core.model.predictor import Predictor
from pipeline.core.settings import conf_folder
from pipeline.tables.labelled import ingest

REQUEST = 76e-6
"""Seconds of one core that ``/classify`` takes, by `benchmarks.serving` with 16 connections."""

CONNECTIONS = 16
BATCH_ROWS = 1000
TABLE_ROWS = 100_000

_TURNS = 200


@dataclass(frozen=True)
class Trick:
    """Seconds of the plain way and of ours, and the seconds of the whole of which they are part."""

    name: str
    plain: float
    ours: float
    whole: float

    def __str__(self) -> str:
        saved = self.plain - self.ours
        return f"{self.name:58}{self.plain * 1e6:12,.1f}{self.ours * 1e6:12,.1f}{saved / self.whole:8.0%}"


def main() -> None:
    print(f"{'':58}{'plain µs':>12}{'ours µs':>12}{'saves':>8}")
    for measure in (predictor_of_one, predictor_of_many, row_encoder, batch_by_columns, blocks, threads):
        print(measure())


def predictor_of_one() -> Trick:
    """XGBoost's C interface by ctypes against `Booster.inplace_predict`: one row, the share of a lone request."""
    matrix, booster = _matrix()[:1], _booster()
    ours = Predictor(booster)
    plain, fast = _seconds(lambda: booster.inplace_predict(matrix), lambda: ours(matrix), times=5)
    return Trick("Predictor, one row, of /classify", plain, fast, REQUEST)


def predictor_of_many() -> Trick:
    """The same for one row of as many as there are connections: the share of a request among others."""
    matrix, booster = _matrix()[:CONNECTIONS], _booster()
    ours = Predictor(booster)
    plain, fast = _seconds(lambda: booster.inplace_predict(matrix), lambda: ours(matrix), times=5)
    name = f"Predictor, one row of {CONNECTIONS}, of /classify"
    return Trick(name, plain / CONNECTIONS, fast / CONNECTIONS, REQUEST)


def row_encoder() -> Trick:
    """`RowEncoder` against the DictVectorizer that defines the columns: one row."""
    schema, row = _schema(), _rows()[:1]
    vectorizer = make_vectorizer(schema)
    encoder = RowEncoder(schema, vectorizer)
    plain, ours = _seconds(
        lambda: vectorizer.transform([feature_dict(item, schema) for item in row]),
        lambda: encoder.transform(row),
        times=5,
    )
    return Trick("RowEncoder against DictVectorizer, one row, of /classify", plain, ours, REQUEST)


def batch_by_columns() -> Trick:
    """A batch checked and encoded by columns, against pydantic and `RowEncoder`: the share of the plain way."""
    schema, rows = _schema(), _rows()[:BATCH_ROWS]
    body = orjson.dumps(rows)
    vectorizer = make_vectorizer(schema)
    by_rows, by_columns = RowEncoder(schema, vectorizer), FrameEncoder(schema, vectorizer)
    validate = request_validator(schema).validate_python

    def ours() -> None:
        columns = valid_columns(orjson.loads(body), schema)
        assert columns is not None
        by_columns.transform_values(columns, BATCH_ROWS)

    plain, fast = _seconds(lambda: by_rows.transform(map(validate, orjson.loads(body))), ours)
    return Trick(f"valid_columns, {BATCH_ROWS} rows, of parsing and encoding them", plain, fast, plain)


def blocks() -> Trick:
    """`FrameEncoder` filling the matrix by blocks that stay in the cache, against column by column at once."""
    return _frame_encoder("FrameEncoder by blocks, of encoding 100,000 rows", "_BLOCK")


def threads() -> Trick:
    """`FrameEncoder` on all cores, against one thread."""
    return _frame_encoder("FrameEncoder on threads (if cores are idle), of the same", "_PART")


def _frame_encoder(name: str, constant: str) -> Trick:
    schema = _schema()
    table = pa.Table.from_pylist(_rows() * (TABLE_ROWS // len(_rows()) + 1)).slice(0, TABLE_ROWS)
    encoder = FrameEncoder(schema, make_vectorizer(schema))

    def plain() -> None:
        with _changed(constant):
            encoder.transform(table)

    slow, fast = _seconds(plain, lambda: encoder.transform(table))
    return Trick(name, slow, fast, slow)


@contextmanager
def _changed(constant: str) -> Iterator[None]:
    before = getattr(encoders, constant)
    setattr(encoders, constant, TABLE_ROWS)
    try:
        yield
    finally:
        setattr(encoders, constant, before)


def _seconds(plain: Callable[[], object], ours: Callable[[], object], times: int = 1) -> tuple[float, float]:
    """Least seconds of one call of each, called in turns: what a busy machine adds is not theirs."""
    best = [float("inf"), float("inf")]
    for _ in range(_TURNS):
        for position, function in enumerate((plain, ours)):
            began = perf_counter()
            for _ in range(times):
                function()
            best[position] = min(best[position], (perf_counter() - began) / times)
    return best[0], best[1]


@cache
def _schema() -> Schema:
    return Schema.load(conf_folder() / "schema.yaml")


@cache
def _rows() -> list[dict[str, Any]]:
    frame = ingest(conf_folder().parent / "data/credit_risk.csv", _schema()).frame
    rows: list[dict[str, Any]] = json.loads(frame.drop(columns=_schema().target.name).to_json(orient="records"))
    return rows


@cache
def _matrix() -> Matrix:
    return RowEncoder(_schema(), make_vectorizer(_schema())).transform(_rows())


@cache
def _booster() -> xgb.Booster:
    """A booster of the default recipe's size."""
    labels = np.arange(len(_matrix())) % 7 == 0
    data = xgb.DMatrix(_matrix(), labels, nthread=1)
    return xgb.train({"objective": "binary:logistic", "max_depth": 4, "nthread": 1}, data, 120)


if __name__ == "__main__":
    main()
