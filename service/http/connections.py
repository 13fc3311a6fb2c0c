"""Bound what connections may cost: how many there are, and how long each may take to send its headers.

BentoML starts uvicorn with uvicorn's defaults and gives no way to change them. But a worker builds its application
before uvicorn looks up the default protocol by name, so `install` can put a subclass there.
"""

from __future__ import annotations

import asyncio
import os
import resource
from collections.abc import Iterable, Sequence
from functools import partial
from itertools import count
from typing import Any

import httptools
import uvicorn.config
from uvicorn.middleware.proxy_headers import ProxyHeadersMiddleware
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from service.settings import LimitSettings

_OTHER_FILES = 64
"""File descriptors of a worker that connections must leave free: libraries, logs, the model's files."""

_FEWEST = 8
"""Connections that are admitted however few file descriptors there are."""

_SWEEPS = 5
"""How often in `header_seconds` silent connections are looked for."""


def install(limits: LimitSettings, proxies: Sequence[str]) -> None:
    """Make the uvicorn of this process use `Connection` for HTTP.

    Parameters
    ----------
    proxies
        Addresses or networks of the proxies whose ``X-Forwarded-For`` and ``X-Forwarded-Proto`` are believed.
    """
    # Uvicorn reads the variable after this; its default believes every process of this machine.
    os.environ["FORWARDED_ALLOW_IPS"] = ",".join(proxies)
    protocol: Any = partial(Connection, guard=ConnectionGuard(limits))
    uvicorn.config.HTTP_PROTOCOLS["auto"] = protocol


class ConnectionGuard:
    """Decides which connections of a worker stay open.

    Parameters
    ----------
    limits
        ``limits`` of ``conf/serve.yaml``.
    """

    def __init__(self, limits: LimitSettings) -> None:
        files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        self._most = max(_FEWEST, min(limits.connections, files - _OTHER_FILES))
        self._header_seconds = limits.header_seconds
        self._is_sweeping = False
        self.numbers = count()
        """Give connections their order; the loop's clock stands still while several are accepted."""

    def admit(self, newcomer: Connection) -> None:
        """Keep to the number of connections: close the idle one that is oldest, or else the newcomer."""
        if not self._is_sweeping:
            self._is_sweeping = True
            self._sweep_later(newcomer)
        if len(newcomer.connections) <= self._most:
            return
        open_ones = [other for other in _guarded(newcomer.connections) if not other.transport.is_closing()]
        if len(open_ones) <= self._most:
            return
        idle = [other for other in open_ones if other.is_idle and other is not newcomer]
        # Those that never sent a whole request go before those that did.
        oldest = min(idle, key=lambda other: (other.cycle is not None, other.number), default=newcomer)
        oldest.transport.abort()

    def _sweep_later(self, connection: Connection) -> None:
        connection.loop.call_later(self._header_seconds / _SWEEPS, self._sweep, connection)

    def _sweep(self, connection: Connection) -> None:
        now = connection.loop.time()
        for other in _guarded(connection.connections):
            if other.waiting_since(now) < now - self._header_seconds:
                other.transport.abort()
        self._sweep_later(connection)


def _guarded(connections: Iterable[Any]) -> list[Connection]:
    return [connection for connection in connections if isinstance(connection, Connection)]


class Connection(HttpToolsProtocol):
    """Uvicorn's HTTP/1.1 with a guard; a request that offers to change the protocol is answered in HTTP/1.1.

    Parameters
    ----------
    guard
        Decides how long the connection stays.
    """

    def __init__(self, *args: Any, guard: ConnectionGuard, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.number = next(guard.numbers)
        self._guard = guard
        self._wait: tuple[object, float] = (None, 0.0)
        if isinstance(self.app, ProxyHeadersMiddleware) and not os.environ["FORWARDED_ALLOW_IPS"]:
            self.app = self.app.app  # it would believe nobody, and cost each request one more call

    @property
    def is_idle(self) -> bool:
        """Whether no request is being answered: none has come, or its headers are not complete."""
        return self.cycle is None or self.cycle.response_complete

    def waiting_since(self, now: float) -> float:
        """Tell since when the connection has waited for its client to do something; `now` if it does not wait."""
        what = self._waits_for()
        if what is None or what != self._wait[0]:
            self._wait = (what, now)
        return self._wait[1]

    def _waits_for(self) -> object:
        if unread := self.transport.get_write_buffer_size():
            return ("to read its answer", unread)
        # Between two requests uvicorn has a timer of its own, until the first byte of the next.
        if self.is_idle and self.timeout_keep_alive_task is None:
            return ("to complete its headers", self.cycle)
        return None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Begin, if the guard admits it."""
        super().connection_made(transport)
        self._guard.admit(self)

    def _should_upgrade(self) -> bool:
        # Tells uvicorn's callbacks to leave such a request alone; `data_received` goes on with it.
        return True

    def data_received(self, data: bytes) -> None:
        """Parse what arrived."""
        self._unset_keepalive_if_required()
        try:
            self.parser.feed_data(data)
        except httptools.HttpParserUpgrade as upgrade:
            self._decline_upgrade(data[upgrade.args[0] :])
        except httptools.HttpParserError:
            self._refuse()

    def _decline_upgrade(self, rest: bytes) -> None:
        """Parse the head of the request again without the offer: the parser would skip the body after it."""
        method = self.parser.get_method()
        if method == b"CONNECT":
            self._refuse()
            return
        lines = [b"%b %b HTTP/%b" % (method, self.url, self.parser.get_http_version().encode())]
        lines += (b"%b: %b" % header for header in self.headers if header[0] != b"upgrade")
        self.parser = httptools.HttpRequestParser(self)
        self.parser.set_dangerous_leniencies(lenient_data_after_close=True)  # as uvicorn does
        self.data_received(b"\r\n".join([*lines, b"", rest]))

    def _refuse(self) -> None:
        message = "Invalid HTTP request received."
        self.logger.warning(message)
        self.send_400_response(message)
