"""Evaluate parameters by cross-validation, as each worker does it, without Optuna or MLflow."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import numpy as np
import xgboost as xgb

from pipeline.core.model.features import Matrix
from pipeline.evaluation.metrics import auc, brier, ks, log_loss
from pipeline.training.fold_split import Positions, fold_rows

ROWS_PER_THREAD = 20_000
"""Rows from which another thread pays: below it XGBoost's threads cost more than they save."""


class FoldScore(NamedTuple):
    """Scores of one fold's validation side, at its best iteration."""

    log_loss: float
    auc: float
    brier: float
    ks: float
    rounds: int


@dataclass(frozen=True)
class Evaluation:
    """Scores of one set of parameters.

    Attributes
    ----------
    folds
        One score a fold, in order; fewer than all when pruned.
    pruned
        Whether it stopped early, because it could not reach the median.
    """

    folds: tuple[FoldScore, ...]
    pruned: bool

    @property
    def means(self) -> dict[str, float]:
        """Mean of each score over the folds."""
        return {name: float(np.mean([getattr(fold, name) for fold in self.folds])) for name in FoldScore._fields}

    @property
    def rounds(self) -> int:
        """Boosting rounds that early stopping decided on: mean of the folds."""
        return max(1, round(self.means["rounds"]))

    def document(self) -> dict[str, Any]:
        """As plain values, the form in which Optuna keeps it."""
        return asdict(self)

    @classmethod
    def of(cls, document: Mapping[str, Any]) -> Evaluation:
        """Rebuild what `document` wrote."""
        return cls(tuple(FoldScore(*fold) for fold in document["folds"]), document["pruned"])


@dataclass(frozen=True)
class FoldSettings:
    """How parameters are evaluated.

    Attributes
    ----------
    fixed
        XGBoost parameters that the search does not vary; ``max_bin`` among them.
    folds, seed
        Number of stratified folds, and what shuffles them.
    max_rounds, early_stopping_rounds
        Boosting rounds at most; rounds without a better log loss on the fold.
    """

    fixed: Mapping[str, Any]
    folds: int
    seed: int
    max_rounds: int
    early_stopping_rounds: int | None


class FoldSet:
    """Training rows, quantised once a fold and then evaluated with any number of parameters.

    It travels to other processes as the plain matrix; each builds its own folds at the first evaluation.

    Parameters
    ----------
    matrix, labels
        Shapes (n, k) and (n,), float32.
    settings
        How parameters are evaluated.
    groups
        Rows of the same group stay in the same fold: see `equal_rows`. None: every row is a group of its own.
    """

    def __init__(
        self, matrix: Matrix, labels: Matrix, settings: FoldSettings, groups: Positions | None = None
    ) -> None:
        self.matrix, self.labels, self.settings, self.groups = matrix, labels, settings, groups
        self._folds: list[_Fold] | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_folds": None}

    def evaluate(self, parameters: Mapping[str, Any], *, threads: int, bars: Sequence[float] = ()) -> Evaluation:
        """Train and score one booster a fold.

        Parameters
        ----------
        parameters
            XGBoost parameters to try.
        threads
            At most so many threads.
        bars
            For each fold but the last, the mean log loss so far above which the rest is not worth its time.
        """
        scores: list[FoldScore] = []
        every = {**self.settings.fixed, **parameters, "nthread": useful_threads(len(self.labels), threads)}
        for fold in self._prepared(every["nthread"]):
            scores.append(self._score(fold, every))
            if _is_hopeless(scores, bars):
                return Evaluation(tuple(scores), pruned=True)
        return Evaluation(tuple(scores), pruned=False)

    def _prepared(self, threads: int) -> list[_Fold]:
        if self._folds is None:
            self._folds = [
                _Fold(
                    # The bins are those of the fold's own training rows; made once, they serve every trial.
                    quantised(self.matrix[train], self.labels[train], self.settings.fixed, threads),
                    xgb.DMatrix(self.matrix[valid], label=self.labels[valid], nthread=threads),
                    self.labels[valid],
                )
                for train, valid in fold_rows(self.labels, self.groups, self.settings.folds, self.settings.seed)
            ]
        return self._folds

    def _score(self, fold: _Fold, parameters: Mapping[str, Any]) -> FoldScore:
        stopping = self.settings.early_stopping_rounds
        booster = xgb.train(
            dict(parameters),
            fold.train,
            self.settings.max_rounds,
            evals=[(fold.valid, "valid")] if stopping else None,
            early_stopping_rounds=stopping,
            verbose_eval=False,
        )
        rounds = booster.best_iteration + 1 if stopping else self.settings.max_rounds
        probabilities = booster.predict(fold.valid, iteration_range=(0, rounds))
        quality = [score(fold.labels, probabilities) for score in (log_loss, auc, brier, ks)]
        return FoldScore._make([*quality, rounds])


def quantised(matrix: Matrix, labels: Matrix, parameters: Mapping[str, Any], threads: int) -> xgb.QuantileDMatrix:
    """Bin rows for training: with the ``max_bin`` of the parameters that they are going to meet."""
    return xgb.QuantileDMatrix(matrix, label=labels, max_bin=parameters["max_bin"], nthread=threads)


class _Fold(NamedTuple):
    train: xgb.DMatrix
    valid: xgb.DMatrix
    labels: Matrix


def useful_threads(rows: int, threads: int) -> int:
    """Threads of at most `threads` that pay for so many rows. Scores and boosters do not depend on it."""
    return max(1, min(threads, rows // ROWS_PER_THREAD))


class Timed(NamedTuple):
    """An evaluation, and when it began and ended: seconds since the epoch."""

    evaluation: Evaluation
    begin: float
    end: float


def timed(folds: FoldSet, parameters: Mapping[str, Any], threads: int, bars: Sequence[float]) -> Timed:
    """Evaluate, and take the time on the evaluating machine."""
    begin = time.time()
    evaluation = folds.evaluate(parameters, threads=threads, bars=bars)
    return Timed(evaluation, begin, time.time())


def _is_hopeless(scores: Sequence[FoldScore], bars: Sequence[float]) -> bool:
    if len(scores) > len(bars):
        return False
    return float(np.mean([score.log_loss for score in scores])) > bars[len(scores) - 1]
