from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import bentoml
import pytest
from scipy.special import expit

from benchmarks.endurance import Switch, stale_answers
from benchmarks.load import await_answers, request, run_load, under_load
from benchmarks.rounds import failed_requests
from pipeline.core.contract.schema import Schema
from pipeline.core.errors import DataError
from pipeline.monitoring.log_reader import read_decisions
from service.answering.core import Core
from tests.testkit import PROJECT
from tests.testkit.projects import changed_conf
from tests.testkit.servers import Server, receive
from tests.testkit.store import Store, serving
from tests.testkit.waiting import eventually

EXAMPLE = Schema.load(PROJECT / "conf/schema.yaml").example()
BODY = json.dumps(EXAMPLE).encode()


def test_an_application_is_decided_on(server: Server) -> None:
    status, answer, headers = server.call("/classify", EXAMPLE)
    assert status == 200
    assert list(answer) == ["Status", "probability", "model", "request_id"]
    assert answer["Status"] in {"APPROVED", "MAYBE", "DECLINED"}
    assert answer["model"] == "credit_risk_model:v1"
    assert headers["content-type"] == "application/json"


def test_every_row_gets_what_the_model_says(server: Server, core: Core, rows: list[dict[str, Any]]) -> None:
    version = core.version()
    assert version is not None
    expected = version.model.decide(version.model.encode(rows)).probabilities
    _, batch, _ = server.call("/classify_batch", rows)
    assert [answer["probability"] for answer in batch] == expected  # to the last bit
    singles = run_load(
        server.port,
        [
            request("/classify", json.dumps(row).encode(), {"X-Request-ID": str(i)})
            for i, row in enumerate(rows[:500])
        ],
        count=500,
        keep=True,
    )
    answers = [json.loads(body) for *_, body in singles.answers]
    found = {int(answer["request_id"]): answer["probability"] for answer in answers}
    assert [found[number] for number in range(500)] == expected[:500]


def test_a_batch_answers_each_row_like_a_single_application(server: Server, rows: list[dict[str, Any]]) -> None:
    status, batch, headers = server.call("/classify_batch", rows[:40], headers={"X-Request-ID": "batch-1"})
    assert status == 200
    assert headers["x-request-id"] == "batch-1"
    for row, answer in zip(rows[:40], batch, strict=True):
        _, single, _ = server.call("/classify", row, headers={"X-Request-ID": "batch-1"})
        assert answer == single
    assert server.call("/classify_batch", [])[1] == []


def test_an_explanation_adds_up(server: Server, rows: list[dict[str, Any]]) -> None:
    for row in rows[:20]:
        _, answer, _ = server.call("/explain", row)
        total = answer["bias"] + sum(answer["contributions"].values())
        assert total == pytest.approx(answer["log_odds"], abs=1e-5)
        assert expit(total) == pytest.approx(answer["probability"], abs=1e-5)
        pushed = {name for name, push in answer["contributions"].items() if push > 0}
        assert {reason["field"] for reason in answer["reasons"]} <= pushed


def test_in_process_callers_get_the_answers_of_http(
    server: Server, store: Store, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, rows: list[dict[str, Any]]
) -> None:
    store.promote(1)
    script = f"""
import asyncio, json
from service.app import svc
rows = json.loads({json.dumps(json.dumps(rows[:3]))})
instance = svc()
async def main():
    single = [await instance.classify(row) for row in rows]
    batch = await instance.classify_batch(rows)
    explained = [await instance.explain(row) for row in rows]
    try:
        await instance.classify({{**rows[0], "age": "30"}})
    except Exception as error:
        refused = [int(error.error_code), json.loads(str(error))]
    print(json.dumps([single, batch, explained, refused]))
asyncio.run(main())
"""
    monkeypatch.setenv("CREDIT_RISK_CONF", str(changed_conf(tmp_path)))
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=PROJECT, capture_output=True, text=True, check=True, timeout=120
    )
    single, batch, explained, refused = json.loads(done.stdout.splitlines()[-1])
    assert without_ids(single) == without_ids(server.call("/classify", row)[1] for row in rows[:3])
    assert without_ids(batch) == without_ids(server.call("/classify_batch", rows[:3])[1])
    assert without_ids(explained) == without_ids(server.call("/explain", row)[1] for row in rows[:3])
    assert refused == list(server.call("/classify", {**rows[0], "age": "30"})[:2])


