"""The pointer is whole at every moment, its history loses nothing, and one command at a time changes it."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipeline.core import promoted as pointer
from pipeline.core.errors import PromotionRefused, StoreError
from pipeline.core.files import replace_file
from pipeline.core.machine import now, whoami
from pipeline.core.promoted import Promotion
from pipeline.promotion.lock import promotion_lock
from pipeline.promotion.pointer import reconcile, write_pointer

SPAWN = multiprocessing.get_context("spawn")


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("BENTOML_HOME", str(tmp_path))
    folder = tmp_path / "models/credit_risk_model"
    folder.mkdir(parents=True)
    return folder


def promotion(version: int, **changes: object) -> Promotion:
    return Promotion.model_validate(
        {
            "tag": f"credit_risk_model:v{version}",
            "version": version,
            "run_id": f"run{version}",
            "since": now(),
            "by": "someone@somewhere",
            "why": "promote",
            "digests": {"saved_model.ubj": "0" * 64},
            **changes,
        }
    )


def test_nothing_promoted_is_no_error() -> None:
    assert pointer.read_pointer() is None
    assert pointer.history() == pointer.History((), 0)
    assert pointer.promotions() == []


def test_what_is_written_is_read(home: Path) -> None:
    first, second = promotion(1), promotion(2, previous="credit_risk_model:v1", forced=True)
    write_pointer(first)
    write_pointer(second)
    assert pointer.read_pointer() == second
    assert [promotion.version for promotion in pointer.history().promotions] == [1, 2]
    assert {path.name for path in home.iterdir()} == {"promoted.json", "history.jsonl"}


def test_a_damaged_pointer_says_what_to_do(home: Path) -> None:
    (home / "promoted.json").write_text('{"tag": "credit')
    with pytest.raises(StoreError, match="promote again, or roll back"):
        pointer.read_pointer()


def test_a_torn_history_line_is_skipped_and_not_continued(home: Path) -> None:
    write_pointer(promotion(1))
    with (home / "history.jsonl").open("ab") as file:
        file.write(b'{"tag": "credit_risk_mo')
    write_pointer(promotion(2))
    write_pointer(promotion(3))
    assert [promotion.version for promotion in pointer.history().promotions] == [1, 2, 3]


def test_a_promotion_without_its_history_line_is_known_and_completed(home: Path) -> None:
    write_pointer(promotion(1))
    replace_file(home / "promoted.json", promotion(2).model_dump_json().encode())
    assert [promotion.version for promotion in pointer.history().promotions] == [1, 2]
    reconcile()
    reconcile()
    lines = (home / "history.jsonl").read_text().splitlines()
    assert [json.loads(line)["version"] for line in lines] == [1, 2]
    assert (home / "latest").read_text() == "v2"


def test_reconciling_removes_what_a_killed_writer_left(home: Path) -> None:
    write_pointer(promotion(1))
    (home / ".promoted.json.abc.tmp").write_text("half")
    (home / "latest").write_text("")  # BentoML's own writer, killed
    reconcile()
    assert {path.name for path in home.iterdir()} == {"promoted.json", "history.jsonl", "latest"}
    assert (home / "latest").read_text() == "v1"


def test_promotions_give_each_version_once_with_its_newest_digests() -> None:
    for version, digest in ((1, "a"), (2, "b"), (1, "c")):
        write_pointer(promotion(version, digests={"f": digest * 64}))
    found = [(one.version, one.digests["f"][0]) for one in pointer.promotions()]
    assert found == [(1, "c"), (2, "b")]


def test_readers_see_only_whole_pointers_while_it_is_replaced() -> None:
    stop = threading.Event()
    tags = {f"credit_risk_model:v{version}" for version in (1, 2)}
    seen: list[str] = []

    def read() -> None:
        while not stop.is_set():
            found = pointer.read_pointer()
            seen.append(found.tag if found else "nothing")

    write_pointer(promotion(1))
    reader = threading.Thread(target=read)
    reader.start()
    for number in range(200):
        write_pointer(promotion(1 + number % 2))
    stop.set()
    reader.join()
    assert set(seen) <= tags


def test_a_failed_write_leaves_the_old_pointer_and_no_rubbish(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_pointer(promotion(1))

    def fail(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="No space left"):
        write_pointer(promotion(2))
    found = pointer.read_pointer()
    assert found
    assert found.version == 1
    assert {path.name for path in home.iterdir()} == {"promoted.json", "history.jsonl"}


@pytest.fixture
def holder() -> Iterator[multiprocessing.process.BaseProcess]:
    """Another process that holds the lock."""
    held = SPAWN.Event()
    process = SPAWN.Process(target=_hold, args=(held,))
    process.start()
    assert held.wait(60)
    yield process
    process.kill()
    process.join()


def _hold(held: threading.Event) -> None:
    with promotion_lock(0):
        held.set()
        signal.pause()


def test_the_lock_admits_one_and_says_who_holds_it(holder: multiprocessing.process.BaseProcess) -> None:
    with pytest.raises(PromotionRefused, match=f"process {holder.pid}"), promotion_lock(0.1):
        pytest.fail("two hold the lock")


def test_the_lock_is_free_as_soon_as_its_holder_is_killed(holder: multiprocessing.process.BaseProcess) -> None:
    waiting = threading.Timer(0.2, holder.kill)
    waiting.start()
    with promotion_lock(30):
        holder.join(30)
    assert holder.exitcode == -signal.SIGKILL


def test_who_and_when_are_told() -> None:
    assert "@" in whoami()
    assert now().endswith("+00:00")


@pytest.mark.parametrize(
    "line",
    [
        b"[" * 100_000,
        b'{"tag": "credit_ri',
        b"null",
        b'"text"',
        b'{"tag": 1}',
        b"\x00\xff",
        b"9" * 5000,
        b'{"version": 1e999}',
    ],
)
def test_damaged_lines_of_the_history_are_left_out_and_counted(home: Path, line: bytes) -> None:
    write_pointer(promotion(1))
    write_pointer(promotion(2))
    path = pointer.history_path()
    first, second = path.read_bytes().splitlines()
    path.write_bytes(b"\n".join([first, line, b"", second, b""]))
    found = pointer.history()
    assert [one.version for one in found.promotions] == [1, 2]
    assert found.damaged_lines == 1
    assert [one.version for one in pointer.promotions()] == [2, 1]
