"""MLflow's side of a promotion: which version is meant, and the alias that names the promoted one to all machines.

MLflow is imported when it is asked something, never before: ``status``, and ``rollback`` with MLflow away,
do without it.
"""

from __future__ import annotations

import contextlib
import os
import socket
import sqlite3
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from pipeline.core.errors import PipelineError, TrackingError, first_line
from pipeline.core.promoted import MODEL_NAME

CHAMPION = "champion"
"""Alias of the promoted version."""

CANDIDATE = "candidate"
"""Alias of the version trained last."""

_DEFAULTS = {
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",
    "MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR": "1",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "20",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
}
"""MLflow's own defaults retry for minutes and draw bars into the report; the user's variables win over these."""


@dataclass(frozen=True)
class ModelVersion:
    """A registered model version and the run that trained it.

    Attributes
    ----------
    number
        Version of `MODEL_NAME`.
    run_id
        MLflow run.
    parameters, metrics
        What the run logged.
    """

    number: int
    run_id: str
    parameters: Mapping[str, str]
    metrics: Mapping[str, float]

    @property
    def uri(self) -> str:
        """Address of the model for MLflow."""
        return f"models:/{MODEL_NAME}/{self.number}"

    @property
    def tag(self) -> str:
        """Tag of the model in the BentoML store."""
        return f"{MODEL_NAME}:v{self.number}"


def address() -> str:
    """Address of MLflow's registry: the one set in MLflow, else that of its variables, else its default."""
    if mlflow := sys.modules.get("mlflow"):
        with contextlib.suppress(AttributeError):  # it is being imported
            return str(mlflow.get_registry_uri())
    chosen = os.environ.get("MLFLOW_REGISTRY_URI") or os.environ.get("MLFLOW_TRACKING_URI")
    return chosen or "sqlite:///mlflow.db"


def shown_address() -> str:
    """The address without the password that it may hold, for messages."""
    parts = urlsplit(address())
    return parts._replace(netloc=parts.netloc.rpartition("@")[2]).geturl() if "@" in parts.netloc else address()


def is_reachable(seconds: float = 1.0) -> bool:
    """Whether MLflow is worth importing: the server's port answers, or the database file exists.

    MLflow would create an absent database, and wait long for an absent server.
    """
    parts = urlsplit(address())
    if parts.scheme == "sqlite":
        return Path(parts.path[1:]).is_file()
    if parts.scheme not in {"http", "https"} or not parts.hostname:
        return True
    try:
        port = parts.port or {"http": 80, "https": 443}[parts.scheme]
        socket.create_connection((parts.hostname, port), timeout=seconds).close()
    except OSError:
        return False
    return True


def by_alias(alias: str) -> ModelVersion | None:
    """The version that an alias names; None if it names none.

    Raises
    ------
    TrackingError
        MLflow cannot be asked.
    """
    with asking() as client:
        number = aliased(client, alias)
        return None if number is None else _version(client, number)


def by_number(number: int) -> ModelVersion:
    """The version of this number.

    Raises
    ------
    TrackingError
        There is none, or MLflow cannot be asked.
    """
    with asking() as client:
        return _version(client, number)


def by_run(run_id: str) -> ModelVersion:
    """The newest version that a run registered.

    Raises
    ------
    TrackingError
        It registered none, or MLflow cannot be asked.
    """
    numbers = _numbers(f"name='{MODEL_NAME}' and run_id='{run_id}'")
    if not numbers:
        raise TrackingError(f"run {run_id} registered no version of {MODEL_NAME}; name a run of `train`")
    return by_number(max(numbers))


def lowest(metric: str) -> ModelVersion:
    """The version whose run has the lowest value of a metric; of equals the newest.

    Raises
    ------
    TrackingError
        No version has it, or MLflow cannot be asked.
    """
    versions = [by_number(number) for number in sorted(_numbers(f"name='{MODEL_NAME}'"), reverse=True)]
    scored = [version for version in versions if metric in version.metrics]
    if not scored:
        raise TrackingError(f"no version of {MODEL_NAME} has the metric {metric}; train one first")
    return min(scored, key=lambda version: version.metrics[metric])


def log_verdict(version: ModelVersion, document: Mapping[str, Any], tags: Mapping[str, str], file: str) -> None:
    """Log the gate's verdict to the run that it judged, as a JSON artifact and tags.

    Raises
    ------
    TrackingError
        MLflow cannot be asked.
    """
    with asking() as client:
        client.log_dict(version.run_id, dict(document), file)
        for key, value in tags.items():
            client.set_tag(version.run_id, key, value)
            client.set_model_version_tag(MODEL_NAME, str(version.number), key, value)


@contextlib.contextmanager
def asking() -> Iterator[Any]:
    """Yield MLflow's client; whatever it raises becomes one readable line."""
    if not is_reachable():
        raise TrackingError(f"MLflow at {shown_address()}: {_absence()}, or set MLFLOW_TRACKING_URI")
    for variable, value in _DEFAULTS.items():
        os.environ.setdefault(variable, value)
    from mlflow import MlflowClient

    try:
        yield MlflowClient()
    except PipelineError:
        raise
    except Exception as error:  # MLflow lets through what its server, its database or its parser raise
        raise TrackingError(f"MLflow at {shown_address()}: {_reason(error)}") from error


def _reason(error: Exception) -> str:
    from mlflow.exceptions import MlflowException
    from requests import RequestException
    from sqlalchemy.exc import SQLAlchemyError

    if isinstance(error, MlflowException | RequestException | SQLAlchemyError | sqlite3.Error | OSError):
        return first_line(error)[:300]
    return f"an unexpected answer ({type(error).__name__}: {first_line(error)[:200]})"


def _absence() -> str:
    if address().startswith("sqlite"):
        return "no such database; train first"
    return "no answer; start the server"


def aliased(client: Any, alias: str) -> int | None:
    """Version that an alias of `MODEL_NAME` names; None if there is no such alias."""
    from mlflow.exceptions import MlflowException

    try:
        return int(client.get_model_version_by_alias(MODEL_NAME, alias).version)
    except MlflowException as error:
        # SQL stores and servers disagree on the code of "no such alias"; both name what is missing.
        if error.error_code in {"RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"}:
            return None
        raise


def _numbers(condition: str) -> list[int]:
    with asking() as client:
        found: list[int] = []
        token = None
        while True:
            page = client.search_model_versions(condition, max_results=1000, page_token=token)
            found += [int(version.version) for version in page]
            token = page.token
            if not token:
                return found


def _version(client: Any, number: int) -> ModelVersion:
    from mlflow.exceptions import MlflowException

    try:
        version = client.get_model_version(MODEL_NAME, str(number))
        run = client.get_run(version.run_id).data
    except MlflowException as error:
        if error.error_code == "RESOURCE_DOES_NOT_EXIST":
            raise TrackingError(
                f"MLflow at {shown_address()} has no {MODEL_NAME} version {number}, or not its run; "
                "choose another version, or train one"
            ) from None
        raise
    return ModelVersion(number, version.run_id, dict(run.params), dict(run.metrics))
