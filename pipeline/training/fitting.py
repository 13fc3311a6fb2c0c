"""Fit the best parameters to the whole training side, and test the booster on the held-out rows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import xgboost as xgb
from sklearn.feature_extraction import DictVectorizer

from pipeline.core.contract.schema import Schema
from pipeline.core.machine import available_cores
from pipeline.core.model.features import Matrix, monotone_constraints
from pipeline.core.policy import Thresholds
from pipeline.evaluation.metrics import Band, Probabilities, bands, metrics
from pipeline.training.folds import FoldSettings, quantised, useful_threads
from pipeline.training.preparation import PreparedData, Side
from pipeline.training.settings import TrainSettings
from pipeline.training.streaming import fit_streamed, score_streamed
from pipeline.training.trials import Best


@dataclass(frozen=True)
class Outcome:
    """The fitted booster, and how it did on the held-out rows.

    Attributes
    ----------
    best
        The trial whose parameters were fitted.
    labels, probabilities
        Of the held-out rows, shape (n,): 1 = default; probability of default in [0, 1].
    metrics, bands
        See `pipeline.evaluation.metrics`.
    """

    best: Best
    booster: xgb.Booster
    labels: Matrix
    probabilities: Probabilities
    metrics: dict[str, float]
    bands: list[Band]


def xgboost_parameters(settings: TrainSettings, schema: Schema, vectorizer: DictVectorizer) -> dict[str, Any]:
    """XGBoost parameters that the search does not vary.

    No ``scale_pos_weight``: the probabilities carry the decision, so they must stay calibrated.
    """
    return {
        "objective": "binary:logistic",
        "eval_metric": "logloss",
        "tree_method": "hist",
        "max_bin": settings.max_bin,
        "seed": settings.seed,
        "monotone_constraints": monotone_constraints(schema, vectorizer),
    }


def fold_settings(settings: TrainSettings, data: PreparedData) -> FoldSettings:
    """How the search evaluates parameters."""
    fixed = xgboost_parameters(settings, data.schema, data.vectorizer)
    return FoldSettings(fixed, settings.folds, settings.seed, settings.max_rounds, settings.early_stopping_rounds)


def fit_and_test(settings: TrainSettings, data: PreparedData, best: Best, thresholds: Thresholds) -> Outcome:
    """Fit the best parameters, score the held-out rows and compute what the model is judged by."""
    booster = _fit(settings, data, best)
    labels, probabilities = _score_held_out(settings, data, booster)
    return Outcome(
        best,
        booster,
        labels,
        probabilities,
        metrics(labels, probabilities),
        bands(labels, probabilities, thresholds),
    )


def fit(side: Side, best: Best, fixed: dict[str, Any]) -> xgb.Booster:
    """Train on a whole side with the best parameters, for the mean number of rounds of their folds."""
    threads = useful_threads(len(side.labels), available_cores())
    data = quantised(side.matrix, side.labels, fixed, threads)
    return xgb.train({**fixed, **best.parameters, "nthread": threads}, data, best.rounds)


def _fit(settings: TrainSettings, data: PreparedData, best: Best) -> xgb.Booster:
    fixed = xgboost_parameters(settings, data.schema, data.vectorizer)
    if data.survey is None:
        return fit(data.train, best, fixed)
    return fit_streamed(settings, data.schema, data.survey, {**fixed, **best.parameters}, best.rounds)


def _score_held_out(settings: TrainSettings, data: PreparedData, booster: xgb.Booster) -> tuple[Matrix, Matrix]:
    if data.survey is None:
        return data.test.labels, np.asarray(booster.inplace_predict(data.test.matrix))
    return score_streamed(settings, data.schema, data.survey, booster)
