"""Batch scoring: the same decisions as everywhere, the table kept as it was, broken rows explained."""

from __future__ import annotations

import csv
import gzip
import json
import shutil
import threading
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import cloudpickle
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import xgboost as xgb
import yaml

from pipeline.__main__ import main
from pipeline.core.contract.schema import Schema
from pipeline.core.files import file_digests
from pipeline.core.model.bundle import BOOSTER_FILE, GOLDEN, OBJECTS_FILE, SCHEMA, VECTORIZER
from pipeline.core.model.encoders import FrameEncoder
from pipeline.core.model.features import feature_dict, make_vectorizer
from pipeline.core.promoted import Promotion, version_home
from pipeline.promotion.pointer import write_pointer
from pipeline.scoring.engine import Model, Scorer, score_table
from pipeline.scoring.settings import ScoreSettings
from pipeline.tables.sources import Batch
from tests.testkit import DATA, PROJECT

TAG = "credit_risk_model:v7"


@pytest.fixture(scope="session")
def model(schema: Schema, applications: pd.DataFrame) -> Model:
    vectorizer = make_vectorizer(schema)
    matrix = FrameEncoder(schema, vectorizer).transform(applications)
    data = xgb.DMatrix(matrix, schema.labels(applications), nthread=1)
    booster = xgb.train({"objective": "binary:logistic", "max_depth": 3, "nthread": 1}, data, 20)
    return Model(TAG, booster, vectorizer, schema)


@pytest.fixture(scope="session")
def expected(model: Model, applications: pd.DataFrame) -> np.ndarray[Any, np.dtype[np.float32]]:
    """Probabilities by the definition: DictVectorizer and booster, no code of batch scoring."""
    dicts = [feature_dict(row, model.schema) for row in rows_of(applications)]
    return np.asarray(model.booster.inplace_predict(model.vectorizer.transform(dicts)))


