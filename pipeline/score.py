"""COMMAND score: a table of any length in, the same table with probability, decision and model out.

Batches are read, checked, encoded, scored and written in a stream. Arrow, NumPy and XGBoost release the GIL, so the
threads overlap; with a Dask cluster the batches go to its workers instead, and come back in order.
"""

from __future__ import annotations

import os
from argparse import Namespace
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import xgboost as xgb
from sklearn.feature_extraction import DictVectorizer
from tqdm import tqdm

from pipeline.bundle import open_bundle
from pipeline.columns import as_numbers
from pipeline.config import CONF, ScoreSettings, ServeSettings, Thresholds
from pipeline.decision import STATUSES, decide_many
from pipeline.errors import ClusterError, DataError, StoreError
from pipeline.features import FrameEncoder, Matrix
from pipeline.pointer import read_pointer, version_home
from pipeline.report import Report
from pipeline.schema import Schema, check_columns, violations
from pipeline.tables import CSV, PARQUET, Batch, Sink, Source, Unreadable, open_sink, open_source, read_ahead

APPENDED = {"probability": pa.float32(), "decision": pa.string(), "model": pa.string()}
"""Columns behind those of the input."""

REJECTED = {"rejected_row": pa.int64(), "rejected_because": pa.string()}
"""Columns of the rejects before those of the input; rows are counted from 1, without the header."""

_DECISIONS = pa.array(STATUSES)


class Model(NamedTuple):
    """A model to score with, and what it is called in the output."""

    name: str
    booster: xgb.Booster
    vectorizer: DictVectorizer
    schema: Schema


@dataclass(frozen=True)
class Scored:
    """What became of one batch of m rows.

    Attributes
    ----------
    valid
        Rows that keep the contract, n of them: shape (m,), bool; None: all.
    probabilities
        Probabilities of default of the valid rows, in [0, 1]: shape (n,), float32.
    reasons
        The broken rules of each other row, in order.
    """

    valid: npt.NDArray[np.bool_] | None
    probabilities: Matrix
    reasons: tuple[str, ...] = ()


class Scorer:
    """Record batches → probabilities and reasons; the work that threads or cluster workers do."""

    def __init__(self, model: Model) -> None:
        self._schema = model.schema
        self._booster = model.booster
        self._encoder = FrameEncoder(model.schema, model.vectorizer)

    def score(self, rows: pa.RecordBatch) -> Scored:
        """Check, encode and score one batch, on one thread."""
        broken = list(violations(rows, self._schema))
        if not broken:
            return Scored(None, self._probabilities(rows))
        valid = ~np.logical_or.reduce([violation.rows for violation in broken])
        reasons = (
            "; ".join(f"{violation.column}: {violation.rule}" for violation in broken if violation.rows[position])
            for position in np.flatnonzero(~valid)
        )
        return Scored(valid, self._probabilities(rows.filter(pa.array(valid))), tuple(reasons))

    def _probabilities(self, rows: pa.RecordBatch) -> Matrix:
        # Each thread scores a batch of its own: more threads inside one prediction would only wait for each other.
        self._booster.set_param({"nthread": 1})
        return np.asarray(self._booster.inplace_predict(self._encoder.transform(rows)), dtype=np.float32)


@dataclass
class Counts:
    """Rows by what became of them."""

    scored: int = 0
    rejected: int = 0
    decisions: npt.NDArray[np.int64] = None  # type: ignore[assignment]
