"""Wait for what another process or thread does."""

from __future__ import annotations

from collections.abc import Callable
from time import monotonic, sleep
from typing import TypeVar

ValueT = TypeVar("ValueT")


def eventually(condition: Callable[[], ValueT], seconds: float = 60) -> ValueT:
    """Ask again and again until the condition gives something true, and return that.

    Raises
    ------
    TimeoutError
        It gave nothing true in time.
    """
    end = monotonic() + seconds
    while not (found := condition()):
        if monotonic() > end:
            raise TimeoutError(f"still not so after {seconds:g} s; the last answer was {found!r}")
        sleep(0.02)
    return found
