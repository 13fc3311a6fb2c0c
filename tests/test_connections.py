"""Connections: how many, how long, for whom, and in which protocol."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from pipeline.core.contract.schema import Schema
from service.answering.refusal import Refusal
from service.http.access import HostCheck
from service.http.connections import Connection
from tests.testkit import PROJECT
from tests.testkit.projects import changed_conf
from tests.testkit.servers import Server, few_files, receive
from tests.testkit.store import Store, serving

EXAMPLE = Schema.load(PROJECT / "conf/schema.yaml").example()
BODY = json.dumps(EXAMPLE).encode()
OFFER = b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAMAAABkAAQAAP__\r\n"


def head(extra: bytes = b"", length: int = len(BODY), path: bytes = b"/classify") -> bytes:
    """The head of a POST request."""
    return (
        b"POST %b HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n%bContent-Length: %d\r\n\r\n"
        % (path, extra, length)
    )


def is_closed(connection: socket.socket, seconds: float = 15) -> bool:
    """Whether the server closes the connection in time, without an answer."""
    connection.settimeout(seconds)
    try:
        return connection.recv(1) == b""
    except ConnectionResetError:
        return True
    except TimeoutError:
        return False


@pytest.fixture
def bounded(tmp_path: Path, store: Store, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    """A service with room for ten connections, and little time for headers."""
    store.promote(1)
    conf = changed_conf(tmp_path, workers=1, limits__connections=10, limits__header_seconds=1)
    monkeypatch.setenv("CREDIT_RISK_CONF", str(conf))
    with serving() as server:
        yield server


@pytest.mark.parametrize("offer", [OFFER, b"Connection: upgrade\r\nUpgrade: websocket\r\n"])
@pytest.mark.parametrize("pieces", [1, 2, 5])
def test_an_offer_of_another_protocol_is_answered_in_http_1_1(server: Server, offer: bytes, pieces: int) -> None:
    data = head(offer + b"X-Request-ID: offered\r\n") + BODY
    size = len(data) // pieces + 1
    with server.connection() as connection:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for _ in range(2):  # and the connection goes on in HTTP/1.1
            for start in range(0, len(data), size):
                connection.sendall(data[start : start + size])
            answer = receive(connection)
            assert answer.startswith(b"HTTP/1.1 200 "), answer
            assert json.loads(answer.partition(b"\r\n\r\n")[2])["request_id"] == "offered"


def test_requests_behind_such_an_offer_are_answered_too(server: Server) -> None:
    data = head(OFFER + b"X-Request-ID: first\r\n") + BODY + head(b"X-Request-ID: second\r\n") + BODY
    with server.connection() as connection:
        connection.sendall(data)
        received = b""
        while received.count(b'"request_id"') < 2:
            received += connection.recv(65536)
    assert received.index(b'"first"') < received.index(b'"second"')


def test_a_chunked_body_behind_such_an_offer_arrives(server: Server) -> None:
    start = head(OFFER).replace(b"Content-Length: %d" % len(BODY), b"Transfer-Encoding: chunked")
    with server.connection() as connection:
        connection.sendall(start)
        connection.sendall(b"%x\r\n%b\r\n0\r\n\r\n" % (len(BODY), BODY))
        assert receive(connection).startswith(b"HTTP/1.1 200 ")


def test_a_tunnel_is_refused(server: Server) -> None:
    with server.connection() as connection:
        connection.sendall(b"CONNECT example.com:80 HTTP/1.1\r\nHost: example.com\r\n\r\n")
        assert receive(connection).startswith(b"HTTP/1.1 400 ")
    assert server.call("/classify", EXAMPLE)[0] == 200


@pytest.mark.parametrize("sent", [b"", b"POST /classify HTTP/1.1\r\nHost: loc", head()[:-2]])
def test_a_client_that_does_not_finish_its_headers_is_closed(bounded: Server, sent: bytes) -> None:
    with bounded.connection() as connection, bounded.connection() as kept:
        kept.sendall(head() + BODY)
        assert receive(kept).startswith(b"HTTP/1.1 200 ")
        connection.sendall(sent)
        kept.sendall(sent or b"P")
        assert is_closed(connection)
        assert is_closed(kept)  # also behind a request that was answered


def test_a_client_that_reads_no_answer_is_closed(bounded: Server, rows: list[dict[str, Any]]) -> None:
    body = json.dumps((rows * 3)[:10_000]).encode()
    data = head(length=len(body), path=b"/classify_batch") + body
    with socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.connect(("127.0.0.1", bounded.port))
        connection.settimeout(60)
        with pytest.raises((ConnectionResetError, BrokenPipeError)):
            connection.sendall(data * 20)  # it blocks once the server waits for its answers to be read
    assert bounded.call("/classify", EXAMPLE)[0] == 200


def test_beyond_the_limit_the_oldest_half_open_connection_makes_room(bounded: Server) -> None:
    with ExitStack() as stack:
        kept = stack.enter_context(bounded.connection())
        kept.sendall(head() + BODY)
        assert receive(kept).startswith(b"HTTP/1.1 200 ")
        half_open = [stack.enter_context(bounded.connection()) for _ in range(9)]
        assert bounded.call("/classify", EXAMPLE)[0] == 200
        assert is_closed(half_open[0], 0.5)
        kept.sendall(head() + BODY)
        assert receive(kept).startswith(b"HTTP/1.1 200 ")


def test_connections_in_use_are_not_closed_for_a_newcomer(bounded: Server) -> None:
    with ExitStack() as stack:
        busy = [stack.enter_context(bounded.connection()) for _ in range(10)]
        for connection in busy:
            connection.sendall(head() + BODY[:-1])
        time_to_arrive = bounded.connection()
        assert is_closed(time_to_arrive, 5)
        for connection in busy:
            connection.sendall(BODY[-1:])
            assert receive(connection).startswith(b"HTTP/1.1 200 ")


def test_few_file_descriptors_suffice_under_attack(
    tmp_path: Path, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    store.promote(1)
    conf = changed_conf(tmp_path, workers=1, limits__header_seconds=1)
    monkeypatch.setenv("CREDIT_RISK_CONF", str(conf))
    with ExitStack() as stack:
        with few_files(120):
            server = stack.enter_context(serving())
        for _ in range(300):
            stack.enter_context(server.connection()).sendall(b"POST /classify HTTP/1.1\r\n")
        answers = [_answered_within(server, 5) for _ in range(20)]
        assert {answer["model"] for answer in answers} == {"credit_risk_model:v1"}
        store.promote(2)
        assert _answered_within(server, 5)["model"] == "credit_risk_model:v2"


def _answered_within(server: Server, seconds: float) -> Any:
    """An answer, tried again while connections are refused: not forever."""
    end = time.monotonic() + seconds
    while True:
        try:
            status, answer, _ = server.call("/classify", EXAMPLE)
        except OSError:
            assert time.monotonic() < end, "no answer in time"
            continue
        assert status == 200
        return answer


@pytest.mark.parametrize("address", ["127.0.0.1", "10.0.0.7", "::1"])
def test_forwarded_headers_are_ignored(server: Server, address: str) -> None:
    headers = {"X-Forwarded-For": address, "X-Forwarded-Proto": "https", "Forwarded": f"for={address}"}
    assert server.call("/classify", EXAMPLE, headers=headers)[0] == 200


def test_a_named_proxy_is_believed(tmp_path: Path, store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    store.promote(1)
    conf = changed_conf(tmp_path, workers=1, proxies=["127.0.0.1"])
    monkeypatch.setenv("CREDIT_RISK_CONF", str(conf))
    monkeypatch.setenv("FORWARDED_ALLOW_IPS", "")
    with serving() as server:
        assert server.call("/classify", EXAMPLE)[0] == 200
        assert server.call("/classify", EXAMPLE, headers={"X-Forwarded-For": "10.0.0.7"})[0] == 401
        assert server.call("/classify", EXAMPLE, headers={"X-Forwarded-For": "127.0.0.1, 10.0.0.7"})[0] == 401


@pytest.mark.parametrize("host", ["evil.example", "evil.example:3000", "localhost.evil.example", "127.0.0.1.evil"])
@pytest.mark.parametrize("path", ["/model", "/classify", "/metrics", "/docs.json", "/"])
def test_without_keys_another_host_name_is_refused(server: Server, host: str, path: str) -> None:
    body = EXAMPLE if path == "/classify" else None
    status, answer, _ = server.call(path, body, headers={"Host": host})
    assert status == 421
    assert "hosts in serve.yaml" in answer["error"]
    assert server.call("/livez", headers={"Host": host})[0] == 200


@pytest.mark.parametrize(
    ("hosts", "with_keys", "header", "accepted"),
    [
        (None, False, b"localhost:3000", True),
        (None, False, b"LOCALHOST", True),
        (None, False, b"127.0.0.1:3000", True),
        (None, False, b"127.1.2.3", True),
        (None, False, b"[::1]:3000", True),
        (None, False, b"[::1]", True),
        (None, False, b"", False),
        (None, False, b"10.0.0.7", False),
        (None, False, b"[::1", True),
        (None, True, b"anything.example", True),
        (("credit.example",), False, b"credit.example:8080", True),
        (("credit.example",), False, b"localhost", False),
        (("Credit.Example",), True, b"credit.example", True),
        (("credit.example",), True, b"evil.example", False),
    ],
)
def test_which_hosts_are_accepted(hosts: Any, with_keys: bool, header: bytes, accepted: bool) -> None:
    check = HostCheck(hosts, with_keys=with_keys)
    if accepted:
        check.check({b"host": header})
        return
    with pytest.raises(Refusal) as caught:
        check.check({b"host": header})
    assert caught.value.status == 421


def test_uvicorn_still_has_what_the_guard_builds_on() -> None:
    overridden = ("connection_made", "data_received", "_should_upgrade")
    used = ("send_400_response", "_unset_keepalive_if_required", "on_headers_complete")
    assert all(name in vars(HttpToolsProtocol) for name in (*overridden, *used))
    assert issubclass(Connection, HttpToolsProtocol)


@pytest.mark.parametrize("path", ["/classify", "/classify_batch", "/nowhere"])
@pytest.mark.parametrize("connection", [b"keep-alive", b"close"])
def test_the_client_of_a_huge_body_reads_its_refusal(server: Server, path: str, connection: bytes) -> None:
    size = 50 << 20
    with server.connection() as client:
        client.sendall(head(b"Connection: %b\r\n" % connection, size, path.encode()))
        for _ in range(50):
            client.sendall(b" " * (1 << 20))
        answer = receive(client)
        assert answer.split(b" ")[1] == (b"404" if path == "/nowhere" else b"413")
        if connection == b"keep-alive":
            client.sendall(head() + BODY)
            assert receive(client).startswith(b"HTTP/1.1 200 ")


def test_a_client_that_waits_to_be_told_sends_no_refused_body(server: Server) -> None:
    with server.connection() as client:
        client.sendall(head(b"Expect: 100-continue\r\n", 50 << 20))
        assert receive(client).startswith(b"HTTP/1.1 413 ")
