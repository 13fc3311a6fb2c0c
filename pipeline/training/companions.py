"""Share a study with other processes: on a database server several people or machines may drive it at once.

Each process records heartbeats of the trials that it evaluates, by Optuna's own means. A trial whose heartbeats
have stopped belonged to a process that is gone: whoever notices fails it and enqueues its parameters again. On
SQLite a lock keeps a study to one process, so there is nothing to record.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Protocol

import optuna
from optuna.exceptions import ExperimentalWarning, StorageInternalError, UpdateFinishedTrialError
from optuna.storages import RDBStorage, fail_stale_trials
from optuna.trial import FrozenTrial, TrialState
from sqlalchemy.exc import SQLAlchemyError

from pipeline.training.databases import sqlite_path
from pipeline.training.heartbeat import repeating
from pipeline.training.settings import TrainSettings

DATABASE_FAILURES = (SQLAlchemyError, StorageInternalError)
"""What a study's database raises when it cannot be reached or used."""

_BEATS = "beats"
"""User attribute of a trial that has had its first heartbeat."""


class Companions(Protocol):
    """The other processes that drive the same study."""

    def running(self) -> int:
        """Trials that they are evaluating."""

    def begin(self, number: int) -> None:
        """Let them know that this process evaluates a trial."""

    def end(self, number: int) -> None:
        """Stop the heartbeats of a trial."""

    def take_over(self) -> None:
        """Enqueue again what processes that are gone have left unfinished."""


@contextmanager
def companions(settings: TrainSettings, name: str) -> Iterator[Companions]:
    """Keep this process's trials alive until the block ends; what is then unfinished is left to the others."""
    if sqlite_path(settings.storage) is not None:
        yield _Alone()
        return
    found = _OnServer(settings, name)
    try:
        with repeating(found.beat, settings.heartbeat):
            yield found
    finally:
        with suppress(*DATABASE_FAILURES):
            found.leave()


def requeue(study: optuna.Study, trial: FrozenTrial) -> None:
    """Enqueue the parameters of a trial that was not finished, and fail it."""
    # In this order: a kill between the two repeats a trial instead of losing it.
    if trial.params:
        study.enqueue_trial(trial.params)
    study.tell(trial.number, state=TrialState.FAIL, skip_if_finished=True)


class _Alone:
    def running(self) -> int:
        return 0

    def begin(self, number: int) -> None:
        pass

    def end(self, number: int) -> None:
        pass

    def take_over(self) -> None:
        pass


class _OnServer:
    def __init__(self, settings: TrainSettings, name: str) -> None:
        self._storage = _storage_with_heartbeats(settings)
        self._study = optuna.load_study(study_name=name, storage=self._storage)
        self._study_id = self._storage.get_study_id_from_name(name)
        self._mine: set[int] = set()

    def running(self) -> int:
        return sum(trial.number not in self._mine for trial in self._running())

    def begin(self, number: int) -> None:
        self._mine.add(number)
        self._first_beat(number)

    def end(self, number: int) -> None:
        self._mine.discard(number)

    def take_over(self) -> None:
        # A process killed between asking for a trial and its first heartbeat leaves a trial without any, which
        # Optuna never calls stale. It gets one here, and is stale in time if no process goes on with it.
        for trial in self._running():
            if _BEATS not in trial.user_attrs:
                self._first_beat(trial.number)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ExperimentalWarning)
            fail_stale_trials(self._study)

    def beat(self) -> None:
        for number in tuple(self._mine):
            self._storage.record_heartbeat(self._trial_id(number))

    def leave(self) -> None:
        for trial in self._running():
            if trial.number in self._mine:
                requeue(self._study, trial)

    def _first_beat(self, number: int) -> None:
        self._storage.record_heartbeat(self._trial_id(number))
        with suppress(UpdateFinishedTrialError):
            self._storage.set_trial_user_attr(self._trial_id(number), _BEATS, True)

    def _trial_id(self, number: int) -> int:
        return int(self._storage.get_trial_id_from_study_id_trial_number(self._study_id, number))

    def _running(self) -> list[FrozenTrial]:
        return list(self._study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)))


def _storage_with_heartbeats(settings: TrainSettings) -> RDBStorage:
    # Beside the storage that asks and tells: Optuna warns about each trial asked for from one with heartbeats.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ExperimentalWarning)
        return RDBStorage(
            settings.storage,
            heartbeat_interval=settings.heartbeat,
            grace_period=settings.stale_after,
            heartbeat_stale_trial_callback=_enqueue_again,
        )


def _enqueue_again(study: optuna.Study, trial: FrozenTrial) -> None:
    if trial.params:
        study.enqueue_trial(trial.params)
