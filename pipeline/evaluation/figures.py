"""Draw what a model does, what it looks at, and how the search for it went."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from pipeline.core.model.features import Matrix
from pipeline.core.policy import Thresholds
from pipeline.evaluation.metrics import Labels, Probabilities, auc, calibration_curve, cumulative_shares, ks

GOOD, BAD, MUTED = "#2c7fb8", "#d95f0e", "#8c8c8c"
"""Repaid, defaulted, and whatever is only there to compare with. Told apart by the colour-blind, too."""

_TOP = 15
_BASELINE: dict[str, Any] = {"color": MUTED, "linestyle": "--", "linewidth": 1}


def performance_figures(labels: Labels, probabilities: Probabilities, thresholds: Thresholds) -> dict[str, Figure]:
    """Figures of a model's quality on held-out rows, by file name without ending.

    Parameters
    ----------
    labels, probabilities
        Shape (n,): 1 = default; probability of default in [0, 1].
    thresholds
        Where one decision ends and the next begins.
    """
    return {
        "roc": _roc(labels, probabilities),
        "precision_recall": _precision_recall(labels, probabilities, thresholds),
        "calibration": _calibration(labels, probabilities),
        "scores": _scores(labels, probabilities, thresholds),
        "gain_and_lift": _gain_and_lift(labels, probabilities),
        "ks": _ks(labels, probabilities),
    }


def booster_figures(
    gains: Sequence[float], contributions: Matrix, matrix: Matrix, names: Sequence[str]
) -> dict[str, Figure]:
    """Figures of what a booster looks at.

    Parameters
    ----------
    gains
        Total gain of each column, shape (k,).
    contributions
        Of each column to the log-odds of default of each row, without the bias: shape (n, k).
    matrix
        The rows, shape (n, k).
    names
        Of the k columns.
    """
    return {
        "feature_importance": _importance(np.asarray(gains, dtype=np.float64), names),
        "contributions": _contributions(contributions, matrix, names),
    }


def study_figures(scores: Mapping[int, float], importances: Mapping[str, float]) -> dict[str, Figure]:
    """Figures of a search: the mean log loss of each trial by its number, and how much each parameter mattered."""
    figures = {"study_history": _history(np.array(list(scores)), np.array(list(scores.values())))}
    if importances:
        figures["parameter_importance"] = _bars(
            list(importances),
            list(importances.values()),
            "Which parameters mattered",
            "share of the variation in log loss",
        )
    return figures


def _axes(title: str, x: str, y: str) -> tuple[Figure, Axes]:
    # Without pyplot: no window system, no global state, and half a second less to import.
    figure = Figure(figsize=(7, 5), dpi=110, layout="constrained")
    axes = figure.add_subplot()
    _label(axes, title, x, y)
    return figure, axes


def _label(axes: Axes, title: str, x: str, y: str) -> None:
    axes.set_title(title, loc="left", fontsize=12)
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25)


def _roc(labels: Labels, probabilities: Probabilities) -> Figure:
    area = auc(labels, probabilities)
    figure, axes = _axes(
        f"ROC: AUC {area:.3f}, Gini {2 * area - 1:.3f}",
        "repaid loans above the threshold (false positive rate)",
        "defaults above the threshold (true positive rate)",
    )
    _, good, bad = cumulative_shares(labels, probabilities)
    axes.plot([1, *(1 - good)], [1, *(1 - bad)], color=BAD, linewidth=2, label="model")
    axes.plot([0, 1], [0, 1], **_BASELINE, label="chance")
    axes.set_aspect("equal")
    axes.legend(loc="lower right")
    return figure


def _precision_recall(labels: Labels, probabilities: Probabilities, thresholds: Thresholds) -> Figure:
    order = np.argsort(-probabilities, kind="stable")
    hits = np.cumsum(labels[order])
    recall, precision = hits / labels.sum(), hits / np.arange(1, len(labels) + 1)
    rate = float(np.mean(labels))
    figure, axes = _axes(
        "Precision and recall", "recall: defaults found", "precision: share of defaults among them"
    )
    axes.plot(recall, precision, color=BAD, linewidth=2, label="model")
    axes.axhline(rate, **_BASELINE, label=f"all applicants: {rate:.0%} default")
    for name, threshold in _named(thresholds):
        last = int(np.sum(probabilities > threshold)) - 1
        if last >= 0:
            axes.plot(recall[last], precision[last], "o", color="black")
            # Below and to the left of a falling curve there is room.
            axes.annotate(
                f"{name} (> {threshold:g})", (recall[last], precision[last]), (-6, -6),
                textcoords="offset points", ha="right", va="top",
            )  # fmt: skip
    axes.set_ylim(0, 1.03)
    axes.legend(loc="lower left")
    return figure


def _calibration(labels: Labels, probabilities: Probabilities) -> Figure:
    predicted, observed, count = calibration_curve(labels, probabilities)
    error = 1.96 * np.sqrt(np.maximum(observed * (1 - observed), 1e-9) / count)
    figure, axes = _axes(
        "Calibration: ten groups of equal size", "mean predicted probability of default", "share that defaulted"
    )
    axes.plot([0, 1], [0, 1], **_BASELINE, label="perfect")
    axes.errorbar(predicted, observed, yerr=error, fmt="o-", color=BAD, capsize=3, label="model, 95 % interval")
    axes.set_aspect("equal")
    axes.set_xlim(0, 1)
    axes.set_ylim(0, 1)
    axes.legend(loc="upper left")
    return figure


def _scores(labels: Labels, probabilities: Probabilities, thresholds: Thresholds) -> Figure:
    figure, axes = _axes("Scores of repaid and of defaulted loans", "probability of default", "applicants")
    edges = np.linspace(0, 1, 41)
    axes.hist(
        [probabilities[labels == 0], probabilities[labels > 0]], bins=edges.tolist(), stacked=True,
        color=[GOOD, BAD], label=["repaid", "defaulted"],
    )  # fmt: skip
    top = axes.get_ylim()[1] * 1.12
    axes.set_ylim(0, top)
    for threshold in (thresholds.maybe_above, thresholds.declined_above):
        axes.axvline(threshold, color="black", linewidth=1)
    ends = [0, thresholds.maybe_above, thresholds.declined_above, 1]
    for name, left, right in zip(("APPROVED", "MAYBE", "DECLINED"), ends[:-1], ends[1:], strict=True):
        axes.text((left + right) / 2, top * 0.985, name, ha="center", va="top", fontsize=9)
    axes.set_xlim(0, 1)
    axes.legend(loc="center right")
    return figure


def _gain_and_lift(labels: Labels, probabilities: Probabilities) -> Figure:
    figure = Figure(figsize=(10, 4.6), dpi=110, layout="constrained")
    gain, lift = figure.subplots(1, 2)
    order = np.argsort(-probabilities, kind="stable")
    share = np.arange(1, len(labels) + 1) / len(labels)
    found = np.cumsum(labels[order]) / labels.sum()
    rate = float(np.mean(labels))
    _label(gain, "Gain", "riskiest share of applicants", "share of all defaults among them")
    gain.plot([0, *share], [0, *found], color=BAD, linewidth=2, label="model")
    gain.plot([0, rate, 1], [0, 1, 1], color=MUTED, linestyle=":", label="perfect")
    gain.plot([0, 1], [0, 1], **_BASELINE, label="chance")
    gain.legend(loc="lower right")
    _label(lift, "Lift by tenth", "tenth of applicants, riskiest first", "default rate relative to all")
    tenths = [float(np.mean(part)) / rate for part in np.array_split(labels[order], 10)]
    bars = lift.bar(range(1, len(tenths) + 1), tenths, color=BAD)
    lift.bar_label(bars, fmt="%.1f")
    lift.axhline(1, **_BASELINE)
    lift.set_xticks(range(1, len(tenths) + 1))
    return figure


def _ks(labels: Labels, probabilities: Probabilities) -> Figure:
    values, good, bad = cumulative_shares(labels, probabilities)
    widest = int(np.argmax(good - bad))
    figure, axes = _axes(
        f"Kolmogorov-Smirnov: {ks(labels, probabilities):.3f}, at a probability of {values[widest]:.2f}",
        "probability of default",
        "share that scores up to it",
    )
    axes.step(values, good, where="post", color=GOOD, linewidth=2, label="repaid")
    axes.step(values, bad, where="post", color=BAD, linewidth=2, label="defaulted")
    axes.vlines(values[widest], bad[widest], good[widest], color="black", label="greatest distance")
    axes.set_xlim(0, 1)
    axes.legend(loc="lower right")
    return figure


def _importance(gains: npt.NDArray[np.float64], names: Sequence[str]) -> Figure:
    top = np.argsort(-gains)[:_TOP]
    shares = gains / max(gains.sum(), 1e-12)
    title = f"What the model looks at: {len(top)} of {len(names)} columns"
    return _bars([names[i] for i in top], [float(shares[i]) for i in top], title, "share of the total gain")


def _bars(names: Sequence[str], values: Sequence[float], title: str, x: str) -> Figure:
    figure, axes = _axes(title, x, "")
    bars = axes.barh(range(len(names)), values, color=GOOD)
    axes.bar_label(bars, fmt=_percent, padding=3, fontsize=9)
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    axes.grid(visible=False, axis="y")
    axes.margins(x=0.1)
    axes.xaxis.set_major_formatter(_percent_tick)
    return figure


def _contributions(contributions: Matrix, matrix: Matrix, names: Sequence[str]) -> Figure:
    """One dot a row: to the right it pushed towards default; the colour says whether the value is low or high."""
    top = np.argsort(-np.abs(contributions).mean(axis=0))[:_TOP]
    figure, axes = _axes(
        "Contributions to the log-odds of default", "pushes towards repaying  ←  0  →  pushes towards default", ""
    )
    dots = None
    for position, column in enumerate(top):
        x = contributions[:, column]
        ranks, known = _ranks(matrix[:, column])
        y = position + _spread(x)
        axes.scatter(x[~known], y[~known], s=6, color=MUTED, linewidths=0)
        dots = axes.scatter(
            x[known], y[known], c=ranks[known], s=6, cmap="coolwarm", vmin=0, vmax=1, linewidths=0, alpha=0.8
        )
    axes.axvline(0, color="black", linewidth=0.8)
    axes.set_yticks(range(len(top)), [names[column] for column in top])
    axes.invert_yaxis()
    if dots is not None:
        bar = figure.colorbar(dots, ax=axes, ticks=[0, 1], aspect=40)
        bar.ax.set_yticklabels(["low", "high"])
        bar.set_label("value of the column (grey: missing)")
    return figure


def _ranks(values: Matrix) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.bool_]]:
    """Ranks of the known values scaled to [0, 1], ties equal, and which are known."""
    known = ~np.isnan(values)
    ranks = np.zeros(len(values))
    distinct, position = np.unique(values[known], return_inverse=True)
    ranks[known] = position / max(len(distinct) - 1, 1)
    return ranks, known


def _spread(x: Matrix) -> npt.NDArray[np.float64]:
    """Vertical offsets in [-0.4, 0.4] that spread dots of nearly equal x: the crowded places become wide."""
    cells = np.digitize(x, np.linspace(x.min(), x.max() + 1e-9, 60))
    offsets = np.zeros(len(x))
    crowd = max(np.bincount(cells).max(), 1)
    for cell in np.unique(cells):
        members = np.flatnonzero(cells == cell)
        offsets[members] = np.linspace(-0.4, 0.4, len(members)) * (len(members) / crowd) if len(members) > 1 else 0
    return offsets


def _history(numbers: npt.NDArray[np.int64], scores: npt.NDArray[np.float64]) -> Figure:
    figure, axes = _axes(
        f"{len(scores)} trials: best log loss {scores.min():.4f}",
        "number of the trial",
        "mean log loss of the folds",
    )
    axes.plot(numbers, scores, "o", color=GOOD, markersize=5, label="trial")
    axes.step(numbers, np.minimum.accumulate(scores), where="post", color=BAD, linewidth=2, label="best so far")
    # The worst trials of a search are far off: without this limit the interesting part is a flat line.
    low, high = float(scores.min()), float(np.quantile(scores, 0.9))
    margin = max((high - low) * 0.15, 1e-4)
    axes.set_ylim(low - margin, high + 2 * margin)
    beyond = int(np.sum(scores > high + 2 * margin))
    if beyond:
        axes.text(0.99, 0.98, f"{beyond} worse, above", transform=axes.transAxes, ha="right", va="top", fontsize=9)
    axes.legend(loc="upper center")
    return figure


def _named(thresholds: Thresholds) -> list[tuple[str, float]]:
    return [("MAYBE or DECLINED", thresholds.maybe_above), ("DECLINED", thresholds.declined_above)]


def _percent(value: float) -> str:
    return f"{value:.1%}"


def _percent_tick(value: float, _: Any = None) -> str:
    return f"{value:.0%}"
