"""Neither the commands nor the service tell anybody anything: the libraries' usage reports are off."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.testkit import PROJECT
from tests.testkit.projects import changed_conf
from tests.testkit.servers import free_port
from tests.testkit.store import Store, serving

RECORDER = """
import ipaddress, os, socket

def _note(what):
    with open(os.environ["CALLS_OUT"], "a") as file:
        file.write(f"{what}\\n")

def _is_far(host):
    try:
        return not ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host not in ("localhost", socket.gethostname())

_look_up, _connect = socket.getaddrinfo, socket.socket.connect

def getaddrinfo(host, *args, **kwargs):
    if isinstance(host, str) and _is_far(host) and host != "0.0.0.0":
        _note(host)
        raise socket.gaierror("no names here")
    return _look_up(host, *args, **kwargs)

def connect(self, address):
    if isinstance(address, tuple) and _is_far(address[0]):
        _note(address)
        raise OSError("no network here")
    return _connect(self, address)

socket.getaddrinfo, socket.socket.connect = getaddrinfo, connect
"""
"""A sitecustomize module: every Python process under test notes, and is refused, what it wants from elsewhere."""

HINTS = ("MLFLOW_", "BENTOML_", "DO_NOT_TRACK", "CI", "PYTEST_", "GITHUB_")


@pytest.fixture
def calls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where calls out are noted, by processes that nothing tells to be quiet."""
    folder = tmp_path / "recorder"
    folder.mkdir()
    (folder / "sitecustomize.py").write_text(RECORDER)
    for name in list(os.environ):
        if name.startswith(HINTS) and name != "BENTOML_HOME":
            monkeypatch.delenv(name)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(folder), os.environ.get("PYTHONPATH", "")]))
    monkeypatch.setenv("CALLS_OUT", str(tmp_path / "calls"))
    return tmp_path / "calls"


def noted(calls: Path) -> str:
    return calls.read_text() if calls.exists() else ""


def outside_pytest(folder: Path) -> dict[str, str]:
    """Variables of a process that finds no sign of a test: MLflow would be quiet in one."""
    found = {**os.environ, "MLFLOW_TRACKING_URI": f"sqlite:///{folder}/mlflow.db"}
    found.pop("PYTEST_CURRENT_TEST", None)
    return found


def test_the_recorder_notes_what_bentoml_would_report(calls: Path) -> None:
    subprocess.run([sys.executable, "-m", "bentoml", "models", "list"], timeout=120, check=True)
    assert "bentoml" in noted(calls)


def test_the_service_reports_nothing(
    calls: Path, store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store.promote(1)
    monkeypatch.setenv("CREDIT_RISK_CONF", str(changed_conf(tmp_path, workers=1)))
    with serving() as server:
        assert server.call("/model")[0] == 200
        assert server.stop() == 0
    assert noted(calls) == ""


def test_the_recorder_notes_what_mlflow_would_report(calls: Path, tmp_path: Path) -> None:
    script = "import mlflow; mlflow.create_experiment('loud'); mlflow.telemetry.get_telemetry_client().flush()"
    subprocess.run([sys.executable, "-c", script], cwd=tmp_path, env=outside_pytest(tmp_path), check=True)
    assert "mlflow" in noted(calls)


def test_the_commands_report_nothing(calls: Path, tmp_path: Path, store: Store) -> None:
    store.promote(1)
    script = (
        "import pipeline, mlflow\n"
        "mlflow.create_experiment('quiet')\n"
        "with mlflow.start_run(): mlflow.log_param('a', 1)\n"
        "assert mlflow.telemetry.get_telemetry_client() is None\n"
    )
    environment = outside_pytest(tmp_path)
    for arguments in (["-c", script], ["-m", "pipeline", "status"]):
        subprocess.run([sys.executable, *arguments], cwd=PROJECT, env=environment, timeout=200, check=True)
    assert noted(calls) == ""


def test_a_server_that_cannot_start_reports_nothing(
    calls: Path, tmp_path: Path, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CREDIT_RISK_CONF", str(changed_conf(tmp_path)))
    command = [sys.executable, "-m", "bentoml", "serve", "--host", "192.0.2.1", "--port", str(free_port())]
    done = subprocess.run(command, cwd=PROJECT, timeout=120, check=False)
    assert done.returncode == 1
    assert noted(calls) == ""
