"""From a probability of default to a decision."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.core.policy import STATUSES, Thresholds, decide, decide_many

THRESHOLDS = Thresholds(maybe_above=0.3, declined_above=0.5)


@pytest.mark.parametrize(
    ("probability", "status"),
    [
        (0.0, "APPROVED"),
        (0.3, "APPROVED"),
        (0.3000001, "MAYBE"),
        (0.5, "MAYBE"),
        (0.5000001, "DECLINED"),
        (1.0, "DECLINED"),
    ],
)
def test_a_threshold_belongs_to_the_band_below(probability: float, status: str) -> None:
    assert decide(probability, THRESHOLDS) == status


@given(st.lists(st.floats(0, 1, width=32) | st.sampled_from([0.3, 0.5]), max_size=20))
def test_many_agree_with_one(probabilities: list[float]) -> None:
    found = decide_many(np.array(probabilities, dtype=np.float64), THRESHOLDS)
    assert [STATUSES[band] for band in found] == [decide(p, THRESHOLDS) for p in probabilities]
