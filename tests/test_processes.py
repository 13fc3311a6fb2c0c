"""The processes of ``bentoml serve`` when some of them are killed."""

from __future__ import annotations

import functools
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import click
import httpx
import psutil
import pytest

from pipeline.core.contract.schema import Schema
from pipeline.monitoring.log_reader import read_decisions
from service import processes
from tests.test_metrics import figures
from tests.testkit import PROJECT
from tests.testkit.projects import changed_conf
from tests.testkit.servers import free_port
from tests.testkit.store import Store, serving
from tests.testkit.waiting import eventually

WORKER = "_bentoml_impl.worker.service"


def workers(main: int) -> set[psutil.Process]:
    """The processes below one that answer or score."""
    found = set()
    for process in psutil.Process(main).children(recursive=True):
        with suppress(psutil.NoSuchProcess):
            if WORKER in process.cmdline():
                found.add(process)
    return found


@pytest.mark.parametrize("service", ["service:svc", "service:front"])
def test_workers_end_with_their_supervisor_and_record_what_they_decided(
    store: Store, tmp_path: Path, schema: Schema, monkeypatch: pytest.MonkeyPatch, service: str
) -> None:
    store.promote(1)
    conf = changed_conf(tmp_path, workers=2, decision_log__flush_seconds=600)
    monkeypatch.setenv("CREDIT_RISK_CONF", str(conf))
    url = f"http://127.0.0.1:{(port := free_port())}"
    # Not by the test kit, which would end the orphans itself.
    command = [sys.executable, "-m", "bentoml", "serve", service, "--port", str(port)]
    with subprocess.Popen(command, cwd=PROJECT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as main:
        try:
            eventually(lambda: is_ready(url))
            orphans = workers(main.pid)
            assert len(orphans) == 2
            assert httpx.post(f"{url}/classify", json=schema.example()).status_code == 200
        finally:
            everyone = workers(main.pid)
            main.kill()
        _, alive = psutil.wait_procs(everyone, timeout=60)
        for process in alive:
            process.kill()
    assert not alive
    decided = read_decisions(conf.parent / "decisions").frame
    assert len(decided) == 1  # written at the end, as nothing else makes it so


def is_ready(url: str) -> bool:
    """Whether a service answers."""
    with suppress(httpx.TransportError):
        return httpx.get(f"{url}/readyz", timeout=5).status_code == 200
    return False


def test_after_all_workers_were_killed_the_promoted_version_answers_again(
    store: Store, tmp_path: Path, schema: Schema, monkeypatch: pytest.MonkeyPatch
) -> None:
    store.promote(1)
    monkeypatch.setenv("CREDIT_RISK_CONF", str(changed_conf(tmp_path, workers=2)))
    with serving() as server:
        assert server.call("/classify", schema.example())[1]["model"] == "credit_risk_model:v1"
        dead, died = workers(server.process.pid), time.time()
        for process in dead:
            process.kill()
        store.promote(2)
        eventually(lambda: len(workers(server.process.pid) - dead) >= len(dead))
        # They are looked for every second; the rest is room for a busy machine. Then comes what a start takes.
        assert max(process.create_time() for process in workers(server.process.pid) - dead) - died < 5
        assert server.call("/classify", schema.example())[1]["model"] == "credit_risk_model:v2"
        exposed = server.call("/metrics")[1].encode()
        shown = figures(exposed, "model_info")
        assert set(shown.values()) == {1}
        assert ["credit_risk_model:v2" in labels for labels in shown] == [True]
        assert figures(exposed, "model_behind") == {"": 0}
        counted = figures(exposed, "decisions_total").items()  # that of the dead, too
        assert {labels.partition(" ")[0]: value for labels, value in counted} == {
            "credit_risk_model:v1": 1, "credit_risk_model:v2": 1
        }  # fmt: skip
        assert "Traceback" not in server.log


def test_stopping_waits_for_a_request_without_a_word_of_trouble(
    store: Store, tmp_path: Path, schema: Schema, monkeypatch: pytest.MonkeyPatch
) -> None:
    store.promote(1)
    monkeypatch.setenv("CREDIT_RISK_CONF", str(changed_conf(tmp_path, workers=1, limits__body_seconds=4)))
    with serving() as server:
        with server.connection() as connection:
            headers = b"host: localhost\r\ncontent-type: application/json\r\ncontent-length: 9\r\n"
            connection.sendall(b"POST /classify HTTP/1.1\r\n%b\r\n{" % headers)
            assert server.call("/classify", schema.example())[0] == 200  # by then the other has arrived, too
            assert server.stop() == 0
            assert b" 408 " in connection.recv(65536)
        assert "Traceback" not in server.log
        assert "Conflict" not in server.log


def run_worker(supervisor: int | None) -> subprocess.CompletedProcess[str]:
    """Start what a worker does first, as a child of this process."""
    environment = {name: value for name, value in os.environ.items() if name != processes.SUPERVISOR}
    if supervisor is not None:
        environment[processes.SUPERVISOR] = str(supervisor)
    script = "from service.processes import end_with_supervisor; end_with_supervisor(); print('works')"
    command = [sys.executable, "-c", script]
    return subprocess.run(command, cwd=PROJECT, env=environment, capture_output=True, text=True, check=False)


def test_a_worker_whose_supervisor_was_killed_before_it_began_ends() -> None:
    with subprocess.Popen([sys.executable, "-c", ""]) as gone:
        gone.wait()
    assert run_worker(gone.pid).returncode == -signal.SIGTERM
    assert run_worker(os.getpid()).stdout == "works\n"
    assert run_worker(None).stdout == "works\n"  # not started by `bentoml serve`


def test_only_bentoml_serve_supervises(monkeypatch: pytest.MonkeyPatch) -> None:
    from bentoml._internal.utils import circus

    monkeypatch.delenv(processes.SUPERVISOR, raising=False)
    monkeypatch.setattr(circus, "create_standalone_arbiter", circus.create_standalone_arbiter)
    for command in ("build", "serve", "serve"):
        with click.Context(click.Command(command)):
            processes.supervise()
        assert os.environ.get(processes.SUPERVISOR) == (str(os.getpid()) if command == "serve" else None)
        monkeypatch.setenv(processes.SUPERVISOR, "1") if command == "serve" else None
    starter = circus.create_standalone_arbiter
    assert isinstance(starter, functools.partial)
    arbiter = starter([])
    assert arbiter.check_delay == 1
    assert arbiter.ctrl is not None
    assert arbiter.ctrl.check_delay == 1000  # milliseconds
    arbiter.ctrl.sys_hdl.stop()  # circus has taken this process's signals