def without_ids(answers: Any) -> list[dict[str, Any]]:
    return [{name: value for name, value in answer.items() if name != "request_id"} for answer in answers]


def test_bentomls_own_client_works(server: Server) -> None:
    with bentoml.SyncHTTPClient(server.url) as client:
        assert client.classify(EXAMPLE)["Status"] == server.call("/classify", EXAMPLE)[1]["Status"]
        assert len(client.classify_batch([EXAMPLE, EXAMPLE])) == 2


def test_the_documents_are_true(server: Server) -> None:
    _, document, _ = server.call("/docs.json")
    application = document["components"]["schemas"]["Application"]
    assert application["additionalProperties"] is False
    assert set(application["properties"]) == set(EXAMPLE)
    assert all(field["description"] and "example" in field for field in application["properties"].values())
    for path in ("/classify", "/classify_batch", "/explain"):
        operation = document["paths"][path]["post"]
        assert set(operation["responses"]) == {"200", "400", "401", "408", "413", "415", "421", "503"}
        content = operation["requestBody"]["content"]["application/json"]
        assert server.call(path, content["example"])[0] == 200  # what the page sends
    assert set(document["paths"]["/model"]) == {"get"}


def test_the_page_loads_nothing_from_elsewhere(server: Server) -> None:
    status, page, headers = server.call("/")
    assert status == 200
    assert headers["content-type"].startswith("text/html")
    assert headers["content-security-policy"].startswith("default-src 'none'; script-src 'sha256-")
    assert not re.search(r"(src|href|action)=[\"'](?!/docs.json)|url\(|@import|https?://(?!localhost)", page)
    for path in ("/static_content/swagger-ui.css", "/static_content/index.css", "/static_content/"):
        assert server.call(path)[0] == 404


def test_the_model_is_shown(server: Server) -> None:
    _, shown, _ = server.call("/model")
    assert shown["promoted"] == shown["loaded"]
    assert shown["loaded"]["tag"] == "credit_risk_model:v1"
    assert shown["refused"] is None
    assert "by" not in shown["promoted"]


def metrics_of(server: Server) -> dict[str, float]:
    _, text, _ = server.call("/metrics")
    lines = [line.rpartition(" ") for line in text.splitlines() if line and not line.startswith("#")]
    return {name: float(value) for name, _, value in lines}


def test_metrics_count_what_was_answered(server: Server, rows: list[dict[str, Any]]) -> None:
    before = metrics_of(server)
    answers = server.call("/classify_batch", rows[:1000])[1]
    server.call("/classify", EXAMPLE)
    server.call("/classify", {})
    server.call("/nowhere/at/all")
    after = metrics_of(server)

    def rise(name: str) -> float:
        return after.get(name, 0) - before.get(name, 0)

    assert rise('credit_risk_requests_total{code="200",endpoint="/classify_batch"}') == 1
    assert rise('credit_risk_requests_total{code="400",endpoint="/classify"}') == 1
    assert rise('credit_risk_requests_total{code="404",endpoint="other"}') == 1
    assert rise("credit_risk_probability_count") == 1001
    approved = sum(answer["Status"] == "APPROVED" for answer in answers)
    counted = rise('credit_risk_decisions_total{model="credit_risk_model:v1",status="APPROVED"}')
    assert counted in (approved, approved + 1)
    low = sum(answer["probability"] <= 0.1 for answer in answers)
    assert rise('credit_risk_probability_bucket{le="0.1"}') in (low, low + 1)
    assert after["credit_risk_promoted_seconds"] > 0
    info = [name for name, value in after.items() if name.startswith("credit_risk_model_info") and value == 1]
    assert len(info) == 1
    assert 'model="credit_risk_model:v1"' in info[0]
    assert not any("nowhere" in name for name in after)


