"""The same decision served in other ways, as their own documentation shows, from the promoted version's files."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from benchmarks.scratch import Scratch
from tests.testkit.servers import Service

EMPTY_LEAN, EMPTY_DEFAULT = "empty BentoML, lean", "empty BentoML, default"
TUTORIAL, FASTAPI, MLFLOW = "tutorial on runners", "FastAPI by hand", "mlflow models serve"


def peers(scratch: Scratch, application: Mapping[str, Any], version: int) -> list[Service]:
    """List what people use instead of this service, each with one worker.

    Parameters
    ----------
    scratch
        State with a promoted version.
    application
        The request's body.
    version
        The promoted version's number in MLflow.
    """
    body = json.dumps(application).encode()
    records = json.dumps({"dataframe_records": [application]}).encode()
    port = ("--port", "{port}")
    return [
        Service(
            TUTORIAL,
            ("bentoml", "serve", "benchmarks.peers.tutorial:svc", "--api-workers", "1", *port),
            body,
            environment=_home(scratch, "tutorial"),
        ),
        Service(
            FASTAPI,
            ("uvicorn", "benchmarks.peers.fastapi_app:app", "--workers", "1", "--no-access-log", *port),
            body,
            ready="/docs",
            environment=scratch.env,
        ),
        Service(
            MLFLOW,
            ("mlflow", "models", "serve", "--model-uri", f"models:/credit_risk_model/{version}",
             "--env-manager", "local", "--workers", "1", *port),
            records,
            path="/invocations",
            ready="/ping",
            environment=scratch.env,
        ),
        *(
            Service(
                name,
                ("bentoml", "serve", f"benchmarks.peers.empty:{kind}", *port),
                body,
                environment=_home(scratch, kind),
            )
            for name, kind in ((EMPTY_DEFAULT, "default"), (EMPTY_LEAN, "lean"))
        ),
    ]  # fmt: skip


def _home(scratch: Scratch, name: str) -> dict[str, str]:
    return {**scratch.env, "BENTOML_HOME": scratch.copy_home(name)}
