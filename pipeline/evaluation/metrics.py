"""Compute the metrics by which a model is judged from labels and probabilities of default."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from scipy.special import expit

from pipeline.core.policy import STATUSES, Status, Thresholds, decide_many

Labels = npt.NDArray[np.floating]
Probabilities = npt.NDArray[np.floating]
Floats = npt.NDArray[np.float64]

BINS = 10
"""Bins of equal count in the calibration error and the calibration curve."""

_CERTAIN = 1e-7
"""Probabilities are kept this far from 0 and 1, where a logarithm has no value."""


class Band(NamedTuple):
    """What one decision would have done.

    Attributes
    ----------
    decision
        APPROVED, MAYBE or DECLINED.
    share
        Of all applicants.
    bad_rate
        Share of those in the band that defaulted; NaN if there are none.
    """

    decision: Status
    share: float
    bad_rate: float


def metrics(labels: Labels, probabilities: Probabilities) -> dict[str, float]:
    """Judge probabilities of default against what happened.

    Parameters
    ----------
    labels
        Shape (n,), 1 = default; both labels occur.
    probabilities
        Shape (n,), in [0, 1].

    Returns
    -------
    dict
        auc, gini, ks, brier, log_loss, calibration_slope, calibration_intercept, ece.
    """
    area = auc(labels, probabilities)
    intercept, slope = calibration(labels, probabilities)
    return {
        "auc": area,
        "gini": 2 * area - 1,
        "ks": ks(labels, probabilities),
        "brier": brier(labels, probabilities),
        "log_loss": log_loss(labels, probabilities),
        "calibration_slope": slope,
        "calibration_intercept": intercept,
        "ece": expected_calibration_error(labels, probabilities),
    }


def bands(labels: Labels, probabilities: Probabilities, thresholds: Thresholds) -> list[Band]:
    """Share of applicants and bad rate of each decision, in the order of `STATUSES`."""
    decisions = decide_many(probabilities, thresholds)
    members = [decisions == position for position in range(len(STATUSES))]
    return [
        Band(status, float(inside.mean()), float(labels[inside].mean()) if inside.any() else float("nan"))
        for status, inside in zip(STATUSES, members, strict=True)
    ]


def auc(labels: Labels, probabilities: Probabilities) -> float:
    """Area under the ROC curve: the chance that a default scores above a repaid loan; ties count half."""
    _, position, count = np.unique(probabilities, return_inverse=True, return_counts=True)
    ranks = (np.cumsum(count) - (count - 1) / 2)[position]
    bad = labels > 0
    positives, negatives = int(bad.sum()), int((~bad).sum())
    return float((ranks[bad].sum() - positives * (positives + 1) / 2) / (positives * negatives))


def ks(labels: Labels, probabilities: Probabilities) -> float:
    """Kolmogorov-Smirnov distance between the scores of defaulted and of repaid loans, in [0, 1]."""
    return float(np.max(np.abs(np.subtract(*cumulative_shares(labels, probabilities)[1:]))))


def cumulative_shares(labels: Labels, probabilities: Probabilities) -> tuple[Floats, Floats, Floats]:
    """Each distinct probability, rising, and the shares of repaid and of defaulted loans that score up to it."""
    values, position = np.unique(probabilities, return_inverse=True)
    bad = np.bincount(position, weights=labels, minlength=len(values))
    good = np.bincount(position, minlength=len(values)) - bad
    return values.astype(np.float64), np.cumsum(good) / good.sum(), np.cumsum(bad) / bad.sum()


def brier(labels: Labels, probabilities: Probabilities) -> float:
    """Mean squared difference between probability and outcome (Brier, 1950): lower is better."""
    return float(np.mean((np.asarray(probabilities, np.float64) - labels) ** 2))


def log_loss(labels: Labels, probabilities: Probabilities) -> float:
    """Mean negative log-likelihood, natural logarithm: lower is better."""
    p = _inside(probabilities)
    return float(-np.mean(np.where(labels > 0, np.log(p), np.log1p(-p))))


def calibration(labels: Labels, probabilities: Probabilities) -> tuple[float, float]:
    """Intercept and slope of a logistic regression of the outcome on the log-odds (Cox, 1958).

    (0, 1) is perfect; a slope below 1 says that the probabilities are too extreme.
    """
    p = _inside(probabilities)
    x = np.column_stack([np.ones(len(p)), np.log(p / (1 - p))])
    rate = np.clip(np.mean(labels), _CERTAIN, 1 - _CERTAIN)
    # Newton's method, from the base rate: from (0, 1) it diverges for a loud model that knows nothing.
    beta = np.array([np.log(rate / (1 - rate)), 0.0])
    for _ in range(25):
        # Kept in range: with labels that the probabilities separate, the slope has no bound.
        fitted = expit(np.clip(x @ beta, -30, 30))
        hessian = (x * (fitted * (1 - fitted))[:, None]).T @ x
        step = np.linalg.lstsq(hessian, x.T @ (labels - fitted), rcond=None)[0]
        beta = beta + step
        if np.abs(step).max() < 1e-9:
            break
    return float(beta[0]), float(beta[1])


def expected_calibration_error(labels: Labels, probabilities: Probabilities) -> float:
    """Mean distance between predicted and observed rate over `BINS` bins of equal count, in [0, 1]."""
    predicted, observed, count = calibration_curve(labels, probabilities)
    return float(np.average(np.abs(predicted - observed), weights=count))


def calibration_curve(labels: Labels, probabilities: Probabilities) -> tuple[Floats, Floats, Floats]:
    """Mean probability, observed rate and count of each of `BINS` bins of equal count, by rising probability."""
    order = np.argsort(probabilities, kind="stable")
    parts = [part for part in np.array_split(order, BINS) if len(part)]
    predicted = np.array([np.mean(probabilities[part], dtype=np.float64) for part in parts])
    observed = np.array([np.mean(labels[part], dtype=np.float64) for part in parts])
    return predicted, observed, np.array([len(part) for part in parts], dtype=np.float64)


def _inside(probabilities: Probabilities) -> Floats:
    return np.clip(np.asarray(probabilities, dtype=np.float64), _CERTAIN, 1 - _CERTAIN)
