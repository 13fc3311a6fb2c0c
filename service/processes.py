"""Keep the processes of ``bentoml serve`` together: workers end with their supervisor, and come back soon.

BentoML starts workers through circus, in the process that runs ``bentoml serve``. If that one is killed, nobody
watches the workers any more, and they would hold the port for ever.
"""

from __future__ import annotations

import ctypes
import functools
import os
import signal
import sys
import threading
import time

import click

SUPERVISOR = "CREDIT_RISK_SUPERVISOR"
"""Environment variable by which workers learn whose they are."""

_CHECK_SECONDS = 1
"""How often the supervisor looks for workers that have died. BentoML's 10 seconds are most of the 13 that clients
wait for the next answer after all workers were killed; the rest is a worker's start."""

_PR_SET_PDEATHSIG = 1
"""Of Linux' ``prctl``: the signal that a process gets when its parent ends."""


def supervise() -> None:
    """Prepare this process, if it runs ``bentoml serve``, to watch its workers."""
    context = click.get_current_context(silent=True)
    if context is None or context.command.name != "serve":
        return
    from bentoml._internal.utils import circus  # workers do not need it, and start sooner without

    os.environ[SUPERVISOR] = str(os.getpid())
    # BentoML leaves this argument at its default, and takes it from no configuration.
    if not isinstance(circus.create_standalone_arbiter, functools.partial):
        circus.create_standalone_arbiter = functools.partial(
            circus.create_standalone_arbiter, check_delay=_CHECK_SECONDS
        )


def end_with_supervisor() -> None:
    """Let this worker end when its supervisor does, after it has answered the requests in progress.

    A process that was not started by ``bentoml serve`` is left alone.
    """
    supervisor = os.environ.get(SUPERVISOR)
    if supervisor is None:
        return
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
        _end_if_orphaned(int(supervisor))  # it may have ended before this was in force
    else:
        threading.Thread(target=_watch, args=(int(supervisor),), name="supervisor", daemon=True).start()


def _watch(supervisor: int) -> None:
    while not _end_if_orphaned(supervisor):
        time.sleep(1)


def _end_if_orphaned(supervisor: int) -> bool:
    is_orphaned = os.getppid() != supervisor
    if is_orphaned:
        os.kill(os.getpid(), signal.SIGTERM)
    return is_orphaned
