"""A file in, a validated frame out; what was left out is counted and explained."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from pipeline.core.contract.columns import as_numbers
from pipeline.core.contract.schema import Schema, Violation, check_columns, violations
from pipeline.core.errors import DataError, first_line


@dataclass(frozen=True)
class Ingested:
    """A table that keeps the contract.

    Attributes
    ----------
    frame
        The contract's fields and the target, in the contract's order; numbers float64 (NaN = missing).
    notes
        One line for each thing left out: rows without a label, columns unknown to the contract.
    """

    frame: pd.DataFrame
    notes: tuple[str, ...]


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
    table = read_table(path)
    check_columns(table, schema, labelled=True)
    labelled, notes = _drop_unlabelled(table, schema)
    unknown = [str(name) for name in table.columns if name not in {*schema.fields, schema.target.name}]
    if unknown:
        notes.append(f"ignored columns that the contract does not know: {', '.join(unknown)}")
    _check(labelled, schema, str(path))
    return Ingested(normalised(labelled, schema), tuple(notes))


def read_table(path: str | Path) -> pd.DataFrame:
    """Read a CSV or Parquet file, or a folder of Parquet files.

    Raises
    ------
    DataError
        The path is absent or holds no such table.
    """
    path = Path(path)
    if not path.exists():
        raise DataError(f"{path}: no such file; give a CSV or Parquet file, or a folder of Parquet files")
    try:
        if path.is_dir() or path.suffix == ".parquet":
            return pd.read_parquet(path)
        # Only an empty cell is missing: "NA" or "None" may be a category.
        return pd.read_csv(path, keep_default_na=False, na_values=[""])
    except (ValueError, OSError) as error:
        raise DataError(f"{path}: not a readable table: {first_line(error)}") from None


def _drop_unlabelled(table: pd.DataFrame, schema: Schema) -> tuple[pd.DataFrame, list[str]]:
    empty = table[schema.target.name].isna()
    if not empty.any():
        return table, []
    return table[~empty], [f"dropped {int(empty.sum())} rows without a label in {schema.target.name}"]


def _check(table: pd.DataFrame, schema: Schema, source: str) -> None:
    problems = [str(problem) for problem in violations(table, schema)]
    target = schema.target
    labels = table[target.name]
    strange = ~labels.isin([target.negative, target.positive]).to_numpy(dtype=bool)
    if strange.any():
        problems.append(str(Violation(target.name, f"must be {target.negative} or {target.positive}", strange)))
    elif labels.nunique() < 2:
        problems.append(f"{target.name}: both labels must occur, received {len(labels)} rows with one or none")
    if problems:
        lines = "\n".join(f"  {problem}" for problem in problems)
        raise DataError(f"{source}: breaks the contract (rows are counted from 1, without the header)\n{lines}")


def normalised(table: pd.DataFrame, schema: Schema) -> pd.DataFrame:
    """Give valid rows the columns, types and order on which the split and everything behind it rely."""
    present = {name: field for name, field in schema.fields.items() if name in table.columns}
    columns = {
        name: as_numbers(table[name]) if field.is_numeric else table[name].astype("str").to_numpy()
        for name, field in present.items()
    }
    return pd.DataFrame({**columns, schema.target.name: table[schema.target.name].to_numpy()})
