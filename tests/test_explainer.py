"""The reasons of a decision, in the applicant's own terms."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from scipy.special import expit

from pipeline.core.contract.schema import Schema
from pipeline.core.model.explainer import Explainer
from service.answering.core import Core


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
