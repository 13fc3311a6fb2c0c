"""Compare running servers by medians over interleaved rounds: a noisy machine then disturbs all of them alike."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from time import process_time
from typing import Any

import httpx

from benchmarks.load import LoadResult, request, run_load
from tests.testkit.servers import Server

CONNECTIONS = 16
OK = 200


@dataclass(frozen=True)
class Figures:
    """Medians over the rounds of one server.

    Attributes
    ----------
    rates
        Answers a second of each round.
    p50, p99
        Milliseconds; medians of the rounds' percentiles.
    failed
        Requests that broke or were not answered 200, in all rounds.
    client
        Share of one core that the load client took.
    """

    rates: tuple[float, ...]
    p50: float
    p99: float
    failed: int
    client: float

    @property
    def rate(self) -> float:
        """Median of the rounds' answers a second."""
        return median(self.rates)


@dataclass(frozen=True)
class Rounds:
    """How long to load, and how often.

    Attributes
    ----------
    count
        Rounds over all servers.
    seconds, warm_up
        Of each server in each round; what happens while warming up is not counted.
    connections
        Kept alive, one request under way on each.
    """

    count: int
    seconds: float
    warm_up: float
    connections: int = CONNECTIONS

    def of(self, servers: Mapping[str, tuple[Server, Sequence[bytes]]]) -> dict[str, Figures]:
        """Load each server with its requests in turn, round after round.

        Parameters
        ----------
        servers
            Name → the running server and the requests to send it, see `benchmarks.load.request`.
        """
        seen: dict[str, list[tuple[LoadResult, float]]] = {name: [] for name in servers}
        for number in range(self.count):
            # Each round begins with another server, so that none always follows the same one.
            names = list(servers)
            for name in names[number % len(names) :] + names[: number % len(names)]:
                server, requests = servers[name]
                seen[name].append(self._load(server.port, requests))
        return {name: _figures(results) for name, results in seen.items()}

    def _load(self, port: int, requests: Sequence[bytes]) -> tuple[LoadResult, float]:
        run_load(port, requests, connections=self.connections, seconds=self.warm_up)
        before = process_time()
        result = run_load(port, requests, connections=self.connections, seconds=self.seconds)
        return result, (process_time() - before) / result.seconds


def single(server: Server) -> list[bytes]:
    """The server's own body as one request, after seeing that it is answered 200: see `ask`."""
    ask(server)
    return [request(server.service.path, server.service.body)]


def ask(server: Server) -> Any:
    """Ask the server once with its own body: the JSON answer.

    Raises
    ------
    RuntimeError
        It is answered otherwise than 200: a measurement of errors would look fast.
    """
    service = server.service
    answer = httpx.post(
        server.url + service.path,
        content=service.body,
        headers={"Content-Type": "application/json"},
        timeout=30,
    )
    if answer.status_code != OK:
        raise RuntimeError(f"{service.name}: answered {answer.status_code}: {answer.text[:300]}")
    return answer.json()


def failed_requests(result: LoadResult) -> int:
    """Requests that broke or were not answered 200."""
    return result.failures + sum(number for status, number in result.statuses.items() if status != OK)


def markdown(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Lay out a table; the first column is text, the others are figures."""
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)


def _figures(results: Sequence[tuple[LoadResult, float]]) -> Figures:
    loads = [result for result, _ in results]
    return Figures(
        rates=tuple(load.rate for load in loads),
        p50=1000 * median(load.percentile(50) for load in loads),
        p99=1000 * median(load.percentile(99) for load in loads),
        failed=sum(failed_requests(load) for load in loads),
        client=median(share for _, share in results),
    )
