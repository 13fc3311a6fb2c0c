from __future__ import annotations

import asyncio
import json
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from benchmarks.load import request, run_load
from pipeline.core.contract.schema import Schema
from pipeline.core.promoted import Promotion
from service.answering.refusal import Refusal
from service.http.access import KEYS_VARIABLE, ApiKeyAuth
from service.http.request_ids import RequestIds
from tests.testkit.projects import changed_conf
from tests.testkit.servers import Server, receive
from tests.testkit.store import Store, serving

SCHEMA = Schema.load(Path(__file__).parent.parent / "conf/schema.yaml")
BODY = json.dumps(SCHEMA.example()).encode()
HEAD = b"POST /classify HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"


def send_raw(server: Server, data: bytes) -> bytes:
    """Send bytes as they are; everything that comes back until the server closes or falls silent."""
    with server.connection() as connection:
        connection.sendall(data)
        return receive(connection)


def assert_refused(found: tuple[int, Any, Any], status: int) -> None:
    code, answer, headers = found
    assert code == status, answer
    assert set(answer) == {"error", "detail"}
    assert headers["x-request-id"]


@pytest.mark.parametrize(
    "content_type", ["text/plain", "application/xml", "", "application/json; charset=latin-1", "application/jsonp"]
)
def test_only_json_is_taken(server: Server, content_type: str) -> None:
    assert_refused(server.call("/classify", raw=BODY, headers={"Content-Type": content_type}), 415)


@pytest.mark.parametrize(
    "content_type", ["application/json", "Application/JSON", "application/json; charset=utf-8"]
)
def test_json_is_taken_however_it_is_written(server: Server, content_type: str) -> None:
    assert server.call("/classify", raw=BODY, headers={"Content-Type": content_type})[0] == 200


def test_a_compressed_body_is_refused(server: Server) -> None:
    assert_refused(server.call("/classify", raw=BODY, headers={"Content-Encoding": "gzip"}), 415)


@pytest.mark.parametrize(
    ("path", "limit"), [("/classify", 65536), ("/explain", 65536), ("/classify_batch", 8388608)]
)
def test_a_body_beyond_the_limit_is_refused(server: Server, path: str, limit: int) -> None:
    assert_refused(server.call(path, raw=b" " * (limit + 1)), 413)
    assert server.call(path, raw=b" " * limit)[0] == 400


def test_a_body_without_a_declared_length_is_counted_as_it_arrives(server: Server) -> None:
    head = HEAD + b"Transfer-Encoding: chunked\r\n\r\n"
    chunk = b"1000\r\n" + b" " * 4096 + b"\r\n"
    assert b" 413 " in send_raw(server, head + chunk * 17).split(b"\r\n")[0]
    pieces = b"".join(b"%x\r\n%b\r\n" % (len(BODY[i : i + 7]), BODY[i : i + 7]) for i in range(0, len(BODY), 7))
    assert b" 200 " in send_raw(server, head + pieces + b"0\r\n\r\n").split(b"\r\n")[0]


def test_an_endless_declared_body_is_refused_before_it_is_sent(server: Server) -> None:
    head = HEAD + b"Content-Length: 99999999999\r\n\r\n"
    began = time.monotonic()
    assert b" 413 " in send_raw(server, head).split(b"\r\n")[0]
    assert time.monotonic() - began < 5


def test_a_client_that_stops_sending_is_told_and_closed(tmp_path: Path, store: Store, monkeypatch: Any) -> None:
    store.promote(1)
    monkeypatch.setenv("CREDIT_RISK_CONF", str(changed_conf(tmp_path, workers=1, limits__body_seconds=0.3)))
    head = HEAD + b"Content-Length: 300\r\n\r\n"
    with serving() as server:
        with server.connection() as connection:
            connection.sendall(head + b"{")
            answer = receive(connection)
            assert answer.startswith(b"HTTP/1.1 408 ")
            assert b"connection: close" in answer
            assert connection.recv(1) == b""
        assert server.call("/classify", raw=BODY)[0] == 200


def test_a_client_that_leaves_in_the_middle_harms_nobody(server: Server) -> None:
    head = HEAD + b"Content-Length: 300\r\n\r\n"
    for _ in range(20):
        with server.connection() as connection:
            connection.sendall(head + b"{")
    assert server.call("/classify", raw=BODY)[0] == 200
    assert "Traceback" not in server.log


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/classify", 405),
        ("PUT", "/classify", 405),
        ("DELETE", "/model", 405),
        ("GET", "/nowhere", 404),
        ("POST", "/nowhere", 404),
        ("GET", "/classify/", 404),
        ("GET", "/../etc/passwd", 404),
        ("GET", "/static_content/swagger-ui.css", 404),
        ("POST", "/", 405),
    ],
)
def test_other_paths_and_methods_are_refused_in_the_same_form(
    server: Server, method: str, path: str, status: int
) -> None:
    assert_refused(server.call(path, method=method), status)


@pytest.mark.parametrize(
    ("given", "taken"),
    [("abc-1.2_3:4", True), ("a" * 64, True), ("a" * 65, False), ('x"y', False), ("a b", False), ("", False)],
)
def test_a_fit_request_id_comes_back_and_another_is_replaced(server: Server, given: str, taken: bool) -> None:
    _, answer, headers = server.call("/classify", raw=BODY, headers={"X-Request-ID": given})
    assert answer["request_id"] == headers["x-request-id"]
    assert (answer["request_id"] == given) is taken
    assert answer["request_id"]


def test_new_request_ids_differ() -> None:
    ids = [RequestIds().choose({}) for _ in range(100)]
    same = RequestIds()
    ids += [same.choose({}) for _ in range(100)]
    assert len(set(ids)) == 200


