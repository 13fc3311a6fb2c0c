"""What is known of a candidate in, a verdict with its reasons out; pure: nothing is read, written or logged."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from pipeline.core.contract.schema import Field, Schema
from pipeline.core.model.bundle import TOLERANCE
from pipeline.core.policy import STATUSES, Thresholds, decide_many
from pipeline.evaluation.metrics import Floats, Labels, Probabilities, metrics
from pipeline.promotion.settings import ApprovalSettings, ChampionSettings, PromoteSettings

_CELLS = 4_000_000
"""Cells of one block of bootstrap weights: 32 MB."""


@dataclass(frozen=True)
class Evidence:
    """All that the gate looks at.

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
        What the candidate's contract refuses or understands unlike the champion's.
    monotone_breaks
        Columns along which the probability moves against the contract's direction.
    parity
        Largest difference between the stored model's and the MLflow model's probabilities.
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
    note
        What a person may want to know besides.
    binding
        Whether not even ``--force`` passes it.
    """

    name: str
    value: float | None
    limit: str
    passed: bool
    note: str = ""
    binding: bool = False

    def __str__(self) -> str:
        note = f" ({self.note})" if self.note else ""
        return f"{self.name} must be {self.limit}, received {_text(self.value)}{note}"


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
    contract = _none_of("schema", evidence.schema_changes, "compatible with the champion's")
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
            replace(contract, passed=True, limit="") if allow_schema_change else contract,
            _none_of("monotone", evidence.monotone_breaks, "in the contract's directions"),
            _at_most("parity", evidence.parity, TOLERANCE, "stored model against MLflow's", binding=True),
            _at_most("milliseconds", evidence.milliseconds, settings.milliseconds, "one application"),
            _at_most("megabytes", evidence.megabytes, settings.megabytes, "stored model"),
        )
    )


def schema_changes(champion: Schema, candidate: Schema) -> tuple[str, ...]:
    """Say what breaks for a client of the champion when the candidate answers.

    Compatible means: every application that the champion accepts is accepted, and means the same.
    """
    changes = []
    if champion.target != candidate.target:
        changes.append("target differs")
    changes += [f"{name}: removed" for name in champion.fields if name not in candidate.fields]
    for name, field in candidate.fields.items():
        if name in champion.fields:
            changes += [f"{name}: {change}" for change in _field_changes(champion.fields[name], field)]
        elif not field.optional:
            changes.append(f"{name}: new and required")
    return tuple(changes)


def worse_by(
    labels: Labels, candidate: Probabilities, champion: Probabilities, settings: ChampionSettings
) -> dict[str, float]:
    """Upper confidence limits of how much worse the candidate is, by metric: positive = worse.

    Paired bootstrap with Poisson weights (Hanley and MacGibbon, 2006): each resample weighs every row by an
    independent Poisson(1) count, the same for both models. Percentile limit, one-sided.

    Parameters
    ----------
    labels, candidate, champion
        Shape (n,), the same rows.

    Returns
    -------
    dict
        auc, brier, log_loss.
    """
    rows = _thinned(len(labels), settings.rows)
    y = np.asarray(labels, dtype=np.float64)[rows]
    p, q = (np.asarray(scores, dtype=np.float64)[rows] for scores in (candidate, champion))
    losses = np.stack([(p - y) ** 2 - (q - y) ** 2, _log_losses(y, p) - _log_losses(y, q)], axis=1)  # (n, 2)
    differences = []
    for weights in _weights(settings.resamples, len(y)):
        means = weights @ losses / weights.sum(axis=1, keepdims=True)  # (block, 2)
        area = _weighted_auc(y, q, weights) - _weighted_auc(y, p, weights)
        differences.append(np.column_stack([area, means]))
    limits = np.quantile(np.concatenate(differences), settings.confidence, axis=0)
    return dict(zip(("auc", "brier", "log_loss"), limits.tolist(), strict=True))


def _holdout(evidence: Evidence, rows: int) -> Rule:
    rule = _at_least("holdout_rows", float(len(evidence.labels)), float(rows), evidence.holdout_note)
    if len(np.unique(evidence.labels)) < 2:
        return replace(rule, passed=False, note="both labels must occur")
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
        yield Rule("champion", None, "able to score the rows", excused, f"{note}: {evidence.champion_failure}")
        return
    worse = worse_by(evidence.labels, evidence.candidate, evidence.champion, settings)
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
    return Rule(name, value, f"at least {floor:g}", value >= floor, note)


def _at_most(name: str, value: float, ceiling: float, note: str = "", *, binding: bool = False) -> Rule:
    return Rule(name, value, f"at most {ceiling:g}", value <= ceiling, note, binding)


def _none_of(name: str, problems: tuple[str, ...], limit: str) -> Rule:
    shown = ", ".join(problems[:5]) + (" …" if len(problems) > 5 else "")
    return Rule(name, float(len(problems)), limit, not problems, shown)


def _field_changes(before: Field, after: Field) -> Iterator[str]:
    if before.kind != after.kind and not (before.kind == "integer" and after.kind == "number"):
        yield f"kind {before.kind} became {after.kind}"
        return
    if before.optional and not after.optional:
        yield "became required"
    if before.unit != after.unit:
        yield f"unit {before.unit} became {after.unit}"
    if set(before.missing) != set(after.missing):
        yield "codes of missing differ"
    if lost := set(before.categories) - set(after.categories):
        yield f"no longer accepts {', '.join(sorted(lost))}"
    if _is_narrower(before, after):
        yield "its range is narrower"


def _is_narrower(before: Field, after: Field) -> bool:
    if before.min is None or before.max is None or after.min is None or after.max is None:
        return False
    return after.min > before.min or after.max < before.max


def _thinned(count: int, most: int) -> npt.NDArray[np.intp]:
    """Positions of at most `most` rows, evenly spread: shape (min(count, most),)."""
    return np.linspace(0, count - 1, min(count, most)).round().astype(np.intp)


def _weights(resamples: int, rows: int) -> Iterator[Floats]:
    """Poisson weights, block by block: shape (block, rows). Seeded: the same evidence gets the same verdict."""
    generator = np.random.default_rng(0)
    block = max(1, _CELLS // rows)
    for start in range(0, resamples, block):
        yield generator.poisson(1.0, (min(block, resamples - start), rows)).astype(np.float64)


def _log_losses(labels: Floats, probabilities: Floats) -> Floats:
    p = np.clip(probabilities, 1e-7, 1 - 1e-7)
    return -np.where(labels > 0, np.log(p), np.log1p(-p))


def _weighted_auc(labels: Floats, scores: Floats, weights: Floats) -> Floats:
    """Area under the ROC curve under each row of weights (m, n): shape (m,). Ties count half."""
    order = np.argsort(scores, kind="stable")
    starts = np.flatnonzero(np.diff(scores[order], prepend=-np.inf))
    bad = np.add.reduceat((weights * labels)[:, order], starts, axis=1)
    good = np.add.reduceat((weights * (1 - labels))[:, order], starts, axis=1)
    below = np.cumsum(good, axis=1) - good / 2
    area: Floats = (bad * below).sum(axis=1) / (bad.sum(axis=1) * good.sum(axis=1))
    return area


def _text(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"