@pytest.mark.parametrize("on", [True, False])
def test_bentomls_middlewares_are_in_the_path_only_if_they_are_on(
    on: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    conf = changed_conf(
        tmp_path, bentoml__tracing=on, bentoml__timeout_seconds=5 if on else None, bentoml__access_log=on
    )
    script = "from service import svc; print(*(one.cls.__name__ for one in svc.to_asgi().user_middleware))"
    monkeypatch.setenv("CREDIT_RISK_CONF", str(conf))
    monkeypatch.setenv("BENTOML_HOME", str(tmp_path / "bentoml"))
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, cwd=PROJECT, capture_output=True, text=True, check=True, timeout=120)
    removable = ["OpenTelemetryMiddleware", "AccessLogMiddleware", "TimeoutMiddleware"]
    assert done.stdout.split() == [*(removable if on else []), "fast_path", "ContextMiddleware"]


def test_bentomls_probes_and_metrics_format(server: Server) -> None:
    assert [server.call(path)[0] for path in ("/livez", "/readyz", "/healthz", "/schema.json")] == [200] * 4
    status, text, headers = server.call("/metrics")
    assert status == 200
    assert headers["content-type"].startswith("text/plain; version=0.0.4")
    assert "# TYPE credit_risk_probability histogram" in text


def test_every_decision_is_recorded(server: Server, rows: list[dict[str, Any]]) -> None:
    answers = server.call("/classify_batch", rows[:30], headers={"X-Request-ID": "recorded-batch"})[1]
    single = server.call("/classify", rows[0], headers={"X-Request-ID": "recorded-single"})[1]
    decisions = Path(server.service.environment["CREDIT_RISK_CONF"]).parent / "decisions"
    recorded = wait_for(lambda: _recorded(decisions, "recorded-batch", "recorded-single"), 31)
    batch = recorded[recorded["request_id"] == "recorded-batch"].sort_values("row")
    assert batch["probability"].tolist() == [answer["probability"] for answer in answers]
    assert batch["status"].tolist() == [answer["Status"] for answer in answers]
    line = recorded[recorded["request_id"] == "recorded-single"].iloc[0]
    assert line["probability"] == single["probability"]
    assert {name: line[f"input.{name}"] for name in ("age", "home")} == {
        name: rows[0][name] for name in ("age", "home")
    }


def _recorded(folder: Path, *ids: str) -> Any:
    try:
        frame = read_decisions(folder).frame
    except DataError:  # no file yet
        return []
    return frame[frame["request_id"].isin(ids)]


def wait_for(read: Any, rows: int) -> Any:
    """What `read` gives once it has so many rows: the log is written a moment after the answer."""
    eventually(lambda: len(read()) >= rows)
    found = read()
    assert len(found) == rows
    return found