KEYS = "old-key, new-key"


@pytest.fixture(scope="module")
def guarded(
    tmp_path_factory: pytest.TempPathFactory, filled_store: tuple[Path, dict[int, Promotion]]
) -> Iterator[Server]:
    """A running service that asks for a key; it binds to all interfaces."""
    folder = tmp_path_factory.mktemp("guarded")
    with pytest.MonkeyPatch.context() as patch:
        shutil.copytree(filled_store[0], folder / "bentoml")
        patch.setenv("BENTOML_HOME", str(folder / "bentoml"))
        patch.setenv("CREDIT_RISK_CONF", str(changed_conf(folder, workers=1)))
        Store(filled_store[1]).promote(1)
        with serving(environment={KEYS_VARIABLE: KEYS}) as running:
            yield running


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({}, 401),
        ({"Authorization": "Bearer wrong"}, 401),
        ({"Authorization": "Bearer "}, 401),
        ({"Authorization": "Bearer old-key, new-key"}, 401),
        ({"Authorization": "Basic old-key"}, 401),
        ({"X-API-Key": "wrong"}, 401),
        ({"Authorization": "Bearer old-key"}, 200),
        ({"Authorization": "bearer new-key"}, 200),
        ({"X-API-Key": "new-key"}, 200),
    ],
)
def test_a_key_is_required(guarded: Server, headers: dict[str, str], status: int) -> None:
    found = guarded.call("/classify", raw=BODY, headers=headers)
    assert found[0] == status
    if status == 401:
        assert_refused(found, 401)
        assert found[2]["www-authenticate"] == "Bearer"


@pytest.mark.parametrize("path", ["/model", "/metrics", "/docs.json", "/schema.json", "/nowhere"])
def test_all_but_the_probes_and_the_page_ask_for_a_key(guarded: Server, path: str) -> None:
    assert guarded.call(path)[0] == 401
    assert {guarded.call(open_path)[0] for open_path in ("/livez", "/readyz", "/")} == {200}


def test_no_key_is_ever_logged(guarded: Server) -> None:
    assert "new-key" not in guarded.log


@pytest.mark.parametrize(
    ("client", "admitted"),
    [
        (("127.0.0.1", 1), True),
        (("127.9.9.9", 1), True),
        (("::1", 1), True),
        (("::ffff:127.0.0.1", 1), True),
        (None, True),
        (("10.0.0.7", 1), False),
        (("::ffff:10.0.0.7", 1), False),
        (("testclient", 1), False),
    ],
)
def test_without_keys_only_this_machine_is_answered(client: Any, admitted: bool) -> None:
    auth = ApiKeyAuth(())
    if admitted:
        auth.check({"client": client}, {})
        return
    with pytest.raises(Refusal) as caught:
        auth.check({"client": client}, {})
    assert caught.value.status == 401


def test_without_keys_it_listens_on_this_machine_only(server: Server) -> None:
    assert f"http://127.0.0.1:{server.port}" in server.log
    assert "localhost" not in server.log  # what BentoML writes for all interfaces


def test_overload_is_answered_at_once(tmp_path: Path, store: Store, monkeypatch: Any) -> None:
    store.promote(1)
    monkeypatch.setenv("CREDIT_RISK_CONF", str(changed_conf(tmp_path, workers=1, limits__requests=4)))
    with serving() as server:
        result = run_load(server.port, [request("/classify", BODY)], connections=64, count=2000, keep=True)
        assert set(result.statuses) == {200, 503}
        assert result.failures == 0
        (refused, *_) = [body for _, _, status, body in result.answers if status == 503]
        assert "in progress" in json.loads(refused)["error"]
        assert server.call("/classify", raw=BODY)[0] == 200  # and nothing stays taken
        assert {server.call("/classify", raw=b"{}")[0] for _ in range(10)} == {400}
        assert server.call("/classify", raw=BODY)[0] == 200


def test_an_applicants_values_are_in_no_log(server: Server) -> None:
    canary = "canary-8d1f"
    number = 918273645.5
    example = SCHEMA.example()
    for field in SCHEMA.fields:
        for value in (canary, number, [canary], {canary: canary}, -number):
            assert server.call("/classify", {**example, field: value})[0] == 400
            assert server.call("/classify_batch", [example, {**example, field: value}])[0] == 400
            assert server.call("/explain", {**example, field: value})[0] == 400
    for raw in (canary.encode(), f'{{"{canary}": 1}}'.encode(), f'["{canary}'.encode()):
        assert server.call("/classify", raw=raw)[0] == 400
        assert server.call("/classify", raw=raw, headers={"X-Request-ID": f'"{canary}'})[0] == 400
    assert server.call("/" + canary)[0] == 404
    assert canary not in server.log
    assert "918273645" not in server.log


def test_pipelined_requests_are_answered_in_order(server: Server) -> None:
    ids = [f"p{number}" for number in range(20)]
    data = b"".join(request("/classify", BODY, {"X-Request-ID": name}) for name in ids)
    with server.connection() as connection:
        connection.sendall(data)
        received = b""
        while received.count(b'"request_id"') < 20:
            received += connection.recv(65536)
    positions = [received.index(f'"{name}"'.encode()) for name in ids]
    assert positions == sorted(positions)


def test_every_key_is_compared() -> None:
    async def refused(headers: dict[bytes, bytes]) -> bool:
        try:
            ApiKeyAuth(("one", "two", "three")).check({}, headers)
        except Refusal:
            return True
        return False

    found = {key: asyncio.run(refused({b"x-api-key": key})) for key in (b"one", b"two", b"three", b"four", b"")}
    assert found == {b"one": False, b"two": False, b"three": False, b"four": True, b"": True}
