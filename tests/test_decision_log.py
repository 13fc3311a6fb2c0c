from __future__ import annotations

import contextlib
import json
import os
import resource
import shutil
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest

from pipeline.core.record import DecisionLogSettings
from service.records.decision_log import DecidedBatch, DecisionLog

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


def decided_batch(rows: int, first_id: int = 0, **changes: Any) -> DecidedBatch:
    values: dict[str, Any] = {
        "model": b'"model":"credit_risk_model:v1","digest":"abc"',
        "applications": [APPLICATION] * rows,
        "probabilities": [0.25] * rows,
        "statuses": ["APPROVED"] * rows,
        "request_ids": [f"r{number}" for number in range(first_id, first_id + rows)],
    }
    return DecidedBatch(**(values | changes))


class LogInFolder:
    """A decision log over a folder, and what it dropped."""

    def __init__(self, folder: Path, **changes: Any) -> None:
        self.folder = folder
        self.dropped: Counter[str] = Counter()
        self.writer = DecisionLog(settings(**changes), folder, self._drop)
        self.writer.start()

    def _drop(self, why: str, rows: int) -> None:
        self.dropped[why] += rows

    def lines(self) -> list[dict[str, Any]]:
        """Everything that stands in the files."""
        files = sorted(self.folder.glob("decisions-*.jsonl"))
        return [json.loads(line) for file in files for line in file.read_text().splitlines()]

    def ids(self) -> list[str]:
        """Whose decisions stand in the files."""
        return [line["request_id"] for line in self.lines()]

    def record(self, number: int) -> None:
        """Add a decision and write it now, where the thread is not to write before the end."""
        self.writer.add(decided_batch(1, number))
        self.writer._write_waiting()


@contextmanager
def no_free_descriptor() -> Iterator[list[int]]:
    """Use up all descriptors of this process, as connections would; gives those that were taken."""
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    taken = [os.open(os.devnull, os.O_RDONLY)]
    highest = max(int(entry.name) for entry in Path("/proc/self/fd").iterdir())
    resource.setrlimit(resource.RLIMIT_NOFILE, (highest + 20, limits[1]))
    try:
        with contextlib.suppress(OSError):
            while True:
                taken.append(os.open(os.devnull, os.O_RDONLY))
        yield taken
    finally:
        for descriptor in taken:
            os.close(descriptor)
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)


def test_a_line_tells_who_was_decided_on_by_what_and_how(tmp_path: Path) -> None:
    log = LogInFolder(tmp_path)
    log.writer.add(decided_batch(1))
    log.writer.close()
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
    log = LogInFolder(tmp_path, inputs=False)
    reasons = [[{"field": "age", "reason": "Young."}], []]
    log.writer.add(decided_batch(2, first_row=512, trace_ids=["a" * 32, "b" * 32], reasons=reasons))
    log.writer.close()
    lines = log.lines()
    assert [line["row"] for line in lines] == [512, 513]
    assert [line["trace_id"] for line in lines] == ["a" * 32, "b" * 32]
    assert [line["reasons"] for line in lines] == reasons
    assert not any("inputs" in line for line in lines)


def test_all_is_written_before_the_end(tmp_path: Path) -> None:
    log = LogInFolder(tmp_path, flush_seconds=60.0)
    for start in range(0, 5000, 1000):
        log.writer.add(decided_batch(1000, start))
    log.writer.close()
    assert [line["request_id"] for line in log.lines()] == [f"r{number}" for number in range(5000)]
    assert not log.dropped


def test_files_rotate_and_the_oldest_go(tmp_path: Path) -> None:
    log = LogInFolder(tmp_path, file_bytes=4096, files=3)
    for start in range(0, 100, 10):
        log.writer.add(decided_batch(10, start))
    log.writer.close()
    assert sorted(path.name for path in tmp_path.glob("decisions-*")) == [
        "decisions-0.1.jsonl",
        "decisions-0.2.jsonl",
        "decisions-0.jsonl",
    ]
    assert all(path.stat().st_size <= 4096 for path in tmp_path.glob("decisions-*"))
    newest = json.loads((tmp_path / "decisions-0.jsonl").read_text().splitlines()[-1])
    assert newest["request_id"] == "r99"


