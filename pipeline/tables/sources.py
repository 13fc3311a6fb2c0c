"""Reads table files as Arrow record batches: memory holds a few batches, however long the table is.

A CSV file is read as text: nothing is guessed from its first rows, an unreadable number breaks a rule of the
contract instead of the whole file, and a column that the contract does not know (``007``) is passed on unchanged.
"""

from __future__ import annotations

import csv
import io
from collections import deque
from collections.abc import Generator, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TypeVar

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.csv
import pyarrow.dataset
import pyarrow.parquet

from pipeline.core.errors import DataError, first_line

CSV, GZIPPED_CSV, PARQUET = ".csv", ".csv.gz", ".parquet"

ItemT = TypeVar("ItemT")

_CSV_BYTES_PER_ROW = 64
"""Rough width of a row, to turn a number of rows into the size of a block of text."""


@dataclass(frozen=True)
class Unreadable:
    """A row that is no row of the table: its number, counted from 1 without the header, and why."""

    number: int
    reason: str


@dataclass(frozen=True, eq=False)
class Batch:
    """Some rows of a table, in order.

    Attributes
    ----------
    rows
        The rows, m of them.
    numbers
        Their numbers in the table, counted from 1 without the header: shape (m,).
    unreadable
        Rows that were left out on the way to the last of these.
    """

    rows: pa.RecordBatch
    numbers: npt.NDArray[np.int64]
    unreadable: tuple[Unreadable, ...] = ()


class Source(Protocol):
    """A table that can be read from start to end, more than once."""

    schema: pa.Schema
    """Names and types of the columns."""
    count: int | None
    """Rows of the table; None: known only after reading it."""

    def batches(self, size: int) -> Iterator[Batch]:
        """Read the table, about `size` rows at a time."""
        ...


def open_source(path: str | Path) -> Source:
    """Open a CSV file, a Parquet file or a folder of Parquet files.

    Raises
    ------
    DataError
        The path is absent, is no such table, or two columns share a name.
    """
    path = Path(path)
    if not path.exists():
        raise DataError(f"{path}: no such file; give a CSV or Parquet file, or a folder of Parquet files")
    with _readable(path):
        source = _source(path)
    names = source.schema.names
    if doubled := sorted({name for name in names if names.count(name) > 1}):
        raise DataError(f"{path}: two columns have the same name: {', '.join(doubled)}; rename one")
    return source


def _source(path: Path) -> Source:
    name = path.name.casefold()
    if path.is_dir() or name.endswith(PARQUET):
        return ParquetSource(path)
    if name.endswith((CSV, GZIPPED_CSV)):
        return CsvSource(path)
    raise DataError(
        f"{path}: the name must end in {CSV}, {GZIPPED_CSV} or {PARQUET}, or be a folder of Parquet files; "
        "convert or rename it"
    )


class Group(NamedTuple):
    """A row group of a Parquet table: the smallest part that can be read by itself."""

    file: int
    """Position of the file in the table."""
    position: int
    """Position of the group in the file."""
    first: int
    """Rows of the table before it."""
    rows: int


class ParquetSource:
    """A Parquet file, or a folder of them read in the order of their paths; ``key=value`` folders are columns."""

    def __init__(self, path: Path) -> None:
        self._path = path
        files = [str(file) for file in sorted(path.rglob(f"*{PARQUET}"))] if path.is_dir() else [str(path)]
        if not files:
            raise DataError(f"{path}: the folder holds no {PARQUET} file")
        base = str(path) if path.is_dir() else None
        dataset = pyarrow.dataset.dataset(
            files, format="parquet", partitioning="hive" if base else None, partition_base_dir=base
        )
        self.schema: pa.Schema = dataset.schema
        self._files = [
            (fragment.path, pyarrow.dataset.get_partition_keys(fragment.partition_expression))
            for fragment in dataset.get_fragments()
        ]
        self.groups = tuple(self._groups())
        """Every row group, in order."""
        self.count: int | None = sum(group.rows for group in self.groups)

    def batches(self, size: int, groups: Sequence[Group] | None = None) -> Iterator[Batch]:
        """Read file after file, about `size` rows at a time; only some row groups, if given, in their order."""
        chosen = self.groups if groups is None else groups
        with _readable(self._path):
            for position, members in groupby(chosen, key=lambda group: group.file):
                yield from self._file_batches(position, list(members), size)

    def _file_batches(self, position: int, groups: Sequence[Group], size: int) -> Iterator[Batch]:
        file, keys = self._files[position]
        numbers = np.concatenate([np.arange(group.first, group.first + group.rows) for group in groups]) + 1
        done = 0
        # Not pyarrow's dataset scanner: it decodes whole row groups, 1M rows by default, ahead of need.
        with pyarrow.parquet.ParquetFile(file, pre_buffer=False) as parquet:
            for rows in parquet.iter_batches(size, row_groups=[group.position for group in groups]):
                yield Batch(self._aligned(rows, keys, file), numbers[done : done + len(rows)])
                done += len(rows)

    def _groups(self) -> Iterator[Group]:
        first = 0
        for file, (path, _) in enumerate(self._files):
            metadata = pyarrow.parquet.read_metadata(path)
            for position in range(metadata.num_row_groups):
                rows = metadata.row_group(position).num_rows
                yield Group(file, position, first, rows)
                first += rows

    def _aligned(self, rows: pa.RecordBatch, keys: Mapping[str, Any], file: str) -> pa.RecordBatch:
        if rows.schema.equals(self.schema):
            return rows
        absent = [name for name in self.schema.names if name not in keys and name not in rows.schema.names]
        if absent:
            raise DataError(f"{file}: lacks columns that the first file has: {', '.join(absent)}")
        columns = [
            pa.array([keys[item.name]] * len(rows)).cast(item.type)
            if item.name in keys
            else rows.column(item.name).cast(item.type)
            for item in self.schema
        ]
        return pa.RecordBatch.from_arrays(columns, schema=self.schema)


