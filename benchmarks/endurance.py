"""Watch the memory and the answers of a service under long load, with promotions in between."""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from threading import Event
from time import monotonic

from benchmarks import figures
from benchmarks.load import LoadResult, await_answers, run_load, under_load
from benchmarks.rounds import CONNECTIONS, failed_requests, markdown
from benchmarks.scratch import Scratch
from tests.testkit.servers import Server

SETTLED = 60.0
"""Seconds after which memory may hardly grow."""
_NAME = "credit_risk_model"
_MIB = 2**20


def soak(server: Server, requests: Sequence[bytes], seconds: float, figure: Path) -> str:
    """Load a server for long, and compare its memory at the end with that after the first minute."""
    with ThreadPoolExecutor(1) as pool:
        over = Event()
        samples = pool.submit(_watch_memory, server, over)
        result = run_load(server.port, requests, connections=CONNECTIONS, seconds=seconds)
        over.set()
    memory = samples.result()
    figures.memory(memory, figure)
    settled = min(SETTLED, seconds / 5)
    early = mean(size for time, size in memory if settled <= time < settled * 1.1 + 1)
    late = mean(size for time, size in memory if time >= seconds * 0.98 - 1)
    rows = [(
        f"{seconds:g} s", f"{len(result.latencies):,}", f"{result.rate:,.0f}", failed_requests(result),
        f"{early / _MIB:.0f}", f"{late / _MIB:.0f}", f"{late / early - 1:+.1%}",
        *_latencies(result),
    )]  # fmt: skip
    header = ("full load, one worker", "requests", "answers/s", "failed (aim 0)", f"MiB after {settled:g} s",
              "MiB at the end", "growth (aim 5 %)", "p50 ms", "p99 ms", "longest ms")  # fmt: skip
    return markdown(header, rows)


@dataclass(frozen=True)
class Switch:
    """One command that moved the pointer.

    Attributes
    ----------
    command
        As typed after ``python -m pipeline``.
    tag
        What is promoted when it has exited.
    began, ended
        By the system's monotonic clock.
    """

    command: str
    tag: str
    began: float
    ended: float


def promotions(server: Server, requests: Sequence[bytes], scratch: Scratch) -> str:
    """Promote and roll back six times under load: count failures and answers of a version no longer promoted.

    The state must hold versions 1 and 2, with 2 promoted and 1 before it.
    """
    with under_load(server.port, requests, CONNECTIONS) as result:
        switches = _switch_six_times(scratch, result)
    rows = [(
        len(switches), f"{len(result.answers):,}", failed_requests(result), stale_answers(result, switches),
        *_latencies(result),
        f"{max(switch.ended - switch.began for switch in switches):.1f}",
    )]  # fmt: skip
    header = ("promotions and rollbacks, 2 workers", "requests", "failed (aim 0)", "stale (aim 0)", "p50 ms",
              "p99 ms", "longest stall ms", "slowest command s")  # fmt: skip
    return markdown(header, rows)


def stale_answers(result: LoadResult, switches: Sequence[Switch]) -> int:
    """Count answers by another version to requests begun after a command had exited and done before the next."""
    nexts = [*(switch.began for switch in switches[1:]), float("inf")]
    return sum(
        json.loads(body)["model"] != switch.tag
        for switch, following in zip(switches, nexts, strict=True)
        for began, finished, status, body in result.answers
        if switch.ended <= began and finished < following and status == 200
    )


def _switch_six_times(scratch: Scratch, load: LoadResult) -> list[Switch]:
    commands = itertools.cycle(
        [(("rollback",), 1), (("promote", "--version", "2", "--force", "--reason", "bench"), 2)]
    )
    switches = []
    for command, version in itertools.islice(commands, 6):
        await_answers(load, 1000)  # between two switches, so that a stale one would be seen
        began = monotonic()
        scratch.pipeline(*command)
        switches.append(Switch(" ".join(command), f"{_NAME}:v{version}", began, monotonic()))
    await_answers(load, 1000)
    return switches


def _latencies(result: LoadResult) -> tuple[str, str, str]:
    """Median, 99th percentile and longest, in milliseconds."""
    return tuple(f"{1000 * result.percentile(share):.1f}" for share in (50, 99, 100))  # type: ignore[return-value]


def _watch_memory(server: Server, over: Event) -> list[tuple[float, int]]:
    """Sample resident memory each second: (seconds since the start, bytes)."""
    began, samples = monotonic(), []
    while not over.wait(1):
        samples.append((monotonic() - began, server.resident_bytes()))
    return samples
