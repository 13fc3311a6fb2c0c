"""COMMAND score: a table of any length in, the same table with probability, decision and model out.

Batches are read, checked, encoded, scored and written in a stream. Arrow, NumPy and XGBoost release the GIL, so
the threads overlap; with a Dask cluster the batches go to its workers instead, and come back in order.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import xgboost as xgb
from sklearn.feature_extraction import DictVectorizer
from tqdm import tqdm

from pipeline.cluster import cluster_failures, connect
from pipeline.core.contract.columns import as_numbers
from pipeline.core.contract.schema import Schema, check_columns, violations
from pipeline.core.errors import DataError, StoreError
from pipeline.core.machine import available_cores
from pipeline.core.model.bundle import open_bundle
from pipeline.core.model.features import FrameEncoder, Matrix
from pipeline.core.policy import STATUSES, Policy, Thresholds, decide_many
from pipeline.core.promoted import read_pointer, version_home
from pipeline.report import Report
from pipeline.scoring.request import ScoreRequest
from pipeline.scoring.settings import ScoreSettings
from pipeline.tables.files import CSV, PARQUET, Batch, Sink, Source, open_sink, open_source, read_ahead

APPENDED = {"probability": pa.float32(), "decision": pa.string(), "model": pa.string()}
"""Columns behind those of the input."""

REJECTED = {"rejected_row": pa.int64(), "rejected_because": pa.string()}
"""Columns of the rejects before those of the input; rows are counted from 1, without the header."""

PROMOTED = "promoted"

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
        return np.asarray(self._booster.inplace_predict(self._encoder.transform(rows)), dtype=np.float32)


class Files(NamedTuple):
    """Where the decided rows go, and where those that break the contract do."""

    output: Path
    rejects: Path


class Counts(NamedTuple):
    """Rows by what became of them."""

    decisions: dict[str, int]
    rejected: int

    @property
    def scored(self) -> int:
        """Rows in the output."""
        return sum(self.decisions.values())


Submit = Callable[[pa.RecordBatch], "Future[Scored]"]


def run(request: ScoreRequest) -> Report:
    """Score a table.

    Raises
    ------
    PipelineError
        Table, model, cluster or target are not usable; no file is left behind.
    """
    settings = ScoreSettings.load(request.config or request.conf / "score.yaml", threads=request.threads)
    thresholds = Policy.load(request.conf / "policy.yaml").thresholds
    files = Files(request.output, request.rejects or request.output.with_suffix(".rejects.csv"))
    _check_places(request.input, files)
    source = open_source(request.input)
    model = _open_model(request.model)
    _check_header(source.schema, model.schema)
    return _report(score_file(source, model, settings, thresholds, files), model.name, files)


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


class _Writer:
    """Writes what became of each batch, and counts it."""

    def __init__(
        self, output: Sink, rejects: _Rejects, kinds: pa.Schema, name: str, thresholds: Thresholds
    ) -> None:
        self.decisions = np.zeros(len(STATUSES), dtype=np.int64)
        self._output, self._rejects, self._kinds, self._name = output, rejects, kinds, name
        self._thresholds = thresholds

    def write(self, batch: Batch, scored: Scored) -> None:
        """Append the valid rows to the output and the others to the rejects."""
        rows = batch.rows if scored.valid is None else batch.rows.filter(pa.array(scored.valid))
        codes = decide_many(scored.probabilities, self._thresholds)
        self.decisions += np.bincount(codes, minlength=len(STATUSES))
        appended = [
            pa.array(scored.probabilities),
            _DECISIONS.take(pa.array(codes)),
            pa.repeat(pa.scalar(self._name), len(rows)),
        ]
        columns = [_as_kind(rows.column(name), self._kinds.field(name).type) for name in rows.schema.names]
        self._output.write(pa.RecordBatch.from_arrays([*columns, *appended], schema=self._kinds))
        self._rejects.write(batch, scored)


class _Rejects:
    """Writes rejected rows to a CSV file that exists only if there are any."""

    def __init__(self, path: Path, columns: pa.Schema, stack: ExitStack) -> None:
        self.count = 0
        self._path, self._stack = path, stack
        self._kept = [item for item in columns if not pa.types.is_nested(item.type) and item.name not in REJECTED]
        self._sink: Sink | None = None

    def write(self, batch: Batch, scored: Scored) -> None:
        """Append the batch's invalid and unreadable rows, in the table's order."""
        if not scored.reasons and not batch.unreadable:
            return
        invalid = np.flatnonzero(~scored.valid) if scored.valid is not None else np.array([], dtype=np.intp)
        numbers = np.concatenate([batch.numbers[invalid], [row.number for row in batch.unreadable]]).astype(
            np.int64
        )
        reasons = [*scored.reasons, *(row.reason for row in batch.unreadable)]
        order = pa.array(np.argsort(numbers))
        # An unreadable row has no cells to show: its position is null.
        places = pa.array([*invalid, *(None for _ in batch.unreadable)], type=pa.int64()).take(order)
        columns = [batch.rows.column(item.name).take(places) for item in self._kept]
        schema = pa.schema([*REJECTED.items(), *self._kept])
        found = [pa.array(numbers).take(order), pa.array(reasons).take(order), *columns]
        self._open(schema).write(pa.RecordBatch.from_arrays(found, schema=schema))
        self.count += len(numbers)

    def _open(self, schema: pa.Schema) -> Sink:
        if self._sink is None:
            self._sink = self._stack.enter_context(open_sink(self._path, schema))
        return self._sink


def score_file(
    source: Source, model: Model, settings: ScoreSettings, thresholds: Thresholds, files: Files
) -> Counts:
    """Score a table into files that appear whole or not at all.

    Raises
    ------
    DataError, ClusterError
        The table breaks off, a file cannot be written, or the cluster broke off.
    """
    kinds = _output_columns(source.schema, model.schema, files.output)
    with ExitStack() as stack:
        output = stack.enter_context(open_sink(files.output, kinds))
        rejects = _Rejects(files.rejects, source.schema, stack)
        writer = _Writer(output, rejects, kinds, model.name, thresholds)
        results = stack.enter_context(closing(score_table(source, Scorer(model), settings)))
        with tqdm(total=source.count, desc="rows", unit="row", unit_scale=True, disable=None) as bar:
            for batch, scored in results:
                writer.write(batch, scored)
                bar.update(len(batch.rows) + len(batch.unreadable))
    if not rejects.count:
        files.rejects.unlink(missing_ok=True)  # those of an earlier run would be taken for this one's
    return Counts(dict(zip(STATUSES, writer.decisions.tolist(), strict=True)), rejects.count)


def _output_columns(columns: pa.Schema, contract: Schema, output: Path) -> pa.Schema:
    """Names and types of the output: the input's, but text that came from CSV becomes numbers in Parquet."""
    kinds = {item.name: item.type for item in columns}
    if output.suffix == PARQUET:
        numbers = {"integer": pa.int64(), "number": pa.float64()}
        for name, field in contract.fields.items():
            if field.is_numeric and kinds.get(name) == pa.string():
                kinds[name] = numbers[field.kind]
    return pa.schema({**kinds, **APPENDED})


