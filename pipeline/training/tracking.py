"""Open the MLflow run of a training, and log to it."""

from __future__ import annotations

import logging
import os
import re
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from typing import Any

import mlflow
from mlflow.entities import Metric, Param, RunTag
from mlflow.exceptions import MlflowException
from mlflow.utils.mlflow_tags import MLFLOW_PARENT_RUN_ID, MLFLOW_RUN_NAME
from requests.exceptions import RequestException

from pipeline.core.errors import TrackingError, first_line
from pipeline.training.databases import sqlite_path, use_wal
from pipeline.training.heartbeat import repeating

STUDY = "study"
"""Tag of a run: its Optuna study."""

HEARTBEAT, LOCK = "heartbeat", "study_lock"
"""Tags of a parent run: when its process last gave a sign of life; the lock of the study that it holds."""

AWAY = (MlflowException, RequestException, OSError)
"""What a tracking server that is slow or away raises."""

_DRAWN_NAME = re.compile(r"[a-z]+-[a-z]+-\d+")
"""Names such as trusting-slug-808, which ``mlflow run`` draws when nobody chose one."""


@contextmanager
def parent_run(
    experiment: str, study: str, *, lock: str | None, heartbeat: float, stale_after: float
) -> Iterator[mlflow.ActiveRun]:
    """Open the parent run of a training, and end it as FINISHED, FAILED or KILLED.

    Under ``mlflow run`` it is the run that MLflow made; otherwise a new one in `experiment`, unless the variables
    ``MLFLOW_EXPERIMENT_NAME`` or ``MLFLOW_EXPERIMENT_ID`` name another. Runs of the same study whose processes are
    gone, but which are still RUNNING, are marked KILLED.

    Parameters
    ----------
    lock
        Name of the study's lock, held by this process: another run with it cannot be alive. None without a lock.
    heartbeat, stale_after
        Seconds between two heartbeats of this run; seconds without one after which another run counts as dead.

    Raises
    ------
    TrackingError
        The tracking server does not answer.
    """
    _be_quiet()
    try:
        _choose_experiment(experiment)
        name = None if "MLFLOW_RUN_ID" in os.environ else f"train {study}"
        run = mlflow.start_run(run_name=name, tags=_life_tags(study, lock))
        if _DRAWN_NAME.fullmatch(run.info.run_name or ""):
            mlflow.set_tag(MLFLOW_RUN_NAME, f"train {study}")
        if path := sqlite_path(mlflow.get_tracking_uri()):
            use_wal(path)
        _end_abandoned(run, study, lock, stale_after)
    except AWAY as error:
        raise _unreachable(error) from None
    try:
        with repeating(lambda: _beat(run), heartbeat):
            yield run
    except AWAY as error:
        _end("FAILED")
        raise _unreachable(error) from error
    except KeyboardInterrupt:
        _end("KILLED")
        raise
    except BaseException:
        _end("FAILED")
        raise
    _end("FINISHED")


def log_facts(
    *,
    params: Mapping[str, Any] | None = None,
    metrics: Mapping[str, float] | None = None,
    tags: Mapping[str, str] | None = None,
) -> None:
    """Log to the active run, in one request."""
    run = mlflow.active_run()
    assert run is not None, "log_facts belongs inside parent_run"  # noqa: S101
    now = round(time.time() * 1000)
    mlflow.MlflowClient().log_batch(
        run.info.run_id,
        params=[Param(name, as_text(value)) for name, value in (params or {}).items()],
        metrics=[Metric(name, value, now, 0) for name, value in (metrics or {}).items()],
        tags=[RunTag(name, value) for name, value in (tags or {}).items()],
    )


def as_text(value: Any) -> str:
    """Write a parameter for people: floats to six digits."""
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def _be_quiet() -> None:
    """Keep MLflow's own progress and database messages out of the report, unless they were asked for."""
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    # Seconds instead of minutes until an absent server is reported; the writer keeps trying anyway.
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
    if "MLFLOW_LOGGING_LEVEL" not in os.environ:
        for name in ("mlflow", "alembic"):
            logging.getLogger(name).setLevel(logging.WARNING)


def _choose_experiment(experiment: str) -> None:
    named = {"MLFLOW_RUN_ID", "MLFLOW_EXPERIMENT_NAME", "MLFLOW_EXPERIMENT_ID"} & os.environ.keys()
    if not named:
        mlflow.set_experiment(experiment)


def _life_tags(study: str, lock: str | None) -> dict[str, str]:
    tags = {STUDY: study, HEARTBEAT: _now().isoformat(timespec="seconds")}
    return tags if lock is None else {**tags, LOCK: lock}


def _beat(run: mlflow.ActiveRun) -> None:
    mlflow.MlflowClient().set_tag(run.info.run_id, HEARTBEAT, _now().isoformat(timespec="seconds"))


def _end_abandoned(mine: mlflow.ActiveRun, study: str, lock: str | None, stale_after: float) -> None:
    client = mlflow.MlflowClient()
    running = search_runs(client, mine.info.experiment_id, f"tags.{STUDY} = '{study}' AND status = 'RUNNING'")
    alive = {mine.info.run_id} | {
        run.info.run_id for run in running if _is_alive(run.data.tags, lock, stale_after)
    }
    for run in running:
        # A trial's run lives as long as its parent.
        if run.data.tags.get(MLFLOW_PARENT_RUN_ID, run.info.run_id) not in alive:
            client.set_terminated(run.info.run_id, "KILLED")


def _is_alive(tags: Mapping[str, str], lock: str | None, stale_after: float) -> bool:
    if lock is not None and tags.get(LOCK) == lock:
        return False
    try:
        last = datetime.fromisoformat(tags[HEARTBEAT])
        return (_now() - last).total_seconds() <= stale_after
    except (KeyError, ValueError, TypeError):  # a run of release 0.1, or a tag that somebody changed
        return False


def _now() -> datetime:
    return datetime.now(UTC)


def search_runs(client: mlflow.MlflowClient, experiment: str, condition: str) -> list[Any]:
    """Find all runs of an experiment that meet a condition."""
    runs, token = [], None
    while True:
        page = client.search_runs([experiment], condition, max_results=1000, page_token=token)
        runs += page
        token = page.token
        if not token:
            return runs


def _end(status: str) -> None:
    with suppress(*AWAY):
        mlflow.end_run(status)


def _unreachable(error: Exception) -> TrackingError:
    return TrackingError(
        f"MLflow at {mlflow.get_tracking_uri()} does not answer, or refuses what is logged ({first_line(error)}). "
        "The study keeps its finished trials: run the same command again when it does."
    )
