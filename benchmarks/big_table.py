"""Make a folder of Parquet files of any length from the shipped data, to try things at scale.

    python -m benchmarks.big_table FOLDER --rows 20000000

Rows are drawn with replacement, and their amounts of money are scaled by up to a tenth, so that nearly every row
is another one: equal rows would all fall on one side of the split, and into the sample for the search or not.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.core.contract.schema import Schema
from pipeline.core.settings import conf_folder
from pipeline.tables.labelled import ingest

MONEY = ("expenses", "income", "assets", "debt", "amount", "price")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--rows", type=int, default=20_000_000)
    parser.add_argument("--rows-per-file", type=int, default=1_000_000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    write_table(options.folder, options.rows, options.rows_per_file, options.seed)
    print(f"{options.rows:,} rows in {options.folder}")


def write_table(folder: Path, rows: int, rows_per_file: int = 1_000_000, seed: int = 0) -> None:
    """Write so many rows into a folder that does not exist yet."""
    frame = ingest("data/credit_risk.csv", Schema.load(conf_folder() / "schema.yaml")).frame
    random = np.random.default_rng(seed)
    folder.mkdir(parents=True)
    for number, start in enumerate(range(0, rows, rows_per_file)):
        part = resampled(frame, min(rows_per_file, rows - start), random)
        pq.write_table(
            pa.Table.from_pandas(part, preserve_index=False),
            folder / f"part-{number:04d}.parquet",
            row_group_size=1 << 17,
        )


def resampled(frame: pd.DataFrame, rows: int, random: np.random.Generator) -> pd.DataFrame:
    """Draw rows with replacement, with amounts of money scaled by up to a tenth."""
    part = frame.iloc[random.integers(0, len(frame), rows)].reset_index(drop=True)
    for name in MONEY:
        part[name] = (part[name] * random.uniform(0.9, 1.1, rows)).round(1)
    return part


if __name__ == "__main__":
    main()
