"""Search for the best parameters: ask the study, evaluate in the pool, tell the study."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from contextlib import AbstractContextManager, nullcontext, suppress

import numpy as np
import optuna
from optuna.exceptions import UpdateFinishedTrialError
from optuna.trial import FrozenTrial, Trial, TrialState

from pipeline.core.errors import ClusterError, first_line
from pipeline.training.companions import Companions, companions
from pipeline.training.folds import Evaluation, Timed
from pipeline.training.sampling import distributions
from pipeline.training.settings import TrainSettings
from pipeline.training.trials import Best, best_of, evaluation_of, finished_trials, record_evaluation
from pipeline.training.workers import Pool

_TRIALS_BEFORE_PRUNING = 10
"""Finished trials without which a median says little."""

_SECONDS_BETWEEN_LOOKS = 1.0
"""At the study, while other processes evaluate its last trials."""


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
        Called with each trial that finishes, here or in another process that drives the same study.
    deferred
        Entered around each access to the study: an interruption that arrives meanwhile waits until it is left.

    Raises
    ------
    ClusterError
        An evaluation failed, or lost its worker too often.
    """
    with companions(settings, study.study_name) as others:
        return _Search(study, pool, settings, on_finished, deferred, others).run()


class _Search:
    def __init__(
        self,
        study: optuna.Study,
        pool: Pool,
        settings: TrainSettings,
        on_finished: Callable[[FrozenTrial], None],
        deferred: Callable[[], AbstractContextManager[None]],
        others: Companions,
    ) -> None:
        self._study, self._pool, self._settings = study, pool, settings
        self._on_finished, self._deferred, self._others = on_finished, deferred, others
        self._space = distributions(settings)
        self._running: dict[Future[Timed], Trial] = {}
        self._seen = {trial.number for trial in finished_trials(study)}

    def run(self) -> Best:
        while len(self._seen) < self._settings.trials:
            self._submit()
            self._await()
            self._report()
        return best_of(self._study)

    def _submit(self) -> None:
        while len(self._running) < self._pool.slots:
            with self._deferred():
                trial = self._ask()
            if trial is None:
                return
            bars = _median_losses(self._study, self._settings) if self._settings.pruning else ()
            self._running[self._pool.submit(trial.params, bars)] = trial

    def _ask(self) -> Trial | None:
        self._others.take_over()
        under_way = len(self._running) + self._others.running()
        if len(self._seen) + under_way >= self._settings.trials:
            return None
        trial = self._study.ask(self._space)
        self._others.begin(trial.number)
        return trial

    def _await(self) -> None:
        if not self._running:  # another process evaluates what is left
            time.sleep(_SECONDS_BETWEEN_LOOKS)
            return
        for future in wait(self._running, return_when=FIRST_COMPLETED).done:
            with self._deferred():
                trial = self._running.pop(future)
                _tell(self._study, trial, future)
                self._others.end(trial.number)

    def _report(self) -> None:
        with self._deferred():
            for trial in finished_trials(self._study):
                if trial.number not in self._seen:
                    self._seen.add(trial.number)
                    self._on_finished(trial)


def _tell(study: optuna.Study, trial: Trial, future: Future[Timed]) -> None:
    try:
        timed = future.result()
    except Exception as error:
        study.tell(trial, state=TrialState.FAIL, skip_if_finished=True)
        reason = first_line(error)
        raise ClusterError(
            f"the evaluation of trial {trial.number} failed ({reason}); its parameters were {trial.params}"
        ) from error
    # Another process fails a trial whose heartbeats stopped, as on a laptop that slept, and makes it again.
    with suppress(UpdateFinishedTrialError):
        record_evaluation(trial, timed)
        _finish(study, trial, timed.evaluation)


def _finish(study: optuna.Study, trial: Trial, evaluation: Evaluation) -> None:
    if evaluation.pruned:
        trial.report(evaluation.means["log_loss"], step=len(evaluation.folds))
        study.tell(trial, state=TrialState.PRUNED, skip_if_finished=True)
    else:
        study.tell(trial, evaluation.means["log_loss"], skip_if_finished=True)


def _median_losses(study: optuna.Study, settings: TrainSettings) -> Sequence[float]:
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
