"""The gate refuses what it should, by the rule that says so, and nothing else."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline.core.contract.schema import Schema
from pipeline.core.policy import Thresholds
from pipeline.evaluation.metrics import auc
from pipeline.promotion.gate import Evidence, Verdict, _weighted_auc, judge, schema_changes, worse_by
from pipeline.promotion.settings import PromoteSettings

PROJECT = Path(__file__).parent.parent
SHIPPED = PromoteSettings.load(PROJECT / "conf/promote.yaml")
FEWER = SHIPPED.against_champion.model_copy(update={"resamples": 200})
SETTINGS = SHIPPED.model_copy(update={"against_champion": FEWER})
THRESHOLDS = Thresholds(maybe_above=0.3, declined_above=0.5)


def draw(rows: int = 2000, seed: int = 0) -> tuple[Any, Any]:
    """Labels drawn from known probabilities: a calibrated model with an AUC of .86."""
    generator = np.random.default_rng(seed)
    probabilities = 1 / (1 + np.exp(-generator.normal(-1.2, 2, rows)))
    labels = (generator.random(rows) < probabilities).astype(np.float32)
    return labels, probabilities.astype(np.float32)


def sound(**changes: Any) -> Evidence:
    """Evidence that breaks no rule, but for the changes."""
    labels, probabilities = draw()
    evidence = Evidence(
        labels=labels,
        candidate=probabilities,
        champion=probabilities,
        champion_name="credit_risk_model:v1",
        champion_failure="",
        holdout_note="",
        groups={"marital": np.where(np.arange(len(labels)) % 2, "single", "married")},
        schema_changes=(),
        monotone_breaks=(),
        parity=0.0,
        milliseconds=0.2,
        megabytes=0.3,
    )
    return replace(evidence, **changes)


def verdict(evidence: Evidence, **settings: Any) -> Verdict:
    return judge(evidence, SETTINGS.model_copy(update=settings), THRESHOLDS)


def broken(evidence: Evidence, **settings: Any) -> set[str]:
    return {rule.name for rule in verdict(evidence, **settings).broken}


def noisy(probabilities: Any, scale: float) -> Any:
    """The same model with noise on its log-odds."""
    logits = np.log(probabilities / (1 - probabilities))
    return 1 / (1 + np.exp(-(logits + np.random.default_rng(1).normal(0, scale, len(logits)))))


def test_a_sound_candidate_passes() -> None:
    assert verdict(sound()).passed


@pytest.mark.parametrize(
    ("changes", "rules"),
    [
        ({"schema_changes": ("debt: removed",)}, {"schema"}),
        ({"monotone_breaks": ("amount",)}, {"monotone"}),
        ({"parity": 2e-6}, {"parity"}),
        ({"parity": float("nan")}, {"parity"}),
        ({"milliseconds": 6.0}, {"milliseconds"}),
        ({"megabytes": 51.0}, {"megabytes"}),
        ({"champion": None, "champion_failure": "cannot be loaded"}, {"champion"}),
        ({"champion": None, "champion_name": None}, set()),
    ],
)
def test_each_fact_has_its_rule(changes: dict[str, Any], rules: set[str]) -> None:
    assert broken(sound(**changes)) == rules


def test_a_model_that_knows_nothing_breaks_every_rule_of_quality() -> None:
    _, probabilities = draw(seed=1)
    found = broken(sound(candidate=probabilities))
    assert {"auc", "ks", "log_loss", "brier", "calibration_slope", "auc_worse_by", "log_loss_worse_by"} <= found


def test_overconfident_probabilities_are_caught_though_their_order_is_perfect() -> None:
    _, p = draw()
    extreme = p**3 / (p**3 + (1 - p) ** 3)
    found = broken(sound(candidate=extreme))
    assert "calibration_slope" in found
    assert not found & {"auc", "ks", "auc_worse_by"}


def test_few_rows_decide_nothing() -> None:
    labels, probabilities = draw(150)
    few = sound(labels=labels, candidate=probabilities, champion=probabilities, groups={})
    assert broken(few) == {"holdout_rows"}


def test_one_label_decides_nothing() -> None:
    labels, _ = draw()
    assert broken(sound(labels=np.zeros_like(labels))) == {"holdout_rows"}


def test_a_clearly_worse_candidate_is_refused_against_the_champion_only() -> None:
    _, probabilities = draw()
    worse = sound(candidate=noisy(probabilities, 0.9))
    lenient: dict[str, Any] = {"at_least": {}, "at_most": {}}
    assert {"auc_worse_by", "log_loss_worse_by"} <= broken(worse, **lenient)
    assert broken(replace(worse, champion=None, champion_name=None), **lenient) == set()


def test_an_equal_candidate_is_not_worse_and_a_better_one_is_better() -> None:
    labels, probabilities = draw()
    settings = SETTINGS.against_champion
    assert worse_by(labels, probabilities, probabilities, settings) == {"auc": 0, "brier": 0, "log_loss": 0}
    limits = worse_by(labels, probabilities, noisy(probabilities, 0.9), settings)
    assert max(limits.values()) < 0


def test_uncertainty_counts_against_the_candidate() -> None:
    labels, probabilities = draw(300)
    other = noisy(probabilities, 0.4)
    many, candidate = np.tile(labels, 20), np.tile(probabilities, 20)
    settings = SETTINGS.against_champion
    uncertain = worse_by(labels, other, probabilities, settings)
    certain = worse_by(many, np.tile(other, 20), candidate, settings)
    assert uncertain["auc"] > certain["auc"]


def test_the_weighted_auc_is_the_auc_and_counts_ties_half() -> None:
    labels, probabilities = draw(500)
    tied = probabilities.round(1).astype(np.float64)
    ones = np.ones((1, 500))
    assert _weighted_auc(labels.astype(np.float64), tied, ones)[0] == pytest.approx(auc(labels, tied))
    twice = np.where(np.arange(500) < 100, 2.0, 1.0)[None]
    repeated = np.concatenate([np.arange(500), np.arange(100)])
    expected = auc(labels[repeated], tied[repeated])
    assert _weighted_auc(labels.astype(np.float64), tied, twice)[0] == pytest.approx(expected)


def test_flipped_decisions_are_counted() -> None:
    _, probabilities = draw()
    limit = SETTINGS.against_champion.model_copy(update={"decision_flips": 0.0})
    assert "decision_flips" in broken(sound(candidate=noisy(probabilities, 0.05)), against_champion=limit)


def test_the_approval_ratio_is_reported_and_refuses_only_with_a_limit() -> None:
    _, probabilities = draw()
    unequal = sound(groups={"marital": np.where(probabilities > 0.3, "single", "married")})
    assert verdict(unequal).passed
    strict = SETTINGS.approval_ratio.model_copy(update={"at_least": 0.8})
    assert broken(unequal, approval_ratio=strict) == {"approval_ratio[marital]"}


def test_a_schema_change_can_be_allowed_and_is_still_reported() -> None:
    changed = sound(schema_changes=("debt: removed",), champion=None, champion_failure="no debt")
    allowed = judge(changed, SETTINGS, THRESHOLDS, allow_schema_change=True)
    assert allowed.passed
    assert "debt: removed" in allowed.table()


def test_force_cannot_override_a_model_that_answers_unlike_the_judged_one() -> None:
    assert verdict(sound(milliseconds=99.0)).can_be_forced
    assert not verdict(sound(parity=0.1)).can_be_forced


def test_the_table_names_each_rule_with_value_limit_and_outcome() -> None:
    table = verdict(sound(milliseconds=99.0)).table().splitlines()
    assert next(line for line in table if line.startswith("milliseconds")).split()[:5] == [
        "milliseconds", "99", "at", "most", "5",
    ]  # fmt: skip
    assert sum("FAIL" in line for line in table) == 1


def field(schema: Schema, name: str, **changes: Any) -> Schema:
    document = schema.document()
    document["fields"][name] = {**document["fields"][name], **changes}
    return Schema.model_validate(document)


@pytest.mark.parametrize(
    ("name", "changes", "said"),
    [
        ("income", {"optional": False}, "income: became required"),
        ("age", {"max": 90}, "age: its range is narrower"),
        ("debt", {"unit": "euro"}, "debt: unit"),
        ("income", {"missing": ()}, "income: codes of missing"),
        ("home", {"categories": ("rent", "owner")}, "home: no longer accepts ignore, other, parents"),
        ("age", {"max": 110}, ""),
        ("age", {"kind": "number"}, ""),
        ("expenses", {"optional": True}, ""),
    ],
)
def test_a_contract_is_compatible_if_every_old_application_still_means_the_same(
    schema: Schema, name: str, changes: dict[str, Any], said: str
) -> None:
    changes_found = "; ".join(schema_changes(schema, field(schema, name, **changes)))
    assert said in changes_found
    assert bool(changes_found) == bool(said)


def test_a_required_new_field_breaks_clients_and_a_widened_contract_does_not(schema: Schema) -> None:
    document = schema.document()
    savings = {"kind": "number", "min": 0, "max": 9, "description": "Savings.", "example": 1}
    required = Schema.model_validate({**document, "fields": {**document["fields"], "savings": savings}})
    optional = field(required, "savings", optional=True)
    assert schema_changes(schema, required) == ("savings: new and required",)
    assert schema_changes(schema, optional) == ()
