"""Writes record batches to table files that appear whole or not at all."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Protocol

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet

from pipeline.core.errors import DataError, first_line
from pipeline.core.files import replacing
from pipeline.tables.sources import CSV, PARQUET


class Sink(Protocol):
    """A table file being written."""

    def write(self, rows: pa.RecordBatch) -> None:
        """Append rows."""
        ...

    def close(self) -> None:
        """Finish the file."""
        ...


class CsvSink:
    """Writes record batches as CSV lines; null becomes an empty cell."""

    def __init__(self, path: Path, schema: pa.Schema) -> None:
        self._file = path.open("wb")
        self.write(pa.RecordBatch.from_arrays([pa.array([name]) for name in schema.names], names=schema.names))

    def write(self, rows: pa.RecordBatch) -> None:
        """Append rows."""
        try:
            self._file.write(_csv_lines(rows, "none"))
        except pa.ArrowInvalid:  # a text holds a comma, a quote or a line end: Arrow then quotes every text
            self._file.write(_csv_lines(rows, "needed"))

    def close(self) -> None:
        """Finish the file."""
        self._file.close()


class ParquetSink:
    """Writes record batches to a Parquet file."""

    def __init__(self, path: Path, schema: pa.Schema) -> None:
        self._writer = pyarrow.parquet.ParquetWriter(path, schema)

    def write(self, rows: pa.RecordBatch) -> None:
        """Append rows."""
        self._writer.write_batch(rows)

    def close(self) -> None:
        """Finish the file."""
        self._writer.close()


@contextmanager
def open_sink(path: Path, schema: pa.Schema) -> Iterator[Sink]:
    """Write a CSV or Parquet file, by the name's ending, that appears under its name whole or not at all.

    Raises
    ------
    DataError
        The name ends otherwise, the folder is absent, or the disk refuses.
    """
    if path.suffix not in {CSV, PARQUET}:
        raise DataError(
            f"{path}: the name must end in {CSV} or {PARQUET}, received {path.suffix or 'no ending'!r}"
        )
    try:
        with replacing(path) as temporary:
            sink: Sink = (CsvSink if path.suffix == CSV else ParquetSink)(temporary, schema)
            with closing(sink):
                yield sink
    except OSError as error:
        raise DataError(
            f"{path}: cannot be written ({error.strerror or error}); name a file in a writable folder"
        ) from None
    except pa.ArrowException as error:
        cure = f"leave the column out, or write {PARQUET}"
        raise DataError(f"{path}: a column cannot be written ({first_line(error)}); {cure}") from None


def _csv_lines(rows: pa.RecordBatch, quoting: str) -> pa.Buffer:
    lines = pa.BufferOutputStream()
    pyarrow.csv.write_csv(
        rows, lines, pyarrow.csv.WriteOptions(include_header=False, quoting_style=quoting, batch_size=1 << 14)
    )
    return lines.getvalue()
