"""Splits rows into a training and a test side, by a seeded hash of each row's content."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pandas as pd

from pipeline.core.contract.schema import Schema

_FULL = 2.0**64


def is_test_row(frame: pd.DataFrame, schema: Schema, seed: int, share: float) -> npt.NDArray[np.bool_]:
    """Say which rows are held out.

    The same row is on the same side whatever is appended, removed or reordered, so a champion
    has never seen the rows on which a challenger is compared. Equal rows go to one side.
    The label is not hashed: an application keeps its side when its label is corrected.

    Parameters
    ----------
    frame
        Validated rows, n of them.
    seed
        Another seed gives another split.
    share
        Expected share of rows held out, in (0, 1).

    Returns
    -------
    numpy.ndarray
        Shape (n,), bool; True = test.
    """
    return content_hashes(frame, schema, seed) / _FULL < share


def content_hashes(frame: pd.DataFrame, schema: Schema, seed: int) -> npt.NDArray[np.uint64]:
    """Hash the contract's fields of each row, without the label: shape (n,), equal for equal rows."""
    content = frame.reindex(columns=list(schema.fields))
    hashes = pd.util.hash_pandas_object(content, index=False, hash_key=f"{seed:016d}"[-16:])
    # String columns use the key; numbers are hashed without one: mix the seed into the result.
    return _mix(np.asarray(hashes, dtype=np.uint64), seed)


def _mix(hashes: npt.NDArray[np.uint64], seed: int) -> npt.NDArray[np.uint64]:
    """Spread hash + seed over 64 bits by the finalizer of SplitMix64 (Steele, Lea, Flood 2014)."""
    with np.errstate(over="ignore"):
        z = hashes + np.uint64((seed * 0x9E3779B97F4A7C15) % 2**64)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return z ^ (z >> np.uint64(31))
