"""Named places where a test can kill the process, as a power cut or ``kill -9`` would."""

from __future__ import annotations

import os
import signal

VARIABLE = "CREDIT_RISK_FAILPOINT"
"""Environment variable that holds the name of the place; unset outside tests."""


def failpoint(name: str) -> None:
    """Kill this process here if the environment says so: no handler runs, nothing is flushed."""
    if os.environ.get(VARIABLE) == name:
        os.kill(os.getpid(), signal.SIGKILL)
