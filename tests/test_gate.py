"""The gate refuses what it should, by the rule that says so, and nothing else."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline.core.contract.schema import Schema
from pipeline.core.policy import Thresholds
from pipeline.evaluation.comparison import _thinned, _weighted_auc, worse_by
from pipeline.evaluation.metrics import auc
from pipeline.promotion.compatibility import schema_changes
from pipeline.promotion.gate import Evidence, Rule, Verdict, judge
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
        is_identical=False,
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


def compared(labels: Any, candidate: Any, champion: Any, **changes: Any) -> dict[str, float]:
    """Upper limits of how much worse the candidate is, as the shipped settings compare."""
    sampling = {"confidence": 0.95, "resamples": 200, "rows": 50000, **changes}
    return worse_by(labels, candidate, champion, **sampling)


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
    assert compared(labels, probabilities, probabilities) == {"auc": 0, "brier": 0, "log_loss": 0}
    limits = compared(labels, probabilities, noisy(probabilities, 0.9))
    assert max(limits.values()) < 0


def test_uncertainty_counts_against_the_candidate() -> None:
    labels, probabilities = draw(300)
    other = noisy(probabilities, 0.4)
    many, candidate = np.tile(labels, 20), np.tile(probabilities, 20)
    uncertain = compared(labels, other, probabilities)
    certain = compared(many, np.tile(other, 20), candidate)
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
        ("age", {"max": 90}, "age: range [18, 100] became the narrower [18, 90]"),
        ("age", {"min": 21}, "age: range [18, 100] became the narrower [21, 100]"),
        ("age", {"min": 21, "max": 110}, "age: range [18, 100] became the narrower [21, 110]"),
        ("marital", {"role": "feature"}, "marital: role audit became feature"),
        ("amount", {"monotone": "decreasing"}, "amount: direction increasing became decreasing"),
        ("amount", {"monotone": None}, "amount: direction increasing became free"),
        ("age", {"monotone": "increasing"}, "age: direction free became increasing"),
        ("age", {"description": "Another sentence."}, ""),
        ("home", {"categories": ("rent", "owner", "private", "ignore", "parents", "other", "unk", "boat")}, ""),
        ("debt", {"unit": "euro"}, "debt: unit thousand pesetas became euro"),
        ("income", {"missing": ()}, "income: the codes that mean missing changed"),
        ("home", {"categories": ("rent", "owner")}, "home: no longer accepts ignore, other, parents"),
        ("age", {"max": 110}, ""),
        ("age", {"kind": "number"}, ""),
        ("amount", {"kind": "integer"}, "amount: kind number became integer"),
        (
            "age",
            {"kind": "category", "categories": ("a",), "example": "a", "min": None, "max": None},
            "age: kind integer became category",
        ),
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


def test_swapped_labels_are_another_target(schema: Schema) -> None:
    document = schema.document()
    swapped = {**document["target"], "negative": "default", "positive": "ok"}
    changes = schema_changes(schema, Schema.model_validate({**document, "target": swapped}))
    assert changes == ("target: the probability of default against ok became that of ok against default",)
    renamed = Schema.model_validate({**document, "target": {**document["target"], "name": "outcome"}})
    assert schema_changes(schema, renamed) == ("target: status became outcome",)
    described = {**document["target"], "description": "Another sentence."}
    assert schema_changes(schema, Schema.model_validate({**document, "target": described})) == ()


def test_the_direction_of_a_ratio_is_part_of_the_contract(schema: Schema) -> None:
    document = schema.document()
    document["ratios"]["coverage"]["monotone"] = "increasing"
    changed = schema_changes(schema, Schema.model_validate(document))
    assert changed == ("coverage: direction decreasing became increasing",)


def test_a_change_that_is_not_allowed_says_how_to_allow_it() -> None:
    refused = verdict(sound(schema_changes=("marital: role audit became feature",)))
    assert refused.reasons() == (
        "schema differs from that of credit_risk_model:v1 (marital: role audit became feature; "
        "--allow-schema-change --reason TEXT accepts it)"
    )


def test_allowing_a_schema_change_does_not_excuse_a_worse_model() -> None:
    _, probabilities = draw()
    worse = sound(schema_changes=("debt: removed",), candidate=noisy(probabilities, 0.9))
    lenient = SETTINGS.model_copy(update={"at_least": {}, "at_most": {}})
    judged = judge(worse, lenient, THRESHOLDS, allow_schema_change=True)
    assert {"auc_worse_by", "log_loss_worse_by"} <= {rule.name for rule in judged.broken}


def test_a_champion_that_cannot_be_compared_is_said_even_where_it_is_allowed() -> None:
    gone = sound(schema_changes=("debt: removed",), champion=None, champion_failure="no debt")
    judged = judge(gone, SETTINGS, THRESHOLDS, allow_schema_change=True)
    rule = next(rule for rule in judged.rules if rule.name == "champion")
    assert rule.passed
    assert rule.note == "not compared, as --allow-schema-change allows; credit_risk_model:v1: no debt"


def test_an_identical_candidate_is_called_identical() -> None:
    table = verdict(sound(is_identical=True)).table()
    assert "identical to credit_risk_model:v1: same booster, same contract" in table
    assert "identical" not in verdict(sound()).table()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"milliseconds": 6.5}, "milliseconds is 6.5, above the ceiling of 5"),
        (
            {"monotone_breaks": ("amount",)},
            "monotone: the probability moves against the contract's direction (amount)",
        ),
    ],
)
def test_a_broken_rule_reads_as_a_sentence(changes: dict[str, Any], said: str) -> None:
    assert said in verdict(sound(**changes)).reasons()


def test_a_value_below_its_floor_reads_as_a_sentence() -> None:
    labels, probabilities = draw()
    found = auc(labels, probabilities)
    assert f"auc is {found:.4g}, below the floor of 0.99" in verdict(sound(), at_least={"auc": 0.99}).reasons()


def test_the_same_evidence_gets_the_same_limits_to_the_last_digit() -> None:
    labels, probabilities = draw(500)
    other = noisy(probabilities, 0.4)
    assert compared(labels, other, probabilities) == compared(labels, other, probabilities)
    assert compared(labels, other, probabilities)["log_loss"] == pytest.approx(0.0387, abs=0.02)


def test_more_confidence_moves_the_limit_out() -> None:
    labels, probabilities = draw(500)
    other = noisy(probabilities, 0.4)
    limits = [
        compared(labels, other, probabilities, confidence=level)["auc"] for level in (0.55, 0.75, 0.95, 0.99)
    ]
    assert limits == sorted(limits)
    assert limits[-1] - limits[0] > 0.005


def test_a_long_holdout_is_thinned_evenly_and_not_cut() -> None:
    labels, probabilities = draw(4000)
    # The candidate is hopeless on the second half only: the first rows alone would not show it.
    half = np.where(np.arange(4000) < 2000, probabilities, 1 - probabilities)
    thinned = compared(labels, half, probabilities, rows=400)
    assert thinned["auc"] > 0.2
    assert _thinned(1000, 10).tolist() == [0, 111, 222, 333, 444, 555, 666, 777, 888, 999]
    assert _thinned(5, 10).tolist() == [0, 1, 2, 3, 4]


def test_only_approved_counts_as_approved() -> None:
    labels, _ = draw(400)
    # Single: half APPROVED, half MAYBE. Married: all APPROVED.
    groups = np.where(np.arange(400) < 200, "single", "married")
    scores = np.where(np.arange(400) < 100, 0.4, 0.1)
    rule = next(
        rule
        for rule in verdict(
            sound(labels=labels, candidate=scores, champion=scores, groups={"marital": groups})
        ).rules
        if rule.name == "approval_ratio[marital]"
    )
    assert rule.value == pytest.approx(0.5)
    assert rule.note == "single 50%, married 100%"


def test_the_verdict_of_a_hopeless_candidate_to_the_word() -> None:
    _, probabilities = draw()
    hopeless = sound(
        candidate=noisy(probabilities, 0.9),
        schema_changes=("debt: removed", "age: new and required"),
        monotone_breaks=tuple("abcdef"),
        parity=1e-3,
        milliseconds=9.0,
        megabytes=99.0,
    )
    found = [
        (rule["name"], round(rule["value"], 4), rule["limit"], rule["problem"], rule["note"])
        for rule in verdict(hopeless).document()
    ]
    before = "credit_risk_model:v1"
    assert found == [
        ("holdout_rows", 2000, "at least 200", "", ""),
        ("auc", 0.8287, "at least 0.8", "", ""),
        ("ks", 0.4993, "at least 0.45", "", ""),
        ("calibration_slope", 0.733, "at least 0.75", "calibration_slope is 0.733, below the floor of 0.75", ""),
        ("log_loss", 0.4754, "at most 0.47", "log_loss is 0.4754, above the ceiling of 0.47", ""),
        ("brier", 0.1553, "at most 0.155", "brier is 0.1553, above the ceiling of 0.155", ""),
        ("calibration_slope", 0.733, "at most 1.35", "", ""),
        (
            "auc_worse_by", 0.0499, "at most 0.02", "auc_worse_by is 0.04988, above the ceiling of 0.02",
            f"0.8287, {before} 0.8689",
        ),
        (
            "log_loss_worse_by", 0.0746, "at most 0.02", "log_loss_worse_by is 0.07462, above the ceiling of 0.02",
            f"0.4754, {before} 0.4159",
        ),
        ("decision_flips", 0.214, "at most 0.25", "", f"against {before}"),
        ("approval_ratio[marital]", 0.9862, "", "", "married 57%, single 58%"),
        (
            "schema", 2, "compatible with the champion's", f"schema differs from that of {before}",
            "debt: removed; age: new and required; --allow-schema-change --reason TEXT accepts it",
        ),
        (
            "monotone", 6, "in the contract's directions",
            "monotone: the probability moves against the contract's direction", "a, b, c, d, e …",
        ),
        (
            "parity", 0.001, "at most 1e-06", "parity is 0.001, above the ceiling of 1e-06",
            "against the answers recorded at logging",
        ),
        ("milliseconds", 9, "at most 5", "milliseconds is 9, above the ceiling of 5", "one application"),
        ("megabytes", 99, "at most 50", "megabytes is 99, above the ceiling of 50", "stored model"),
    ]  # fmt: skip
    assert all(rule.passed == (not rule.problem) for rule in verdict(hopeless).rules)
    assert [rule.name for rule in verdict(hopeless).rules if rule.binding] == ["parity"]


def test_the_table_to_the_letter() -> None:
    rules = (
        Rule("auc", 0.86887, "at least 0.8", passed=True),
        Rule("champion", None, "", passed=True, note="nothing is promoted yet"),
        Rule("megabytes", 99.0, "at most 50", passed=False, problem="too large", note="stored model"),
    )
    assert Verdict(rules).table().splitlines() == [
        "rule       value   limit               note",
        "auc        0.8689  at least 0.8  pass",
        "champion   -       -             pass  nothing is promoted yet",
        "megabytes  99      at most 50    FAIL  stored model",
    ]
    assert Verdict(rules).reasons() == "too large (stored model)"
    assert not Verdict(rules).passed
    assert Verdict(rules).can_be_forced
    assert str(rules[0]) == "auc"


def test_values_on_the_limit_pass() -> None:
    at_limit = sound(milliseconds=SETTINGS.milliseconds, megabytes=SETTINGS.megabytes, parity=1e-6)
    assert verdict(at_limit, holdout_rows=2000).passed
    assert broken(at_limit, holdout_rows=2001) == {"holdout_rows"}


@pytest.mark.parametrize(
    ("changes", "note"),
    [
        ({"champion": None, "champion_name": None}, "nothing is promoted yet: nothing to compare with"),
        ({"champion": None, "champion_failure": "cannot be loaded"}, "credit_risk_model:v1: cannot be loaded"),
    ],
)
def test_a_champion_that_is_not_there_is_said(changes: dict[str, Any], note: str) -> None:
    rules = [rule for rule in verdict(sound(**changes)).rules if rule.name == "champion"]
    assert [(rule.note, rule.value) for rule in rules] == [(note, None)]
    said = "champion credit_risk_model:v1 cannot score these rows, so the candidate cannot be compared with it"
    assert [rule.problem for rule in rules if not rule.passed] == ([said] if "champion_failure" in changes else [])


def test_small_groups_are_left_out_and_one_group_is_no_comparison() -> None:
    labels, _ = draw()
    names = np.array(["single"] * 1000 + ["married"] * 970 + ["widow"] * 30)
    settings = SETTINGS.approval_ratio.model_copy(update={"group_rows": 30})

    def rule(groups: Any, **changes: Any) -> Rule:
        found = verdict(sound(groups={"marital": groups}, **changes), approval_ratio=settings).rules
        return next(rule for rule in found if rule.name == "approval_ratio[marital]")

    scores = np.where(names == "widow", 0.9, 0.1)
    assert rule(names, candidate=scores).note == "widow 0%, married 100%"
    assert rule(names, candidate=scores).value == 0
    assert rule(np.array([*names[:-1], "single"]), candidate=scores).note == "single 100%, married 100%"
    alone = rule(np.array(["single"] * len(labels)))
    assert (alone.value, alone.passed, alone.note) == (None, True, "fewer than two groups of 30 rows")
    assert rule(names, candidate=np.full(len(labels), 0.9)).value == 1  # nobody is approved: no difference


def test_an_identical_candidate_passes_by_a_rule_that_says_so() -> None:
    judged = verdict(sound(is_identical=True))
    assert judged.passed
    note = "identical to credit_risk_model:v1: same booster, same contract"
    assert [rule for rule in judged.rules if rule.name == "champion"] == [
        Rule("champion", None, "", passed=True, note=note)
    ]


def test_a_contract_without_changes_and_an_allowed_change_are_reported() -> None:
    changed = sound(schema_changes=("debt: removed",))
    allowed = judge(changed, SETTINGS, THRESHOLDS, allow_schema_change=True)
    found = [rule for judged in (verdict(sound()), allowed) for rule in judged.rules if rule.name == "schema"]
    assert found == [
        Rule("schema", 0.0, "compatible with the champion's", passed=True),
        Rule("schema", 1.0, "", passed=True, note="allowed: debt: removed"),
    ]


def test_a_champion_that_cannot_be_compared_is_a_rule_of_its_own() -> None:
    found = verdict(sound(champion=None, champion_failure="gone")).rules
    assert [rule.limit for rule in found if rule.name == "champion"] == ["compared"]
    nothing = verdict(sound(champion=None, champion_name=None)).rules
    assert [rule.limit for rule in nothing if rule.name == "champion"] == [""]


def test_every_audited_field_is_looked_at() -> None:
    labels, _ = draw()
    halves = np.where(np.arange(len(labels)) % 2, "a", "b")
    groups = {"branch": np.full(len(labels), "one"), "marital": halves}
    strict = SETTINGS.approval_ratio.model_copy(update={"at_least": 0.8})
    found = [
        rule for rule in verdict(sound(groups=groups), approval_ratio=strict).rules if "approval" in rule.name
    ]
    alone = "fewer than two groups of 30 rows"
    assert found[0] == Rule("approval_ratio[branch]", None, "", passed=True, note=alone)
    assert (found[1].name, found[1].limit) == ("approval_ratio[marital]", "at least 0.8")
    assert found[1].note.startswith("b ")
    assert len(found) == 2


def test_a_holdout_that_decides_nothing_says_why() -> None:
    labels, _ = draw(150)
    few = verdict(sound(labels=np.ones_like(labels), holdout_note="1,850 rows were left out"))
    assert few.reasons() == "holdout_rows: only one of the two labels occurs (1,850 rows were left out)"
    assert few.rules[0].passed is False
    slow = verdict(sound(milliseconds=6.0, megabytes=51.0))
    assert slow.reasons() == (
        "milliseconds is 6, above the ceiling of 5 (one application); "
        "megabytes is 51, above the ceiling of 50 (stored model)"
    )
