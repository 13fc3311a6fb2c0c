from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.special import expit

from pipeline.core.contract.schema import Schema
from pipeline.core.model.explainer import Explainer
from pipeline.core.policy import STATUSES, Thresholds, decide, decide_many
from service.answering.core import Core

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


@pytest.fixture(scope="module")
def explainer(core: Core) -> Explainer:
    version = core.version()
    assert version is not None
    return version.model.explainer


def explained(core: Core, application: dict[str, Any]) -> dict[str, Any]:
    version = core.version()
    assert version is not None
    return version.model.explanation(application)


def test_contributions_add_up_to_the_probability(core: Core, rows: list[dict[str, Any]]) -> None:
    version = core.version()
    assert version is not None
    matrix = version.model.encode(rows[:200])
    contributions, bias = version.model.explainer.contributions(matrix)
    probabilities = np.array(version.model.decide(matrix).probabilities)
    np.testing.assert_allclose(expit(contributions.sum(axis=1) + bias), probabilities, atol=1e-5)


def test_an_explanation_speaks_of_the_applicants_fields_only(core: Core, schema: Schema) -> None:
    document = explained(core, schema.example())
    assert list(document["contributions"]) == list(schema.features)
    assert "marital" not in document["contributions"]
    assert document["log_odds"] == pytest.approx(document["bias"] + sum(document["contributions"].values()))


def test_reasons_are_what_pushed_towards_default_strongest_first(core: Core, rows: list[dict[str, Any]]) -> None:
    for row in rows[:50]:
        document = explained(core, row)
        pushes = [document["contributions"][reason["field"]] for reason in document["reasons"]]
        assert len(pushes) <= 4
        assert all(push > 0 for push in pushes)
        others = [
            push
            for name, push in document["contributions"].items()
            if name not in {reason["field"] for reason in document["reasons"]}
        ]
        assert pushes == sorted(pushes, reverse=True)
        assert len(pushes) < 4 or min(pushes) >= max(others)
        assert len(pushes) == 4 or max(others) <= 0


def test_a_reason_is_the_contracts_sentence(core: Core, schema: Schema) -> None:
    risky = {**schema.example(), "records": "yes", "job": "partime", "seniority": 0}
    reasons = {reason["field"]: reason["reason"] for reason in explained(core, risky)["reasons"]}
    assert reasons["records"] == "A record of earlier payment problems exists."


def test_without_a_push_towards_default_there_is_no_reason(explainer: Explainer) -> None:
    assert explainer.reasons(np.full(len(explainer.fields), -0.1)) == []
