"""A study and a pool of workers in, the best parameters out; what is finished is never evaluated again."""

from __future__ import annotations

import json
import signal
import sqlite3
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import optuna
from filelock import FileLock, Timeout
from optuna.distributions import BaseDistribution, FloatDistribution, IntDistribution
from optuna.trial import FrozenTrial, Trial, TrialState
from sqlalchemy import Engine, event

from pipeline.core.errors import ClusterError, ConfigError, first_line
from pipeline.core.files import sha256
from pipeline.training.folds import Evaluation, Timed
from pipeline.training.settings import Range, TrainSettings
from pipeline.training.workers import Pool

FINISHED = (TrialState.COMPLETE, TrialState.PRUNED)
"""States that count towards the total; a failed evaluation is made again."""

_EVALUATION, _BEGIN, _END = "evaluation", "begin", "end"
_INPUTS = "inputs"
_TRIALS_BEFORE_PRUNING = 10


@dataclass(frozen=True)
class Best:
    """Outcome of a study.

    Attributes
    ----------
    number
        Of the best trial.
    parameters
        Its XGBoost parameters.
    rounds
        Boosting rounds, decided by early stopping inside the folds.
    scores
        Mean of each score over the folds.
    """

    number: int
    parameters: dict[str, Any]
    rounds: int
    scores: dict[str, float]


def study_inputs(settings: TrainSettings, **digests: str) -> dict[str, Any]:
    """Everything that a score depends on: two studies with equal inputs give equal scores to equal parameters."""
    import xgboost

    keys = {
        "search_rows",
        "seed",
        "test_share",
        "folds",
        "max_rounds",
        "early_stopping_rounds",
        "max_bin",
        "pruning",
        "search_space",
    }
    return {**settings.model_dump(mode="json", include=keys), "xgboost": xgboost.__version__, **digests}


def study_name(settings: TrainSettings, inputs: Mapping[str, Any]) -> str:
    """Name given in the settings, or one derived from the inputs."""
    document = json.dumps([inputs, settings.first_trial], sort_keys=True)
    return settings.study or f"credit-risk-{sha256(document.encode())[:10]}"


@contextmanager
def open_study(settings: TrainSettings, name: str, inputs: Mapping[str, Any]) -> Iterator[optuna.Study]:
    """Create a study or resume it, alone.

    Trials that a killed process left running are failed, and their parameters enqueued again.

    Raises
    ------
    ConfigError
        Another process drives the study, or it was started with other inputs.
    """
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    with _alone(settings.storage, name):
        storage = optuna.storages.RDBStorage(settings.storage)
        if sqlite_path(settings.storage):
            _spare_the_disk(storage.engine)
        study = optuna.create_study(
            study_name=name,
            storage=storage,
            direction="minimize",
            load_if_exists=True,
            sampler=sampler(settings, 0),
        )
        _check_inputs(study, inputs)
        if not study.get_trials(deepcopy=False):
            study.enqueue_trial(settings.first_parameters)
        _requeue_interrupted(study)
        yield study


