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
from pipeline.training.fold_split import EQUAL_ROWS, Positions
from pipeline.training.sampling import sampler
from pipeline.training.settings import TrainSettings
from pipeline.training.sqlite import spare_the_disk, sqlite_path, use_wal

_INPUTS = "inputs"


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
            f"study {name}: must be driven by one process, and another one holds it; wait, or give --study NAME"
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
        # First enqueued, then failed: a kill between the two repeats a trial instead of losing it.
        if trial.params:
            study.enqueue_trial(trial.params)
        study.tell(trial.number, state=TrialState.FAIL)
