"""Read a long table once: validate every row, decide its side, and draw a sample to search on."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
import pyarrow as pa
from tqdm import tqdm

from pipeline.core.contract.schema import Schema, Violation, check_columns, violations
from pipeline.core.errors import DataError
from pipeline.tables.digest import TableDigest
from pipeline.tables.files import ParquetSource, open_source, read_ahead
from pipeline.tables.holdout import is_test_row
from pipeline.tables.labelled import normalised
from pipeline.training.settings import TrainSettings

TRAIN, TEST, UNLABELLED = 0, 1, 2
"""Sides of a row."""


BLOCK_ROWS = 1 << 16
"""Rows read at a time: what is beside the pages stays small."""


_SAMPLE_SEED = 1_000_003
"""Added to the seed, so that the sample is drawn without regard to the split."""


@dataclass(frozen=True)
class Survey:
    """What one pass over a table found.

    Attributes
    ----------
    sides
        `TRAIN`, `TEST` or `UNLABELLED` for each row: shape (n,), uint8.
    sample
        About as many labelled rows as asked for, chosen by a hash of their content, normalised.
    digest
        That of `frame_digest` for the whole table.
    notes
        One line for each thing left out.
    """

    sides: npt.NDArray[np.uint8]
    sample: pd.DataFrame
    digest: str
    notes: tuple[str, ...]


def is_streamed(settings: TrainSettings) -> bool:
    """Whether the table is too long to search on: Parquet of more than ``search_rows`` rows."""
    path = Path(settings.data)
    if not path.is_dir() and path.suffix != ".parquet":
        return False
    return (open_source(path).count or 0) > settings.search_rows


def survey(settings: TrainSettings, schema: Schema) -> Survey:
    """Validate a whole table, decide each row's side, and draw the sample.

    Raises
    ------
    DataError
        The table cannot be read, or rows break the contract: every broken rule is listed.
    """
    source = ParquetSource(Path(settings.data))
    empty = source.schema.empty_table()
    check_columns(empty, schema, labelled=True)
    columns = list(normalised(empty.to_pandas(), schema).columns)
    rows = source.count or 0
    sides, sample, problems = [], [], _Problems()
    digest = TableDigest(columns)
    with tqdm(total=rows, desc="survey", unit="row", unit_scale=True, disable=None) as bar:
        for batch in read_ahead(source.batches(BLOCK_ROWS)):
            table = batch.rows.to_pandas()
            labelled = table[schema.target.name].notna().to_numpy(dtype=bool)
            problems.add(batch.rows.filter(pa.array(labelled)), table[labelled], batch.numbers[labelled], schema)
            if not problems:
                frame = normalised(table[labelled], schema)
                digest.update(frame)
                sides.append(_sides(frame, labelled, schema, settings))
                share = settings.search_rows / rows
                sample.append(frame[is_test_row(frame, schema, settings.seed + _SAMPLE_SEED, share)])
            bar.update(len(table))
    problems.raise_any(settings.data, schema)
    found = np.concatenate(sides)
    return Survey(found, pd.concat(sample, ignore_index=True), digest.text(), _notes(found, source, schema))


class _Problems:
    """Broken rules over all batches: how often, and where first."""

    def __init__(self) -> None:
        self._counts: Counter[tuple[str, str]] = Counter()
        self._first: dict[tuple[str, str], list[int]] = {}
        self._labels: set[Any] = set()

    def __bool__(self) -> bool:
        return bool(self._counts)

    def add(
        self, rows: pa.RecordBatch, table: pd.DataFrame, numbers: npt.NDArray[np.int64], schema: Schema
    ) -> None:
        """Check some rows, whose numbers in the table are given."""
        target = schema.target
        strange = ~table[target.name].isin([target.negative, target.positive]).to_numpy(dtype=bool)
        self._labels |= set(table[target.name].unique())
        found = list(violations(rows, schema))
        if strange.any():
            found.append(Violation(target.name, f"must be {target.negative} or {target.positive}", strange))
        for violation in found:
            key = (violation.column, violation.rule)
            self._counts[key] += int(violation.rows.sum())
            first = self._first.setdefault(key, [])
            first += numbers[violation.rows][: 5 - len(first)].tolist()

    def raise_any(self, source: str, schema: Schema) -> None:
        """Raise `DataError` if a rule is broken, or a label never occurs."""
        lines = [
            f"  {column}: {rule}: {count} {'row' if count == 1 else 'rows'}, "
            f"first at {', '.join(map(str, self._first[column, rule]))}"
            for (column, rule), count in self._counts.items()
        ]
        if not lines and len(self._labels) < 2:
            lines = [f"  {schema.target.name}: both labels must occur, received one or none"]
        if lines:
            rule = "breaks the contract (rows are counted from 1, without the header)"
            raise DataError("\n".join([f"{source}: {rule}", *lines]))


def _sides(
    frame: pd.DataFrame, labelled: npt.NDArray[np.bool_], schema: Schema, settings: TrainSettings
) -> npt.NDArray[np.uint8]:
    sides = np.full(len(labelled), UNLABELLED, dtype=np.uint8)
    sides[labelled] = np.where(is_test_row(frame, schema, settings.seed, settings.test_share), TEST, TRAIN)
    return sides


def _notes(sides: npt.NDArray[np.uint8], source: ParquetSource, schema: Schema) -> tuple[str, ...]:
    notes = [f"streamed {len(sides):,} rows: searched on a sample, fitted and tested on all"]
    if unlabelled := int((sides == UNLABELLED).sum()):
        notes.append(f"dropped {unlabelled} rows without a label in {schema.target.name}")
    unknown = [name for name in source.schema.names if name not in {*schema.fields, schema.target.name}]
    if unknown:
        notes.append(f"ignored columns that the contract does not know: {', '.join(unknown)}")
    return tuple(notes)
