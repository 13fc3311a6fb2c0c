from __future__ import annotations

import json
import os
from datetime import UTC, datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from pipeline.__main__ import main
from pipeline.core.errors import DataError
from pipeline.monitoring.log_reader import read_decisions
from tests.test_decision_log import APPLICATION, LogInFolder, decided_batch

V2 = (
    b'"model":"credit_risk_model:v2","digest":"d","schema":"s",'
    b'"thresholds":{"maybe_above":0.3,"declined_above":0.5}'
)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Decisions of two workers and two versions; one line cut by a crash."""
    one, other = LogInFolder(tmp_path), LogInFolder(tmp_path)
    now = datetime.now(UTC).timestamp()
    one.writer.add(decided_batch(2, 0, at=now))
    one.writer.add(decided_batch(1, 2, at=now - 7200))
    one.writer.close()
    other.writer.add(decided_batch(3, 3, at=now - 3600, model=V2, statuses=["DECLINED"] * 3, first_row=0))
    other.writer.close()
    with (tmp_path / "decisions-0.jsonl").open("a") as file:
        file.write('{"time":"2026-')
    return tmp_path


def test_what_was_written_is_read_back_in_order(folder: Path) -> None:
    found = read_decisions(folder)
    assert found.broken_lines == 1
    assert found.frame["request_id"].tolist() == ["r2", "r3", "r4", "r5", "r0", "r1"]
    first, second = found.frame.iloc[0], found.frame.iloc[1]
    assert {name: first[f"input.{name}"] for name in ("age", "home")} == {"age": 30, "home": "owner"}
    names = map(str, found.frame.columns)
    assert set(APPLICATION) == {name.partition(".")[2] for name in names if name.startswith("input.")}
    assert (second["status"], second["model"], second["maybe_above"]) == ("DECLINED", "credit_risk_model:v2", 0.3)


def test_it_can_be_narrowed_by_time_and_version(folder: Path) -> None:
    recent = datetime.now(UTC) - timedelta(minutes=90)
    assert len(read_decisions(folder, since=recent).frame) == 5
    assert len(read_decisions(folder, since=recent.replace(tzinfo=None)).frame) == 5
    assert len(read_decisions(folder, model="credit_risk_model:v2").frame) == 3
    nothing = read_decisions(folder, model="credit_risk_model:v9").frame
    assert nothing.empty
    assert set(nothing.columns) == {"time", "request_id", "model", "probability", "status"}


def test_a_folder_without_decisions_says_what_to_name(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"decision_log\.folder"):
        read_decisions(tmp_path)


@pytest.mark.parametrize("ending", [".csv", ".parquet"])
def test_the_command_writes_one_table(folder: Path, ending: str, capsys: pytest.CaptureFixture[str]) -> None:
    output = folder / f"table{ending}"
    assert main(["decisions", "--folder", str(folder), "--output", str(output)]) == 0
    printed = capsys.readouterr().out
    assert "6 decisions" in printed
    assert "credit_risk_model:v2: 3 decisions: APPROVED 0.0%, MAYBE 0.0%, DECLINED 100.0%" in printed
    table = pd.read_csv(output) if ending == ".csv" else pd.read_parquet(output)
    assert table["request_id"].tolist() == ["r2", "r3", "r4", "r5", "r0", "r1"]


def test_no_decision_of_that_kind_is_no_error(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["decisions", "--folder", str(folder), "--model", "credit_risk_model:v9"]) == 0
    assert "0 decisions" in capsys.readouterr().out


# Whatever stands in the files, what is a decision is read, and what is not is counted.

GOOD: dict[str, Any] = {
    "time": "2026-01-01T00:00:00.5+00:00", "model": "credit_risk_model:v1", "digest": "d", "schema": "s",
    "thresholds": {"maybe_above": 0.3, "declined_above": 0.5}, "request_id": "good", "probability": 0.25,
    "status": "APPROVED", "inputs": APPLICATION,
}  # fmt: skip
NO_JSON = {
    "brackets": b"[" * 100_000, "braces": b'{"a":' * 100_000, "list": b"[]", "number": b"1", "null": b"null",
    "empty": b"", "nul": b"\0" * 4096, "nul at the end": json.dumps(GOOD).encode() + b"\0" * 10,
    "not UTF-8": b'{"time":"\xff"}', "lone surrogate": json.dumps(GOOD).encode().replace(b"good", b"\\ud800"),
    "NaN": json.dumps(GOOD).encode().replace(b"0.25", b"NaN"),
    "1e999": json.dumps(GOOD).encode().replace(b"0.25", b"1e999"),
}  # fmt: skip
NO_DECISION: dict[str, list[Any]] = {
    "time": [1, None, "", "yesterday", "2026-01-01T00:00:00", "0001-01-01T00:00:00+14:00", []],
    "model": [None, 1, ["credit_risk_model:v1"], {}],
    "probability": ["0.5", None, True, -0.1, 1.5, 10**400, []],
    "status": ["MAYBE NOT", None, 1],
    "thresholds": [[0.3, 0.5], "0.3", {"maybe_above": "0.3", "declined_above": 0.5}, {}],
    "inputs": [[1], "age", {"age": [30]}, {"age": {}}, {"age": 10**400}],
    "row": ["1", 10**30, 0.5],
    "request_id": [7],
}


def logged(folder: Path, *lines: bytes) -> Path:
    """A decision log of these lines with a whole one before and after them."""
    good = json.dumps(GOOD).encode()
    (folder / "decisions-0.jsonl").write_bytes(b"\n".join([good, *lines, good]) + b"\n")
    return folder


def all_ways(folder: Path) -> pd.DataFrame:
    """Read it narrowed and not, and write it as a table: nothing may fail."""
    for since in (datetime.min, datetime.max, datetime.min.replace(tzinfo=timezone(timedelta(hours=14))), None):
        found = read_decisions(folder, since=since, model="credit_risk_model:v1")
        assert (found.broken_lines, found.first_broken) == (1, "decisions-0.jsonl, line 2")
    for ending in (".csv", ".parquet"):
        assert main(["decisions", "--folder", str(folder), "--output", str(folder / f"table{ending}")]) == 0
    return found.frame


@pytest.mark.parametrize("kind", NO_JSON)
def test_a_damaged_line_is_counted_and_left_out(
    tmp_path: Path, kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert all_ways(logged(tmp_path, NO_JSON[kind]))["request_id"].tolist() == ["good", "good"]
    told = capsys.readouterr().out
    assert "1 line is no decision and was left out" in told
    assert "the first at decisions-0.jsonl, line 2" in told


@pytest.mark.parametrize(("key", "value"), [(key, value) for key in NO_DECISION for value in NO_DECISION[key]])
def test_a_line_that_is_no_decision_is_counted_and_left_out(tmp_path: Path, key: str, value: Any) -> None:
    frame = all_ways(logged(tmp_path, json.dumps({**GOOD, key: value}).encode()))
    assert frame["request_id"].tolist() == ["good", "good"]


@pytest.mark.parametrize("key", ["time", "model", "request_id", "probability", "status"])
def test_a_line_without_a_required_key_is_counted_and_left_out(tmp_path: Path, key: str) -> None:
    line = json.dumps({name: value for name, value in GOOD.items() if name != key}).encode()
    assert len(all_ways(logged(tmp_path, line))) == 2


def test_keys_of_a_later_release_are_ignored(tmp_path: Path) -> None:
    later = {
        **GOOD,
        "policy": {"digest": "p"},
        "request_id": "later",
        "thresholds": {**GOOD["thresholds"], "x": []},
    }
    found = read_decisions(logged(tmp_path, json.dumps(later).encode()))
    assert found.frame["request_id"].tolist() == ["good", "later", "good"]
    assert (found.broken_lines, found.first_broken) == (0, None)


def test_a_field_may_change_its_kind_from_one_contract_to_the_next(tmp_path: Path) -> None:
    other = {**GOOD, "inputs": {**APPLICATION, "age": "30 to 40"}}
    output = tmp_path / "table.parquet"
    folder = logged(tmp_path, json.dumps(other).encode())
    assert main(["decisions", "--folder", str(folder), "--output", str(output)]) == 0
    assert pd.read_parquet(output)["input.age"].tolist() == ["30", "30 to 40", "30"]


def test_time_zones_are_compared_as_moments(tmp_path: Path) -> None:
    line = json.dumps({**GOOD, "time": "2026-01-01T01:00:00+02:00", "request_id": "hour before"}).encode()
    folder = logged(tmp_path, line)
    since = datetime(2026, 1, 1, tzinfo=UTC)
    assert read_decisions(folder).frame["request_id"].tolist() == ["hour before", "good", "good"]
    assert read_decisions(folder, since=since).frame["request_id"].tolist() == ["good", "good"]


def test_what_is_no_file_is_passed_over(tmp_path: Path) -> None:
    os.mkfifo(logged(tmp_path) / "decisions-1.jsonl")
    (tmp_path / "decisions-2.jsonl").mkdir()
    (tmp_path / "decisions-3.jsonl").symlink_to("rotated-away")
    assert len(read_decisions(tmp_path).frame) == 2
