"""Who may ask, and under which name: API keys and the Host header."""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
import os
from collections.abc import Sequence
from functools import lru_cache

from service.answering.refusal import Refusal
from service.http.asgi import Headers, Scope

KEYS_VARIABLE = "CREDIT_RISK_API_KEYS"
"""Environment variable with the accepted API keys, separated by commas: several, so that keys can rotate."""

LOOPBACK = "127.0.0.1"


def configured_keys() -> tuple[str, ...]:
    """Read the accepted API keys from the environment; without any, only this machine is answered."""
    return tuple(key for part in os.environ.get(KEYS_VARIABLE, "").split(",") if (key := part.strip()))


class ApiKeyAuth:
    """Admits requests with a valid API key or, where no key is configured, from this machine.

    Parameters
    ----------
    keys
        Accepted API keys; see `configured_keys`.
    """

    def __init__(self, keys: tuple[str, ...]) -> None:
        # Digests have one length: comparing them tells nothing about the length of a key.
        self._keys = tuple(hashlib.sha256(key.encode()).digest() for key in keys)

    def check(self, scope: Scope, headers: Headers) -> None:
        """Raise the `Refusal` 401 unless the request may pass."""
        if self._keys:
            self._check_key(headers)
        elif not _is_local(scope.get("client")):
            raise _unauthorized(f"without {KEYS_VARIABLE} only this machine is answered; set it to a key")

    def _check_key(self, headers: Headers) -> None:
        given = hashlib.sha256(_given_key(headers)).digest()
        # All keys are compared, whichever matches: the time tells nothing.
        if not sum(hmac.compare_digest(given, key) for key in self._keys):
            raise _unauthorized("a valid API key is required, as 'Authorization: Bearer KEY' or 'X-API-Key: KEY'")


class HostCheck:
    """Admits requests by their Host header.

    A web page may make its visitor's browser call a service on that machine, by a name that the page's owner has
    pointed at 127.0.0.1. So without keys the service answers to this machine's own names only.

    Parameters
    ----------
    hosts
        Accepted names, without port. None: any name if there are keys, else ``localhost`` and loopback addresses.
    with_keys
        Whether API keys are required.
    """

    def __init__(self, hosts: Sequence[str] | None, *, with_keys: bool) -> None:
        self._accepted = None if hosts is None else frozenset(host.lower() for host in hosts)
        self._accepts_any = hosts is None and with_keys
        self._accepts = lru_cache(maxsize=256)(self._look_up)

    def check(self, headers: Headers) -> None:
        """Raise the `Refusal` 421 unless the request is for this service."""
        if not self._accepts_any and not self._accepts(headers.get(b"host", b"")):
            raise Refusal(421, "the Host header names another host; add its name to hosts in serve.yaml")

    def _look_up(self, header: bytes) -> bool:
        name = _without_port(header.decode("latin-1").lower())
        if self._accepted is not None:
            return name in self._accepted
        return name == "localhost" or _is_loopback(name)


def _without_port(host: str) -> str:
    if host.startswith("["):
        return host[1:].partition("]")[0]
    return host.partition(":")[0]


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
