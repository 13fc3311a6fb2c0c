"""A bounded keep-alive load client: it sends ready-made HTTP requests, and keeps latencies and answers.

It speaks just enough HTTP/1.1 (answers with a Content-Length) to cost the machine little beside the server::

    python -m benchmarks.load http://127.0.0.1:3000/classify --body application.json --seconds 10
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
from array import array
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from threading import Event
from time import monotonic
from typing import cast
from urllib.parse import urlsplit

import numpy as np
import uvloop

from tests.testkit.waiting import eventually

_HEADER_END = b"\r\n\r\n"
_LENGTH = b"\r\ncontent-length: "
_CLOSE = b"\r\nconnection: close\r\n"
_GRACE = 30.0
"""Seconds that a request under way may take after the end before it counts as failed."""


@dataclass
class LoadResult:
    """What one run of the client saw.

    Attributes
    ----------
    seconds
        From the first request to the last answer.
    latencies
        Seconds from the sending of each request to its whole answer, in order of completion.
    statuses
        HTTP status → answers.
    failures
        Connections that broke, refused or never answered; each cost one request.
    answers
        ``(started, finished, status, body)`` of each request, by the system's monotonic clock; only if kept.
    """

    seconds: float = 0.0
    latencies: array[float] = field(default_factory=lambda: array("d"))
    statuses: Counter[int] = field(default_factory=Counter)
    failures: int = 0
    answers: list[tuple[float, float, int, bytes]] = field(default_factory=list)

    @property
    def rate(self) -> float:
        """Answers a second."""
        return len(self.latencies) / self.seconds if self.seconds else 0.0

    def percentile(self, share: float) -> float:
        """Latency in seconds that `share` percent of the requests did not exceed."""
        return float(np.percentile(self.latencies, share)) if self.latencies else float("nan")

    def summary(self) -> dict[str, object]:
        """Sum up the figures that are usually printed; latencies in milliseconds."""
        return {
            "rate": round(self.rate, 1),
            "p50_ms": round(1000 * self.percentile(50), 3),
            "p99_ms": round(1000 * self.percentile(99), 3),
            "max_ms": round(1000 * self.percentile(100), 3),
            "requests": len(self.latencies),
            "statuses": dict(self.statuses),
            "failures": self.failures,
        }


def request(path: str, body: bytes = b"", headers: Mapping[str, str] | None = None, method: str = "POST") -> bytes:
    """Write one keep-alive request as bytes."""
    fields = {"Host": "127.0.0.1", "Content-Type": "application/json", **(headers or {})}
    lines = "".join(f"{name}: {value}\r\n" for name, value in fields.items())
    return f"{method} {path} HTTP/1.1\r\n{lines}Content-Length: {len(body)}\r\n\r\n".encode() + body


def run_load(
    port: int,
    requests: Sequence[bytes],
    *,
    host: str = "127.0.0.1",
    connections: int = 16,
    seconds: float | None = None,
    count: int | None = None,
    keep: bool = False,
    result: LoadResult | None = None,
) -> LoadResult:
    """Load a server from this process until the time is over or the number of requests is reached.

    Parameters
    ----------
    port, host
        Where the server listens.
    requests
        Sent in turn, round and round; see `request`.
    connections
        Kept open, each with one request under way.
    seconds, count
        When to stop; at least one must be given.
    keep
        Keep every answer with its times.
    result
        Add to this one; it can be read while the load goes on.
    """
    if seconds is None and count is None:
        raise ValueError("give seconds, count or both; otherwise the load has no end")
    return uvloop.run(_load(host, port, connections, _Run(requests, seconds, count, keep, result or LoadResult())))


@contextmanager
def under_load(port: int, requests: Sequence[bytes], connections: int = 16) -> Iterator[LoadResult]:
    """Load a server until the block ends; yields the answers, kept, which become more meanwhile."""
    result, over = LoadResult(), Event()

    def load() -> None:
        while not over.is_set():
            run_load(port, requests, connections=connections, seconds=1, keep=True, result=result)

    with ThreadPoolExecutor(1) as pool:
        loading = pool.submit(load)
        try:
            yield result
        finally:
            over.set()
        loading.result()


def await_answers(result: LoadResult, count: int = 200) -> None:
    """Wait until so many more requests have been answered or have failed."""
    enough = len(result.latencies) + result.failures + count
    eventually(lambda: len(result.latencies) + result.failures >= enough)


class _Run:
    """What the connections of one run share."""

    def __init__(
        self, requests: Sequence[bytes], seconds: float | None, count: int | None, keep: bool, result: LoadResult
    ) -> None:
        self.requests: Iterator[bytes] = itertools.cycle(requests)
        self.end = monotonic() + seconds if seconds is not None else float("inf")
        self.left = count if count is not None else float("inf")
        self.keep = keep
        self.result = result

    def next(self) -> bytes | None:
        if self.left <= 0 or monotonic() >= self.end:
            return None
        self.left -= 1
        return next(self.requests)


class _Connection(asyncio.Protocol):
    """One keep-alive connection: sends a request when the answer before it is whole."""

    def __init__(self, run: _Run) -> None:
        self.closed: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.waiting = False
        self._run = run
        self._received = b""
        self._started = 0.0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        # uvloop's transports have the methods of asyncio's without being their subclasses.
        self.transport = cast("asyncio.Transport", transport)
        self._send()

    def data_received(self, data: bytes) -> None:
        received = self._received = self._received + data if self._received else data
        end = received.find(_HEADER_END)
        if end < 0:
            return
        head = received[: end + 2].lower()
        whole = end + len(_HEADER_END) + _content_length(head)
        if len(received) < whole:
            return
        self._note(received[end + len(_HEADER_END) : whole], int(received[9:12]))
        self._received = b""
        if _CLOSE in head:
            self.transport.close()  # the next request goes over a new connection
        else:
            self._send()

    def connection_lost(self, exc: Exception | None) -> None:
        if self.waiting:
            self._run.result.failures += 1
        if not self.closed.done():
            self.closed.set_result(None)

    def _note(self, body: bytes, status: int) -> None:
        now, result = monotonic(), self._run.result
        self.waiting = False
        result.latencies.append(now - self._started)
        result.statuses[status] += 1
        if self._run.keep:
            result.answers.append((self._started, now, status, body))

    def _send(self) -> None:
        following = self._run.next()
        if following is None:
            self.transport.close()
            return
        self.waiting = True
        self._started = monotonic()
        self.transport.write(following)


def _content_length(head: bytes) -> int:
    start = head.find(_LENGTH)
    if start < 0:
        return 0
    start += len(_LENGTH)
    return int(head[start : head.index(b"\r\n", start)])


async def _load(host: str, port: int, connections: int, run: _Run) -> LoadResult:
    began = monotonic()
    await asyncio.gather(*(_keep_connected(host, port, run) for _ in range(connections)))
    run.result.seconds += monotonic() - began
    return run.result


async def _keep_connected(host: str, port: int, run: _Run) -> None:
    """Connect, and connect again whenever the server closes the connection, until the run is over."""
    loop = asyncio.get_running_loop()
    while run.left > 0 and (left := run.end - monotonic()) > 0:
        try:
            transport, connection = await loop.create_connection(lambda: _Connection(run), host, port)
        except OSError:
            run.result.failures += 1
            run.left -= 1
            await asyncio.sleep(0.01)  # a server that is away must not be hammered
            continue
        limit = None if left == float("inf") else left + _GRACE
        done, _ = await asyncio.wait({connection.closed}, timeout=limit)
        if not done:
            transport.abort()
            await connection.closed


def main(arguments: Sequence[str] | None = None) -> None:
    """Load one address with one body and print the figures as JSON."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.load", description=__doc__)
    parser.add_argument("url")
    parser.add_argument("--body", type=Path, help="file of the JSON body; without it GET")
    parser.add_argument("--header", action="append", default=[], metavar="NAME:VALUE")
    parser.add_argument("--connections", type=int, default=16)
    parser.add_argument("--seconds", type=float, default=10.0)
    options = parser.parse_args(arguments)
    url = urlsplit(options.url)
    headers = dict(text.split(":", 1) for text in options.header)
    body = options.body.read_bytes() if options.body else b""
    sent = request(url.path or "/", body, headers, method="POST" if options.body else "GET")
    result = run_load(
        url.port or 80,
        [sent],
        host=url.hostname or "127.0.0.1",
        connections=options.connections,
        seconds=options.seconds,
    )
    print(json.dumps(result.summary()))


if __name__ == "__main__":
    main()
