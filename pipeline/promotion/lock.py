"""The lock of this machine's promotions."""

from __future__ import annotations

import contextlib
import fcntl
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from pipeline.core.errors import PromotionRefused
from pipeline.core.machine import now, whoami
from pipeline.core.promoted import MODEL_NAME, store_home

_held = False


def work_home(name: str = MODEL_NAME) -> Path:
    """Hidden folder for the lock and for staged versions: on the store's filesystem, outside its listings."""
    return store_home() / f".{name}"


@contextlib.contextmanager
def promotion_lock(seconds: float, name: str = MODEL_NAME) -> Iterator[None]:
    """Hold the lock that every change of the promoted version needs.

    The kernel releases it when the process ends, for whatever reason.

    Parameters
    ----------
    seconds
        How long to wait for another command.

    Raises
    ------
    PromotionRefused
        Another command held it all that time.
    """
    global _held
    path = work_home(name) / "lock"
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+b") as file:
        _acquire(file, time.monotonic() + seconds)
        with contextlib.suppress(OSError):  # who holds it is a courtesy: a full disk must not stop a rollback
            file.truncate(0)
            file.write(f"{whoami()}, process {os.getpid()}, since {now()}".encode())
            file.flush()
        _held = True
        try:
            yield
        finally:
            _held = False


def is_held_here() -> bool:
    """Whether this process holds the lock."""
    return _held


def _acquire(file: IO[bytes], deadline: float) -> None:
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() >= deadline:
                file.seek(0)
                holder = file.read().decode(errors="replace") or "unknown"
                raise PromotionRefused(
                    f"another promotion is in progress ({holder}). Try again when it finishes"
                ) from None
            time.sleep(0.05)
        else:
            return
