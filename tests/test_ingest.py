from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from pipeline.core.contract.schema import Schema
from pipeline.core.errors import DataError
from pipeline.tables.labelled import ingest
from tests.conftest import DATA


def test_shipped_data_keeps_the_contract(schema: Schema) -> None:
    ingested = ingest(DATA, schema)
    assert ingested.frame.shape == (4454, 14)
    assert ingested.notes == ()
    assert ingested.frame["income"].isna().sum() == 381


@pytest.mark.parametrize("form", ["file.parquet", "folder"])
def test_parquet_gives_the_same_frame_as_csv(schema: Schema, tmp_path: Path, form: str) -> None:
    table = pd.read_csv(DATA)
    path = tmp_path / form
    if form == "folder":
        path.mkdir()
        table.head(2000).to_parquet(path / "part-0.parquet", index=False)
        table.tail(2454).to_parquet(path / "part-1.parquet", index=False)
    else:
        table.astype({"home": "category"}).to_parquet(path, index=False)
    pd.testing.assert_frame_equal(ingest(path, schema).frame, ingest(DATA, schema).frame)


def test_what_is_left_out_is_counted(schema: Schema, tmp_path: Path) -> None:
    table = pd.read_csv(DATA).assign(branch="north")
    table.loc[:2, "status"] = None
    table.to_csv(tmp_path / "table.csv", index=False)
    ingested = ingest(tmp_path / "table.csv", schema)
    assert len(ingested.frame) == 4451
    assert ingested.notes == (
        "dropped 3 rows without a label in status",
        "ignored columns that the contract does not know: branch",
    )


def test_bad_rows_are_all_listed(schema: Schema, tmp_path: Path) -> None:
    table = pd.read_csv(DATA).astype({"status": object})
    table.loc[4, "age"] = 0
    table.loc[5, "job"] = "astronaut"
    table.loc[6, "status"] = "perhaps"
    table.to_csv(tmp_path / "table.csv", index=False)
    with pytest.raises(DataError) as error:
        ingest(tmp_path / "table.csv", schema)
    assert "age: must be in [18, 100]: 1 row, first at 5" in str(error.value)
    assert "job: must be one of fixed, partime, freelance, others, unk: 1 row, first at 6" in str(error.value)
    assert "status: must be ok or default: 1 row, first at 7" in str(error.value)


def test_one_label_only_is_refused(schema: Schema, tmp_path: Path) -> None:
    pd.read_csv(DATA).query("status == 'ok'").to_csv(tmp_path / "table.csv", index=False)
    with pytest.raises(DataError, match="status: ok and default must both occur; only ok does"):
        ingest(tmp_path / "table.csv", schema)


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("empty.csv", b"", "the file is empty"),
        ("binary.csv", b"\xff\xfe\x00\x01", "not a readable table"),
        ("broken.parquet", b"PAR1", "not a readable table"),
    ],
)
def test_unreadable_file_is_one_line(
    schema: Schema, tmp_path: Path, name: str, content: bytes, expected: str
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=expected) as error:
        ingest(tmp_path / name, schema)
    assert "\n" not in str(error.value)


def test_absent_file_says_what_is_accepted(schema: Schema, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such file"):
        ingest(tmp_path / "none.csv", schema)


def test_text_that_pandas_takes_for_missing_stays_a_category(schema: Schema, tmp_path: Path) -> None:
    table = pd.read_csv(DATA).head(50)
    assert set(table["status"]) == {"ok", "default"}
    table["home"] = np.where(table.index == 7, "None", table["home"])
    table.to_csv(tmp_path / "table.csv", index=False)
    with pytest.raises(DataError, match=r"home: must be one of .* first at 8"):
        ingest(tmp_path / "table.csv", schema)
