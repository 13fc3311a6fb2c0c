"""Read a long table once: validate every row, decide its side, and draw a sample to search on."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pandas as pd
from tqdm import tqdm

from pipeline.core.contract.schema import Schema
from pipeline.tables.digest import TableDigest
from pipeline.tables.holdout import is_test_row
from pipeline.tables.labelled import frame_columns, labelled_batches, notes
from pipeline.tables.sources import open_source
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
    source = open_source(settings.data)
    rows = source.count or 0
    sides, sample = [], []
    digest = TableDigest(frame_columns(source, schema))
    share = settings.search_rows / max(rows, 1)
    with tqdm(total=rows, desc="survey", unit="row", unit_scale=True, disable=None) as bar:
        for batch in labelled_batches(source, schema, settings.data, BLOCK_ROWS):
            frame = batch.frame
            digest.update(frame)
            sides.append(_sides(frame, batch.labelled, schema, settings))
            sample.append(frame[is_test_row(frame, schema, settings.seed + _SAMPLE_SEED, share)])
            bar.update(len(batch.labelled))
    found = np.concatenate(sides)
    streamed = f"streamed {len(found):,} rows: searched on a sample, fitted and tested on all"
    left_out = notes(source, schema, unlabelled=int((found == UNLABELLED).sum()))
    return Survey(found, pd.concat(sample, ignore_index=True), digest.text(), (streamed, *left_out))


def _sides(
    frame: pd.DataFrame, labelled: npt.NDArray[np.bool_], schema: Schema, settings: TrainSettings
) -> npt.NDArray[np.uint8]:
    sides = np.full(len(labelled), UNLABELLED, dtype=np.uint8)
    sides[labelled] = np.where(is_test_row(frame, schema, settings.seed, settings.test_share), TEST, TRAIN)
    return sides