def _as_kind(column: pa.Array, kind: pa.DataType) -> pa.Array:
    if column.type == kind:
        return column
    return pa.array(as_numbers(column), from_pandas=True).cast(kind)


def _open_model(name: str) -> Model:
    """Open what is promoted, or a model of MLflow, by an exact name."""
    if name != PROMOTED:
        from pipeline.registry.logged_model import open_model

        opened = open_model(name)
        return Model(opened.uri, *opened.parts)
    promotion = read_pointer()
    if promotion is None:
        raise StoreError(
            "nothing is promoted; run `python -m pipeline promote`, or name a model: --model models:/NAME/VERSION"
        )
    bundle = open_bundle(version_home(promotion.tag), promotion.digests)
    return Model(promotion.tag, bundle.booster, bundle.vectorizer, bundle.schema)


def _check_header(columns: pa.Schema, contract: Schema) -> None:
    check_columns(columns.empty_table(), contract, labelled=False)
    if taken := [name for name in APPENDED if name in columns.names]:
        raise DataError(
            f"the columns {', '.join(APPENDED)} are appended, received {', '.join(taken)}; rename or drop it"
        )


def _check_places(source: Path, files: Files) -> None:
    """Refuse to write over or into what is being read."""
    for path in files:
        target = path.resolve()
        if target == source.resolve() or source.resolve() in target.parents:
            raise DataError(f"{path}: must lie outside of the input {source}; name another file")
    if files.rejects.suffix != CSV or files.rejects.resolve() == files.output.resolve():
        raise DataError(f"{files.rejects}: the rejects need a file of their own ending in {CSV}; name another one")


def _report(counts: Counts, model: str, files: Files) -> Report:
    data = {
        "model": model,
        "output": str(files.output),
        "scored": counts.scored,
        "decisions": counts.decisions,
        "rejected": counts.rejected,
        "rejects": str(files.rejects) if counts.rejected else None,
    }
    decided = "   ".join(f"{status} {number:,}" for status, number in counts.decisions.items())
    lines = [
        f"{'model':10}{model}",
        f"{'scored':10}{counts.scored:,} rows to {files.output}",
        f"{'decisions':10}{decided}",
    ]
    if counts.rejected:
        lines.append(
            f"{'rejected':10}{counts.rejected:,} rows that break the contract, with reasons in {files.rejects}"
        )
    useless = counts.rejected > 0 and counts.scored == 0
    failure = f"every row breaks the contract; see {files.rejects}" if useless else None
    return Report("\n".join(lines), data, failure)
