"""Probabilities of default in, decisions out, by the two thresholds of ``conf/serve.yaml``."""

from __future__ import annotations

from typing import Literal

import numpy as np
import numpy.typing as npt

from pipeline.core.settings import Thresholds

Status = Literal["APPROVED", "MAYBE", "DECLINED"]
STATUSES: tuple[Status, ...] = ("APPROVED", "MAYBE", "DECLINED")


def decide(probability: float, thresholds: Thresholds) -> Status:
    """Decide on one probability of default in [0, 1]."""
    if probability > thresholds.declined_above:
        return "DECLINED"
    return "MAYBE" if probability > thresholds.maybe_above else "APPROVED"


def decide_many(probabilities: npt.NDArray[np.floating], thresholds: Thresholds) -> npt.NDArray[np.intp]:
    """Decide on many probabilities: positions in `STATUSES`, shape (n,)."""
    # float64, as `decide` compares: the float32 next to 0.3 lies above 0.3.
    exact = np.asarray(probabilities, dtype=np.float64)
    return np.searchsorted([thresholds.maybe_above, thresholds.declined_above], exact, side="left")
