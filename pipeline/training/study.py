"""Open the Optuna study that a training works on: create it or resume it, and read its finished trials."""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import optuna
from filelock import FileLock, Timeout
from optuna.storages import RDBStorage
from optuna.trial import TrialState
from sqlalchemy.exc import IntegrityError, ProgrammingError, SQLAlchemyError

from pipeline.core.errors import ConfigError, first_line
from pipeline.core.files import sha256
from pipeline.training.companions import DATABASE_FAILURES, requeue
from pipeline.training.databases import shown_address, spare_the_disk, sqlite_path, use_wal
from pipeline.training.fold_split import EQUAL_ROWS, Positions
from pipeline.training.sampling import SeededSampler
from pipeline.training.settings import TrainSettings

_INPUTS, _LOCK = "inputs", "lock"
"""User attributes of a study: what it was started with; the name of its lock, which no other study has."""

_ATTEMPTS, _PAUSE = 5, 0.5
"""How often the tables of a new database are tried to be made, and the seconds between."""


def study_inputs(settings: TrainSettings, **digests: str) -> dict[str, Any]:
    """Everything that a score depends on: studies with equal inputs give equal parameters equal scores."""
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
    """Create a study or resume it.

    On SQLite this process has it to itself: trials that a killed process left running are failed, and their
    parameters enqueued again. On a database server other processes may drive it, too: see `companions`.

    Raises
    ------
    ConfigError
        The storage cannot be used, another process holds the study, or it was started with other inputs.
    """
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    with _usable(settings.storage), _alone(settings.storage, name):
        study = optuna.create_study(
            study_name=name,
            storage=_storage(settings.storage),
            direction="minimize",
            load_if_exists=True,
            sampler=SeededSampler(settings.seed),
        )
        if not study.get_trials(deepcopy=False):
            study.enqueue_trial(settings.first_parameters)
        _check_inputs(study, inputs)
        if sqlite_path(settings.storage):
            _requeue_interrupted(study)
        yield study


def lock_of(study: optuna.Study, settings: TrainSettings) -> str | None:
    """Name of the lock that this process holds on an open study; None on a database server."""
    if sqlite_path(settings.storage) is None:
        return None
    if _LOCK not in study.user_attrs:
        study.set_user_attr(_LOCK, str(uuid.uuid4()))
    return str(study.user_attrs[_LOCK])


def fold_groups(study: optuna.Study, groups: Positions | None) -> Positions | None:
    """Groups by which this study divides its rows into folds: none in a study that release 0.1 started."""
    return groups if EQUAL_ROWS in study.user_attrs[_INPUTS] else None


def fold_notes(study: optuna.Study, groups: Positions | None) -> list[str]:
    """A line about a study whose folds share equal rows."""
    if groups is None or fold_groups(study, groups) is not None:
        return []
    return [
        f"study {study.study_name} was started by release 0.1, whose folds share equal rows: "
        "its fold scores are too good. Start another with --study NAME."
    ]


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
            f"another process is driving study {name}. Wait until it finishes, start another with --study NAME, "
            "or let both share the study on a database server: see `storage`."
        ) from None


def _check_inputs(study: optuna.Study, inputs: Mapping[str, Any]) -> None:
    inputs = json.loads(json.dumps(inputs))
    known = study.user_attrs.get(_INPUTS)
    if known is None:
        study.set_user_attr(_INPUTS, inputs)
    elif changed := _changed(known, inputs):
        raise ConfigError(
            f"study {study.study_name} was started with other inputs ({', '.join(changed)} changed). "
            "Resume it with the old ones, or start another with --study NAME."
        )


def _changed(known: Mapping[str, Any], inputs: Mapping[str, Any]) -> list[str]:
    # A study of release 0.1 goes on with the folds that it began with.
    accepted = {EQUAL_ROWS} - known.keys()
    return sorted(key for key in {*known, *inputs} - accepted if known.get(key) != inputs.get(key))


def _requeue_interrupted(study: optuna.Study) -> None:
    for trial in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
        requeue(study, trial)


@contextmanager
def _usable(address: str) -> Iterator[None]:
    try:
        yield
    except (*DATABASE_FAILURES, ImportError) as error:
        raise ConfigError(
            f"storage {shown_address(address)} cannot be used ({_reason(error)}). Finished trials are kept: "
            "run the same command again when it can, or correct `storage`."
        ) from error


def _reason(error: BaseException) -> str:
    # Optuna says that something failed; what failed stands in the error behind it.
    cause = error.__cause__ if isinstance(error.__cause__, SQLAlchemyError) else error
    return first_line(cause)


def _storage(address: str) -> RDBStorage:
    for _ in range(_ATTEMPTS):
        try:
            return _opened(address)
        except (IntegrityError, ProgrammingError):
            time.sleep(_PAUSE)  # another process is making the tables at this moment
    return _opened(address)


def _opened(address: str) -> RDBStorage:
    storage = RDBStorage(address)
    if sqlite_path(address):
        spare_the_disk(storage.engine)
    return storage