def test_one_file_alone_can_rotate_too(tmp_path: Path) -> None:
    log = LogInFolder(tmp_path, file_bytes=4096, files=1)
    for start in range(0, 100, 10):
        log.writer.add(decided_batch(10, start))
    log.writer.close()
    assert [path.name for path in tmp_path.glob("decisions-*")] == ["decisions-0.jsonl"]


def test_two_workers_do_not_share_a_file(tmp_path: Path) -> None:
    one, other = LogInFolder(tmp_path), LogInFolder(tmp_path)
    one.writer.add(decided_batch(1, 1))
    one.writer.close()
    other.writer.add(decided_batch(1, 2))
    other.writer.close()
    assert sorted(path.name for path in tmp_path.glob("decisions-*")) == ["decisions-0.jsonl", "decisions-1.jsonl"]


def test_a_line_cut_by_a_crash_does_not_spoil_the_next(tmp_path: Path) -> None:
    (tmp_path / "decisions-0.jsonl").write_text('{"time": "2026-')
    log = LogInFolder(tmp_path)
    log.writer.add(decided_batch(1))
    log.writer.close()
    broken, whole = (tmp_path / "decisions-0.jsonl").read_text().splitlines()
    assert broken == '{"time": "2026-'
    assert json.loads(whole)["request_id"] == "r0"


def test_a_full_disk_drops_counts_and_says_so_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "decisions-0.jsonl").symlink_to("/dev/full")
    log = LogInFolder(tmp_path)
    for start in range(0, 50, 10):
        log.writer.add(decided_batch(10, start))
    log.writer.close()
    assert log.dropped == {"disk": 50}
    assert [record.message.count("No space left") for record in caplog.records] == [1]


def test_after_a_full_disk_whole_lines_are_written_again(tmp_path: Path) -> None:
    # A limit on the size of files stops a write in the middle, as a full disk does.
    log = LogInFolder(tmp_path)
    script = f"""
import resource, signal
from pathlib import Path
from tests.test_decision_log import LogInFolder, decided_batch
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (5000, resource.RLIM_INFINITY))
log = LogInFolder(Path({str(tmp_path)!r}))
for start in range(0, 100, 10):
    log.writer.add(decided_batch(10, start))
log.writer._write_waiting()
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
log.writer.add(decided_batch(10, 900))
log.writer.close()
assert 0 < log.dropped["disk"] < 100, log.dropped
"""
    subprocess.run([sys.executable, "-c", script], check=True, cwd=Path(__file__).parent.parent)
    ids = [line["request_id"] for line in log.lines()]  # every line is whole
    assert ids[:10] == [f"r{number}" for number in range(10)]
    assert ids[-10:] == [f"r{number}" for number in range(900, 910)]


def test_a_full_queue_drops_without_waiting(tmp_path: Path) -> None:
    log = LogInFolder(tmp_path, queue_rows=100, flush_seconds=60.0)
    for start in range(0, 1000, 50):
        log.writer.add(decided_batch(50, start))
    log.writer.close()
    assert log.dropped == {"queue full": 900}
    assert len(log.lines()) == 100


def test_switched_off_it_leaves_no_trace(tmp_path: Path) -> None:
    log = LogInFolder(tmp_path / "decisions", enabled=False)
    log.writer.add(decided_batch(1))
    log.writer.close()
    assert not (tmp_path / "decisions").exists()


def test_only_the_services_user_can_read_it(tmp_path: Path) -> None:
    os.umask(0o022)
    log = LogInFolder(tmp_path)
    log.writer.add(decided_batch(1))
    log.writer.close()
    assert (tmp_path / "decisions-0.jsonl").stat().st_mode & 0o077 == 0


# Somebody clears up while it writes.


@pytest.mark.parametrize("taken", ["folder", "file"])
def test_after_a_move_it_is_written_again_where_conf_says(tmp_path: Path, taken: str) -> None:
    log = LogInFolder(tmp_path / "decisions", flush_seconds=60.0)
    log.record(1)
    away = tmp_path / "away"
    (log.folder if taken == "folder" else log.folder / "decisions-0.jsonl").rename(away)
    log.record(2)
    log.record(3)
    log.writer.close()
    assert log.ids() == ["r2", "r3"]
    (moved,) = (away / "decisions-0.jsonl" if taken == "folder" else away).read_text().splitlines()
    assert json.loads(moved)["request_id"] == "r1"
    assert not log.dropped


