"""Compare two models on the same rows: how much worse one may be, with its uncertainty."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from pipeline.evaluation.metrics import Floats, Labels, Probabilities

_CELLS = 4_000_000
"""Cells of one block of bootstrap weights: 32 MB."""


def worse_by(
    labels: Labels,
    candidate: Probabilities,
    champion: Probabilities,
    *,
    confidence: float,
    resamples: int,
    rows: int,
) -> dict[str, float]:
    """Upper confidence limits of how much worse the candidate is, by metric: positive = worse.

    Paired bootstrap with Poisson weights (Hanley and MacGibbon, 2006): each resample weighs every row by an
    independent Poisson(1) count, the same for both models. Percentile limit, one-sided.

    Parameters
    ----------
    labels, candidate, champion
        Shape (n,), the same rows.
    confidence
        One-sided, in (0.5, 1).
    resamples
        Bootstrap resamples.
    rows
        Rows in a resample at most; more of them are thinned evenly.

    Returns
    -------
    dict
        auc, brier, log_loss.
    """
    chosen = _thinned(len(labels), rows)
    y = np.asarray(labels, dtype=np.float64)[chosen]
    p, q = (np.asarray(scores, dtype=np.float64)[chosen] for scores in (candidate, champion))
    losses = np.stack([(p - y) ** 2 - (q - y) ** 2, _log_losses(y, p) - _log_losses(y, q)], axis=1)  # (n, 2)
    differences = []
    for weights in _weights(resamples, len(y)):
        means = weights @ losses / weights.sum(axis=1, keepdims=True)  # (block, 2)
        area = _weighted_auc(y, q, weights) - _weighted_auc(y, p, weights)
        differences.append(np.column_stack([area, means]))
    limits = np.quantile(np.concatenate(differences), confidence, axis=0)
    return dict(zip(("auc", "brier", "log_loss"), limits.tolist(), strict=True))


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
