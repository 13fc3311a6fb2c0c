"""Reads labelled tables: rows that keep the contract, as a frame; what is left out is counted and explained."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
import pyarrow as pa

from pipeline.core.contract.checks import (
    BrokenRules,
    check_columns,
    column_notes,
    label_violations,
    violations,
)
from pipeline.core.contract.columns import as_numbers, equals, is_empty
from pipeline.core.contract.schema import Field, Schema, Target
from pipeline.core.errors import DataError
from pipeline.tables.sources import Source, open_source, read_ahead

_BLOCK = 1 << 16
"""Rows read at a time: what is beside the frame stays small."""


@dataclass(frozen=True)
class Ingested:
    """A table that keeps the contract.

    Attributes
    ----------
    frame
        The contract's fields and the target, in the contract's order; numbers float64 (NaN = missing).
    notes
        One line for each thing left out: rows without a label, columns unknown to the contract; and one for
        optional columns that are absent.
    """

    frame: pd.DataFrame
    notes: tuple[str, ...]


@dataclass(frozen=True, eq=False)
class LabelledBatch:
    """Some rows of a table, in order.

    Attributes
    ----------
    labelled
        Which rows have a label: shape (m,), bool.
    frame
        Those rows, as `Ingested` has them.
    """

    labelled: npt.NDArray[np.bool_]
    frame: pd.DataFrame


def ingest(path: str | Path, schema: Schema) -> Ingested:
    """Read and validate a labelled table.

    Parameters
    ----------
    path
        A CSV or Parquet file, or a folder of Parquet files.

    Raises
    ------
    DataError
        The file cannot be read, or rows break the contract: every broken rule is listed.
    """
    source = open_source(path)
    batches = list(labelled_batches(source, schema, str(path), _BLOCK))
    frame = pd.concat([batch.frame for batch in batches], ignore_index=True)
    unlabelled = sum(int((~batch.labelled).sum()) for batch in batches)
    return Ingested(frame, tuple(notes(source, schema, unlabelled)))


def labelled_batches(source: Source, schema: Schema, name: str, size: int) -> Iterator[LabelledBatch]:
    """Read and validate a labelled table, about `size` rows at a time.

    Rows without a label are left out, unchecked. After the first broken rule no more batches come: the rest of the
    table is only checked.

    Parameters
    ----------
    name
        The table's, for errors.

    Raises
    ------
    DataError
        Columns are absent, rows break the contract (every broken rule is listed), or one of the labels does not
        occur.
    """
    check_columns(source.schema.empty_table(), schema, labelled=True)
    target = schema.target
    broken, seen = BrokenRules(), set[Any]()
    for batch in read_ahead(source.batches(size)):
        for line in batch.unreadable:
            broken.add_rows(line.reason, [line.number])
        labelled = ~is_empty(batch.rows.column(target.name))
        rows = batch.rows.filter(pa.array(labelled))
        broken.add(violations(rows, schema), batch.numbers[labelled])
        broken.add(label_violations(rows.column(target.name), target), batch.numbers[labelled])
        if not broken:
            frame = _frame(rows, schema)
            seen.update(frame[target.name].unique())
            yield LabelledBatch(labelled, frame)
    broken.raise_any(name)
    if len(seen) < 2:
        found = f"only {seen.pop()} does" if seen else "the table has no labelled row"
        raise DataError(f"{name}: {target.name}: {target.negative} and {target.positive} must both occur; {found}")


def frame_columns(source: Source, schema: Schema) -> list[str]:
    """Names of the columns of the frames of a table, in order."""
    return [*(name for name in schema.fields if name in source.schema.names), schema.target.name]


def notes(source: Source, schema: Schema, unlabelled: int) -> list[str]:
    """Say what was left out of a table, and which optional columns it lacks."""
    dropped = [f"dropped {unlabelled} rows without a label in {schema.target.name}"] if unlabelled else []
    return [*dropped, *column_notes(source.schema.empty_table(), schema)]


def _frame(rows: pa.RecordBatch, schema: Schema) -> pd.DataFrame:
    """Give valid rows the columns, types and order on which the split and everything behind it rely."""
    columns = {
        name: _values(rows.column(name), field)
        for name, field in schema.fields.items()
        if name in rows.schema.names
    }
    return pd.DataFrame({**columns, schema.target.name: _labels(rows.column(schema.target.name), schema.target)})


def _values(column: pa.Array, field: Field) -> npt.NDArray[Any]:
    if field.is_numeric:
        return as_numbers(column)
    texts: npt.NDArray[np.object_] = column.cast(pa.string()).to_numpy(zero_copy_only=False)
    return texts


def _labels(column: pa.Array, target: Target) -> pd.Series[Any]:
    labels = np.array([target.negative, target.positive], dtype=object)
    return pd.Series(labels[equals(column, target.positive).astype(int)]).infer_objects()
