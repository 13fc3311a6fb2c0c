"""Search for the best parameters: ask the study, evaluate in the pool, tell the study."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from contextlib import AbstractContextManager, nullcontext

import numpy as np
import optuna
from optuna.distributions import BaseDistribution
from optuna.trial import FrozenTrial, Trial, TrialState

from pipeline.core.errors import ClusterError, first_line
from pipeline.training.folds import Timed
from pipeline.training.sampling import distributions, sampler
from pipeline.training.settings import TrainSettings
from pipeline.training.trials import Best, best_of, evaluation_of, finished_trials, record_evaluation
from pipeline.training.workers import Pool

_TRIALS_BEFORE_PRUNING = 10
"""Finished trials without which a median says little."""


def search(
    study: optuna.Study,
    pool: Pool,
    settings: TrainSettings,
    on_finished: Callable[[FrozenTrial], None],
    deferred: Callable[[], AbstractContextManager[None]] = nullcontext,
) -> Best:
    """Ask, evaluate and tell until the study holds `settings.trials` finished trials.

    Parameters
    ----------
    study
        From `open_study`.
    pool
        Where parameters are evaluated.
    on_finished
        Called with each trial that finishes.
    deferred
        Entered around each access to the study: what arrives meanwhile must not interrupt it.

    Raises
    ------
    ClusterError
        An evaluation failed, or lost its worker too often.
    """
    space = distributions(settings)
    running: dict[Future[Timed], Trial] = {}
    finished = len(finished_trials(study))
    while finished < settings.trials:
        while len(running) < min(pool.slots, settings.trials - finished):
            with deferred():
                trial = _ask(study, space, settings, asked=finished + len(running))
                bars = _bars(study, settings) if settings.pruning else ()
            running[pool.submit(trial.params, bars)] = trial
        for future in wait(running, return_when=FIRST_COMPLETED).done:
            with deferred():
                on_finished(_tell(study, running.pop(future), future))
            finished += 1
    return best_of(study)


def _ask(study: optuna.Study, space: dict[str, BaseDistribution], settings: TrainSettings, asked: int) -> Trial:
    study.sampler = sampler(settings, asked)
    return study.ask(space)


def _tell(study: optuna.Study, trial: Trial, future: Future[Timed]) -> FrozenTrial:
    try:
        timed = future.result()
    except Exception as error:
        study.tell(trial, state=TrialState.FAIL)
        reason = first_line(error)
        raise ClusterError(f"trial {trial.number} with {trial.params}: its evaluation failed: {reason}") from error
    evaluation = timed.evaluation
    record_evaluation(trial, timed)
    if evaluation.pruned:
        trial.report(evaluation.means["log_loss"], step=len(evaluation.folds))
        return study.tell(trial, state=TrialState.PRUNED)
    return study.tell(trial, evaluation.means["log_loss"])


def _bars(study: optuna.Study, settings: TrainSettings) -> Sequence[float]:
    """Median over the finished trials of the mean log loss up to each fold but the last (Golovin et al., 2017)."""
    trials = [evaluation_of(trial).folds for trial in finished_trials(study)]
    if len(trials) < _TRIALS_BEFORE_PRUNING:
        return ()
    return [
        float(
            np.median(
                [np.mean([fold.log_loss for fold in folds[:done]]) for folds in trials if len(folds) >= done]
            )
        )
        for done in range(1, settings.folds)
    ]
