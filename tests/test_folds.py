from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from sklearn.model_selection import StratifiedKFold

from pipeline.core.contract.schema import Schema
from pipeline.core.errors import DataError
from pipeline.training.fitting import fold_settings
from pipeline.training.fold_split import equal_rows, fold_rows
from pipeline.training.folds import FoldSet
from pipeline.training.preparation import PreparedData, prepare
from pipeline.training.settings import TrainSettings
from tests.testkit import PROJECT


def prepared(table: pd.DataFrame, folder: Path, schema: Schema) -> tuple[TrainSettings, PreparedData]:
    """Prepare a table as the command does."""
    table.to_csv(folder / "table.csv", index=False)
    settings = TrainSettings.load(PROJECT / "conf/train.yaml", data=str(folder / "table.csv"))
    return settings, prepare(settings, schema)


def test_equal_rows_teach_the_folds_nothing(tmp_path: Path, schema: Schema, applications: pd.DataFrame) -> None:
    """Labels drawn at random cannot be predicted; a model that met copies of a fold's rows would seem to do it."""
    random = np.random.default_rng(1)
    distinct = applications.drop_duplicates(list(schema.fields)).head(1200)
    distinct = distinct.assign(status=random.choice(["ok", "default"], len(distinct)))
    settings, data = prepared(pd.concat([distinct] * 4).sample(frac=1, random_state=1), tmp_path, schema)
    parameters = {**settings.first_parameters, "eta": 0.3, "max_depth": 6}
    matrix, labels, wanted = data.train.matrix, data.train.labels, fold_settings(settings, data)
    assert FoldSet(matrix, labels, wanted, data.groups).evaluate(parameters, threads=1).means["auc"] < 0.56
    assert FoldSet(matrix, labels, wanted).evaluate(parameters, threads=1).means["auc"] > 0.8


def test_folds_are_whole_applications_stratified_and_even(
    tmp_path: Path, schema: Schema, applications: pd.DataFrame
) -> None:
    twice = pd.concat([applications, applications.head(2000)])
    _, data = prepared(twice, tmp_path, schema)
    assert data.groups is not None
    folds = fold_rows(data.train.labels, data.groups, 5, 42)
    for train, valid in folds:
        assert not set(data.groups[train]) & set(data.groups[valid])
        assert len(valid) == pytest.approx(len(data.groups) / 5, rel=0.05)
        assert data.train.labels[valid].mean() == pytest.approx(data.train.labels.mean(), abs=0.02)
    everyone = np.sort(np.concatenate([valid for _, valid in folds]))
    np.testing.assert_array_equal(everyone, np.arange(len(data.groups)))


def test_without_equal_rows_the_folds_are_those_of_earlier_releases(
    schema: Schema, applications: pd.DataFrame
) -> None:
    distinct = applications.drop_duplicates(list(schema.fields))
    groups, labels = equal_rows(distinct, schema, 42), schema.labels(distinct)
    assert groups is None
    expected = StratifiedKFold(5, shuffle=True, random_state=42).split(labels, labels)
    for found, wanted in zip(fold_rows(labels, groups, 5, 42), expected, strict=True):
        np.testing.assert_array_equal(found[0], wanted[0])
        np.testing.assert_array_equal(found[1], wanted[1])


def test_a_corrected_label_leaves_a_row_with_its_equals(schema: Schema, applications: pd.DataFrame) -> None:
    row = applications.head(1)
    groups = equal_rows(pd.concat([row, row.assign(status="default")]), schema, 42)
    assert groups is not None
    assert groups.tolist() == [0, 0]


def test_a_label_too_rare_for_the_folds_is_refused_before_training(
    tmp_path: Path, schema: Schema, applications: pd.DataFrame
) -> None:
    ok = applications[applications["status"] == "ok"].head(200)
    rare = applications[applications["status"] == "default"].head(1)
    with pytest.raises(DataError, match=r"folds is 5, but only [01] different applications .* Lower folds or add"):
        prepared(pd.concat([ok, *[rare] * 9]), tmp_path, schema)
