"""Summarise a finished training, as text for people and as values for programs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from pipeline.core.promoted import MODEL_NAME
from pipeline.evaluation.metrics import Band
from pipeline.registry.client import CANDIDATE
from pipeline.report import Report
from pipeline.training.fitting import Outcome

NEXT = "make promote    (python -m pipeline promote)"


def summarise(
    outcome: Outcome, version: Any, study: str, earlier: int, total: int, notes: Sequence[str]
) -> Report:
    """Report a training.

    Parameters
    ----------
    version
        The registered MLflow version.
    earlier, total
        Trials that the study had finished before, and those that were asked for in all.
    notes
        One line for each thing left out of the table.
    """
    data = _data(outcome, version, study, earlier, total)
    return Report("\n".join([*notes, *_resumed(study, earlier, total), *_lines(outcome, data)]), data)


def _data(outcome: Outcome, version: Any, study: str, earlier: int, total: int) -> dict[str, Any]:
    return {
        "model": MODEL_NAME,
        "version": int(version.version),
        "run_id": version.run_id,
        "study": study,
        "trials": max(total, earlier),
        "resumed": earlier,
        "best_trial": outcome.best.number,
        "parameters": outcome.best.parameters,
        "rounds": outcome.best.rounds,
        "cv": outcome.best.scores,
        "test": outcome.metrics,
        "bands": [{**band._asdict(), "bad_rate": _number(band.bad_rate)} for band in outcome.bands],
    }


def _number(value: float) -> float | None:
    """Replace NaN, which JSON does not have."""
    return None if math.isnan(value) else value


def _resumed(study: str, earlier: int, total: int) -> list[str]:
    if earlier >= total:
        return [f"study {study} was complete ({earlier} trials): nothing evaluated, its best logged again"]
    return [f"study {study} resumed after {earlier} of {total} trials"] if earlier else []


def _lines(outcome: Outcome, data: dict[str, Any]) -> list[str]:
    cv = {**outcome.best.scores, "gini": 2 * outcome.best.scores["auc"] - 1}
    return [
        f"{'':12}{'AUC':>8}{'Gini':>8}{'KS':>8}{'Brier':>8}{'log loss':>10}{'slope':>8}{'ECE':>8}",
        f"{'test':12}{_scores(outcome.metrics)}{outcome.metrics['calibration_slope']:8.3f}"
        f"{outcome.metrics['ece']:8.4f}",
        f"{'folds':12}{_scores(cv)}",
        *_decisions(outcome.bands),
        f"{'study':12}{data['study']}: best of {data['trials']} trials is {data['best_trial']}, "
        f"{data['rounds']} boosting rounds",
        f"{'run':12}{data['run_id']}",
        f"{'version':12}{MODEL_NAME} {data['version']}, alias {CANDIDATE}",
        f"{'next':12}{NEXT}",
    ]


def _scores(values: dict[str, float]) -> str:
    columns = [f"{values[name]:8.4f}" for name in ("auc", "gini", "ks", "brier")]
    return "".join([*columns, f"{values['log_loss']:10.4f}"])


def _decisions(found: list[Band]) -> list[str]:
    heads = ["decisions", *[""] * (len(found) - 1)]
    return [f"{head:12}{band.decision:10}{_shares(band)}" for head, band in zip(heads, found, strict=True)]


def _shares(band: Band) -> str:
    if not band.share:
        return "no applicants"
    return f"{band.share:4.0%} of applicants, {band.bad_rate:3.0%} of them defaulted"
