"""A table longer than memory gives the model, the split and the errors that it would give in memory."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import xgboost as xgb
import yaml

from benchmarks.big_table import write_table
from pipeline.__main__ import main
from pipeline.cluster import ClusterSettings
from pipeline.core.contract.schema import Schema
from pipeline.core.errors import DataError
from pipeline.core.model.encoders import FrameEncoder
from pipeline.core.model.features import Matrix
from pipeline.core.promoted import MODEL_NAME
from pipeline.evaluation.metrics import auc
from pipeline.registry.logged_model import open_model
from pipeline.tables.holdout import is_test_row
from pipeline.tables.labelled import ingest
from pipeline.training.fitting import xgboost_parameters
from pipeline.training.folds import quantised
from pipeline.training.preparation import PreparedData, prepare
from pipeline.training.settings import TrainSettings
from pipeline.training.share import share_of
from pipeline.training.streaming import fit_streamed, score_streamed
from pipeline.training.survey import TEST, TRAIN, UNLABELLED, is_streamed, survey
from tests.testkit import DATA, PROJECT

ROUNDS = 30


@pytest.fixture(scope="session")
def in_memory(schema: Schema) -> tuple[TrainSettings, PreparedData]:
    """The shipped data, prepared the usual way."""
    settings = TrainSettings.load(PROJECT / "conf/train.yaml", data=str(DATA))
    return settings, prepare(settings, schema)


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The shipped data as a folder of Parquet files, in the same order."""
    folder = tmp_path_factory.mktemp("parquet")
    raw = pd.read_csv(DATA, keep_default_na=False, na_values=[""])
    for number, start in enumerate(range(0, len(raw), 1600)):
        raw.iloc[start : start + 1600].to_parquet(folder / f"part-{number}.parquet", row_group_size=700)
    return folder


@pytest.fixture
def streamed(in_memory: tuple[TrainSettings, PreparedData], folder: Path, tmp_path: Path) -> TrainSettings:
    """Settings by which that folder is streamed, in several pages."""
    changes = {"data": str(folder), "search_rows": 2000, "page_rows": 1500, "cache": str(tmp_path)}
    return in_memory[0].model_copy(update=changes)


def parameters(in_memory: tuple[TrainSettings, PreparedData], **others: float) -> dict[str, object]:
    settings, prepared = in_memory
    first = {str(name): value for name, value in settings.first_trial.items()}
    fixed = xgboost_parameters(settings, prepared.schema, prepared.vectorizer)
    return {**fixed, **first, "max_depth": 3, **others}


def train_in_memory(prepared: PreparedData, values: dict[str, object]) -> Matrix:
    data = quantised(prepared.train.matrix, prepared.train.labels, values, threads=1)
    booster = xgb.train({**values, "nthread": 1}, data, ROUNDS)
    return np.asarray(booster.inplace_predict(prepared.test.matrix))


def test_only_long_parquet_is_streamed(streamed: TrainSettings) -> None:
    assert is_streamed(streamed)
    assert not is_streamed(streamed.model_copy(update={"search_rows": 4454}))
    assert not is_streamed(streamed.model_copy(update={"data": str(DATA), "search_rows": 1}))


def test_survey_finds_what_ingest_finds(
    streamed: TrainSettings, in_memory: tuple[TrainSettings, PreparedData], schema: Schema
) -> None:
    found, prepared = survey(streamed, schema), in_memory[1]
    assert found.digest == prepared.digest
    positions = prepared.test.frame.index
    assert np.flatnonzero(found.sides == TEST).tolist() == positions.tolist()
    everything = pd.concat([prepared.train.frame, prepared.test.frame]).drop_duplicates()
    assert 1700 < len(found.sample) < 2300
    assert len(found.sample.merge(everything)) == len(found.sample)


def test_streamed_model_is_the_model_of_memory(
    streamed: TrainSettings, in_memory: tuple[TrainSettings, PreparedData], schema: Schema, tmp_path: Path
) -> None:
    found = survey(streamed, schema)
    values = parameters(in_memory)
    booster = fit_streamed(streamed, schema, found, values, ROUNDS)
    labels, probabilities = score_streamed(streamed, schema, found, booster)
    np.testing.assert_array_equal(labels, in_memory[1].test.labels)
    np.testing.assert_allclose(probabilities, train_in_memory(in_memory[1], values), atol=1e-6)
    assert list(tmp_path.iterdir()) == []  # no pages stay on the disk


def test_two_workers_train_one_model_on_all_rows(
    streamed: TrainSettings, in_memory: tuple[TrainSettings, PreparedData], schema: Schema, scheduler: str
) -> None:
    values = parameters(in_memory)
    settings = streamed.model_copy(update={"cluster": ClusterSettings(address=scheduler)})
    found = survey(settings, schema)
    booster = fit_streamed(settings, schema, found, values, ROUNDS)
    labels, probabilities = score_streamed(settings, schema, found, booster)
    expected = train_in_memory(in_memory[1], values)
    # Workers merge approximate quantiles and draw their own rows, so the bins and the trees differ a little.
    assert abs(auc(labels, probabilities) - auc(labels, expected)) < 0.01
    assert np.corrcoef(probabilities, expected)[0, 1] > 0.99
    covers = booster.get_dump(with_stats=True)[0].splitlines()[0]
    everything = in_memory[1].train.labels
    weight = float(np.mean(everything) * (1 - np.mean(everything)) * len(everything))
    assert float(covers.rpartition("cover=")[2]) == pytest.approx(0.7 * weight, rel=0.05)