class CsvSource:
    """A CSV file with a header, in UTF-8, may be gzipped; every column is text, only an empty cell is missing."""

    def __init__(self, path: Path) -> None:
        self._path = path
        # Arrow tells by the name's ending whether the file is compressed, here and when it reads the rows.
        with io.TextIOWrapper(pa.input_stream(str(path)), newline="", encoding="utf-8-sig") as file:
            header = next(csv.reader(file), [])
        if not header:
            raise DataError(f"{path}: the file is empty; it must begin with a line of column names")
        self.schema: pa.Schema = pa.schema([(name, pa.string()) for name in header])
        self.count: int | None = None

    def batches(self, size: int) -> Iterator[Batch]:
        """Read the file, about `size` rows at a time; lines with too few or too many cells are left out."""
        strange: deque[Unreadable] = deque()
        done = 0
        with _readable(self._path), self._reader(size * _CSV_BYTES_PER_ROW, strange) as reader:
            for rows in reader:
                # What is skipped is reported before the rows behind it are handed over, some of it further ahead.
                skipped = [row.number for row in strange]
                numbers = np.arange(done + 1, done + len(rows) + len(skipped) + 1)
                numbers = numbers[~np.isin(numbers, skipped)][: len(rows)]
                done = int(numbers[-1]) if len(numbers) else done
                yield Batch(rows, numbers, tuple(_taken(strange, done)))
        if strange:
            nothing = pa.RecordBatch.from_pylist([], schema=self.schema)
            yield Batch(nothing, np.array([], dtype=np.int64), tuple(strange))

    def _reader(self, block: int, strange: deque[Unreadable]) -> pa.RecordBatchReader:
        def skip(row: Any) -> str:
            reason = f"the line must have {row.expected_columns} cells, received {row.actual_columns}"
            strange.append(Unreadable(row.number - 1, reason))  # the header is the reader's row 1
            return "skip"

        return pyarrow.csv.open_csv(
            self._path,
            # One thread: only then are skipped rows numbered. Reading is a tenth of the work.
            read_options=pyarrow.csv.ReadOptions(block_size=max(block, 1 << 16), use_threads=False),
            parse_options=pyarrow.csv.ParseOptions(invalid_row_handler=skip, newlines_in_values=True),
            convert_options=pyarrow.csv.ConvertOptions(
                column_types=self.schema, strings_can_be_null=True, null_values=[""]
            ),
        )


def _taken(strange: deque[Unreadable], until: int) -> Iterator[Unreadable]:
    while strange and strange[0].number <= until:
        yield strange.popleft()


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    try:
        yield
    except (pa.ArrowException, OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{path}: not a readable table: {first_line(error)}") from None


def read_ahead(items: Iterator[ItemT]) -> Generator[ItemT, None, None]:
    """Fetch the next item in a thread while the caller works on this one; Arrow and XGBoost release the GIL."""
    with ThreadPoolExecutor(1) as pool:
        upcoming = pool.submit(next, items, None)
        while (item := upcoming.result()) is not None:
            upcoming = pool.submit(next, items, None)
            yield item
