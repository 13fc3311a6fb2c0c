"""Fail fast, with a one-line error, if the serving port is taken."""

from __future__ import annotations

import socket

import bentoml
import click


def require_free_port() -> None:
    """Check, in a process that runs ``bentoml serve``, that the port is free.

    BentoML itself finds out last, and ends in a traceback. In other processes, such as workers and ``bentoml
    build``, nothing is checked.

    Raises
    ------
    bentoml.exceptions.BentoMLException
        The port cannot be listened on: BentoML prints the line and exits with 1.
    """
    context = click.get_current_context(silent=True)
    if context is None or context.command.name != "serve":
        return
    host, port = _address(context.params["host"], context.params["port"])
    try:
        _bind(host, port)
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        message = f"cannot listen on {host}:{port}: {reason}. Stop that process, or pass --port or --host."
        raise bentoml.exceptions.BentoMLException(message) from None


def _address(host: str | None, port: int | None) -> tuple[str, int]:
    """Complete the flags as BentoML does, from its configuration."""
    # There is no public way to its configuration; a second copy of its rules would go stale unnoticed.
    from bentoml._internal.configuration.containers import BentoMLContainer

    configured = BentoMLContainer.http
    return host or configured.host.get(), configured.port.get() if port is None else port


def _bind(host: str, port: int) -> None:
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        # As the server does: a port is free while its last connections are closing.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        probe.bind((host, port))
