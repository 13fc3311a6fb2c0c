"""Writes the scored table: decided rows to the output, rows that break the contract to the rejects."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import ExitStack, closing, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
from tqdm import tqdm

from pipeline.core.contract.checks import BrokenRules
from pipeline.core.contract.columns import as_numbers
from pipeline.core.contract.schema import Schema
from pipeline.core.policy import STATUSES, Thresholds, decide_many
from pipeline.scoring.engine import Model, Scored, Scorer, score_table
from pipeline.scoring.settings import ScoreSettings
from pipeline.tables.sinks import Sink, open_sink
from pipeline.tables.sources import PARQUET, Batch, Source

APPENDED = {"probability": pa.float32(), "decision": pa.string(), "model": pa.string()}
"""Columns behind those of the input."""

REJECTED = {"rejected_row": pa.int64(), "rejected_because": pa.string()}
"""Columns of the rejects before those of the input; rows are counted from 1, without the header."""

_DECISIONS = pa.array(STATUSES)


class Files(NamedTuple):
    """Where the decided rows go, and where those that break the contract do."""

    output: Path
    rejects: Path


@dataclass(frozen=True)
class Outcome:
    """What became of the rows of a table.

    Attributes
    ----------
    decisions
        Rows in the output, by decision.
    rejected
        Rows in the rejects.
    broken_rules
        One line for each rule that they break.
    """

    decisions: dict[str, int]
    rejected: int
    broken_rules: tuple[str, ...]

    @property
    def scored(self) -> int:
        """Rows that were decided."""
        return sum(self.decisions.values())

    @property
    def is_useless(self) -> bool:
        """Whether every row was rejected, so that there is no output."""
        return self.rejected > 0 and self.scored == 0


def score_file(
    source: Source, model: Model, settings: ScoreSettings, thresholds: Thresholds, files: Files
) -> Outcome:
    """Score a table into files that appear whole or not at all.

    If every row is rejected, no output appears, and that of an earlier run stays.

    Raises
    ------
    DataError, ClusterError
        The table breaks off, a file cannot be written, or the cluster broke off.
    """
    kinds = _output_columns(source.schema, model.schema, files.output)
    with ExitStack() as stack:
        rejects = _Rejects(files.rejects, source.schema, stack)
        with suppress(_NothingDecided), open_sink(files.output, kinds) as output:
            writer = _Writer(output, rejects, kinds, model.name, thresholds)
            _write_all(source, score_table(source, Scorer(model), settings), writer)
            if rejects.count and not writer.decisions.any():
                raise _NothingDecided
    if not rejects.count:
        files.rejects.unlink(missing_ok=True)  # those of an earlier run would be taken for this one's
    decisions: dict[str, int] = dict(zip(STATUSES, writer.decisions.tolist(), strict=True))
    return Outcome(decisions, rejects.count, tuple(rejects.broken.lines()))


class _NothingDecided(Exception):
    """Every row was rejected: the output's file is dropped, and what stood there before stays."""


def _write_all(source: Source, results: Generator[tuple[Batch, Scored], None, None], writer: _Writer) -> None:
    with closing(results), tqdm(total=source.count, desc="rows", unit="row", unit_scale=True, disable=None) as bar:
        for batch, scored in results:
            writer.write(batch, scored)
            bar.update(len(batch.rows) + len(batch.unreadable))


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
        self.broken = BrokenRules()
        self._path, self._stack = path, stack
        self._kept = [item for item in columns if not pa.types.is_nested(item.type) and item.name not in REJECTED]
        self._schema = pa.schema([*REJECTED.items(), *self._kept])
        self._sink: Sink | None = None

    def write(self, batch: Batch, scored: Scored) -> None:
        """Append the batch's invalid and unreadable rows, in the table's order."""
        if scored.valid is None and not batch.unreadable:
            return
        self._count(batch, scored)
        invalid = np.array([], dtype=np.intp) if scored.valid is None else np.flatnonzero(~scored.valid)
        unreadable = batch.unreadable
        numbers = np.array([*batch.numbers[invalid], *(row.number for row in unreadable)], dtype=np.int64)
        reasons = [*(_reasons(scored, row) for row in invalid), *(row.reason for row in unreadable)]
        # An unreadable row has no cells to show: its position is null.
        positions = pa.array([*invalid, *(None for _ in unreadable)], type=pa.int64())
        order = pa.array(np.argsort(numbers))
        cells = [batch.rows.column(item.name).take(positions.take(order)) for item in self._kept]
        columns = [pa.array(numbers).take(order), pa.array(reasons).take(order), *cells]
        self._open().write(pa.RecordBatch.from_arrays(columns, schema=self._schema))
        self.count += len(numbers)

    def _count(self, batch: Batch, scored: Scored) -> None:
        self.broken.add(scored.broken, batch.numbers)
        for row in batch.unreadable:
            self.broken.add_rows(row.reason, [row.number])

    def _open(self) -> Sink:
        if self._sink is None:
            self._sink = self._stack.enter_context(open_sink(self._path, self._schema))
        return self._sink


def _reasons(scored: Scored, row: int) -> str:
    return "; ".join(str(violation) for violation in scored.broken if violation.rows[row])


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
