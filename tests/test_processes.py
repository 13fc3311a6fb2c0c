"""The processes of ``bentoml serve`` when some of them are killed."""

from __future__ import annotations

import functools
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import click
import psutil
import pytest

from pipeline.core.contract.schema import Schema
from pipeline.monitoring.log_reader import read_decisions
from service import processes
from tests.serving import PROJECT, Server, Store, changed_conf, serving
from tests.test_metrics import figures

WORKER = "_bentoml_impl.worker.service"


def workers(server: Server) -> set[psutil.Process]:
    """The processes that answer or score."""
    found = set()
    for process in psutil.Process(server.process.pid).children(recursive=True):
        try:
            if WORKER in process.cmdline():
                found.add(process)
        except psutil.NoSuchProcess:
            continue
    return found


@pytest.mark.parametrize("service", ["service:svc", "service:front"])
def test_workers_end_with_their_supervisor_and_record_what_they_decided(
    store: Store, tmp_path: Path, schema: Schema, monkeypatch: pytest.MonkeyPatch, service: str
) -> None:
    store.promote(1)
    conf = changed_conf(tmp_path, workers=2, decision_log__flush_seconds=600)
    monkeypatch.setenv("CREDIT_RISK_CONF", str(conf))
    with serving(tmp_path, arguments=[service]) as server:
        assert server.call("/classify", schema.example())[0] == 200
        orphans = workers(server)
        assert len(orphans) == 2
        server.process.kill()
        server.process.wait()
        _, alive = psutil.wait_procs(orphans, timeout=60)
        for process in alive:
            process.kill()
    assert not alive
    assert len(read_decisions(server.decisions).frame) == 1  # written at the end, as nothing else makes it so


def test_after_all_workers_were_killed_the_promoted_version_answers_again(
    store: Store, tmp_path: Path, schema: Schema, monkeypatch: pytest.MonkeyPatch
) -> None:
    store.promote(1)
    monkeypatch.setenv("CREDIT_RISK_CONF", str(changed_conf(tmp_path, workers=2)))
    with serving(tmp_path) as server:
        assert server.call("/classify", schema.example())[1]["model"] == "credit_risk_model:v1"
        dead, died = workers(server), time.time()
        for process in dead:
            process.kill()
        store.promote(2)
        deadline = time.monotonic() + 30
        while len(workers(server) - dead) < len(dead):  # a started process is no event that could be awaited
            assert time.monotonic() < deadline, server.log
            time.sleep(0.05)
        # They are looked for every second; the rest is room for a busy machine. Then comes what a start takes.
        assert max(process.create_time() for process in workers(server) - dead) - died < 5
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
    with serving(tmp_path) as server:
        with server.connection() as connection:
            headers = b"host: x\r\ncontent-type: application/json\r\ncontent-length: 9\r\n"
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
