"""Turn SIGINT and SIGTERM into one clean interruption of a training."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interruptions:
    """Raises `KeyboardInterrupt` at the first SIGINT or SIGTERM, but never inside a deferred section.

    The signals that follow the first are ignored, because the end is bounded in time and must not be cut short:
    ``mlflow run`` sends SIGTERM after the SIGINT that the terminal has sent.

    Python lets only the main thread handle signals. On another thread, as in a notebook or a scheduler, nothing is
    installed, and whoever started the thread ends it.
    """

    def __init__(self) -> None:
        self._deferring = False
        self._pending = False

    @contextmanager
    def handled(self) -> Iterator[None]:
        """Handle the signals until the block ends."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.signal(number, self._receive) for number in _SIGNALS}
        try:
            yield
        finally:
            _install(before)

    @contextmanager
    def deferred(self) -> Iterator[None]:
        """Hold an interruption back until the block ends, so that no statement of a database is cut in two."""
        self._deferring = True
        try:
            yield
        finally:
            self._deferring = False
        if self._pending:
            raise KeyboardInterrupt

    def _receive(self, *_: object) -> None:
        _install(dict.fromkeys(_SIGNALS, signal.SIG_IGN))
        if not self._deferring:
            raise KeyboardInterrupt
        self._pending = True


@contextmanager
def resumable(study: str) -> Iterator[Interruptions]:
    """Handle SIGINT and SIGTERM, and tell whoever interrupts how to go on."""
    interruptions = Interruptions()
    with interruptions.handled():
        try:
            yield interruptions
        except KeyboardInterrupt:
            raise KeyboardInterrupt(
                f"interrupted; study {study} keeps its finished trials: run the same command again to go on"
            ) from None


def _install(handlers: dict[signal.Signals, Any]) -> None:
    for number, handler in handlers.items():
        signal.signal(number, handler)
