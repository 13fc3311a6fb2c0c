"""The address that ``bentoml serve`` is to listen on in, nothing out; or one line that says why it cannot."""

from __future__ import annotations

import socket

import bentoml
import click


def require_free_port() -> None:
    """See to it, in a process that runs ``bentoml serve``, that the port can be listened on.

    BentoML finds out last and ends in a traceback. Elsewhere, in a worker or under ``bentoml build``, nothing is
    to listen, and nothing is checked.

    Raises
    ------
    bentoml.exceptions.BentoMLException
        The port is another process's, or the system does not give it away: BentoML prints the line and exits 1.
    """
    context = click.get_current_context(silent=True)
    if context is None or context.command.name != "serve":
        return
    host, port = _address(context.params["host"], context.params["port"])
    try:
        _bind(host, port)
    except OSError as error:
        raise bentoml.exceptions.BentoMLException(
            f"port {port} of {host}: the service must be able to listen there, received: {error.strerror}; "
            "stop what has the port, or give another --port or --host"
        ) from None


def _address(host: str | None, port: int | None) -> tuple[str, int]:
    """Complete the flags as BentoML does, from its configuration."""
    from bentoml._internal.configuration.containers import BentoMLContainer

    configured = BentoMLContainer.http
    return host or configured.host.get(), configured.port.get() if port is None else port


def _bind(host: str, port: int) -> None:
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        # As the server does: a port whose last connections are still being wound up is free.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        probe.bind((host, port))
