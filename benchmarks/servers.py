"""Commands of servers in, running and answering servers out, each stopped by its own process group."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from time import monotonic, sleep

import httpx
import psutil

PROJECT = Path(__file__).resolve().parent.parent
BINARIES = Path(sys.executable).parent
START_LIMIT = 120.0
"""Seconds that a server may take to become ready; `mlflow models serve` imports for long on a busy machine."""


@dataclass(frozen=True)
class Service:
    """How to start one server, and how to ask it for a decision.

    Attributes
    ----------
    name
        As it stands in tables and figures.
    command
        ``{port}`` is replaced by a free port.
    body
        One request; its answer must have status 200.
    path, ready
        Where decisions are asked for, and where readiness.
    environment
        Laid over this process's.
    """

    name: str
    command: tuple[str, ...]
    body: bytes = b""
    path: str = "/classify"
    ready: str = "/readyz"
    environment: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Server:
    """A running server.

    Attributes
    ----------
    seconds_to_ready
        From the start of its process to the first answer 200 of its readiness.
    """

    service: Service
    port: int
    process: subprocess.Popen[bytes]
    seconds_to_ready: float

    @property
    def address(self) -> str:
        """Root of its addresses."""
        return f"http://127.0.0.1:{self.port}"

    def resident_bytes(self) -> int:
        """Resident memory of the server's processes, all workers included; shared pages count in each."""
        total = 0
        for process in _family(self.process.pid):
            try:
                total += process.memory_info().rss
            except psutil.NoSuchProcess:
                continue
        return total


@contextmanager
def running(service: Service) -> Iterator[Server]:
    """Start a server in the project's folder, wait until it is ready, and stop it on the way out.

    Raises
    ------
    RuntimeError
        It ended or did not become ready; the message holds the end of its output.
    """
    port = free_port()
    command = [part.replace("{port}", str(port)) for part in service.command]
    environment = {**os.environ, "BENTOML_DO_NOT_TRACK": "true", **service.environment}
    environment["PATH"] = f"{BINARIES}{os.pathsep}{environment['PATH']}"
    with tempfile.TemporaryFile() as output:
        began = monotonic()
        process = subprocess.Popen(
            command, cwd=PROJECT, env=environment, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            if not _becomes_ready(process, f"http://127.0.0.1:{port}{service.ready}"):
                output.seek(0)
                raise RuntimeError(f"{service.name}: not ready; {output.read()[-3000:].decode(errors='replace')}")
            yield Server(service, port, process, monotonic() - began)
        finally:
            _stop(process)


_CLUSTER = """
import sys
from distributed import Client, LocalCluster
def work_before():
    import sklearn.model_selection, xgboost
with LocalCluster(
    n_workers={workers}, threads_per_worker=1, host="127.0.0.1", dashboard_address=None, memory_limit=0
) as cluster:
    with Client(cluster) as client:
        client.run(work_before)
    print(cluster.scheduler_address, flush=True)
    sys.stdin.read()
"""


@contextmanager
def dask_cluster(workers: int) -> Iterator[str]:
    """Run a Dask cluster of processes with one thread each, and yield its scheduler's address.

    They have imported XGBoost, like those of a cluster that has worked before.

    It stands in processes of its own, as users start it elsewhere: in this one it would import the code that it is
    sent, in the place of the code that runs here.
    """
    command = [sys.executable, "-c", _CLUSTER.format(workers=workers)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd="/") as process:
        assert process.stdin is not None
        assert process.stdout is not None
        yield process.stdout.readline().strip()
        process.stdin.close()


def free_port() -> int:
    """Find a port on the loopback interface that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _becomes_ready(process: subprocess.Popen[bytes], address: str) -> bool:
    end = monotonic() + START_LIMIT
    with httpx.Client(timeout=5) as client:
        while process.poll() is None and monotonic() < end:
            with suppress(httpx.HTTPError):
                if client.get(address).status_code == httpx.codes.OK:
                    return True
            sleep(0.02)
    return False


def _stop(process: subprocess.Popen[bytes]) -> None:
    process.send_signal(signal.SIGTERM)
    with suppress(subprocess.TimeoutExpired):
        process.wait(timeout=15)
    # Some of the peers leave children behind; the group is ours alone.
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _family(pid: int) -> list[psutil.Process]:
    try:
        parent = psutil.Process(pid)
        return [parent, *parent.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []
