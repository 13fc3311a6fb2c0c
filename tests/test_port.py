from __future__ import annotations

import socket

import bentoml
import click
import pytest

from service.http.port import require_free_port


def serve(host: str, port: int, command: str = "serve") -> None:
    """Check the port as ``bentoml serve --host HOST --port PORT`` does."""
    with click.Context(click.Command(command)) as context:
        context.params = {"host": host, "port": port}
        require_free_port()


@pytest.mark.parametrize(
    ("host", "listens"), [("127.0.0.1", "127.0.0.1"), ("0.0.0.0", "127.0.0.1"), ("::1", "::1")]
)
def test_a_port_is_refused_only_while_another_listens(host: str, listens: str) -> None:
    with _listening(listens) as other:
        port = other.getsockname()[1]
        with pytest.raises(
            bentoml.exceptions.BentoMLException, match=f"cannot listen on {host}:{port}: .* in use"
        ):
            serve(host, port)
    serve(host, port)


def test_a_server_that_is_started_again_gets_its_port_at_once() -> None:
    with socket.create_server(("127.0.0.1", 0)) as before:
        port = before.getsockname()[1]
        with socket.create_connection(("127.0.0.1", port)) as client:
            answering, _ = before.accept()
            answering.close()  # the side that closes first keeps the port for a minute
            assert client.recv(1) == b""
    serve("127.0.0.1", port)


def test_what_does_not_serve_needs_no_port() -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        serve("127.0.0.1", other.getsockname()[1], command="build")
        require_free_port()


def _listening(host: str) -> socket.socket:
    try:
        return socket.create_server((host, 0), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    except OSError:
        pytest.skip(f"this machine has no {host}")
