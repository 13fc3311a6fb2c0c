from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
import pytest
from scipy.stats import ks_2samp
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import brier_score_loss, log_loss, roc_auc_score

from pipeline.core.policy import Thresholds
from pipeline.evaluation.figures import booster_figures, performance_figures, study_figures
from pipeline.evaluation.metrics import bands, calibration, metrics

THRESHOLDS = Thresholds(maybe_above=0.3, declined_above=0.5)


def sample(rows: int, *, digits: int = 9, sharper: float = 1.0) -> tuple[np.ndarray, np.ndarray]:
    """Labels drawn from known log-odds, and probabilities whose log-odds are `sharper` times too extreme."""
    rng = np.random.default_rng(5)
    odds = rng.normal(-1, 1.5, rows)
    labels = (rng.random(rows) < 1 / (1 + np.exp(-odds))).astype(np.float32)
    return labels, (1 / (1 + np.exp(-sharper * odds))).round(digits).astype(np.float32)


@pytest.mark.parametrize("digits", [9, 1])  # one digit: many ties
def test_metrics_are_those_of_the_reference_libraries(digits: int) -> None:
    labels, probabilities = sample(500, digits=digits)
    probabilities = probabilities.clip(0.001, 0.999)
    found = metrics(labels, probabilities)
    assert found["auc"] == pytest.approx(roc_auc_score(labels, probabilities))
    assert found["gini"] == pytest.approx(2 * roc_auc_score(labels, probabilities) - 1)
    assert found["brier"] == pytest.approx(brier_score_loss(labels, probabilities))
    assert found["log_loss"] == pytest.approx(log_loss(labels, probabilities), rel=1e-6)
    assert found["ks"] == pytest.approx(ks_2samp(probabilities[labels > 0], probabilities[labels == 0]).statistic)


def test_calibration_is_the_logistic_regression_on_the_log_odds() -> None:
    labels, probabilities = sample(2000)
    p = probabilities.astype(np.float64)
    reference = LogisticRegression(C=np.inf, tol=1e-9).fit(np.log(p / (1 - p))[:, None], labels)
    intercept, slope = calibration(labels, probabilities)
    assert (intercept, slope) == pytest.approx((reference.intercept_[0], reference.coef_[0, 0]), abs=1e-4)


def test_too_extreme_probabilities_have_a_slope_below_one_and_a_larger_error() -> None:
    honest, extreme = metrics(*sample(5000)), metrics(*sample(5000, sharper=2))
    assert honest["calibration_slope"] == pytest.approx(1, abs=0.1)
    assert extreme["calibration_slope"] == pytest.approx(0.5, abs=0.05)
    assert honest["ece"] < 0.03 < extreme["ece"]


def test_certain_and_wrong_probabilities_give_finite_metrics() -> None:
    found = metrics(np.array([0, 1, 1, 0], np.float32), np.array([1, 0, 1, 0], np.float32))
    assert all(np.isfinite(value) for value in found.values())


def test_bands_say_share_and_bad_rate_of_each_decision() -> None:
    labels = np.array([0, 0, 1, 0, 1, 1], np.float32)
    found = bands(labels, np.array([0.1, 0.2, 0.3, 0.31, 0.5, 0.51], np.float32), THRESHOLDS)
    # float32 0.3 lies above 0.3: `decide` counts it as MAYBE, and so does this.
    assert [(band.decision, round(band.share, 3), band.bad_rate) for band in found] == [
        ("APPROVED", 0.333, 0.0), ("MAYBE", 0.5, pytest.approx(2 / 3)), ("DECLINED", 0.167, 1.0),
    ]  # fmt: skip


def test_an_empty_band_has_no_bad_rate() -> None:
    found = bands(np.array([0, 1], np.float32), np.array([0.1, 0.2], np.float32), THRESHOLDS)
    assert found[2].share == 0
    assert np.isnan(found[2].bad_rate)


@pytest.mark.parametrize("constant", [False, True])
def test_every_figure_can_be_drawn(tmp_path: Path, constant: bool) -> None:
    labels, probabilities = sample(200)
    if constant:  # a model that has learnt nothing
        probabilities = np.full_like(probabilities, 0.2)
    matrix = np.random.default_rng(0).normal(size=(200, 3)).astype(np.float32)
    matrix[::7, 1] = np.nan
    contributions = np.nan_to_num(matrix) * (0 if constant else 1)
    drawn = performance_figures(labels, probabilities, THRESHOLDS)
    drawn |= booster_figures([0, 0, 0] if constant else [3, 2, 1], contributions, matrix, ["a", "b", "c"])
    drawn |= study_figures({0: 0.5, 3: 0.4}, {"eta": 0.7, "max_depth": 0.3})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for name, figure in drawn.items():
            figure.savefig(tmp_path / f"{name}.png")
    assert {path.stem for path in tmp_path.iterdir()} == {
        "roc", "precision_recall", "calibration", "scores", "gain_and_lift", "ks", "feature_importance",
        "contributions", "study_history", "parameter_importance",
    }  # fmt: skip
