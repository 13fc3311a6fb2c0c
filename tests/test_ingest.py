from __future__ import annotations

import gzip
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from pipeline.core.contract.schema import Schema, load_schema
from pipeline.core.errors import DataError
from pipeline.tables.labelled import ingest
from tests.testkit import DATA


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


def test_lines_that_are_no_rows_are_listed_beside_the_broken_rules(schema: Schema, tmp_path: Path) -> None:
    lines = DATA.read_text().splitlines()[:50]
    lines[3] = "1,2,3"
    lines[7] = lines[7].replace("owner", "castle").replace("rent", "castle").replace("parents", "castle")
    (tmp_path / "table.csv").write_text("\n".join(lines))
    with pytest.raises(DataError) as error:
        ingest(tmp_path / "table.csv", schema)
    assert str(error.value).splitlines()[1:] == [
        "  the line must have 14 cells, received 3: 1 row, first at 3",
        "  home: must be one of rent, owner, private, ignore, parents, other, unk: 1 row, first at 7",
    ]


def test_gzipped_csv_is_the_same_table(schema: Schema, tmp_path: Path) -> None:
    (tmp_path / "table.csv.gz").write_bytes(gzip.compress(DATA.read_bytes()))
    pd.testing.assert_frame_equal(ingest(tmp_path / "table.csv.gz", schema).frame, ingest(DATA, schema).frame)


@pytest.mark.parametrize("name", ["table.csv.bz2", "table.xlsx", "table"])
def test_other_files_are_refused_with_the_cure(schema: Schema, tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(DATA.read_bytes())
    with pytest.raises(
        DataError, match=r"the name must end in \.csv, \.csv\.gz or \.parquet, .*; convert or rename"
    ):
        ingest(tmp_path / name, schema)


def test_two_columns_of_one_name_are_refused(schema: Schema, tmp_path: Path) -> None:
    (tmp_path / "table.csv").write_text(DATA.read_text().replace("assets", "income", 1))
    with pytest.raises(DataError, match="two columns have the same name: income; rename one"):
        ingest(tmp_path / "table.csv", schema)


def test_an_absent_optional_column_is_told_with_its_misspelling(schema: Schema, tmp_path: Path) -> None:
    pd.read_csv(DATA).rename(columns={"income": "incom"}).to_csv(tmp_path / "table.csv", index=False)
    assert ingest(tmp_path / "table.csv", schema).notes == (
        "ignored columns that the contract does not know: incom (did you mean income?)",
        "optional columns are absent, so their values count as missing: income",
    )


@pytest.mark.parametrize("form", ["csv", "csv with gaps", "int parquet", "bool parquet", "text parquet"])
def test_labels_that_are_numbers_may_be_written_in_any_way(schema: Schema, tmp_path: Path, form: str) -> None:
    document = schema.document()
    document["target"] |= {"negative": 0, "positive": 1}
    table = pd.read_csv(DATA).head(200)
    labels = (table["status"] == "default").astype(int)
    kinds: dict[str, Any] = {"int": "int8", "bool": "bool", "text": "str"}
    kind, ending = form.rpartition(" ")[0], form.split()[-1]
    if ending == "parquet":
        table.assign(status=labels.astype(kinds[kind])).to_parquet(tmp_path / "table.parquet")
    else:
        gaps = labels.where(labels.index > 4) if "gaps" in form else labels
        table.assign(status=gaps).to_csv(tmp_path / "table.csv", index=False)
    numbers = load_schema(document)
    frame = ingest(tmp_path / f"table.{'parquet' if ending == 'parquet' else 'csv'}", numbers).frame
    expected = labels[labels.index > 4] if "gaps" in form else labels
    assert frame["status"].tolist() == expected.tolist()
    assert frame["status"].dtype == np.int64
    assert numbers.labels(frame).tolist() == expected.tolist()


def test_other_labels_are_refused(schema: Schema, tmp_path: Path) -> None:
    document = schema.document()
    document["target"] |= {"negative": 0, "positive": 1}
    pd.read_csv(DATA).head(9).to_csv(tmp_path / "table.csv", index=False)
    with pytest.raises(DataError, match="status: must be 0 or 1: 9 rows, first at 1, 2, 3, 4, 5"):
        ingest(tmp_path / "table.csv", load_schema(document))


def test_a_table_without_rows_is_refused(schema: Schema, tmp_path: Path) -> None:
    (tmp_path / "table.csv").write_text(DATA.read_text().splitlines()[0] + "\n")
    with pytest.raises(DataError, match="ok and default must both occur; the table has no labelled row"):
        ingest(tmp_path / "table.csv", schema)


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
        ("cut.csv.gz", gzip.compress(DATA.read_bytes())[:9000], "not a readable table"),
        ("no.csv.gz", DATA.read_bytes(), "not a readable table"),
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