@pytest.mark.parametrize("taken", ["folder", "file"])
def test_after_a_deletion_it_is_written_again(tmp_path: Path, taken: str) -> None:
    log = LogInFolder(tmp_path / "decisions", flush_seconds=60.0)
    log.record(1)
    if taken == "folder":
        shutil.rmtree(log.folder)
    else:
        (log.folder / "decisions-0.jsonl").unlink()
    log.record(2)
    log.writer.close()
    assert log.ids() == ["r2"]
    assert not log.dropped


def test_after_the_file_was_emptied_lines_follow_each_other(tmp_path: Path) -> None:
    log = LogInFolder(tmp_path, flush_seconds=60.0)
    log.record(1)
    os.truncate(tmp_path / "decisions-0.jsonl", 0)
    log.record(2)
    log.writer.close()
    assert log.ids() == ["r2"]


def test_while_the_folder_cannot_be_made_decisions_are_counted(tmp_path: Path) -> None:
    log = LogInFolder(tmp_path / "decisions", flush_seconds=60.0)
    log.record(1)
    shutil.rmtree(log.folder)
    log.folder.write_text("in the way")
    log.record(2)
    assert log.dropped == {"disk": 1}
    log.folder.unlink()
    log.record(3)
    log.writer.close()
    assert log.ids() == ["r3"]
    assert log.dropped == {"disk": 1}


def test_two_workers_whose_folder_was_deleted_do_not_share_a_file(tmp_path: Path) -> None:
    one, other = (LogInFolder(tmp_path / "decisions", flush_seconds=60.0) for _ in range(2))
    for log, number in ((one, 1), (other, 2)):
        log.record(number)
    shutil.rmtree(one.folder)
    for log, number in ((other, 3), (one, 4), (other, 5)):
        log.record(number)
    for log in (one, other):
        log.writer.close()
    texts = [path.read_text() for path in sorted(one.folder.glob("*.jsonl"))]
    assert [[json.loads(line)["request_id"] for line in text.splitlines()] for text in texts] == [
        ["r3", "r5"],
        ["r4"],
    ]


def test_it_is_written_though_no_descriptor_is_free(tmp_path: Path) -> None:
    log = LogInFolder(tmp_path, flush_seconds=60.0)
    with no_free_descriptor():
        log.record(1)
    log.writer.close()
    assert log.ids() == ["r1"]
    assert not log.dropped


def test_a_folder_that_cannot_be_made_is_said_at_the_start(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "decisions").write_text("in the way")
    log = LogInFolder(tmp_path / "decisions")
    assert ["cannot be opened" in record.message for record in caplog.records] == [True]
    log.writer.close()
    assert not log.dropped  # nothing was decided


def test_kill_9_loses_no_more_than_was_promised(tmp_path: Path) -> None:
    promised = 2.0
    script = f"""
import select, sys
from pathlib import Path
from tests.test_decision_log import LogInFolder, decided_batch
log = LogInFolder(Path({str(tmp_path)!r}), flush_seconds={promised})
while not select.select([sys.stdin], [], [], 0.005)[0]:  # until its input ends, as this process does
    log.writer.add(decided_batch(1))
"""
    file = tmp_path / "decisions-0.jsonl"

    def age() -> float:
        """Of the newest line."""
        return (
            time.time() - datetime.fromisoformat(json.loads(file.read_text().splitlines()[-1])["time"]).timestamp()
        )

    command = [sys.executable, "-c", script]
    with subprocess.Popen(command, cwd=Path(__file__).parent.parent, stdin=subprocess.PIPE) as process:
        deadline = time.monotonic() + 60
        while not (file.exists() and file.stat().st_size):
            assert time.monotonic() < deadline
            time.sleep(0.01)
        watched = time.monotonic() + 2.2 * promised
        ages = []
        while time.monotonic() < watched:
            ages.append(age())
            time.sleep(0.02)
        process.kill()
        ages.append(age())
    # What a kill would have lost at any moment, with some room for a busy machine; without a margin in the
    # service itself it would come to all that is promised.
    assert max(ages) < 0.85 * promised
