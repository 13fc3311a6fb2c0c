"""A service that runs as another user than the one who promotes reads what is promoted, or says what it lacks."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.testkit import PROJECT
from tests.testkit.registry import Machine

NOBODY = 65534

pytestmark = pytest.mark.skipif(os.getuid() != 0, reason="only root may become another user")

ANSWER = """
import asyncio, json, os, sys
from pathlib import Path
from pipeline.core.policy import Policy
from service.answering.core import Core
from service.answering.refusal import Refusal
from service.settings import ServeSettings
import xgboost, sklearn.feature_extraction, cloudpickle
conf = Path("conf")
settings = ServeSettings.load(conf / "serve.yaml")
silent = settings.decision_log.model_copy(update={"enabled": False})
settings = settings.model_copy(update={"decision_log": silent})
policy = Policy.load(conf / "policy.yaml")
os.setgid(int(sys.argv[1]))
os.setuid(int(sys.argv[1]))
core = Core(settings, policy, Path("/"))
try:
    print(asyncio.run(core.classify(sys.stdin.buffer.read(), "r")).decode())
except Refusal as refusal:
    print(refusal.status, core.promoted.refused)
"""


@pytest.fixture
def shared(promoted_machine: Machine) -> Iterator[Machine]:
    """The promoted machine in a folder that everybody may enter."""
    folder = Path(tempfile.mkdtemp())
    folder.chmod(0o755)
    yield promoted_machine.copy(folder)
    shutil.rmtree(folder)


def answer(machine: Machine, application: dict[str, object]) -> str:
    """What a service of another user answers."""
    done = subprocess.run(
        [sys.executable, "-c", ANSWER, str(NOBODY)],
        cwd=PROJECT,
        env={**os.environ, **machine.env, "CREDIT_RISK_CONF": str(PROJECT / "conf")},
        input=json.dumps(application).encode(),
        capture_output=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr.decode()
    return done.stdout.decode()


def test_a_service_of_another_user_answers_with_what_was_promoted(
    shared: Machine, rows: list[dict[str, object]]
) -> None:
    assert shared.run("promote", "--version", "2").code == 0
    assert json.loads(answer(shared, rows[0]))["model"] == "credit_risk_model:v2"
    modes = {path.stat().st_mode & 0o777 for path in shared.folder(2).rglob("*") if path.is_file()}
    assert modes == {0o644}
    assert shared.folder(2).stat().st_mode & 0o777 == 0o755
    # A read-only mount looks like this to the service.
    for path in [shared.models, *shared.models.rglob("*")]:
        path.chmod(path.stat().st_mode & ~0o222)
    assert json.loads(answer(shared, rows[0]))["model"] == "credit_risk_model:v2"


def test_going_back_to_a_version_of_private_folders_opens_them(
    shared: Machine, rows: list[dict[str, object]]
) -> None:
    assert shared.run("promote", "--version", "2").code == 0
    shared.folder(1).chmod(0o700)  # as release 0.1 left it
    assert shared.run("rollback").code == 0
    assert json.loads(answer(shared, rows[0]))["model"] == "credit_risk_model:v1"
