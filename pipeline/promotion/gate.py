"""The gate: apply the rules of ``promote.yaml`` to the evidence on a candidate. Nothing is read or written."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from pipeline.core.model.bundle import TOLERANCE
from pipeline.core.policy import STATUSES, Thresholds, decide_many
from pipeline.evaluation.comparison import worse_by
from pipeline.evaluation.metrics import Labels, Probabilities, metrics
from pipeline.promotion.settings import ApprovalSettings, ChampionSettings, PromoteSettings


@dataclass(frozen=True)
class Evidence:
    """Everything that the gate considers.

    Attributes
    ----------
    labels
        Of the holdout: shape (n,), 1 = default.
    candidate, champion
        Probabilities of default for the same rows, shape (n,), scored now; champion None if it could not.
    champion_name
        The champion's version; None if there is no champion.
    champion_failure
        Why the champion cannot score the rows; empty if it can.
    holdout_note
        Why there are fewer rows than the candidate's run held out; empty if there are not.
    groups
        Audit field → its values for the same rows, shape (n,).
    schema_changes
        What a person must allow before the candidate answers the champion's clients; see `compatibility`.
    is_identical
        Whether candidate and champion are the same booster under the same contract.
    monotone_breaks
        Columns along which the probability moves against the contract's direction.
    parity
        Largest difference between what the stored model answers and what was recorded when it was logged.
    milliseconds, megabytes
        Time of encoding and scoring one application, and size of the stored model.
    """

    labels: Labels
    candidate: Probabilities
    champion: Probabilities | None
    champion_name: str | None
    champion_failure: str
    holdout_note: str
    groups: Mapping[str, npt.NDArray[Any]]
    schema_changes: tuple[str, ...]
    is_identical: bool
    monotone_breaks: tuple[str, ...]
    parity: float
    milliseconds: float
    megabytes: float


@dataclass(frozen=True)
class Rule:
    """One rule, applied.

    Attributes
    ----------
    name
        What is looked at.
    value
        What was found; None if it could not be.
    limit
        What is allowed, for people; empty if the rule only reports.
    passed
        Whether the value is within the limit.
    problem
        What is wrong with the value, in words; empty if nothing is.
    note
        What a person may want to know besides.
    binding
        Whether not even ``--force`` passes it.
    """

    name: str
    value: float | None
    limit: str
    passed: bool
    problem: str = ""
    note: str = ""
    binding: bool = False

    def __str__(self) -> str:
        note = f" ({self.note})" if self.note else ""
        return f"{self.problem or self.name}{note}"


@dataclass(frozen=True)
class Verdict:
    """What the gate says of a candidate."""

    rules: tuple[Rule, ...]

    @property
    def broken(self) -> tuple[Rule, ...]:
        """The rules that refuse it."""
        return tuple(rule for rule in self.rules if not rule.passed)

    @property
    def passed(self) -> bool:
        """Whether no rule refuses it."""
        return not self.broken

    @property
    def can_be_forced(self) -> bool:
        """Whether ``--force`` may override it."""
        return not any(rule.binding for rule in self.broken)

    def reasons(self) -> str:
        """The broken rules in one line."""
        return "; ".join(str(rule) for rule in self.broken)

    def document(self) -> list[dict[str, Any]]:
        """The rules as plain values."""
        return [asdict(rule) for rule in self.rules]

    def table(self) -> str:
        """The rules as a table for people."""
        rows = [
            (rule.name, _text(rule.value), rule.limit or "-", "pass" if rule.passed else "FAIL", rule.note)
            for rule in self.rules
        ]
        heading = ("rule", "value", "limit", "", "note")
        widths = [max(len(row[column]) for row in [heading, *rows]) for column in range(len(heading))]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
        title = "  ".join(cell.ljust(width) for cell, width in zip(heading, widths, strict=True))
        return "\n".join(line.rstrip() for line in [title, *lines])


def judge(
    evidence: Evidence, settings: PromoteSettings, thresholds: Thresholds, *, allow_schema_change: bool = False
) -> Verdict:
    """Apply every rule of ``conf/promote.yaml``; none is skipped because another refused.

    Parameters
    ----------
    allow_schema_change
        Report what the candidate's contract breaks for the champion's clients, and do not refuse it.
    """
    contract = _contract(evidence, allowed=allow_schema_change)
    holdout = _holdout(evidence, settings.holdout_rows)
    statistics = (
        (
            *_quality(evidence, settings),
            *_against_champion(evidence, settings.against_champion, thresholds, excused=allow_schema_change),
            *_approvals(evidence, settings.approval_ratio, thresholds),
        )
        if holdout.passed
        else ()
    )
    return Verdict(
        (
            holdout,
            *statistics,
            contract,
            _monotone(evidence.monotone_breaks),
            _at_most(
                "parity",
                evidence.parity,
                TOLERANCE,
                "against the answers recorded at logging",
                binding=True,
            ),
            _at_most("milliseconds", evidence.milliseconds, settings.milliseconds, "one application"),
            _at_most("megabytes", evidence.megabytes, settings.megabytes, "stored model"),
        )
    )


def _holdout(evidence: Evidence, rows: int) -> Rule:
    rule = _at_least("holdout_rows", float(len(evidence.labels)), float(rows), evidence.holdout_note)
    if len(np.unique(evidence.labels)) < 2:
        return replace(rule, passed=False, problem="holdout_rows: only one of the two labels occurs")
    return rule


def _quality(evidence: Evidence, settings: PromoteSettings) -> Iterator[Rule]:
    found = metrics(evidence.labels, evidence.candidate)
    for name, floor in settings.at_least.items():
        yield _at_least(name, found[name], floor)
    for name, ceiling in settings.at_most.items():
        yield _at_most(name, found[name], ceiling)


def _against_champion(
    evidence: Evidence, settings: ChampionSettings, thresholds: Thresholds, *, excused: bool
) -> Iterator[Rule]:
    if evidence.champion_name is None:
        yield Rule("champion", None, "", passed=True, note="nothing is promoted yet: nothing to compare with")
        return
    note = evidence.champion_name
    if evidence.champion is None:
        problem = f"champion {note} cannot score these rows, so the candidate cannot be compared with it"
        allowed = "not compared, as --allow-schema-change allows; " if excused else ""
        yield Rule("champion", None, "compared", excused, problem, f"{allowed}{note}: {evidence.champion_failure}")
        return
    if evidence.is_identical:
        yield Rule("champion", None, "", passed=True, note=f"identical to {note}: same booster, same contract")
    sampling = settings.model_dump(include={"confidence", "resamples", "rows"})
    worse = worse_by(evidence.labels, evidence.candidate, evidence.champion, **sampling)
    now, before = (metrics(evidence.labels, scores) for scores in (evidence.candidate, evidence.champion))
    for name, margin in settings.margins.items():
        comparison = f"{now[name]:.4f}, {note} {before[name]:.4f}"
        yield _at_most(f"{name}_worse_by", worse[name], margin, comparison)
    flips = decide_many(evidence.candidate, thresholds) != decide_many(evidence.champion, thresholds)
    yield _at_most("decision_flips", float(flips.mean()), settings.decision_flips, f"against {note}")


def _approvals(evidence: Evidence, settings: ApprovalSettings, thresholds: Thresholds) -> Iterator[Rule]:
    approved = decide_many(evidence.candidate, thresholds) == STATUSES.index("APPROVED")
    for field, values in evidence.groups.items():
        rates = {
            str(group): float(approved[values == group].mean())
            for group in np.unique(values)
            if (values == group).sum() >= settings.group_rows
        }
        name = f"approval_ratio[{field}]"
        if len(rates) < 2:
            yield Rule(name, None, "", passed=True, note=f"fewer than two groups of {settings.group_rows} rows")
            continue
        low, high = min(rates, key=lambda group: rates[group]), max(rates, key=lambda group: rates[group])
        ratio = rates[low] / rates[high] if rates[high] else 1.0
        note = f"{low} {rates[low]:.0%}, {high} {rates[high]:.0%}"
        if settings.at_least is None:
            yield Rule(name, ratio, "", passed=True, note=note)
        else:
            yield _at_least(name, ratio, settings.at_least, note)


def _at_least(name: str, value: float, floor: float, note: str = "") -> Rule:
    problem = "" if value >= floor else f"{name} is {_text(value)}, below the floor of {floor:g}"
    return Rule(name, value, f"at least {floor:g}", not problem, problem, note)


def _at_most(name: str, value: float, ceiling: float, note: str = "", *, binding: bool = False) -> Rule:
    problem = "" if value <= ceiling else f"{name} is {_text(value)}, above the ceiling of {ceiling:g}"
    return Rule(name, value, f"at most {ceiling:g}", not problem, problem, note, binding)


def _contract(evidence: Evidence, *, allowed: bool) -> Rule:
    """Changes of the contract: reported either way, refused unless a person allowed them."""
    changes = evidence.schema_changes
    if not changes:
        return Rule("schema", 0.0, "compatible with the champion's", passed=True)
    shown = "; ".join(changes)
    if allowed:
        return Rule("schema", float(len(changes)), "", passed=True, note=f"allowed: {shown}")
    problem = f"schema differs from that of {evidence.champion_name}"
    cure = "--allow-schema-change --reason TEXT accepts it"
    return Rule(
        "schema", float(len(changes)), "compatible with the champion's", False, problem, f"{shown}; {cure}"
    )


def _monotone(breaks: tuple[str, ...]) -> Rule:
    shown = ", ".join(breaks[:5]) + (" …" if len(breaks) > 5 else "")
    problem = "monotone: the probability moves against the contract's direction" if breaks else ""
    return Rule("monotone", float(len(breaks)), "in the contract's directions", not breaks, problem, shown)


def _text(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"