@pytest.fixture(autouse=True)
def home(model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A store with a promoted version; the project's folder is the working folder."""
    monkeypatch.setenv("BENTOML_HOME", str(tmp_path / "store"))
    monkeypatch.chdir(PROJECT)
    folder = version_home(TAG)
    folder.mkdir(parents=True)
    model.booster.save_model(folder / BOOSTER_FILE)
    objects = {VECTORIZER: model.vectorizer, SCHEMA: model.schema.document(), GOLDEN: {}}
    (folder / OBJECTS_FILE).write_bytes(cloudpickle.dumps(objects))
    digests = file_digests(folder)
    write_pointer(Promotion(tag=TAG, version=7, run_id="run", since="", by="", why="", digests=digests))
    return folder


@pytest.fixture
def score(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., dict[str, Any]]:
    """Score in batches of 500 rows, so that every file takes several; returns the JSON report."""
    config = write_config(tmp_path)

    def run(source: Path, target: Path, *flags: str, code: int = 0) -> dict[str, Any]:
        arguments = ["--input", str(source), "--output", str(target), "--config", str(config), "--json", *flags]
        assert main(["score", *arguments]) == code
        printed = capsys.readouterr()
        return {**(json.loads(printed.out) if printed.out else {}), "stderr": printed.err}

    return run


def write_config(folder: Path, **values: Any) -> Path:
    config = folder / "score.yaml"
    config.write_text(yaml.safe_dump({"batch_rows": 500, "threads": 2, "cluster": None, **values}))
    return config


def rows_of(frame: pd.DataFrame) -> list[dict[str, Any]]:
    return [
        {str(name): None if value != value else value for name, value in row.items()}
        for row in frame.to_dict("records")
    ]


def left_behind(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.is_file() and path.name != "score.yaml")


def check_decisions(frame: pd.DataFrame, expected: np.ndarray[Any, Any]) -> None:
    np.testing.assert_array_equal(frame["probability"].to_numpy(dtype=np.float32), expected)
    above = pd.cut(expected.astype(float), [-1, 0.3, 0.5, 2], labels=["APPROVED", "MAYBE", "DECLINED"])
    assert (frame["decision"].to_numpy() == np.asarray(above)).all()
    assert set(frame["model"]) == {TAG}


@pytest.mark.parametrize("target", ["out.csv", "out.parquet"])
@pytest.mark.parametrize("kind", ["csv", "parquet", "folder"])
def test_every_row_gets_its_decision_in_order(
    kind: str, target: str, tmp_path: Path, applications: pd.DataFrame, expected: Any, score: Any
) -> None:
    source = write_source(kind, applications, tmp_path)
    report = score(source, tmp_path / target)
    read = pd.read_csv if target.endswith("csv") else pd.read_parquet
    frame = read(tmp_path / target)
    check_decisions(frame, expected)
    assert frame.columns.tolist() == [*applications.columns, "probability", "decision", "model"]
    given = applications.drop(columns="status").fillna(-1)
    pd.testing.assert_frame_equal(
        frame[given.columns].fillna(-1).astype(given.dtypes.to_dict()), given, check_dtype=False
    )
    assert report["scored"] == len(applications)
    assert report["decisions"] == {
        status: int((frame["decision"] == status).sum()) for status in ("APPROVED", "MAYBE", "DECLINED")
    }
    assert (report["rejected"], report["rejects"]) == (0, None)
    assert not (tmp_path / "out.rejects.csv").exists()


def write_source(kind: str, frame: pd.DataFrame, folder: Path) -> Path:
    if kind == "csv":
        frame.to_csv(folder / "in.csv", index=False)
        return folder / "in.csv"
    if kind == "parquet":
        frame.to_parquet(folder / "in.parquet", row_group_size=700)
        return folder / "in.parquet"
    (folder / "in/deeper").mkdir(parents=True)
    frame.iloc[:2000].to_parquet(folder / "in/a.parquet", row_group_size=300)
    frame.iloc[2000:].to_parquet(folder / "in/deeper/b.parquet")
    return folder / "in"


def test_csv_passes_through_to_the_letter(tmp_path: Path, score: Any) -> None:
    lines = DATA.read_text().splitlines()[:4]
    given = [f"id,{lines[0]},note", *(f"00{n},{line},1.50" for n, line in enumerate(lines[1:]))]
    (tmp_path / "in.csv").write_text("\n".join(given) + "\n")
    score(tmp_path / "in.csv", tmp_path / "out.csv")
    assert [line.rsplit(",", 3)[0] for line in (tmp_path / "out.csv").read_text().splitlines()] == given


def test_awkward_text_survives_csv(tmp_path: Path, score: Any) -> None:
    frame = pd.read_csv(DATA).head(3).assign(note=['a "b", c', "two\nlines", "ümlaut"], **{"odd, name": "x"})
    frame.to_csv(tmp_path / "in.csv", index=False)
    score(tmp_path / "in.csv", tmp_path / "out.csv")
    with (tmp_path / "out.csv").open(newline="") as file:
        found = list(csv.DictReader(file))
    assert [row["note"] for row in found] == frame["note"].tolist()
    assert [row["odd, name"] for row in found] == ["x"] * 3


def test_parquet_types_and_unknown_columns_are_kept(
    tmp_path: Path, applications: pd.DataFrame, score: Any
) -> None:
    table = pa.Table.from_pandas(applications.head(1200), preserve_index=False).drop_columns("assets")
    table = table.set_column(1, "home", table["home"].dictionary_encode())
    table = table.set_column(0, "seniority", table["seniority"].cast(pa.int16()))
    table = table.append_column("when", pa.array(range(1200), pa.timestamp("s")))
    table = table.append_column("tags", pa.array([["a", "b"]] * 1200))
    pq.write_table(table, tmp_path / "in.parquet")
    score(tmp_path / "in.parquet", tmp_path / "out.parquet")
    given, found = pq.read_table(tmp_path / "in.parquet"), pq.read_table(tmp_path / "out.parquet")
    assert found.schema.types[:-3] == given.schema.types
    assert found.drop_columns(["probability", "decision", "model"]).equals(given)
    assert found.schema.types[-3:] == [pa.float32(), pa.string(), pa.string()]


def test_column_of_the_folder_names_is_kept(tmp_path: Path, applications: pd.DataFrame, score: Any) -> None:
    for year in (2024, 2025):
        (tmp_path / f"in/year={year}").mkdir(parents=True)
        applications.head(3).to_parquet(tmp_path / f"in/year={year}/part.parquet")
    score(tmp_path / "in", tmp_path / "out.parquet")
    assert pd.read_parquet(tmp_path / "out.parquet")["year"].tolist() == [2024] * 3 + [2025] * 3


def broken_lines() -> list[str]:
    """1,200 lines of which four are no application, at rows 2, 4, 1001 and 1200."""
    header, *lines = DATA.read_text().splitlines()[:1201]
    cells = lines[1].split(",")
    lines[1] = ",".join(["-1", "castle", *cells[2:7], "many", *cells[8:]])
    lines[3] = "1,2,3"
    lines[1000] = ",".join(["", *lines[1000].split(",")[1:]])
    lines[1199] += ",more"
    return [header, *lines]


def test_broken_rows_are_rejected_with_number_and_reasons(tmp_path: Path, score: Any) -> None:
    (tmp_path / "in.csv").write_text("\n".join(broken_lines()) + "\n")
    report = score(tmp_path / "in.csv", tmp_path / "out.csv")
    assert (report["scored"], report["rejected"]) == (1196, 4)
    rejects = pd.read_csv(report["rejects"])
    assert rejects["rejected_row"].tolist() == [2, 4, 1001, 1200]
    reasons = rejects["rejected_because"].tolist()
    assert reasons[0].startswith("seniority: must be in [0, 60]; home: must be one of rent, owner,")
    assert reasons[0].endswith("; expenses: must be a number")
    assert reasons[1:] == [
        "the line must have 14 cells, received 3",
        "seniority: must not be missing",
        "the line must have 14 cells, received 15",
    ]
    assert rejects.loc[0, "home"] == "castle"
    kept = (tmp_path / "out.csv").read_text().splitlines()
    good = [line for number, line in enumerate(broken_lines()) if number not in {2, 4, 1001, 1200}]
    assert [line.rsplit(",", 3)[0] for line in kept] == good


def test_mended_rejects_can_be_scored(tmp_path: Path, score: Any) -> None:
    (tmp_path / "in.csv").write_text("\n".join(broken_lines()[:3]) + "\n")
    score(tmp_path / "in.csv", tmp_path / "out.csv")
    rejects = tmp_path / "out.rejects.csv"
    rejects.write_text(rejects.read_text().replace("-1", "1").replace("castle", "rent").replace("many", "40"))
    assert score(rejects, tmp_path / "second.csv")["scored"] == 1
    assert pd.read_csv(tmp_path / "second.csv")["rejected_row"].tolist() == [2]


def test_rejects_of_an_earlier_run_go(tmp_path: Path, score: Any) -> None:
    (tmp_path / "in.csv").write_text("\n".join(broken_lines()[:3]) + "\n")
    assert score(tmp_path / "in.csv", tmp_path / "out.csv")["rejected"] == 1
    (tmp_path / "in.csv").write_text("\n".join(broken_lines()[:2]) + "\n")
    assert score(tmp_path / "in.csv", tmp_path / "out.csv")["rejected"] == 0
    assert left_behind(tmp_path) == ["in.csv", "out.csv"]


@pytest.mark.parametrize("before", [None, "the table of last month"])
def test_if_every_row_is_rejected_the_old_output_stays(before: str | None, tmp_path: Path, score: Any) -> None:
    header = DATA.read_text().splitlines()[0]
    (tmp_path / "in.csv").write_text(f"{header}\n1,2\n")
    if before:
        (tmp_path / "out.csv").write_text(before)
    report = score(tmp_path / "in.csv", tmp_path / "out.csv", code=1)
    assert "error: every row breaks the contract; see " in report["stderr"]
    assert ("out.csv is left as it was" in report["stderr"]) is bool(before)
    assert (report["scored"], report["rejected"], report["output"]) == (0, 1, None)
    assert "must have 14 cells" in (tmp_path / "out.rejects.csv").read_text()
    assert left_behind(tmp_path) == ["in.csv", *(["out.csv"] if before else []), "out.rejects.csv"]
    assert not before or (tmp_path / "out.csv").read_text() == before


def test_the_report_lists_the_broken_rules(tmp_path: Path, score: Any) -> None:
    (tmp_path / "in.csv").write_text("\n".join(broken_lines()) + "\n")
    assert score(tmp_path / "in.csv", tmp_path / "out.csv")["broken_rules"] == [
        "seniority: must not be missing: 1 row, first at 1001",
        "seniority: must be in [0, 60]: 1 row, first at 2",
        "home: must be one of rent, owner, private, ignore, parents, other, unk: 1 row, first at 2",
        "expenses: must be a number: 1 row, first at 2",
        "the line must have 14 cells, received 3: 1 row, first at 4",
        "the line must have 14 cells, received 15: 1 row, first at 1200",
    ]


def test_a_misspelt_optional_column_is_told(
    tmp_path: Path, score: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    source, target = tmp_path / "in.csv", tmp_path / "out.csv"
    pd.read_csv(DATA).rename(columns={"income": "incom"}).to_csv(source, index=False)
    notes = [
        "ignored columns that the contract does not know: incom (did you mean income?)",
        "optional columns are absent, so their values count as missing: income",
    ]
    assert score(source, target)["notes"] == notes
    config = str(write_config(tmp_path))
    assert main(["score", "--input", str(source), "--output", str(target), "--config", config]) == 0
    assert capsys.readouterr().out.splitlines()[:2] == notes


def test_gzipped_csv_is_scored(tmp_path: Path, score: Any, expected: Any) -> None:
    (tmp_path / "in.csv.gz").write_bytes(gzip.compress(DATA.read_bytes()))
    assert score(tmp_path / "in.csv.gz", tmp_path / "out.csv")["scored"] == len(expected)
    check_decisions(pd.read_csv(tmp_path / "out.csv"), expected)


@pytest.mark.parametrize("ending", ["csv", "parquet"])
def test_empty_table_gives_an_empty_table(
    ending: str, tmp_path: Path, applications: pd.DataFrame, score: Any
) -> None:
    source = tmp_path / f"in.{ending}"
    empty = applications.head(0)
    empty.to_csv(source, index=False) if ending == "csv" else empty.to_parquet(source)
    assert score(source, tmp_path / f"out.{ending}")["scored"] == 0
    found = (pd.read_csv if ending == "csv" else pd.read_parquet)(tmp_path / f"out.{ending}")
    assert (len(found), found.columns.tolist()[-1]) == (0, "model")


def test_target_and_optional_columns_may_be_absent(tmp_path: Path, score: Any) -> None:
    pd.read_csv(DATA).drop(columns=["status", "income", "debt"]).to_csv(tmp_path / "in.csv", index=False)
    assert score(tmp_path / "in.csv", tmp_path / "out.csv")["scored"] == 4454


def test_table_that_breaks_off_leaves_the_old_output(
    tmp_path: Path, applications: pd.DataFrame, score: Any
) -> None:
    source = write_source("folder", applications, tmp_path)
    part = source / "deeper/b.parquet"
    content = bytearray(part.read_bytes())
    content[4 : len(content) // 2] = b"\0" * (len(content) // 2 - 4)
    part.write_bytes(content)
    (tmp_path / "out.csv").write_text("old")
    report = score(source, tmp_path / "out.csv", code=1)
    assert report["stderr"].startswith("error: ")
    assert "not a readable table" in report["stderr"]
    assert (tmp_path / "out.csv").read_text() == "old"
    assert left_behind(tmp_path) == ["out.csv"]


@pytest.mark.parametrize(
    ("prepare", "message"),
    [
        (lambda frame: frame.drop(columns=["age"]), "required columns are absent: age"),
        (
            lambda frame: frame.assign(model="x"),
            "the table has columns of the names that `score` adds: model; rename or drop them",
        ),
        (
            lambda frame: frame.rename(columns={"status": "price"}),
            "two columns have the same name: price; rename one",
        ),
    ],
)
def test_unusable_table_is_refused(
    prepare: Any, message: str, tmp_path: Path, applications: pd.DataFrame, score: Any
) -> None:
    prepare(applications).to_csv(tmp_path / "in.csv", index=False)
    assert message in score(tmp_path / "in.csv", tmp_path / "out.csv", code=1)["stderr"]
    assert left_behind(tmp_path) == ["in.csv"]


@pytest.mark.parametrize(
    ("source", "target", "flags", "message"),
    [
        ("absent.csv", "out.csv", [], "no such file"),
        ("in.csv", "out.xlsx", [], "the name must end in .csv or .parquet"),
        ("in.csv", "in.csv", [], "must lie outside of the input"),
        ("folder", "folder/out.parquet", [], "must lie outside of the input"),
        ("in.csv", "absent/out.csv", [], "cannot be written"),
        ("in.csv", "out.csv", ["--rejects", "out.csv"], "the rejects need a file of their own"),
    ],
)
def test_unusable_places_are_refused(
    source: str, target: str, flags: list[str], message: str, tmp_path: Path, score: Any
) -> None:
    shutil.copy(DATA, tmp_path / "in.csv")
    (tmp_path / "folder").mkdir()
    flags = [str(tmp_path / flag) if flag == "out.csv" else flag for flag in flags]
    assert message in score(tmp_path / source, tmp_path / target, *flags, code=1)["stderr"]
    assert left_behind(tmp_path) == ["in.csv"]


def test_altered_model_is_refused(home: Path, tmp_path: Path, score: Any) -> None:
    (home / OBJECTS_FILE).write_bytes((home / OBJECTS_FILE).read_bytes() + b".")
    assert "its sha256 is not the promoted one" in score(DATA, tmp_path / "out.csv", code=1)["stderr"]


def test_nothing_promoted_names_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, score: Any) -> None:
    monkeypatch.setenv("BENTOML_HOME", str(tmp_path / "empty"))
    assert "python -m pipeline promote" in score(DATA, tmp_path / "out.csv", code=1)["stderr"]


def test_long_table_is_never_held(model: Model, applications: pd.DataFrame) -> None:
    rows = pa.RecordBatch.from_pandas(applications.head(50).drop(columns="status"), preserve_index=False)
    alive: weakref.WeakSet[Batch] = weakref.WeakSet()
    too_many = threading.Event()

    class Long:
        schema: pa.Schema = rows.schema
        count: int | None = None

        def batches(self, size: int) -> Iterator[Batch]:
            for start in range(200):
                batch = Batch(rows, np.arange(start * 50, start * 50 + 50))
                alive.add(batch)
                if len(alive) > 9:
                    too_many.set()
                yield batch

    settings = ScoreSettings(batch_rows=50, threads=2, cluster=None)
    results = score_table(Long(), Scorer(model), settings)
    next(results)
    assert not too_many.wait(0.2)  # a slow disk: nothing is read meanwhile that could not be held
    assert sum(1 for _ in results) == 199
    assert not too_many.is_set()


def test_cluster_gives_the_same_file(
    tmp_path: Path, applications: pd.DataFrame, expected: Any, score: Any, scheduler: str
) -> None:
    frame = applications.copy()
    frame.loc[[3, 2500], "age"] = 200
    frame.to_parquet(tmp_path / "in.parquet")
    here = score(tmp_path / "in.parquet", tmp_path / "here.csv")
    write_config(tmp_path, cluster={"address": scheduler})
    there = score(tmp_path / "in.parquet", tmp_path / "there.csv")
    assert there["decisions"] == here["decisions"]
    assert (tmp_path / "there.csv").read_bytes() == (tmp_path / "here.csv").read_bytes()
    assert (tmp_path / "there.rejects.csv").read_bytes() == (tmp_path / "here.rejects.csv").read_bytes()
    assert pd.read_csv(tmp_path / "there.rejects.csv")["rejected_row"].tolist() == [4, 2501]


def test_absent_cluster_is_named(tmp_path: Path, score: Any) -> None:
    write_config(tmp_path, cluster={"address": "tcp://127.0.0.1:1"})
    report = score(DATA, tmp_path / "out.csv", code=1)
    assert "no Dask scheduler answers at tcp://127.0.0.1:1" in report["stderr"]
    assert left_behind(tmp_path) == []
