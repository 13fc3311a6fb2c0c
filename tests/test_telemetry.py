"""Neither the commands nor the service tell anybody anything: the libraries' usage reports are off."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.testkit import PROJECT
from tests.testkit.projects import changed_conf
from tests.testkit.recorder import CALLS_OUT, recorded_environment
from tests.testkit.servers import free_port
from tests.testkit.store import Store, serving


@pytest.fixture
def calls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where calls out are noted, by processes that nothing tells to be quiet."""
    recorded = recorded_environment(os.environ, tmp_path)
    for name in os.environ.keys() - recorded.keys() - {"PYTEST_CURRENT_TEST"}:
        monkeypatch.delenv(name)
    for name in ("PYTHONPATH", CALLS_OUT):
        monkeypatch.setenv(name, recorded[name])
    monkeypatch.setenv("BENTOML_HOME", str(tmp_path / "bentoml"))
    return Path(recorded[CALLS_OUT])


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
