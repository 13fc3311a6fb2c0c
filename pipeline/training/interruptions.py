"""Turn SIGINT and SIGTERM into one clean interruption of a training."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def resumable(study: str) -> Iterator[None]:
    """Turn the first SIGINT or SIGTERM into an interruption, and tell whoever interrupts how to go on.

    Those that follow are ignored, because the end is bounded in time and must not be cut short:
    ``mlflow run`` sends SIGTERM after the SIGINT that the terminal has sent.
    """

    def interrupt(*_: object) -> None:
        for number in numbers:
            signal.signal(number, signal.SIG_IGN)
        raise KeyboardInterrupt

    numbers = (signal.SIGINT, signal.SIGTERM)
    before = [signal.signal(number, interrupt) for number in numbers]
    try:
        yield
    except KeyboardInterrupt:
        raise KeyboardInterrupt(
            f"interrupted; study {study} keeps its finished trials: run the same command again to go on"
        ) from None
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Hold SIGINT and SIGTERM back until the block ends, so that no statement of the database is cut in two."""
    received: list[int] = []
    held = (signal.SIGINT, signal.SIGTERM)
    before = [signal.signal(number, lambda number, _: received.append(number)) for number in held]
    try:
        yield
    finally:
        for number, handler in zip(held, before, strict=True):
            signal.signal(number, handler)
    if received:
        signal.raise_signal(received[0])
