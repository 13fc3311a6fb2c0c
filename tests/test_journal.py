from __future__ import annotations

import json
import os
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from pipeline.core.record import DecisionLogSettings
from service.records.log_writer import Decided, Journal

APPLICATION = {"age": 30, "home": "owner", "income": None}


def settings(**changes: Any) -> DecisionLogSettings:
    values: dict[str, Any] = {
        "enabled": True,
        "folder": "unused",
        "inputs": True,
        "file_bytes": 1_000_000,
        "files": 3,
        "queue_rows": 10_000,
        "flush_seconds": 0.01,
    }
    return DecisionLogSettings(**(values | changes))


def decided(rows: int, first_id: int = 0, **changes: Any) -> Decided:
    values: dict[str, Any] = {
        "model": b'"model":"credit_risk_model:v1","digest":"abc"',
        "applications": [APPLICATION] * rows,
        "probabilities": [0.25] * rows,
        "statuses": ["APPROVED"] * rows,
        "request_ids": [f"r{number}" for number in range(first_id, first_id + rows)],
    }
    return Decided(**(values | changes))


class Log:
    """A journal over a folder, and what it dropped."""

    def __init__(self, folder: Path, **changes: Any) -> None:
        self.folder = folder
        self.dropped: Counter[str] = Counter()
        self.journal = Journal(settings(**changes), folder, self._drop)
        self.journal.start()

    def _drop(self, why: str, rows: int) -> None:
        self.dropped[why] += rows

    def lines(self) -> list[dict[str, Any]]:
        """Everything that stands in the files."""
        files = sorted(self.folder.glob("decisions-*.jsonl"))
        return [json.loads(line) for file in files for line in file.read_text().splitlines()]


def test_a_line_tells_who_was_decided_on_by_what_and_how(tmp_path: Path) -> None:
    log = Log(tmp_path)
    log.journal.add(decided(1))
    log.journal.close()
    (line,) = log.lines()
    assert line.pop("time").endswith("+00:00")
    assert line == {
        "model": "credit_risk_model:v1",
        "digest": "abc",
        "request_id": "r0",
        "probability": 0.25,
        "status": "APPROVED",
        "inputs": APPLICATION,
    }


def test_rows_traces_and_reasons_are_told_where_there_are_some(tmp_path: Path) -> None:
    log = Log(tmp_path, inputs=False)
    reasons = [[{"field": "age", "reason": "Young."}], []]
    log.journal.add(decided(2, first_row=512, trace_ids=["a" * 32, "b" * 32], reasons=reasons))
    log.journal.close()
    lines = log.lines()
    assert [line["row"] for line in lines] == [512, 513]
    assert [line["trace_id"] for line in lines] == ["a" * 32, "b" * 32]
    assert [line["reasons"] for line in lines] == reasons
    assert not any("inputs" in line for line in lines)


def test_all_is_written_before_the_end(tmp_path: Path) -> None:
    log = Log(tmp_path, flush_seconds=60.0)
    for start in range(0, 5000, 1000):
        log.journal.add(decided(1000, start))
    log.journal.close()
    assert [line["request_id"] for line in log.lines()] == [f"r{number}" for number in range(5000)]
    assert not log.dropped


def test_files_rotate_and_the_oldest_go(tmp_path: Path) -> None:
    log = Log(tmp_path, file_bytes=4096, files=3)
    for start in range(0, 100, 10):
        log.journal.add(decided(10, start))
    log.journal.close()
    assert sorted(path.name for path in tmp_path.glob("decisions-*")) == [
        "decisions-0.1.jsonl",
        "decisions-0.2.jsonl",
        "decisions-0.jsonl",
    ]
    assert all(path.stat().st_size <= 4096 for path in tmp_path.glob("decisions-*"))
    newest = json.loads((tmp_path / "decisions-0.jsonl").read_text().splitlines()[-1])
    assert newest["request_id"] == "r99"


def test_one_file_alone_can_rotate_too(tmp_path: Path) -> None:
    log = Log(tmp_path, file_bytes=4096, files=1)
    for start in range(0, 100, 10):
        log.journal.add(decided(10, start))
    log.journal.close()
    assert [path.name for path in tmp_path.glob("decisions-*")] == ["decisions-0.jsonl"]


def test_two_workers_do_not_share_a_file(tmp_path: Path) -> None:
    one, other = Log(tmp_path), Log(tmp_path)
    one.journal.add(decided(1, 1))
    one.journal.close()
    other.journal.add(decided(1, 2))
    other.journal.close()
    assert sorted(path.name for path in tmp_path.glob("decisions-*")) == ["decisions-0.jsonl", "decisions-1.jsonl"]


def test_a_line_cut_by_a_crash_does_not_spoil_the_next(tmp_path: Path) -> None:
    (tmp_path / "decisions-0.jsonl").write_text('{"time": "2026-')
    log = Log(tmp_path)
    log.journal.add(decided(1))
    log.journal.close()
    broken, whole = (tmp_path / "decisions-0.jsonl").read_text().splitlines()
    assert broken == '{"time": "2026-'
    assert json.loads(whole)["request_id"] == "r0"


def test_a_full_disk_drops_counts_and_says_so_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "decisions-0.jsonl").symlink_to("/dev/full")
    log = Log(tmp_path)
    for start in range(0, 50, 10):
        log.journal.add(decided(10, start))
    log.journal.close()
    assert log.dropped == {"disk": 50}
    assert [record.message.count("No space left") for record in caplog.records] == [1]


def test_after_a_full_disk_whole_lines_are_written_again(tmp_path: Path) -> None:
    # A limit on the size of files stops a write in the middle, as a full disk does.
    log = Log(tmp_path)
    script = f"""
import resource, signal
from pathlib import Path
from tests.test_journal import Log, decided
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (5000, resource.RLIM_INFINITY))
log = Log(Path({str(tmp_path)!r}))
for start in range(0, 100, 10):
    log.journal.add(decided(10, start))
log.journal._write_waiting()
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
log.journal.add(decided(10, 900))
log.journal.close()
assert 0 < log.dropped["disk"] < 100, log.dropped
"""
    import subprocess
    import sys

    subprocess.run([sys.executable, "-c", script], check=True, cwd=Path(__file__).parent.parent)
    ids = [line["request_id"] for line in log.lines()]  # every line is whole
    assert ids[:10] == [f"r{number}" for number in range(10)]
    assert ids[-10:] == [f"r{number}" for number in range(900, 910)]


def test_a_full_queue_drops_without_waiting(tmp_path: Path) -> None:
    log = Log(tmp_path, queue_rows=100, flush_seconds=60.0)
    for start in range(0, 1000, 50):
        log.journal.add(decided(50, start))
    log.journal.close()
    assert log.dropped == {"queue full": 900}
    assert len(log.lines()) == 100


def test_switched_off_it_leaves_no_trace(tmp_path: Path) -> None:
    log = Log(tmp_path / "decisions", enabled=False)
    log.journal.add(decided(1))
    log.journal.close()
    assert not (tmp_path / "decisions").exists()


def test_only_the_services_user_can_read_it(tmp_path: Path) -> None:
    os.umask(0o022)
    log = Log(tmp_path)
    log.journal.add(decided(1))
    log.journal.close()
    assert (tmp_path / "decisions-0.jsonl").stat().st_mode & 0o077 == 0
