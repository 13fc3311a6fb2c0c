"""Write every decision to the decision log: JSON lines in rotating files, by a thread of its own.

An answer never waits for the disk and never fails because of it. What the disk or the bounded queue cannot take is
dropped, counted in a metric, and said in the service's log. ``docs/serving.md`` lists the fields.
"""

from __future__ import annotations

import fcntl
import logging
import os
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from threading import Event, Thread
from time import monotonic, time
from typing import Any

import orjson

from pipeline.core.policy import Status
from pipeline.core.record import DECISION_FILE, DecisionLogSettings

logger = logging.getLogger("bentoml.credit_risk")

QUEUE_FULL = "queue full"
DISK = "disk"
"""Why decisions were not recorded."""

_ROWS_A_WRITE = 256
"""Decisions written at a time: in between, the other threads get their turn."""

_SILENCE_SECONDS = 60.0
"""Between two lines in the service's log about the same trouble."""


@dataclass(frozen=True, slots=True)
class DecidedBatch:
    """Decisions that one version made in one call; the sequences are parallel.

    Attributes
    ----------
    model
        JSON members that say which model and rules decided, without braces.
    applications
        Validated inputs.
    probabilities, statuses
        What was decided.
    request_ids
        One id a decision.
    trace_ids
        W3C traces, 32 hex digits each; None without tracing.
    reasons
        Adverse reasons of each decision; None if not asked for.
    first_row
        Row of the first decision in its batch request; None for single applications.
    at
        When it was decided: seconds since the epoch.
    """

    model: bytes
    applications: Sequence[Mapping[str, Any]]
    probabilities: Sequence[float]
    statuses: Sequence[Status]
    request_ids: Sequence[str]
    trace_ids: Sequence[str] | None = None
    reasons: Sequence[Any] | None = None
    first_row: int | None = None
    at: float = field(default_factory=time)

    def lines(self, rows: range, *, inputs: bool) -> bytes:
        """Write some of the decisions as JSON lines."""
        moment = datetime.fromtimestamp(self.at, UTC).isoformat(timespec="microseconds").encode()
        # The same for all of them, so it is made once: a line whole by `orjson.dumps` costs several times as much.
        head = b'{"time":"%b",%b,' % (moment, self.model)
        members = (self._members(row, inputs=inputs) for row in rows)
        return b"".join(head + orjson.dumps(one, option=orjson.OPT_APPEND_NEWLINE)[1:] for one in members)

    def _members(self, row: int, *, inputs: bool) -> dict[str, Any]:
        """Give what only this decision's line has."""
        members: dict[str, Any] = {
            "request_id": self.request_ids[row],
            "probability": self.probabilities[row],
            "status": self.statuses[row],
        }
        if self.first_row is not None:
            members["row"] = self.first_row + row
        if self.trace_ids is not None:
            members["trace_id"] = self.trace_ids[row]
        if self.reasons is not None:
            members["reasons"] = self.reasons[row]
        if inputs:
            members["inputs"] = self.applications[row]
        return members


class DecisionLog:
    """The decision log of one worker.

    Parameters
    ----------
    settings
        ``decision_log`` of ``conf/serve.yaml``.
    folder
        Where the files stand; made if absent.
    dropped
        Told why and how many decisions could not be recorded; called from any thread.
    """

    def __init__(self, settings: DecisionLogSettings, folder: Path, dropped: Callable[[str, int], None]) -> None:
        self._settings = settings
        self._dropped = dropped
        self._queue: deque[DecidedBatch] = deque()
        # Two counters, each raised by one thread alone: their difference needs no lock.
        self._added = 0
        self._taken = 0
        self._said: dict[str, float] = {}
        self._file = _RotatingFile(folder, settings.file_bytes, settings.files)
        self._stop = Event()
        self._thread = Thread(target=self._run, name="decision log", daemon=True)

    def start(self) -> None:
        """Open the file, while descriptors are free, and start to write."""
        if not self._settings.enabled:
            return
        try:
            self._file.open()
        except OSError as error:  # tried again with the first decision
            self._say(DISK, f"the decision log cannot be opened: {self._trouble(error)}")
        self._thread.start()

    def add(self, batch: DecidedBatch) -> None:
        """Queue decisions to be written; never blocks and never raises."""
        if not self._settings.enabled:
            return
        rows = len(batch.statuses)
        if self._added - self._taken + rows > self._settings.queue_rows:
            self._drop(QUEUE_FULL, rows, "decisions arrive faster than they can be written")
            return
        self._added += rows
        self._queue.append(batch)

    def close(self) -> None:
        """Write what waits, and stop."""
        if self._thread.is_alive():
            self._stop.set()
            self._thread.join()

    def _run(self) -> None:
        # Half of the promised time to wait, half to write: see `DecisionLogSettings.flush_seconds`.
        while not self._stop.wait(self._settings.flush_seconds / 2):
            self._write_waiting()
        self._write_waiting()
        self._file.close()

    def _write_waiting(self) -> None:
        while self._queue:
            batch = self._queue.popleft()
            everything = range(len(batch.statuses))
            for start in range(0, len(everything), _ROWS_A_WRITE):
                self._write(batch, everything[start : start + _ROWS_A_WRITE])
            self._taken += len(everything)

    def _write(self, batch: DecidedBatch, rows: range) -> None:
        try:
            self._file.write(batch.lines(rows, inputs=self._settings.inputs))
        except OSError as error:
            self._drop(DISK, len(rows), self._trouble(error))

    def _drop(self, why: str, rows: int, what: str) -> None:
        self._dropped(why, rows)
        self._say(why, f"decisions are answered but NOT recorded, and counted as dropped: {what}")

    def _say(self, why: str, message: str) -> None:
        if monotonic() - self._said.get(why, -_SILENCE_SECONDS) >= _SILENCE_SECONDS:
            self._said[why] = monotonic()
            logger.error("%s", message)

    def _trouble(self, error: OSError) -> str:
        return f"{self._file.folder}: {error.strerror}"


