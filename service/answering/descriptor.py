"""A file descriptor kept back for the moment in which no other is free."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress


class ReservedDescriptor:
    """One file descriptor that nobody else in this process can take.

    Clients can use up a process's descriptors by connections alone. What must be read even then is read in
    `released`, one file at a time.
    """

    def __init__(self) -> None:
        self._descriptor: int | None = None
        self._reserve()

    @contextmanager
    def released(self) -> Iterator[None]:
        """Free the descriptor inside the block, and take it back after it."""
        self._free()
        try:
            yield
        finally:
            self._reserve()

    def __del__(self) -> None:
        self._free()

    def _reserve(self) -> None:
        with suppress(OSError):  # another thread was faster: the next `released` begins without
            self._descriptor = os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)

    def _free(self) -> None:
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None
