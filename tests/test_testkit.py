"""Processes that tests and benchmarks start: none may outlive the run."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from tests.testkit import PROJECT
from tests.testkit.projects import changed_conf
from tests.testkit.servers import Process, alive
from tests.testkit.waiting import eventually

RUNNER = """
from tests.testkit.store import serving
with serving(ready="/livez") as server:
    print(server.process.pid, *(process.pid for process in server.process.descendants()), flush=True)
    input()
"""


def test_a_server_and_its_workers_end_with_a_runner_that_is_killed(tmp_path: Path) -> None:
    own = {"BENTOML_HOME": str(tmp_path), "CREDIT_RISK_CONF": str(changed_conf(tmp_path, workers=2))}
    runner = subprocess.Popen(
        [sys.executable, "-c", RUNNER],
        cwd=PROJECT,
        env={**os.environ, **own},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    with runner:
        assert runner.stdout
        family = [psutil.Process(int(pid)) for pid in runner.stdout.readline().split()]
        assert len({os.getsid(process.pid) for process in family}) > 1  # killing one group would not end them
        runner.kill()
    eventually(lambda: not any(alive(process) for process in family))


def test_what_a_command_leaves_behind_ends_with_it() -> None:
    code = "import subprocess; print(subprocess.Popen(['sleep', '600'], start_new_session=True).pid, flush=True)"
    with Process([sys.executable, "-c", code], stdout=subprocess.PIPE) as process:
        assert process.stdout
        left = psutil.Process(int(process.stdout.readline()))
    assert not alive(left)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_a_signal_reaches_the_command_and_its_exit_is_told(number: signal.Signals) -> None:
    with Process(["sleep", "600"]) as process:
        process.send_signal(number)
    assert process.returncode == -number


def test_an_exit_code_is_told() -> None:
    assert Process([sys.executable, "-c", "raise SystemExit(3)"]).wait() == 3
