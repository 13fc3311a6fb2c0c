"""Digests of a table's content."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import pandas as pd


class TableDigest:
    """Sha256 over the names and values of a table's columns, row by row in order, fed in parts of any size."""

    def __init__(self, columns: Sequence[str]) -> None:
        self._sha = hashlib.sha256("\n".join(columns).encode())

    def update(self, frame: pd.DataFrame) -> None:
        """Add rows."""
        self._sha.update(pd.util.hash_pandas_object(frame, index=False).to_numpy().tobytes())

    def text(self) -> str:
        """32 hex digits."""
        return self._sha.hexdigest()[:32]


def frame_digest(frame: pd.DataFrame) -> str:
    """Digest of a table in memory: see `TableDigest`."""
    digest = TableDigest(list(frame.columns))
    digest.update(frame)
    return digest.text()
