"""Divide the training rows into folds: stratified by label, and equal rows in the same fold."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pandas as pd

from pipeline.core.contract.schema import Schema
from pipeline.core.errors import DataError
from pipeline.core.model.features import Matrix
from pipeline.tables.holdout import content_hashes

EQUAL_ROWS = "equal_rows"
"""Input of a study on a table with equal rows: its folds keep them together."""

Positions = npt.NDArray[np.intp]


def equal_rows(frame: pd.DataFrame, schema: Schema, seed: int) -> Positions | None:
    """Number the distinct applications of a table in the order in which they first occur.

    Rows are equal when their content hash is, as in the split between training and test. The label does not count.

    Returns
    -------
    numpy.ndarray or None
        Number of each row's application, shape (n,); None if no two rows are equal.
    """
    numbers, distinct = pd.factorize(content_hashes(frame, schema, seed))
    return None if len(distinct) == len(numbers) else np.asarray(numbers, dtype=np.intp)


def fold_rows(
    labels: Matrix, groups: Positions | None, folds: int, seed: int
) -> list[tuple[Positions, Positions]]:
    """Divide rows into folds.

    Parameters
    ----------
    labels
        Shape (n,): 1 = default.
    groups
        From `equal_rows`. If None, the folds are those of scikit-learn's ``StratifiedKFold`` over the rows;
        otherwise over the distinct applications, and each row follows its application.

    Returns
    -------
    list
        For each fold the positions of the rows to train on and of those to validate on.
    """
    from sklearn.model_selection import StratifiedKFold

    members = np.arange(len(labels)) if groups is None else groups
    strata = _majority_labels(labels, members)
    splitter = StratifiedKFold(folds, shuffle=True, random_state=seed)
    validated = np.empty(len(strata), dtype=np.intp)
    for fold, (_, valid) in enumerate(splitter.split(np.zeros(len(strata)), strata)):
        validated[valid] = fold
    fold_of_row = validated[members]
    return [(np.flatnonzero(fold_of_row != fold), np.flatnonzero(fold_of_row == fold)) for fold in range(folds)]


def check_folds(labels: Matrix, groups: Positions | None, folds: int) -> None:
    """Check that each fold can hold both labels.

    Raises
    ------
    DataError
        One label is too rare.
    """
    strata = _majority_labels(labels, np.arange(len(labels)) if groups is None else groups)
    rarest = int(min(strata.sum(), len(strata) - strata.sum()))
    if rarest < folds:
        raise DataError(
            f"folds is {folds}, but only {rarest} different applications on the training side have the rarer "
            "label, and each fold needs one. Lower folds or add rows."
        )


def _majority_labels(labels: Matrix, members: Positions) -> npt.NDArray[np.int64]:
    """Label of most rows of each application; 1 in a tie."""
    count = np.bincount(members)
    return (2 * np.bincount(members, weights=labels) >= count).astype(np.int64)
