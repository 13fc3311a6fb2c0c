"""What a client sends in, a body worth parsing out; everything else is refused before it costs anything."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import ipaddress
import os
import re
from collections.abc import Awaitable, Callable, Coroutine, Generator, Mapping, MutableMapping
from functools import lru_cache
from itertools import count
from types import coroutine
from typing import Any

from service.answering.refusal import Refusal

Headers = Mapping[bytes, bytes]
Message = MutableMapping[str, Any]
Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]

KEYS_VARIABLE = "CREDIT_RISK_API_KEYS"
"""Environment variable of the accepted API keys, separated by commas: several at once, so that they can rotate."""

LOOPBACK = "127.0.0.1"

_JSON = b"application/json"
CLOSE = (b"connection", b"close")
"""Header of an answer after which the connection cannot be used again."""


class ClientGone(Exception):
    """The client closed the connection before its request was whole: nobody waits for an answer."""


class Door:
    """Decides who may ask: the holder of a key or, where no key is configured, this machine alone.

    Parameters
    ----------
    keys
        Accepted API keys; see `configured_keys`.
    """

    def __init__(self, keys: tuple[str, ...]) -> None:
        # Digests have one length: comparing them tells nothing about the length of a key.
        self._keys = tuple(hashlib.sha256(key.encode()).digest() for key in keys)

    def admit(self, scope: Scope, headers: Headers) -> None:
        """Let a request pass, or raise the `Refusal` 401."""
        if self._keys:
            self._check_key(headers)
        elif not _is_local(scope.get("client")):
            raise _unauthorized(f"without {KEYS_VARIABLE} only this machine is answered; set it to a key")

    def _check_key(self, headers: Headers) -> None:
        given = hashlib.sha256(_given_key(headers)).digest()
        # All keys are compared, whichever matches: the time tells nothing.
        if not sum(hmac.compare_digest(given, key) for key in self._keys):
            raise _unauthorized("a valid API key is required, as 'Authorization: Bearer KEY' or 'X-API-Key: KEY'")


def configured_keys() -> tuple[str, ...]:
    """Read the accepted API keys from the environment; empty: only this machine is answered."""
    return tuple(key for part in os.environ.get(KEYS_VARIABLE, "").split(",") if (key := part.strip()))


def require_json(headers: Headers) -> None:
    """Raise the `Refusal` 415 unless the body is declared as plain JSON in UTF-8."""
    if headers.get(b"content-encoding", b"identity").lower() != b"identity":
        raise Refusal(415, "the body must not be compressed; send it without Content-Encoding")
    declared = headers.get(b"content-type", b"")
    if declared != _JSON and not _is_json(declared):
        raise Refusal(415, "the body must be JSON in UTF-8; send it with Content-Type: application/json")


async def read_body(receive: Receive, headers: Headers, limit: int, seconds: float) -> bytes:
    """Read a whole body, of at most `limit` bytes and within `seconds`.

    Raises
    ------
    Refusal
        413 if it is larger, by its declared length or as it arrives; 408 if it takes longer.
    ClientGone
        The client closed the connection.
    """
    if _declared(headers) > limit:
        raise _too_large(limit)
    reading = _collect(receive, limit)
    try:
        waits_for = reading.send(None)
    except StopIteration as done:  # all of it is here, as nearly always: a timer would cost more than reading it
        whole: bytes = done.value
        return whole
    try:
        async with asyncio.timeout(seconds):
            body: bytes = await _resumed(reading, waits_for)
            return body
    except TimeoutError:
        raise Refusal(408, f"the body must arrive within {seconds:g} seconds", headers=[CLOSE]) from None


async def drain(receive: Receive, headers: Headers, most: int, seconds: float) -> bool:
    """Read off what is left of a refused body, so that its client gets to read the answer.

    A connection that is closed while its client still sends is reset, and the answer is lost with it.

    Returns
    -------
    bool
        Whether the body came to its end, and the connection can be kept.
    """
    if _declared(headers) > most:
        return False
    try:
        async with asyncio.timeout(seconds):
            while most >= 0:
                message = await receive()
                most -= len(message.get("body", b""))
                if not message.get("more_body"):
                    return bool(message["type"] == "http.request")
    except TimeoutError:
        pass
    return False


class RequestIds:
    """Gives each request its id: the client's own if it is fit for logs and headers, else a new one."""

    def __init__(self) -> None:
        # Random once and then counted: unique like a UUID for a tenth of its cost.
        self._prefix = os.urandom(8).hex()
        self._numbers = count()

    def choose(self, headers: Headers) -> str:
        """Take ``X-Request-ID`` if it is 1 to 64 letters, digits and ``. _ : -``; else make one."""
        given = headers.get(b"x-request-id")
        if given is not None and _REQUEST_ID.fullmatch(given):
            return given.decode()
        return f"{self._prefix}{next(self._numbers):08x}"


_REQUEST_ID = re.compile(rb"[A-Za-z0-9._:-]{1,64}")


@coroutine
def _resumed(started: Coroutine[Any, Any, bytes], waits_for: Any) -> Generator[Any, None, bytes]:
    """Await a coroutine that has been started already, and waits for something."""
    try:
        yield waits_for
    except BaseException as error:
        started.throw(error)
        raise
    body: bytes = yield from started
    return body


async def _collect(receive: Receive, limit: int) -> bytes:
    body = bytearray()  # not a list of chunks: one byte a chunk would take fifty times its size
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ClientGone
        chunk: bytes = message.get("body", b"")
        if len(body) + len(chunk) > limit:
            raise _too_large(limit)
        if not body and not message.get("more_body"):
            return chunk
        body += chunk
        if not message.get("more_body"):
            return bytes(body)


def _declared(headers: Headers) -> int:
    return int(headers.get(b"content-length", b"0"))


def _too_large(limit: int) -> Refusal:
    return Refusal(413, f"the body must not exceed {limit} bytes")


def _unauthorized(error: str) -> Refusal:
    return Refusal(401, error, headers=[(b"www-authenticate", b"Bearer")])


def _given_key(headers: Headers) -> bytes:
    scheme, _, token = headers.get(b"authorization", b"").partition(b" ")
    if scheme.lower() == b"bearer":
        return token.strip()
    return headers.get(b"x-api-key", b"")


def _is_local(client: tuple[str, int] | None) -> bool:
    return client is None or _is_loopback(client[0])  # no address: a socket file of this machine


@lru_cache(maxsize=1024)
def _is_loopback(host: str) -> bool:
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return False
    mapped = getattr(address, "ipv4_mapped", None)
    return (mapped or address).is_loopback


@lru_cache(maxsize=64)
def _is_json(content_type: bytes) -> bool:
    media, *parameters = (part.strip().lower() for part in content_type.split(b";"))
    charsets = [part.partition(b"=")[2].strip(b'" ') for part in parameters if part.startswith(b"charset=")]
    return media == _JSON and all(charset in (b"utf-8", b"utf8") for charset in charsets)
