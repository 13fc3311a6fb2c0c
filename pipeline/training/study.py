"""Open the Optuna study that a training works on: create it or resume it, and read its finished trials."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import optuna
from filelock import FileLock, Timeout
from optuna.trial import TrialState

from pipeline.core.errors import ConfigError
from pipeline.core.files import sha256
from pipeline.training.sampling import sampler
from pipeline.training.settings import TrainSettings
from pipeline.training.sqlite import spare_the_disk, sqlite_path, use_wal

_INPUTS = "inputs"


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
            spare_the_disk(storage.engine)
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
