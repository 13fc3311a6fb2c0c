"""Read and write what Optuna keeps of each trial."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import optuna
from optuna.trial import FrozenTrial, Trial, TrialState

from pipeline.training.folds import Evaluation, Timed

FINISHED = (TrialState.COMPLETE, TrialState.PRUNED)
"""States that count towards the total; a failed evaluation is made again."""

_EVALUATION, _BEGIN, _END = "evaluation", "begin", "end"


@dataclass(frozen=True)
class Best:
    """The best trial of a study.

    Attributes
    ----------
    number
        Its number.
    parameters
        Its XGBoost parameters.
    rounds
        Boosting rounds on which early stopping settled, mean of the folds.
    scores
        Mean of each score over the folds.
    """

    number: int
    parameters: dict[str, Any]
    rounds: int
    scores: dict[str, float]


def finished_trials(study: optuna.Study) -> list[FrozenTrial]:
    """Trials that count towards the total, by number."""
    return list(study.get_trials(deepcopy=False, states=FINISHED))


def best_of(study: optuna.Study) -> Best:
    """The best trial of a study that has finished at least one."""
    trial = study.best_trial
    evaluation = evaluation_of(trial)
    return Best(trial.number, dict(trial.params), evaluation.rounds, evaluation.means)


def record_evaluation(trial: Trial, timed: Timed) -> None:
    """Keep an evaluation with its trial."""
    trial.set_user_attr(_EVALUATION, {**timed.evaluation.document(), _BEGIN: timed.begin, _END: timed.end})


def evaluation_of(trial: FrozenTrial) -> Evaluation:
    """Scores of a finished trial, fold by fold."""
    return Evaluation.of(trial.user_attrs[_EVALUATION])


def times_of(trial: FrozenTrial) -> tuple[float, float]:
    """When the evaluation of a finished trial began and ended: seconds since the epoch."""
    return trial.user_attrs[_EVALUATION][_BEGIN], trial.user_attrs[_EVALUATION][_END]
