from __future__ import annotations

from datetime import UTC, datetime, timedelta
from pathlib import Path

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
    assert read_decisions(folder, model="credit_risk_model:v9").frame.empty


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
