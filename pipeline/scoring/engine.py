"""Scores record batches in order, on threads or on a Dask cluster.

Batches are read, checked, encoded and scored in a stream. Arrow, NumPy and XGBoost release the GIL, so the threads
overlap; with a Dask cluster the batches go to its workers instead, and come back in order.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import xgboost as xgb
from sklearn.feature_extraction import DictVectorizer

from pipeline.cluster import cluster_failures, connect
from pipeline.core.contract.checks import Violation, violations
from pipeline.core.contract.schema import Schema
from pipeline.core.machine import available_cores
from pipeline.core.model.encoders import FrameEncoder
from pipeline.core.model.features import Matrix
from pipeline.scoring.settings import ScoreSettings
from pipeline.tables.sources import Batch, Source, read_ahead


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
    broken
        The rules that the other rows break.
    """

    valid: npt.NDArray[np.bool_] | None
    probabilities: Matrix
    broken: tuple[Violation, ...] = ()


class Scorer:
    """Checks, encodes and scores record batches: the work that threads or cluster workers do."""

    def __init__(self, model: Model) -> None:
        self._model = model
        self._schema = model.schema
        self.fields = frozenset(model.schema.fields)
        """The columns that it looks at."""
        self._booster = model.booster
        self._encoder = FrameEncoder(model.schema, model.vectorizer)
        # Each thread scores a batch of its own: more threads inside one prediction would only wait for each other.
        self._booster.set_param({"nthread": 1})
        # A booster configures itself at its first prediction, and that is not safe in several threads.
        self._booster.inplace_predict(np.zeros((1, self._encoder.width), dtype=np.float32))

    def __reduce__(self) -> tuple[type[Scorer], tuple[Model]]:
        return Scorer, (self._model,)

    def score(self, rows: pa.RecordBatch) -> Scored:
        """Check, encode and score one batch, on one thread."""
        broken = tuple(violations(rows, self._schema))
        if not broken:
            return Scored(None, self._probabilities(rows))
        valid = ~np.logical_or.reduce([violation.rows for violation in broken])
        return Scored(valid, self._probabilities(rows.filter(pa.array(valid))), broken)

    def _probabilities(self, rows: pa.RecordBatch) -> Matrix:
        return np.asarray(self._booster.inplace_predict(self._encoder.transform(rows)), dtype=np.float32)


Submit = Callable[[pa.RecordBatch], "Future[Scored]"]


def score_table(
    source: Source, scorer: Scorer, settings: ScoreSettings
) -> Generator[tuple[Batch, Scored], None, None]:
    """Score a table batch by batch, in order; at most a few batches are held.

    Raises
    ------
    DataError, ClusterError
        The table breaks off, or the cluster does.
    """
    names = [name for name in source.schema.names if name in scorer.fields]
    batches = read_ahead(source.batches(settings.batch_rows))
    waiting: deque[tuple[Batch, Future[Scored]]] = deque()
    with _pool(scorer, settings) as (submit, slots), closing(batches):
        for batch in batches:
            waiting.append((batch, submit(batch.rows.select(names))))
            if len(waiting) > 2 * slots:
                yield _finished(*waiting.popleft())
        while waiting:
            yield _finished(*waiting.popleft())


@contextmanager
def _pool(scorer: Scorer, settings: ScoreSettings) -> Iterator[tuple[Submit, int]]:
    if settings.cluster is None:
        slots = settings.threads or available_cores()
        with ThreadPoolExecutor(slots) as pool:
            yield (lambda rows: pool.submit(scorer.score, rows)), slots
        return
    with connect(settings.cluster.address) as client, cluster_failures():
        # Sent once to each worker; a batch then costs its own columns only.
        shared = client.scatter(scorer, broadcast=True, hash=False)
        slots = sum(client.nthreads().values())
        yield (lambda rows: client.submit(Scorer.score, shared, rows, pure=False)), slots


def _finished(batch: Batch, future: Future[Scored]) -> tuple[Batch, Scored]:
    return batch, future.result()
