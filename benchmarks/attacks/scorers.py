"""Attacks on the scorer of ``service:front`` by whoever reaches its address."""

from __future__ import annotations

import socket
from contextlib import suppress
from typing import Any

import numpy as np
import psutil

from benchmarks.attacks.attack import Attack, Tally
from benchmarks.attacks.lab import Lab, environment
from pipeline.core.model.features import make_vectorizer
from service.split.protocol import PATH, TOKEN_HEADER, TOKEN_VARIABLE, VERSION_HEADER, version_name
from tests.testkit.servers import Server, receive
from tests.testkit.waiting import eventually

TOKEN = "the-token-of-this-attack"


def scorer(lab: Lab, tally: Tally) -> None:
    with lab.store() as store, environment(**{TOKEN_VARIABLE: TOKEN}), lab.serving("service:front") as server:
        version = version_name(store.promotions[1])
        before = server.call("/classify", lab.schema.example())[1]
        process = _scorer(server)
        row = np.zeros(_width(lab), dtype=np.float32).tobytes()

        def ask(expected: set[int], what: str, body: bytes = row, **headers: Any) -> None:
            status = _ask(process, body, {"token": TOKEN.encode(), "version": version, **headers})
            tally.count(status in expected, f"{what}: {status}")

        ask({200}, "a good call")
        for token in (b"", b"x", TOKEN[:-1].encode(), TOKEN.upper().encode(), b"\xff" * 1000):
            ask({400, 401, 403}, f"token {token[:20]!r}", token=token)
            ask({400, 401, 403}, f"token {token[:20]!r}, 20 MB", b"x" * 20_000_000, token=token)
        for body in (b"", b"\0", row[:-1], row[:-4], row + b"\0" * 4):
            ask({400, 413, 422}, f"{len(body)} bytes", body)
        ask({413}, "100,000 rows", row * 100_000)
        for name in (
            b"",
            b"x",
            b"[" * 5000,
            b"{}",
            b'{"tag": "../v1", "digests": {}}',
            version.replace(b"v1", b"v9"),
        ):
            ask({400, 409, 431}, f"version {name[:40]!r}", version=name)
        after = server.call("/classify", lab.schema.example())[1]
        tally.count(after["probability"] == before["probability"], "another answer afterwards")
        tally.count(process.is_running(), "the scorer has died")


ATTACKS = [
    Attack("scorer", "The scorer of service:front wants a token, has limits and survives any call", scorer),
]


def _scorer(server: Server) -> psutil.Process:
    def found() -> psutil.Process | None:
        for process in server.process.descendants():
            with suppress(psutil.NoSuchProcess):
                if "credit_risk_scorer" in process.cmdline():
                    return process
        return None

    process = eventually(found)
    assert process
    return process


def _connected(process: psutil.Process) -> socket.socket:
    """A connection to the address on which a scorer listens: a socket file, or a port."""
    for kind in ("unix", "inet"):
        for found in process.net_connections(kind):
            if not found.raddr and found.laddr:
                with suppress(OSError):
                    client = socket.socket(found.family)
                    client.settimeout(20)
                    client.connect(found.laddr)
                    return client
    raise RuntimeError("the scorer listens nowhere")


def _ask(process: psutil.Process, body: bytes, headers: dict[str, bytes]) -> int:
    """The status of one call; 0 if there was no answer."""
    head = b"POST %b HTTP/1.1\r\nHost: scorer\r\nContent-Length: %d\r\n%b: %b\r\n%b: %b\r\n\r\n" % (
        *(PATH.encode(), len(body)),
        *(TOKEN_HEADER.encode(), headers["token"]),
        *(VERSION_HEADER.encode(), headers["version"]),
    )
    with _connected(process) as connection:
        connection.sendall(head)
        with suppress(OSError):  # it may refuse before it has read all
            connection.sendall(body)
        try:
            answer = receive(connection)
        except OSError:
            return 0
    return int(answer[9:12]) if answer[:9] == b"HTTP/1.1 " else 0


def _width(lab: Lab) -> int:
    return len(make_vectorizer(lab.schema).feature_names_)
