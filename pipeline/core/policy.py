"""The policy: from a probability of default to a decision."""

from __future__ import annotations

from typing import Literal, Self

import numpy as np
import numpy.typing as npt
from pydantic import Field, model_validator

from pipeline.core.settings import Settings

Status = Literal["APPROVED", "MAYBE", "DECLINED"]
STATUSES: tuple[Status, ...] = ("APPROVED", "MAYBE", "DECLINED")


class Thresholds(Settings):
    """Where one decision ends and the next begins, as probabilities of default in [0, 1]."""

    maybe_above: float = Field(ge=0, le=1)
    """Above it, a person decides (MAYBE); up to it, the application is APPROVED."""
    declined_above: float = Field(ge=0, le=1)
    """Above it, the application is DECLINED."""

    @model_validator(mode="after")
    def _in_order(self) -> Self:
        if self.maybe_above > self.declined_above:
            raise ValueError(
                f"maybe_above is {self.maybe_above:g}, greater than declined_above, {self.declined_above:g}; "
                "lower it, or raise declined_above"
            )
        return self


class Policy(Settings):
    """``conf/policy.yaml``: how probabilities of default become decisions."""

    thresholds: Thresholds


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