def search(
    study: optuna.Study, pool: Pool, settings: TrainSettings, on_finished: Callable[[FrozenTrial], None]
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
            with _uninterrupted():
                trial = _ask(study, space, settings, asked=finished + len(running))
                bars = _bars(study, settings) if settings.pruning else ()
            running[pool.submit(trial.params, bars)] = trial
        for future in wait(running, return_when=FIRST_COMPLETED).done:
            with _uninterrupted():
                on_finished(_tell(study, running.pop(future), future))
            finished += 1
    return best_of(study)


def distributions(settings: TrainSettings) -> dict[str, BaseDistribution]:
    """The search space, as Optuna has it."""
    return {str(name): _distribution(allowed) for name, allowed in settings.search_space.items()}


def sampler(settings: TrainSettings, asked: int) -> optuna.samplers.BaseSampler:
    """Make the sampler of a study that has asked for so many trials already."""
    # Seeded for each trial: a resumed study draws what it would have drawn, and not its first numbers again.
    return optuna.samplers.TPESampler(seed=(settings.seed * 100_003 + asked) % 2**32)


def finished_trials(study: optuna.Study) -> list[FrozenTrial]:
    """Trials that count, by number."""
    return list(study.get_trials(deepcopy=False, states=FINISHED))


def best_of(study: optuna.Study) -> Best:
    """Best trial of a study that has finished one."""
    trial = study.best_trial
    evaluation = evaluation_of(trial)
    return Best(trial.number, dict(trial.params), evaluation.rounds, evaluation.means)


def evaluation_of(trial: FrozenTrial) -> Evaluation:
    """Scores of a finished trial, fold by fold."""
    return Evaluation.of(trial.user_attrs[_EVALUATION])


def times_of(trial: FrozenTrial) -> tuple[float, float]:
    """When the evaluation of a finished trial began and ended: seconds since the epoch."""
    return trial.user_attrs[_EVALUATION][_BEGIN], trial.user_attrs[_EVALUATION][_END]


@contextmanager
def _alone(storage: str, name: str) -> Iterator[None]:
    """Hold the study's lock: two processes would each take the other's trials for interrupted ones."""
    path = sqlite_path(storage)
    if path is None:
        yield
        return
    use_wal(path)
    try:
        with FileLock(f"{path}.{name}.lock", timeout=0):
            yield
    except Timeout:
        raise ConfigError(
            f"study {name}: must be driven by one process, and another one holds it; wait, or give --study NAME"
        ) from None


def sqlite_path(address: str) -> Path | None:
    """File behind a SQLAlchemy address; None if it is not SQLite."""
    prefix = "sqlite:///"
    return Path(address.removeprefix(prefix)) if address.startswith(prefix) else None


def use_wal(path: Path) -> None:
    """Let SQLite append to a log: a commit then costs a tenth, and readers do not block the writer."""
    connection = sqlite3.connect(path)
    connection.execute("PRAGMA journal_mode=wal")
    connection.close()


def _spare_the_disk(engine: Engine) -> None:
    """Let SQLite leave a commit to the system: a killed process loses nothing, a power cut the last trial."""

    @event.listens_for(engine, "connect")
    def set_synchronous(connection: sqlite3.Connection, _: object) -> None:
        connection.execute("PRAGMA synchronous=normal")

    engine.dispose()  # connections that were opened before this


@contextmanager
def _uninterrupted() -> Iterator[None]:
    """Hold SIGINT and SIGTERM back until the block ends, so that no statement of the database is cut in two."""
    received: list[int] = []
    held = (signal.SIGINT, signal.SIGTERM)
    before = [signal.signal(number, lambda number, _: received.append(number)) for number in held]
    try:
        yield
    finally:
        for number, handler in zip(held, before, strict=True):
            signal.signal(number, handler)
    if received:
        signal.raise_signal(received[0])


def _check_inputs(study: optuna.Study, inputs: Mapping[str, Any]) -> None:
    inputs = json.loads(json.dumps(inputs))
    known = study.user_attrs.get(_INPUTS)
    if known is None:
        study.set_user_attr(_INPUTS, inputs)
    elif known != inputs:
        changed = sorted(key for key in {*known, *inputs} if known.get(key) != inputs.get(key))
        raise ConfigError(
            f"study {study.study_name}: must be resumed with the inputs it was started with; "
            f"changed: {', '.join(changed)}; give --study another name"
        )


def _requeue_interrupted(study: optuna.Study) -> None:
    for trial in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
        # First enqueued, then failed: a kill between the two repeats a trial instead of losing it.
        if trial.params:
            study.enqueue_trial(trial.params)
        study.tell(trial.number, state=TrialState.FAIL)


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
    trial.set_user_attr(_EVALUATION, {**evaluation.document(), _BEGIN: timed.begin, _END: timed.end})
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


def _distribution(allowed: Range) -> BaseDistribution:
    if allowed.integer:
        return IntDistribution(int(allowed.low), int(allowed.high), log=allowed.log)
    return FloatDistribution(allowed.low, allowed.high, log=allowed.log)
