"""Declare the BentoML service and its endpoints, and fit it into BentoML's server.

Nothing heavy is imported here: ``bentoml serve`` loads this module in its own process too, only to start workers.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import bentoml

from pipeline.core.machine import available_cores
from pipeline.core.settings import conf_folder
from service.http.access import LOOPBACK, configured_keys
from service.http.port import require_free_port
from service.processes import end_with_supervisor, supervise
from service.settings import ServeSettings

if TYPE_CHECKING:
    from service.answering.core import Core
    from service.http.middleware import FastPath

SETTINGS = ServeSettings.load(conf_folder() / "serve.yaml")

_UNUSED_TIMEOUT = 60.0
"""BentoML requires a timeout to be configured, even if its middleware is removed."""


def bentoml_options(settings: ServeSettings, *, with_keys: bool) -> dict[str, Any]:
    """Translate ``conf/serve.yaml`` into BentoML's own configuration.

    Without API keys the service binds to this machine only, unless ``--host`` says otherwise.
    """
    kept = settings.bentoml
    options: dict[str, Any] = {
        "traffic": {"timeout": kept.timeout_seconds or _UNUSED_TIMEOUT},
        "metrics": {"enabled": kept.metrics},
        "logging": {"access": {"enabled": kept.access_log}},
    }
    return options if with_keys else {**options, "http": {"host": LOOPBACK}}


class LeanService(bentoml.Service[Any]):
    """A BentoML service without the middlewares that ``conf/serve.yaml`` leaves off.

    BentoML's configuration cannot leave out two of them: tracing, which costs 200 µs a request even if it traces
    nothing, and the timeout, 15 µs for a task and a timer that outlives its request.
    """

    def inject_config(self) -> None:
        """Complete BentoML's configuration; where a server is about to start, check its port at once.

        BentoML's hook for checks, ``on_deployment``, comes too late: by then a second server on a port that is in
        use has wiped the metrics of the first.
        """
        super().inject_config()
        require_free_port()
        supervise()

    def to_asgi(self, is_main: bool = True) -> Any:
        """Build the application that a worker serves, as the last step before uvicorn is configured."""
        from service.http.connections import install

        install(SETTINGS.limits, SETTINGS.proxies)
        end_with_supervisor()
        app = super().to_asgi(is_main=is_main)
        app.user_middleware = [one for one in app.user_middleware if one.cls not in _unwanted()]
        return app


class CreditRiskClassifier:
    """Decide on applications for credit with the promoted version.

    Over HTTP the middleware answers (`service.http.middleware`); these methods are for BentoML's in-process
    callers, and use the same core.
    """

    def __init__(self) -> None:
        self._core = self.make_core()
        self._core.start()

    @staticmethod
    def make_core() -> Core:
        """Return this process's core; its imports are heavy."""
        from service.answering.core import core

        return core()

    @bentoml.api(route="/classify")
    async def classify(self, application: dict[str, Any], /) -> dict[str, Any]:
        """Decide on one application."""
        answer: dict[str, Any] = await _answered(self._core.classify, application)
        return answer

    @bentoml.api(route="/classify_batch")
    async def classify_batch(self, applications: list[dict[str, Any]], /) -> list[dict[str, Any]]:
        """Decide on an array of applications, all by one version and all or none."""
        with self._core.batches:
            answer: list[dict[str, Any]] = await _answered(self._core.classify_batch, applications)
        return answer

    @bentoml.api(route="/explain")
    async def explain(self, application: dict[str, Any], /) -> dict[str, Any]:
        """Decide on one application, and explain: contributions of its fields, adverse reasons."""
        answer: dict[str, Any] = await _answered(self._core.explain, application)
        return answer

    async def __is_ready__(self) -> bool:
        """Whether a version is serving, for ``/readyz``."""
        return self._core.version() is not None

    @bentoml.on_shutdown
    def close(self) -> None:
        """Stop, after recording the last decisions."""
        self._core.close()


def make_service(inner: type[CreditRiskClassifier], name: str, workers: int | None) -> LeanService:
    """Make a BentoML service of a class, with the fast path in front of it."""
    options = bentoml_options(SETTINGS, with_keys=bool(configured_keys()))
    alone = (workers or available_cores()) == 1
    service: LeanService = bentoml.service(
        name=name, service_class=LeanService, **{**options, "workers": workers or "cpu_count"}
    )(inner)

    def fast_path(app: Any) -> FastPath:
        """Build the middleware when a worker builds its application, with what it imports."""
        from service.http.middleware import FastPath

        core, keys = inner.make_core(), configured_keys()
        return FastPath(app, core, keys, lambda: service.openapi_spec.asdict(), alone=alone)

    service.add_asgi_middleware(fast_path)
    return service


def _unwanted() -> set[type]:
    """BentoML's middlewares that ``conf/serve.yaml`` switches off and BentoML's configuration cannot."""
    from bentoml._internal.server.http.traffic import TimeoutMiddleware
    from opentelemetry.instrumentation.asgi import OpenTelemetryMiddleware

    left_off: set[type] = set() if SETTINGS.bentoml.tracing else {OpenTelemetryMiddleware}
    return left_off if SETTINGS.bentoml.timeout_seconds else {*left_off, TimeoutMiddleware}


async def _answered(decide: Any, body: Any) -> Any:
    from service.answering.refusal import Refusal
    from service.http.request_ids import RequestIds

    try:
        return json.loads(await decide(json.dumps(body).encode(), RequestIds().choose({})))
    except Refusal as refusal:
        raise bentoml.exceptions.BentoMLException(refusal.body.decode(), error_code=refusal.status) from None


svc = make_service(CreditRiskClassifier, "credit_risk_classifier", SETTINGS.workers)