class _RotatingFile:
    """Files ``decisions-N.jsonl``, ``decisions-N.1.jsonl``, … that this process alone writes.

    N is the first that is free when it comes: workers, and servers that share the folder, do not write into each
    other's lines. A lock beside the files holds N until the process ends, or the files are taken away.
    """

    def __init__(self, folder: Path, limit: int, files: int) -> None:
        self.folder = folder
        self._limit = limit
        self._files = files
        self._number = 0
        self._lock: int | None = None
        self._descriptor: int | None = None
        self._size = 0

    def open(self) -> int:
        """Open the file of the number held, or of the first that is free, at its end."""
        if self._lock is None or _opened_at(self._lock_path, self._lock) is None:
            self.close()
            self.folder.mkdir(parents=True, exist_ok=True)
            self._claim()
        # Applicants' values: for the service's user alone.
        descriptor = os.open(self._path(0), os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
        self._descriptor = descriptor
        self._size = os.fstat(descriptor).st_size
        if self._size and os.pread(descriptor, 1, self._size - 1) != b"\n":
            # A crash cut the last line: the next one must not continue it.
            self._size += os.write(descriptor, b"\n")
        return descriptor

    def write(self, data: bytes) -> None:
        """Append whole lines: all of them or, if the disk cannot take them, none."""
        descriptor = self._in_place()
        if self._size and self._size + len(data) > self._limit:
            descriptor = self._rotated()
        try:
            _write_all(descriptor, data)
        except OSError:
            with suppress(OSError):
                os.ftruncate(descriptor, self._size)
            raise
        self._size += len(data)

    def close(self) -> None:
        """Give the file and its number back."""
        self._close_file()
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def _in_place(self) -> int:
        """Give the open file; open it anew if somebody has moved or removed it, as its lines would be lost."""
        if self._descriptor is not None:
            found = _opened_at(self._path(0), self._descriptor)
            if found is not None:
                self._size = found.st_size  # somebody may have emptied it
                return self._descriptor
            self._close_file()
        return self.open()

    def _claim(self) -> None:
        self._number = 0
        while self._lock is None:
            lock = os.open(self._lock_path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                self._number += 1
            except OSError:
                os.close(lock)
                raise
            else:
                if _opened_at(self._lock_path, lock):
                    self._lock = lock
                    return
            os.close(lock)

    def _rotated(self) -> int:
        self._close_file()
        for number in range(self._files - 1, 0, -1):
            with suppress(FileNotFoundError):
                self._path(number - 1).replace(self._path(number))
        if self._files == 1:
            self._path(0).unlink(missing_ok=True)
        return self._in_place()

    def _close_file(self) -> None:
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    def _path(self, number: int) -> Path:
        return self.folder / DECISION_FILE.format(f"{self._number}.{number}" if number else self._number)

    @property
    def _lock_path(self) -> Path:
        return self.folder / f".decisions-{self._number}.lock"


def _opened_at(path: Path, descriptor: int) -> os.stat_result | None:
    """Look at an open file; None if it does not stand at its path any more."""
    opened = os.fstat(descriptor)
    try:
        return opened if os.path.samestat(path.stat(), opened) else None
    except FileNotFoundError:
        return None


def _write_all(descriptor: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(descriptor, view) :]
