"""Train a booster on a share of a long Parquet table without holding that share in memory.

The rows are read in batches. XGBoost keeps its quantised pages on the disk and reads them back for each level of
each tree, so the memory needed depends on `page_rows`, not on the length of the table.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import xgboost as xgb
from tqdm import tqdm

from pipeline.core.contract.schema import Schema, load_schema
from pipeline.core.model.encoders import FrameEncoder
from pipeline.core.model.features import Matrix, make_vectorizer
from pipeline.tables.sources import Group, ParquetSource, read_ahead
from pipeline.training.settings import TrainSettings
from pipeline.training.survey import BLOCK_ROWS, TRAIN, Survey

Pages = Iterator[tuple[Matrix, Matrix]]
"""Encoded rows, shape (m, k), and their labels, shape (m,)."""


@dataclass(frozen=True)
class Share:
    """Row groups of a table that one process trains on; travels to cluster workers, which see the same files."""

    path: str
    groups: tuple[Group, ...]
    sides: npt.NDArray[np.uint8]
    """Sides of the rows of these groups, in order."""
    schema: Mapping[str, Any]
    page_rows: int
    cache: str | None

    def pages(self, side: int) -> Pages:
        """Read and encode the rows of one side, about `page_rows` at a time."""
        matrices: list[Matrix] = []
        labels: list[Matrix] = []
        for matrix, label in read_ahead(self._blocks(side)):
            matrices.append(matrix)
            labels.append(label)
            if sum(map(len, labels)) >= self.page_rows:
                yield np.concatenate(matrices), np.concatenate(labels)
                matrices, labels = [], []
        if matrices:
            yield np.concatenate(matrices), np.concatenate(labels)

    def train(self, parameters: Mapping[str, Any], rounds: int, *, shown: bool) -> xgb.Booster:
        """Train on the rows of the training side; among several processes, each with its own share."""
        with (
            tempfile.TemporaryDirectory(prefix="pages-", dir=self.cache) as folder,
            tqdm(total=rounds, desc="rounds", unit="round", disable=None if shown else True) as bar,
        ):
            return self._train(parameters, rounds, Path(folder), bar)

    def split(self, parts: int) -> list[Share]:
        """Cut into at most so many shares of whole row groups, about equally long."""
        ends = np.cumsum([group.rows for group in self.groups])
        starts = ends - [group.rows for group in self.groups]
        owners = (starts + ends) // 2 * parts // ends[-1]  # a group belongs where its middle lies
        return [
            replace(
                self,
                groups=tuple(self.groups[position] for position in members),
                sides=self.sides[starts[members[0]] : ends[members[-1]]],
            )
            for members in (np.flatnonzero(owners == owner) for owner in np.unique(owners))
        ]

    def _train(self, parameters: Mapping[str, Any], rounds: int, folder: Path, bar: Any) -> xgb.Booster:
        # Gone with this function: XGBoost removes its pages before their folder is removed.
        pages = _Pages(lambda: self.pages(TRAIN), folder)
        data = xgb.ExtMemQuantileDMatrix(pages, max_bin=parameters["max_bin"], nthread=parameters["nthread"])
        return xgb.train(dict(parameters), data, rounds, callbacks=[_Rounds(bar)])

    def _blocks(self, side: int) -> Pages:
        schema = load_schema(self.schema)
        encode = FrameEncoder(schema, make_vectorizer(schema)).transform
        done = 0
        for batch in ParquetSource(Path(self.path)).batches(BLOCK_ROWS, self.groups):
            mine = self.sides[done : done + len(batch.rows)] == side
            done += len(batch.rows)
            rows = batch.rows.filter(pa.array(mine))
            yield encode(rows), schema.labels(rows)


class _Pages(xgb.DataIter):
    """Hands pages to XGBoost, which asks for them several times and keeps its own form of them on the disk."""

    def __init__(self, start: Callable[[], Pages], folder: Path) -> None:
        self._start = start
        self._pages = start()
        super().__init__(cache_prefix=str(folder / "page"), release_data=True)

    def next(self, input_data: Callable[..., Any]) -> bool:
        """Hand over one page; False at the end."""
        page = next(self._pages, None)
        if page is None:
            return False
        input_data(data=page[0], label=page[1])
        return True

    def reset(self) -> None:
        """Begin again."""
        self._pages = self._start()


class _Rounds(xgb.callback.TrainingCallback):
    def __init__(self, bar: Any) -> None:
        self._bar = bar

    def after_iteration(self, model: xgb.Booster, epoch: int, evals_log: Any) -> bool:
        self._bar.update()
        return False


def share_of(settings: TrainSettings, schema: Schema, found: Survey) -> Share:
    """The whole table as one share."""
    # Workers may run in another folder.
    path = str(Path(settings.data).resolve())
    return Share(
        path, ParquetSource(Path(path)).groups, found.sides, schema.document(), settings.page_rows, settings.cache
    )
