"""The service's core in a process of another user."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from typing import Any, NamedTuple

from tests.testkit import PROJECT
from tests.testkit.registry import Machine

NOBODY = 65534

# It imports first: the other user may not be able to read this environment.
_ANSWER = """
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
    found = {"status": 200, **json.loads(asyncio.run(core.classify(sys.stdin.buffer.read(), "r")))}
except Refusal as refusal:
    found = {"status": refusal.status, "model": None}
print(json.dumps([found["status"], found["model"], str(core.promoted.refused)]))
"""


class OthersAnswer(NamedTuple):
    """What another user's service answered.

    Attributes
    ----------
    status, model
        Of the answer; no model if it was refused.
    refused
        Which promoted version was refused last, and why.
    """

    status: int
    model: str | None
    refused: str


def answer_as(user: int, machine: Machine, application: Mapping[str, Any]) -> OthersAnswer:
    """Decide on an application as another user's service on a machine does; only root can."""
    done = subprocess.run(
        [sys.executable, "-c", _ANSWER, str(user)],
        cwd=PROJECT,
        env={**os.environ, **machine.env, "CREDIT_RISK_CONF": str(PROJECT / "conf")},
        input=json.dumps(application).encode(),
        capture_output=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr.decode()
    return OthersAnswer(*json.loads(done.stdout))
