"""Decisions in, JSON lines in rotating files out, by a thread of its own; ``docs/serving.md`` lists the fields.

An answer never waits for the disk and never fails because of it. What the disk or the bounded queue cannot take is
dropped, counted in a metric, and said in the service's log.
"""

from __future__ import annotations

import fcntl
import logging
import os
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from threading import Event, Thread
from time import monotonic, time
from typing import Any

import orjson

from pipeline.core.policy import STATUSES, Status
from pipeline.core.record import DECISION_FILE, DecisionLogSettings

logger = logging.getLogger("bentoml.credit_risk")

QUEUE_FULL = "queue full"
DISK = "disk"
"""Why decisions were not recorded."""

_SLICE = 256
"""Lines made at a time: between two writes the other threads get their turn."""

_SILENCE_SECONDS = 60.0
"""Between two lines in the service's log about the same trouble."""


_STATUS = {status: b',"status":"%b"' % status.encode() for status in STATUSES}


@dataclass(frozen=True, slots=True)
class Decided:
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
        some = slice(rows.start, rows.stop)
        moment = datetime.fromtimestamp(self.at, UTC).isoformat(timespec="microseconds").encode()
        head = b'{"time":"%b",%b,"request_id":"' % (moment, self.model)
        ids, statuses = self.request_ids[some], self.statuses[some]
        numbers = orjson.dumps(self.probabilities[some])[1:-1].split(b",")
        endings = [b',"inputs":%b}\n' % text for text in self._inputs(some)] if inputs else [b"}\n"] * len(ids)
        extras = map(b"".join, zip(*self._extras(rows), strict=True)) if self._has_extras else [b""] * len(ids)
        parts: list[bytes] = []
        # Lines are put together from parts: to format each takes twice as long, and this is most of the cost.
        for request_id, number, status, extra, ending in zip(ids, numbers, statuses, extras, endings, strict=True):
            parts += (head, request_id.encode(), b'","probability":', number, _STATUS[status], extra, ending)
        return b"".join(parts)

    def _inputs(self, some: slice) -> list[bytes]:
        applications = self.applications[some]
        # All at once, and then taken apart; one by one if that cannot be done, as a value has braces in it.
        texts = orjson.dumps(applications)[2:-2].split(b"},{")
        if len(texts) == len(applications):
            return [b"{%b}" % text for text in texts]
        return [orjson.dumps(application) for application in applications]

    @property
    def _has_extras(self) -> bool:
        return not (self.first_row is None and self.trace_ids is None and self.reasons is None)

    def _extras(self, rows: range) -> Iterator[list[bytes]]:
        """Columns of what some decisions have more."""
        if self.first_row is not None:
            yield [b',"row":%d' % (self.first_row + row) for row in rows]
        if self.trace_ids is not None:
            yield [b',"trace_id":"%b"' % self.trace_ids[row].encode() for row in rows]
        if self.reasons is not None:
            yield [b',"reasons":' + orjson.dumps(self.reasons[row]) for row in rows]


class Journal:
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
        self._queue: deque[Decided] = deque()
        # Two counters, each raised by one thread alone: their difference needs no lock.
        self._added = 0
        self._taken = 0
        self._said: dict[str, float] = {}
        self._file = _RotatingFile(folder, settings.file_bytes, settings.files)
        self._stop = Event()
        self._thread = Thread(target=self._run, name="decision log", daemon=True)

    def start(self) -> None:
        """Start to write."""
        if self._settings.enabled:
            self._thread.start()

    def add(self, decided: Decided) -> None:
        """Queue decisions to be written; never blocks and never raises."""
        if not self._settings.enabled:
            return
        rows = len(decided.statuses)
        if self._added - self._taken + rows > self._settings.queue_rows:
            self._drop(QUEUE_FULL, rows, "decisions arrive faster than they can be written")
            return
        self._added += rows
        self._queue.append(decided)

    def close(self) -> None:
        """Write what waits, and stop."""
        if self._thread.is_alive():
            self._stop.set()
            self._thread.join()

    def _run(self) -> None:
        while not self._stop.wait(self._settings.flush_seconds):
            self._write_waiting()
        self._write_waiting()

    def _write_waiting(self) -> None:
        while self._queue:
            decided = self._queue.popleft()
            everything = range(len(decided.statuses))
            for start in range(0, len(everything), _SLICE):
                self._write(decided, everything[start : start + _SLICE])
            self._taken += len(everything)

    def _write(self, decided: Decided, rows: range) -> None:
        try:
            self._file.write(decided.lines(rows, inputs=self._settings.inputs))
        except OSError as error:
            self._drop(DISK, len(rows), f"{self._file.folder}: {error.strerror}")

    def _drop(self, why: str, rows: int, what: str) -> None:
        self._dropped(why, rows)
        if monotonic() - self._said.get(why, -_SILENCE_SECONDS) >= _SILENCE_SECONDS:
            self._said[why] = monotonic()
            logger.error("decisions are answered but NOT recorded, and counted as dropped: %s", what)


class _RotatingFile:
    """Files ``decisions-N.jsonl``, ``decisions-N.1.jsonl``, … that this process alone writes.

    N is the first that is free when it comes: workers, and servers that share the folder, do not write into each
    other's lines.
    """

    def __init__(self, folder: Path, limit: int, files: int) -> None:
        self.folder = folder
        self._limit = limit
        self._files = files
        self._slot: int | None = None
        self._descriptor: int | None = None
        self._size = 0

    def write(self, data: bytes) -> None:
        """Append whole lines: all of them or, if the disk cannot take them, none."""
        if self._descriptor is None:
            self._descriptor = self._open()
        if self._size and self._size + len(data) > self._limit:
            self._descriptor = self._rotate(self._descriptor)
        try:
            _write_all(self._descriptor, data)
        except OSError:
            with suppress(OSError):
                os.ftruncate(self._descriptor, self._size)
            raise
        self._size += len(data)

    def _open(self) -> int:
        if self._slot is None:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._slot = self._claim()
        # Applicants' values: for the service's user alone.
        descriptor = os.open(self._path(0), os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o600)
        self._size = os.fstat(descriptor).st_size
        if self._size and os.pread(descriptor, 1, self._size - 1) != b"\n":
            self._size += os.write(
                descriptor, b"\n"
            )  # a crash cut the last line: the next one must not continue it
        return descriptor

    def _claim(self) -> int:
        slot = 0
        while True:
            lock = os.open(self.folder / f".decisions-{slot}.lock", os.O_WRONLY | os.O_CREAT, 0o600)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # held until the process ends
            except BlockingIOError:
                os.close(lock)
                slot += 1
            else:
                return slot

    def _rotate(self, descriptor: int) -> int:
        os.close(descriptor)
        self._descriptor = None
        for number in range(self._files - 1, 0, -1):
            with suppress(FileNotFoundError):
                self._path(number - 1).replace(self._path(number))
        if self._files == 1:
            self._path(0).unlink()
        return self._open()

    def _path(self, number: int) -> Path:
        name = f"{self._slot}.{number}" if number else f"{self._slot}"
        return self.folder / DECISION_FILE.format(name)


def _write_all(descriptor: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(descriptor, view) :]
