"""Read, check, split and encode the table that a training works on."""

from __future__ import annotations

from dataclasses import dataclass

import pandas as pd
from sklearn.feature_extraction import DictVectorizer

from pipeline.core.contract.schema import Schema
from pipeline.core.model.encoders import FrameEncoder
from pipeline.core.model.features import Matrix, make_vectorizer
from pipeline.tables.digest import frame_digest
from pipeline.tables.holdout import is_test_row
from pipeline.tables.labelled import ingest
from pipeline.training.fold_split import EQUAL_ROWS, Positions, check_folds, equal_rows
from pipeline.training.settings import TrainSettings
from pipeline.training.survey import Survey, is_streamed, survey


@dataclass(frozen=True)
class Side:
    """Rows of one side of the split: the frame, its matrix of shape (n, k), its labels of shape (n,)."""

    frame: pd.DataFrame
    matrix: Matrix
    labels: Matrix


@dataclass(frozen=True)
class PreparedData:
    """Everything that is known before the search begins.

    Attributes
    ----------
    train, test
        Both sides of the split; of the sample when the table is streamed.
    digest
        Digest of the whole table.
    notes
        One line for each thing left out.
    groups
        Number of each training row's application; None if no two rows are equal: see `equal_rows`.
    survey
        What was found in a table that is streamed; None for a table in memory.
    """

    schema: Schema
    vectorizer: DictVectorizer
    train: Side
    test: Side
    digest: str
    notes: tuple[str, ...]
    groups: Positions | None
    survey: Survey | None = None

    @property
    def fold_inputs(self) -> dict[str, str]:
        """What the study must know about the folds; nothing for a table without equal rows."""
        return {} if self.groups is None else {EQUAL_ROWS: "in one fold"}


def prepare(settings: TrainSettings, schema: Schema) -> PreparedData:
    """Read, validate, split and encode the table.

    Raises
    ------
    DataError
        The table cannot be read, rows break the contract, or a label is too rare for the folds.
    """
    if is_streamed(settings):
        found = survey(settings, schema)
        return _prepared(settings, schema, found.sample, found.digest, found.notes, found)
    table = ingest(settings.data, schema)
    return _prepared(settings, schema, table.frame, frame_digest(table.frame), table.notes)


def _prepared(
    settings: TrainSettings,
    schema: Schema,
    rows: pd.DataFrame,
    digest: str,
    notes: tuple[str, ...],
    found: Survey | None = None,
) -> PreparedData:
    vectorizer = make_vectorizer(schema)
    held_out = is_test_row(rows, schema, settings.seed, settings.test_share)
    encode = FrameEncoder(schema, vectorizer).transform
    train, test = (Side(frame, encode(frame), schema.labels(frame)) for frame in (rows[~held_out], rows[held_out]))
    groups = equal_rows(train.frame, schema, settings.seed)
    check_folds(train.labels, groups, settings.folds)
    return PreparedData(schema, vectorizer, train, test, digest, notes, groups, found)
