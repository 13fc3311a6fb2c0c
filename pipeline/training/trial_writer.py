"""Write each finished trial to MLflow as a child run, in the background."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress

import mlflow
from mlflow.entities import Metric, Param
from mlflow.utils.mlflow_tags import MLFLOW_PARENT_RUN_ID, MLFLOW_RUN_NAME
from optuna.trial import FrozenTrial, TrialState

from pipeline.core.errors import TrackingError, first_line
from pipeline.training.tracking import AWAY, STUDY, as_text, search_runs
from pipeline.training.trials import evaluation_of, times_of

TRIAL = "trial"
"""Tag of a child run: the number of its trial in the study."""

_FIRST_PAUSE, _LONGEST_PAUSE = 0.5, 10.0
"""Seconds between two attempts to write: doubling from the first to the longest."""


class TrialWriter:
    """Writes each finished trial that a parent run does not have yet as a child of it, in the background.

    The same rule serves a normal run, a resumed study and a server that was away: whatever is missing is written.
    No trial is written twice, because before a second attempt the children are read.

    Parameters
    ----------
    parent
        The parent run.
    study
        Name of the Optuna study.
    """

    def __init__(self, parent: mlflow.ActiveRun, study: str) -> None:
        self._parent, self._study = parent, study
        self._client = mlflow.MlflowClient()
        self._children: dict[int, tuple[str, str]] | None = None
        self._waiting: queue.Queue[FrozenTrial | None] = queue.Queue()
        self._put: set[int] = set()
        self._problem: Exception | None = None
        self._abandoned = threading.Event()
        self._done = threading.Event()
        # A daemon: a server that is away must not keep the process from ending.
        self._thread = threading.Thread(target=self._write_all, name="trial writer", daemon=True)
        self._thread.start()

    def put(self, trial: FrozenTrial) -> None:
        """Have a finished trial written, once; returns at once."""
        if trial.number not in self._put:
            self._put.add(trial.number)
            self._waiting.put(trial)

    def close(self, patience: float) -> None:
        """Wait until everything is written, for at most `patience` seconds.

        Raises
        ------
        TrackingError
            Trials remain unwritten.
        """
        self._waiting.put(None)
        if self._done.wait(patience):
            return
        self._abandoned.set()
        reason = first_line(self._problem) if self._problem else "it is slow"
        raise TrackingError(
            f"MLflow at {mlflow.get_tracking_uri()} did not answer within {patience:g} s: {self._pending()} trials"
            f" are not written ({reason}). The study keeps them: run the same command again later."
        )

    def _pending(self) -> int:
        return sum(trial is not None for trial in list(self._waiting.queue)) + 1

    def _write_all(self) -> None:
        while (trial := self._waiting.get()) is not None:
            self._write_surely(trial)
        self._done.set()

    def _write_surely(self, trial: FrozenTrial) -> None:
        pause = _FIRST_PAUSE
        while not self._abandoned.is_set():
            try:
                self._write(trial)
            except AWAY as error:
                # The request may have reached the server all the same: look before writing again.
                self._problem, self._children = error, None
                self._abandoned.wait(pause)
                pause = min(2 * pause, _LONGEST_PAUSE)
            else:
                return

    def _write(self, trial: FrozenTrial) -> None:
        if self._children is None:
            self._children = self._read_children()
        run_id, status = self._children.get(trial.number, (None, None))
        if status == "FINISHED":
            return
        begin, end = (round(moment * 1000) for moment in times_of(trial))
        run_id = run_id or self._create(trial, begin)
        self._client.log_batch(run_id, metrics=_trial_metrics(trial, end), params=_trial_params(trial))
        self._client.set_terminated(run_id, "FINISHED", end_time=end)
        self._children[trial.number] = (run_id, "FINISHED")

    def _create(self, trial: FrozenTrial, begin: int) -> str:
        tags = {
            MLFLOW_PARENT_RUN_ID: self._parent.info.run_id,
            MLFLOW_RUN_NAME: f"trial {trial.number:03d}",
            STUDY: self._study,
            TRIAL: str(trial.number),
            "pruned": str(trial.state == TrialState.PRUNED).lower(),
        }
        experiment = self._parent.info.experiment_id
        run_id: str = self._client.create_run(experiment, start_time=begin, tags=tags).info.run_id
        return run_id

    def _read_children(self) -> dict[int, tuple[str, str]]:
        mine = f"tags.`{MLFLOW_PARENT_RUN_ID}` = '{self._parent.info.run_id}'"
        runs = search_runs(self._client, self._parent.info.experiment_id, mine)
        return {
            int(run.data.tags[TRIAL]): (run.info.run_id, run.info.status) for run in runs if TRIAL in run.data.tags
        }


@contextmanager
def trial_writer(
    parent: mlflow.ActiveRun, study: str, finished: Iterable[FrozenTrial], patience: float
) -> Iterator[TrialWriter]:
    """Open a writer that first writes the trials that are finished already; wait for it at the end.

    An interruption waits for 5 seconds at most: what is then unwritten is written when the study is resumed.
    """
    writer = TrialWriter(parent, study)
    for trial in finished:
        writer.put(trial)
    try:
        yield writer
    except BaseException:
        with suppress(TrackingError):
            writer.close(min(patience, 5))
        raise
    writer.close(patience)


def _trial_params(trial: FrozenTrial) -> list[Param]:
    return [Param(name, as_text(value)) for name, value in trial.params.items()]


def _trial_metrics(trial: FrozenTrial, moment: int) -> list[Metric]:
    evaluation = evaluation_of(trial)
    begin, end = times_of(trial)
    values = {f"cv_{name}": value for name, value in evaluation.means.items()} | {"seconds": end - begin}
    folds = [Metric("fold_log_loss", fold.log_loss, moment, step) for step, fold in enumerate(evaluation.folds, 1)]
    return [Metric(name, value, moment, 0) for name, value in values.items()] + folds
