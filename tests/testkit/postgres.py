"""A PostgreSQL server of the tests' own, on the loopback interface."""

from __future__ import annotations

import os
import pwd
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.testkit.servers import free_port

_LIMIT = 60.0
"""Seconds within which the server must answer."""


@contextmanager
def postgres() -> Iterator[str]:
    """Run a server with an empty database; yields its SQLAlchemy address. Skips the test where there is none."""
    pytest.importorskip("psycopg", reason="psycopg is not installed: pip install 'psycopg[binary]'")
    programs, user, port = _programs(), _unprivileged(), free_port()
    # Not in pytest's folder, which pytest closes to all other users whenever it starts.
    with tempfile.TemporaryDirectory(prefix="postgres-", ignore_cleanup_errors=True) as folder:
        data, log = f"{folder}/data", Path(folder, "log")
        if os.getuid() == 0:
            shutil.chown(folder, "postgres")
        make = [f"{programs}/initdb", "-D", data, "-U", "tests", "--auth=trust", "--no-sync", "--locale=C.UTF-8"]
        subprocess.run([*user, *make], check=True, capture_output=True, cwd="/")
        options = {"listen_addresses": "127.0.0.1", "unix_socket_directories": "", "fsync": "off", "port": port}
        settings = [part for name, value in options.items() for part in ("-c", f"{name}={value}")]
        # Ends with the tests, whatever ends them.
        serve = [*user, "--pdeathsig=INT", f"{programs}/postgres", "-D", data, *settings]
        with log.open("wb") as output:
            server = subprocess.Popen(serve, cwd="/", stdout=output, stderr=subprocess.STDOUT)
        try:
            _wait_until_it_answers(programs, port, server, log)
            yield f"postgresql+psycopg://tests@127.0.0.1:{port}/postgres"
        finally:
            server.send_signal(signal.SIGINT)  # at once, whoever is still connected
            server.wait(30)


class WaitingConnections:
    """Connections that wait for the lock of `no_heartbeats`."""

    def __init__(self, connection: Any) -> None:
        self._connection = connection

    @property
    def count(self) -> int:
        """How many there are now."""
        query = "SELECT count(DISTINCT pid) FROM pg_locks WHERE NOT granted"
        return int(self._connection.execute(query).fetchone()[0])


@contextmanager
def no_heartbeats(database: str) -> Iterator[WaitingConnections]:
    """Let nobody record a heartbeat: whoever has asked for a trial stops there until the block ends."""
    import optuna
    import psycopg  # type: ignore[import-not-found, unused-ignore]

    optuna.storages.RDBStorage(database)  # makes the tables
    with psycopg.connect(database.replace("+psycopg", "")) as connection:
        connection.execute("LOCK TABLE trial_heartbeats IN EXCLUSIVE MODE")
        yield WaitingConnections(connection)


def _programs() -> Path:
    """Folder of PostgreSQL's programs; Debian keeps them off PATH."""
    on_path = shutil.which("pg_ctl")
    found = [*([Path(on_path)] if on_path else []), *sorted(Path("/usr/lib/postgresql").glob("*/bin/pg_ctl"))]
    if not found or not shutil.which("setpriv"):
        pytest.skip("no PostgreSQL server here: apt-get install postgresql")
    return found[-1].resolve().parent


def _unprivileged() -> list[str]:
    """PostgreSQL refuses to run as root."""
    if os.getuid() != 0:
        return ["setpriv"]
    user = pwd.getpwnam("postgres")
    return ["setpriv", f"--reuid={user.pw_uid}", f"--regid={user.pw_gid}", "--clear-groups"]


def _wait_until_it_answers(programs: Path, port: int, server: subprocess.Popen[bytes], log: Path) -> None:
    ready = [f"{programs}/pg_isready", "-h", "127.0.0.1", "-p", str(port), "-t", "1"]
    for _ in range(int(_LIMIT / 0.1)):
        if subprocess.run(ready, capture_output=True, check=False).returncode == 0:
            return
        try:
            server.wait(0.1)
        except subprocess.TimeoutExpired:
            continue
        break
    raise AssertionError(f"PostgreSQL did not start:\n{log.read_text()}")