def test_pages_are_bounded_and_complete(streamed: TrainSettings, schema: Schema, tmp_path: Path) -> None:
    write_table(tmp_path / "big", rows=200_000, rows_per_file=150_000)
    settings = streamed.model_copy(update={"data": str(tmp_path / "big"), "page_rows": 50_000})
    found = survey(settings, schema)
    share = share_of(settings, schema, found)
    sizes = [len(matrix) for matrix, _ in share.pages(TRAIN)]
    assert sum(sizes) == int((found.sides == TRAIN).sum())
    assert max(sizes) <= 50_000 + 65_536


def test_shares_of_a_table_are_even_and_whole(streamed: TrainSettings, schema: Schema) -> None:
    share = share_of(streamed, schema, survey(streamed, schema))
    parts = share.split(2)
    assert [group for part in parts for group in part.groups] == list(share.groups)
    np.testing.assert_array_equal(np.concatenate([part.sides for part in parts]), share.sides)
    sizes = [sum(group.rows for group in part.groups) for part in parts]
    assert max(sizes) - min(sizes) <= 700
    assert len(share.split(100)) == len(share.groups)


def test_broken_rows_are_counted_over_all_files(streamed: TrainSettings, schema: Schema, tmp_path: Path) -> None:
    raw = pd.read_csv(DATA, keep_default_na=False, na_values=[""])
    raw.loc[[2, 3000, 3001, 3002, 3003, 4000], "age"] = 7
    raw.loc[4453, "status"] = "maybe"
    raw.loc[10, ["status", "age"]] = [None, 7]  # without a label, so left out
    raw.iloc[:2000].to_parquet(tmp_path / "a.parquet")
    raw.iloc[2000:].to_parquet(tmp_path / "b.parquet")
    with pytest.raises(DataError) as error:
        survey(streamed.model_copy(update={"data": str(tmp_path)}), schema)
    assert str(error.value).splitlines()[1:] == [
        "  age: must be in [18, 100]: 6 rows, first at 3, 3001, 3002, 3003, 3004",
        "  status: must be ok or default: 1 row, first at 4454",
    ]


def test_unlabelled_rows_are_left_out(streamed: TrainSettings, schema: Schema, tmp_path: Path) -> None:
    raw = pd.read_csv(DATA, keep_default_na=False, na_values=[""]).assign(branch="north")
    raw.loc[:99, "status"] = None
    raw.to_parquet(tmp_path / "a.parquet")
    found = survey(streamed.model_copy(update={"data": str(tmp_path)}), schema)
    assert (found.sides == UNLABELLED).tolist() == [True] * 100 + [False] * 4354
    assert "dropped 100 rows without a label in status" in found.notes
    assert "ignored columns that the contract does not know: branch" in found.notes


def test_train_command_streams_a_long_table(
    folder: Path,
    tmp_path: Path,
    tracking_store: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(PROJECT)
    values = yaml.safe_load(Path("conf/train.yaml").read_text())
    values |= {"search_rows": 2000, "page_rows": 1500, "max_rounds": 40, "cache": str(tmp_path)}
    values |= {"experiment": "tests", "storage": f"sqlite:///{tmp_path}/optuna.db"}
    (tmp_path / "train.yaml").write_text(yaml.safe_dump(values))
    arguments = ["--data", str(folder), "--trials", "1", "--workers", "1", "--json"]
    assert main(["train", "--config", str(tmp_path / "train.yaml"), *arguments]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["test"]["auc"] > 0.8
    parts = open_model(f"models:/{MODEL_NAME}/{report['version']}").parts
    frame = ingest(folder, parts.schema).frame
    held_out = frame[is_test_row(frame, parts.schema, 42, 0.2)]
    matrix = FrameEncoder(parts.schema, parts.vectorizer).transform(held_out)
    # The metrics are those of the whole holdout, not of the sample's.
    found = auc(parts.schema.labels(held_out), np.asarray(parts.booster.inplace_predict(matrix)))
    assert found == pytest.approx(report["test"]["auc"], abs=1e-9)
    # What the alias stands for scores a table, and is named exactly.
    source, target = tmp_path / "in.parquet", tmp_path / "out.parquet"
    frame.to_parquet(source)
    uri = f"models:/{MODEL_NAME}@candidate"
    assert main(["score", "--input", str(source), "--output", str(target), "--model", uri]) == 0
    decided = pd.read_parquet(target)
    assert set(decided["model"]) == {f"models:/{MODEL_NAME}/{report['version']}"}
    np.testing.assert_array_equal(
        decided.loc[held_out.index, "probability"], parts.booster.inplace_predict(matrix)
    )
