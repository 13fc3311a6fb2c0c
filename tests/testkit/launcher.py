"""Run a command until it ends or its caller does, then end every process that it has started.

BentoML's workers lead sessions of their own, so killing the command's process group would miss them. As a "child
subreaper" (prctl(2)) this process becomes the parent of every descendant whose own parent has died: killing its
children until none is left misses none.

Usage: ``python launcher.py CALLER_PID COMMAND ...``; it exits as the command did.
"""

from __future__ import annotations

import ctypes
import os
import select
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

PR_SET_CHILD_SUBREAPER = 36


def main(caller: int, command: list[str]) -> int:
    """Run the command; returns its exit code, negative for the signal that killed it."""
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    calling = os.pidfd_open(os.getppid())
    if os.getppid() != caller:  # it has died already
        return 1
    process = subprocess.Popen(command)
    select.select([calling, os.pidfd_open(process.pid)], [], [])
    code = process.poll()
    end_children()
    return 1 if code is None else code


def end_children() -> None:
    """Kill all children, and the grandchildren that thereby become children."""
    while True:
        for pid in Path("/proc/thread-self/children").read_text().split():
            os.kill(int(pid), signal.SIGKILL)
        try:
            os.wait()
        except ChildProcessError:
            return


if __name__ == "__main__":
    code = main(int(sys.argv[1]), sys.argv[2:])
    if code < 0:
        with suppress(OSError):  # SIGKILL has no handler
            signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    sys.exit(code)
