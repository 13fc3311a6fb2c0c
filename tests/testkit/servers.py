"""Start a command that serves HTTP, wait until it is ready, and end it with every process that it started."""

from __future__ import annotations

import json
import os
import resource
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.client import HTTPException
from pathlib import Path
from time import monotonic
from typing import IO, Any
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import psutil

from tests.testkit import PROJECT
from tests.testkit.waiting import eventually

LAUNCHER = Path(__file__).with_name("launcher.py")
START_LIMIT = 120.0
"""Seconds that a server may take to become ready; `mlflow models serve` imports for long on a busy machine."""
STOP_LIMIT = 60.0


class Process(subprocess.Popen[Any]):
    """A command whose processes all end when it does, and when this process does: see `tests.testkit.launcher`."""

    def __init__(self, command: Sequence[str | Path], **options: Any) -> None:
        launcher: list[str | Path] = [sys.executable, "-I", "-S", LAUNCHER, str(os.getpid())]
        super().__init__([*launcher, *command], start_new_session=True, **options)

    def send_signal(self, number: int) -> None:
        """Signal the command itself: its launcher follows it."""
        if self.poll() is not None:
            return
        with suppress(psutil.NoSuchProcess):
            children = eventually(lambda: psutil.Process(self.pid).children() or self.poll() is not None)
            if isinstance(children, list):
                # Orphans that the launcher has adopted are younger.
                min(children, key=psutil.Process.create_time).send_signal(number)

    def descendants(self) -> list[psutil.Process]:
        """The command's own process and all below it."""
        try:
            return psutil.Process(self.pid).children(recursive=True)
        except psutil.NoSuchProcess:
            return []


@dataclass(frozen=True)
class Service:
    """How to start one server, and how to ask it for a decision.

    Attributes
    ----------
    name
        As it stands in tables and figures.
    command
        ``{port}`` is replaced by the port.
    body
        One request; its answer must have status 200.
    path, ready
        Where decisions are asked for, and where readiness.
    environment
        All variables, not only those to be added.
    folder
        Where the command runs.
    """

    name: str
    command: Sequence[str | Path]
    body: bytes = b""
    path: str = "/classify"
    ready: str = "/readyz"
    environment: Mapping[str, str] = field(default_factory=lambda: dict(os.environ))
    folder: Path = PROJECT


@dataclass
class Server:
    """A running server.

    Attributes
    ----------
    seconds_to_ready
        From the start of its process to the first answer 200 of its readiness.
    """

    service: Service
    port: int
    process: Process
    output: IO[bytes]
    seconds_to_ready: float = float("nan")

    @property
    def url(self) -> str:
        """Root of its addresses."""
        return f"http://127.0.0.1:{self.port}"

    @property
    def log(self) -> str:
        """What it has written so far."""
        descriptor = self.output.fileno()
        # Not `read`: it would move the position at which the server writes.
        return os.pread(descriptor, os.fstat(descriptor).st_size, 0).decode(errors="replace")

    def resident_bytes(self) -> int:
        """Resident memory of the server's processes, all workers included; shared pages count in each."""
        total = 0
        for process in self.process.descendants():
            with suppress(psutil.NoSuchProcess):
                total += process.memory_info().rss
        return total

    def call(
        self,
        path: str,
        body: Any = None,
        *,
        raw: bytes | None = None,
        headers: Mapping[str, str] | None = None,
        method: str | None = None,
    ) -> tuple[int, Any, Mapping[str, str]]:
        """One request: status, decoded JSON (else text), headers in lower case."""
        data = raw if raw is not None else json.dumps(body).encode() if body is not None else None
        given = {"Content-Type": "application/json", **(headers or {})}
        request = Request(self.url + path, data=data, headers=given, method=method)
        try:
            with urlopen(request, timeout=30) as response:
                return response.status, _decoded(response.read()), _lower(response.headers)
        except HTTPError as error:
            with error:
                return error.code, _decoded(error.read()), _lower(error.headers)

    def connection(self) -> socket.socket:
        """A raw connection."""
        return socket.create_connection(("127.0.0.1", self.port), timeout=20)

    def stop(self) -> int:
        """Ask it to end as an orchestrator does, and wait."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        return self.process.wait(STOP_LIMIT)

    def kill(self) -> None:
        """End all its processes at once."""
        self.process.kill()
        self.process.wait()


@contextmanager
def running(service: Service, port: int | None = None) -> Iterator[Server]:
    """Start a server, wait until it is ready, and stop it when the block ends.

    Parameters
    ----------
    port
        Any free one if not given.

    Raises
    ------
    RuntimeError
        It ended or did not become ready; the message holds the end of its output.
    """
    port = port or free_port()
    command = [part.replace("{port}", str(port)) if isinstance(part, str) else part for part in service.command]
    with tempfile.TemporaryFile() as output:
        began = monotonic()
        process = Process(
            command, cwd=service.folder, env=service.environment, stdout=output, stderr=subprocess.STDOUT
        )
        server = Server(service, port, process, output)
        try:
            _await_ready(server)
            server.seconds_to_ready = monotonic() - began
            yield server
            server.stop()
        finally:
            server.kill()


@contextmanager
def few_files(count: int) -> Iterator[None]:
    """Let processes that are started within open so many files, as ``ulimit -n`` does."""
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (count, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


def alive(process: psutil.Process) -> bool:
    """Whether a process still runs; one that nobody has waited for yet does not."""
    with suppress(psutil.NoSuchProcess):
        return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
    return False


def free_port() -> int:
    """Find a port on the loopback interface that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def receive(connection: socket.socket) -> bytes:
    """One answer, or all that comes before the end."""
    received = b""
    while True:
        try:
            chunk = connection.recv(65536)
        except TimeoutError:
            return received
        received += chunk
        head, separator, body = received.partition(b"\r\n\r\n")
        length = next(
            (int(line[16:]) for line in head.lower().split(b"\r\n") if line[:15] == b"content-length:"), 0
        )
        if not chunk or (separator and len(body) >= length):
            return received


def _await_ready(server: Server) -> None:
    ready = False

    def decided() -> bool:
        nonlocal ready
        with suppress(OSError, HTTPException):
            ready = server.call(server.service.ready)[0] == 200
        return ready or server.process.poll() is not None

    with suppress(TimeoutError):
        eventually(decided, START_LIMIT)
    if not ready:
        raise RuntimeError(f"{server.service.name} did not become ready; it wrote:\n{server.log[-3000:]}")


def _decoded(body: bytes) -> Any:
    try:
        return json.loads(body)
    except ValueError:
        return body.decode(errors="replace")


def _lower(headers: Any) -> dict[str, str]:
    return {name.lower(): value for name, value in headers.items()}
