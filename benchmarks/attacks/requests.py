"""Attacks by whoever can send the service something: bodies, connections, headers."""

from __future__ import annotations

import json
import multiprocessing
import re
import shutil
import socket
import subprocess
import time
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack, suppress
from http.client import HTTPException
from typing import Any

from benchmarks.attacks.attack import Attack, Tally
from benchmarks.attacks.lab import Lab
from tests.testkit.servers import Server, few_files, receive

HALF_OPEN = 300
PATIENCE = 10.0
"""Seconds within which a service under attack must answer somebody."""


def slow_bodies(lab: Lab, tally: Tally) -> None:
    from benchmarks.slow_bodies import measure

    spawn = multiprocessing.get_context("spawn")  # memory is measured: of a process that does nothing else
    with ProcessPoolExecutor(1, mp_context=spawn) as pool:
        costs = pool.submit(measure, lab.counts.body_seconds, lab.counts.seed).result()
    for cost in costs:
        tally.count(cost.status < 500 and not cost.is_too_high, str(cost))
    slowest, largest = max(costs, key=lambda cost: cost.held_ms), max(costs, key=lambda cost: cost.growth)
    tally.note(f"slowest holds the loop {slowest.held_ms:.0f} ms ({slowest.size:,} bytes)")
    tally.note(f"largest growth {largest.growth:.1f} x its {largest.size:,} bytes")


def half_open(lab: Lab, tally: Tally) -> None:
    body = json.dumps(lab.schema.example()).encode()
    outcomes: Counter[str] = Counter()
    with lab.store() as store, ExitStack() as stack:
        with few_files(120):
            server = stack.enter_context(lab.serving(workers=1))
        for number in range(6):
            for _ in range(HALF_OPEN if number == 0 else HALF_OPEN // 5):
                with suppress(OSError):
                    stack.enter_context(server.connection()).sendall(b"POST /classify HTTP/1.1\r\n")
            version = 2 - number % 2
            store.promote(version)
            for _ in range(5):
                outcome = _answer(server, body, version)
                outcomes[outcome] += 1
                tally.count(outcome in {"answered", "503"}, f"after a switch to v{version}: {outcome}")
    tally.note(", ".join(f"{outcome} {count}" for outcome, count in outcomes.items()))


OFFERS = {
    "h2c": b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAMAAABkAAQAAP__\r\n",
    "websocket": b"Connection: upgrade\r\nUpgrade: websocket\r\n",
    "TLS": b"Connection: Upgrade\r\nUpgrade: TLS/1.3\r\n",
}


def upgrades(lab: Lab, tally: Tally) -> None:
    body = json.dumps(lab.schema.example()).encode()
    with lab.store(), lab.serving(workers=1) as server:
        for name, offer in OFFERS.items():
            for pieces in (1, 2, 3, 5, 17, 100):
                with server.connection() as connection:
                    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                    for _ in range(3):
                        answer = _in_pieces(connection, _head("/classify", len(body), offer) + body, pieces)
                        tally.count(answer.startswith(b"HTTP/1.1 200 "), f"{name} in {pieces}: {answer[:200]!r}")
        if curl := shutil.which("curl"):
            command = [
                curl,
                "-sS",
                "--http2",
                "-H",
                "Content-Type: application/json",
                "--data-binary",
                body.decode(),
            ]
            url = f"{server.url}/classify"
            found = subprocess.run([*command, url], capture_output=True, timeout=30, check=False)
            tally.count(b'"Status"' in found.stdout, f"curl --http2: {found.stdout!r} {found.stderr!r}")


HOSTS = [
    *("evil.example", "evil.example:3000", "localhost.evil.example", "127.0.0.1.evil.example", "10.0.0.7"),
    *(
        "0.0.0.0",
        "[::ffff:10.0.0.7]",
        "localhost@evil.example",
        "evil.example#localhost",
        " ",
        "127.1",
        "2130706433",
    ),
]
FORWARDED = [{"X-Forwarded-For": "10.0.0.7"}, {"Forwarded": "for=10.0.0.7"}, {"X-Real-IP": "10.0.0.7"}]


def hosts(lab: Lab, tally: Tally) -> None:
    example = lab.schema.example()
    with lab.store(), lab.serving(workers=1) as server:
        for host in HOSTS:
            for path in ("/model", "/classify", "/metrics", "/docs.json"):
                body = example if path == "/classify" else None
                status = server.call(path, body, headers={"Host": host})[0]
                tally.count(status in {400, 421}, f"Host {host!r} on {path}: {status}")
        for host in ("localhost", "127.0.0.1:3000", "[::1]:3000"):
            tally.count(server.call("/model", headers={"Host": host})[0] == 200, f"Host {host} is refused")
        # Were they believed, the client would count as another machine's, and be refused.
        for headers in FORWARDED:
            status = server.call("/classify", example, headers=headers)[0]
            tally.count(status == 200, f"{headers} is believed: {status}")


def huge_bodies(lab: Lab, tally: Tally) -> None:
    size, block = 50 << 20, b" " * (1 << 20)
    with lab.store(), lab.serving(workers=1) as server:
        for path in ("/classify", "/classify_batch", "/explain", "/nowhere", "/model"):
            for kind in (b"Connection: keep-alive\r\n", b"Connection: close\r\n"):
                expected = {"/nowhere": b"404", "/model": b"405"}.get(path, b"413")
                answer = _sent(server, _head(path, size, kind), block, size // len(block))
                tally.count(answer[9:12] == expected, f"{path} with {kind!r}: {answer[:100]!r}")
        tally.count(server.call("/classify", lab.schema.example())[0] == 200, "no answer afterwards")


FOREIGN = re.compile(
    r"""(?:src|href|action)\s*=\s*["']?(?:https?:)?//|url\(|@import|https?://(?!localhost|127\.)"""
)


def page(lab: Lab, tally: Tally) -> None:
    with lab.store(), lab.serving(workers=1, keys="secret") as server:
        status, text, headers = server.call("/")
        tally.count(status == 200, f"with keys set GET / is {status}")
        tally.count(not (found := FOREIGN.findall(str(text))), f"the page names {found}")
        policy = headers.get("content-security-policy", "")
        strict = policy.startswith("default-src 'none'") and "unsafe" not in policy and "http" not in policy
        tally.count(strict, f"Content-Security-Policy is {policy!r}")
        for path, body in (("/classify", lab.schema.example()), ("/model", None), ("/docs.json", None)):
            tally.count(server.call(path, body)[0] == 401, f"{path} is open")
        for path in ("/static_content/swagger-ui.css", "/static_content/index.css"):
            tally.count(server.call(path)[0] in {401, 404}, f"{path} is served")


ATTACKS = [
    Attack("slow-bodies", "No body holds the event loop for 50 ms, or takes ten times its size", slow_bodies),
    Attack("half-open", "300 half-open connections under ulimit -n 120: no answer of a version before", half_open),
    Attack("upgrades", "An offer of another protocol is answered in HTTP/1.1", upgrades),
    Attack("hosts", "Without keys only this machine's names are answered; forwarded headers are ignored", hosts),
    Attack("huge-bodies", "The client of a refused body of 50 MB reads its answer", huge_bodies),
    Attack("page", "The page loads nothing from elsewhere, and is open where keys are set", page),
]


def _head(path: str, length: int, extra: bytes = b"") -> bytes:
    return (
        b"POST %b HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n%bContent-Length: %d\r\n\r\n"
        % (path.encode(), extra, length)
    )


def _in_pieces(connection: socket.socket, data: bytes, pieces: int) -> bytes:
    size = len(data) // pieces + 1
    for start in range(0, len(data), size):
        connection.sendall(data[start : start + size])
    return receive(connection)


def _sent(server: Server, head: bytes, block: bytes, blocks: int) -> bytes:
    """Send a body to its end, as clients do that read no answer before."""
    try:
        with server.connection() as connection:
            connection.sendall(head)
            for _ in range(blocks):
                connection.sendall(block)
            return receive(connection)
    except OSError as error:
        return repr(error).encode()


def _answer(server: Server, body: bytes, version: int) -> str:
    """How a request is answered, tried again while connections are refused: not forever."""
    end = time.monotonic() + PATIENCE
    while time.monotonic() < end:
        with suppress(OSError, HTTPException):
            status, answer, _ = server.call("/classify", raw=body)
            return _outcome(status, answer, version)
        time.sleep(0.05)
    return f"no answer in {PATIENCE:g} s"


def _outcome(status: int, answer: Any, version: int) -> str:
    if status != 200:
        return str(status)
    return "answered" if answer["model"] == f"credit_risk_model:v{version}" else f"stale: {answer['model']}"