@pytest.mark.parametrize(
    ("arguments", "environment"),
    [
        (["--port", "{port}"], {}),
        (["service:front", "--port", "{port}"], {}),
        ([], {"BENTOML_PORT": "{port}"}),
        ([], {"BENTOML_CONFIG_OPTIONS": "services.credit_risk_classifier.http.port={port}"}),
    ],
)
def test_a_port_in_use_is_reported_in_one_line_and_its_server_keeps_counting(
    server: Server, arguments: list[str], environment: dict[str, str]
) -> None:
    server.call("/classify", EXAMPLE)
    counted = {name: value for name, value in metrics_of(server).items() if "/classify" in name}
    second = subprocess.run(
        [sys.executable, "-m", "bentoml", "serve", *(text.format(port=server.port) for text in arguments)],
        env={**os.environ, **{name: text.format(port=server.port) for name, text in environment.items()}},
        cwd=PROJECT,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert second.returncode == 1
    (line,) = second.stderr.splitlines()
    assert f"cannot listen on 127.0.0.1:{server.port}: address already in use." in line
    assert "or pass --port" in line
    assert counted.items() <= metrics_of(server).items()


@pytest.fixture
def environment(store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Store:
    """A store and configuration of the test's own for a server of its own."""
    monkeypatch.setenv("CREDIT_RISK_CONF", str(changed_conf(tmp_path, workers=2)))
    return store


def test_without_a_promotion_it_starts_and_says_what_to_run(environment: Store, tmp_path: Path) -> None:
    with serving(ready="/livez") as server:
        assert server.call("/readyz")[0] == 503
        status, answer, headers = server.call("/classify", EXAMPLE)
        assert (status, headers["retry-after"]) == (503, "1")
        assert "python -m pipeline promote" in answer["error"]
        assert server.call("/model")[1]["promoted"] is None
        assert server.call("/docs.json")[0] == 200
        environment.promote(2)
        assert server.call("/classify", EXAMPLE)[1]["model"] == "credit_risk_model:v2"
        assert server.call("/readyz")[0] == 200


def test_promotions_under_load_are_never_stale_and_fail_nobody(environment: Store, tmp_path: Path) -> None:
    environment.promote(1)
    switches = []
    with serving() as server, under_load(server.port, [request("/classify", BODY)]) as result:
        for version in (2, 1, 2, 1, 2, 1):
            await_answers(result)
            began = time.monotonic()
            promotion = environment.promote(version)
            switches.append(Switch("promote", promotion.tag, began, time.monotonic()))
        await_answers(result)
    assert failed_requests(result) == 0
    assert stale_answers(result, switches) == 0
    assert {json.loads(body)["model"] for *_, body in result.answers} == {
        "credit_risk_model:v1",
        "credit_risk_model:v2",
    }


def test_kept_connections_spread_over_the_workers(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store.promote(1)
    conf = changed_conf(tmp_path, workers=2, requests_per_connection=20)
    monkeypatch.setenv("CREDIT_RISK_CONF", str(conf))
    with serving() as server:
        result = run_load(server.port, [request("/classify", BODY)], count=6000, seconds=60)
    assert dict(result.statuses) == {200: 6000}
    assert result.failures == 0
    decided = [len(path.read_bytes().splitlines()) for path in (tmp_path / "decisions").glob("*.jsonl")]
    assert sum(decided) == 6000
    assert min(decided) > 600  # whichever worker accepted all connections at first


def test_a_lone_worker_keeps_its_connections(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store.promote(1)
    conf = changed_conf(tmp_path, workers=1, requests_per_connection=1)
    monkeypatch.setenv("CREDIT_RISK_CONF", str(conf))
    with serving() as server, server.connection() as connection:
        for _ in range(50):
            connection.sendall(request("/classify", BODY))
            assert b"connection: close" not in receive(connection).lower()


def test_sigterm_finishes_what_is_under_way(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rows: list[dict[str, Any]]
) -> None:
    store.promote(1)
    monkeypatch.setenv("CREDIT_RISK_CONF", str(changed_conf(tmp_path, workers=1)))
    data = request("/classify_batch", json.dumps((rows * 3)[:10_000]).encode())
    with serving() as server, server.connection() as idle, server.connection() as busy:
        idle.sendall(request("/livez", method="GET"))
        assert receive(idle).startswith(b"HTTP/1.1 200")
        busy.sendall(data[:-1])
        server.process.send_signal(signal.SIGTERM)
        assert idle.recv(65536) == b""  # closed: the worker is on its way out
        busy.sendall(data[-1:])
        answer = receive(busy)
        assert answer.startswith(b"HTTP/1.1 200")
        assert len(json.loads(answer.partition(b"\r\n\r\n")[2])) == 10_000
        assert server.process.wait(30) == 0
    assert len(read_decisions(tmp_path / "decisions").frame) == 10_000  # recorded to the last


def test_a_trace_is_honoured_when_tracing_is_on(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store.promote(1)
    conf = changed_conf(tmp_path, workers=1, bentoml__tracing=True, bentoml__access_log=True, reasons=True)
    monkeypatch.setenv("CREDIT_RISK_CONF", str(conf))
    trace = "0af7651916cd43dd8448eb211c80319c"
    with serving() as server:
        headers = {"traceparent": f"00-{trace}-b7ad6b7169203331-01", "X-Request-ID": "traced"}
        status, answer, _ = server.call("/classify", EXAMPLE, headers=headers)
        assert status == 200
        assert answer["reasons"]
        recorded = wait_for(lambda: _recorded(tmp_path / "decisions", "traced"), 1).iloc[0]
        assert recorded["trace_id"] == trace
        assert list(recorded["reasons"]) == answer["reasons"]
        assert "/classify" in server.log  # the access log
