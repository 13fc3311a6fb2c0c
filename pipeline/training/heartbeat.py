"""Tell other processes at regular intervals that something is alive."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress


@contextmanager
def repeating(action: Callable[[], None], seconds: float) -> Iterator[None]:
    """Repeat an action on a thread of its own until the block ends; an action that fails is tried again.

    The end does not wait for an action under way: a server that hangs must not keep the process from ending.
    """
    ended = threading.Event()

    def repeat() -> None:
        while not ended.wait(seconds):
            with suppress(Exception):
                action()

    threading.Thread(target=repeat, name="heartbeat", daemon=True).start()
    try:
        yield
    finally:
        ended.set()
