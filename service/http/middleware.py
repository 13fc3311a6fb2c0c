"""Answer HTTP requests in an ASGI middleware, before BentoML's own handling of requests.

That handling costs several times what the model does. So BentoML's public hook, ``Service.add_asgi_middleware``,
puts this in front of it: the endpoints and all refusals are answered here, only the probes go through to BentoML.
"""

from __future__ import annotations

import asyncio
import logging
import traceback
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from functools import partial
from random import random
from time import perf_counter
from typing import Any

import orjson
from opentelemetry.trace import format_trace_id, get_current_span

from service.answering.core import Core, Version
from service.answering.refusal import Header, Refusal
from service.http.access import ApiKeyAuth, HostCheck
from service.http.asgi import CLOSE, Application, Headers, Receive, Scope, Send
from service.http.openapi import openapi
from service.http.page import HEADERS, PAGE
from service.http.request_body import ClientGone, discard_body, read_body, require_json
from service.http.request_ids import RequestIds
from service.records.metrics import CONTENT_TYPE

logger = logging.getLogger("bentoml.credit_risk")

_JSON = b"application/json"
_PROBES = frozenset({"/livez", "/healthz", "/readyz"})
"""Open to everybody: probes have no key and learn nothing."""

_NEED_NO_KEY = frozenset({*_PROBES, "/"})
_BENTOML = frozenset({*_PROBES, "/schema.json"})

_OTHER = "other"
"""Metrics label of unknown paths, which must not become labels themselves."""


@dataclass(slots=True)
class Request:
    """A request, as endpoints see it."""

    receive: Receive
    headers: Headers
    request_id: str
    body_is_read: bool = False


@dataclass(slots=True)
class Answer:
    """An answer of an endpoint."""

    body: bytes
    status: int = 200
    content_type: bytes = _JSON
    headers: tuple[Header, ...] = ()


Endpoint = Callable[[Request], Awaitable[Answer]]
Decide = Callable[[bytes, str, str, Version], Awaitable[bytes]]


class FastPath:
    """The middleware.

    Parameters
    ----------
    app
        BentoML's application, which answers the probes.
    core
        Answers.
    keys
        API keys; see `service.http.access.ApiKeyAuth`.
    describe
        Returns BentoML's own OpenAPI document, which `/docs.json` completes.
    alone
        Whether this is the only worker; otherwise connections are closed now and then, see
        `service.settings.ServeSettings.requests_per_connection`.
    """

    def __init__(
        self,
        app: Application,
        core: Core,
        keys: tuple[str, ...],
        describe: Callable[[], dict[str, Any]],
        *,
        alone: bool = True,
    ) -> None:
        self._app = app
        self._core = core
        self._auth = ApiKeyAuth(keys)
        self._hosts = HostCheck(core.settings.hosts, with_keys=bool(keys))
        self._ids = RequestIds()
        self._describe = describe
        self._with_keys = bool(keys)
        self._answers: Version | None = None
        kept = core.settings.requests_per_connection
        self._parting = 0.0 if alone or kept is None else 1 / kept
        self._endpoints = self._routes()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request, or pass it on to BentoML."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        began = perf_counter()
        headers = dict(scope["headers"])
        request = Request(receive, headers, self._ids.choose(headers))
        try:
            answer = await self._answer(scope, request)
        except Refusal as refusal:
            answer = await self._refused(refusal, request)
        except ClientGone:
            return
        except Exception as error:
            answer = _failed(error, request.request_id)
        if answer is None:
            await self._app(scope, receive, send)
            return
        # Nobody gains by guessing it, so any random number will do.
        if random() < self._parting and CLOSE not in answer.headers:  # noqa: S311
            answer.headers += (CLOSE,)
        await _send(send, answer, request.request_id)
        path = scope["path"]
        endpoint = path if path in self._endpoints else _OTHER
        self._core.metrics.answered(endpoint, answer.status, perf_counter() - began)

    def _routes(self) -> Mapping[str, Mapping[str, Endpoint]]:
        core, limits = self._core, self._core.settings.limits
        return {
            "/classify": {"POST": partial(self._decide, core.classify, limits.body_bytes)},
            "/explain": {"POST": partial(self._decide, core.explain, limits.body_bytes)},
            "/classify_batch": {"POST": self._classify_batch},
            "/model": {"GET": self._model},
            "/metrics": {"GET": self._metrics},
            "/docs.json": {"GET": self._docs},
            "/": {"GET": self._page},
        }

    async def _answer(self, scope: Scope, request: Request) -> Answer | None:
        """Run the endpoint of a request; None if BentoML is to answer."""
        path = scope["path"]
        if path not in _PROBES:
            self._hosts.check(request.headers)
        if path not in _NEED_NO_KEY:
            self._auth.check(scope, request.headers)
        methods = self._endpoints.get(path)
        if methods is None:
            if path in _BENTOML:
                return None
            raise Refusal(404, "no such path; GET / lists the paths")
        endpoint = methods.get(scope["method"])
        if endpoint is None:
            allowed = ", ".join(methods)
            raise Refusal(405, f"the path takes {allowed} only", headers=[(b"allow", allowed.encode())])
        return await endpoint(request)

    async def _refused(self, refusal: Refusal, request: Request) -> Answer:
        headers = refusal.headers
        if _sends_body(request) and CLOSE not in headers:
            seconds = self._core.settings.limits.body_seconds
            if not await discard_body(request.receive, seconds):
                headers = [*headers, CLOSE]
        return Answer(refusal.body, refusal.status, headers=tuple(headers))

    async def _decide(self, decide: Decide, limit: int, request: Request) -> Answer:
        require_json(request.headers)
        body = await read_body(request.receive, request.headers, limit, self._core.settings.limits.body_seconds)
        request.body_is_read = True
        return Answer(await decide(body, request.request_id, self._trace_id(), self._answering()))

    async def _classify_batch(self, request: Request) -> Answer:
        with self._core.batches:
            limit = self._core.settings.limits.batch_body_bytes
            return await self._decide(self._core.classify_batch, limit, request)

    async def _model(self, _: Request) -> Answer:
        return Answer(orjson.dumps(self._core.model()))

    async def _metrics(self, _: Request) -> Answer:
        self._core.show()
        # Reading the files of all workers takes milliseconds: not in the loop.
        return Answer(await asyncio.to_thread(self._core.metrics.exposition), content_type=CONTENT_TYPE)

    async def _docs(self, _: Request) -> Answer:
        document = openapi(self._describe(), self._core, with_keys=self._with_keys)
        return Answer(orjson.dumps(document))

    async def _page(self, _: Request) -> Answer:
        return Answer(PAGE, content_type=b"text/html; charset=utf-8", headers=HEADERS)

    def _answering(self) -> Version:
        """Return the serving version, looking at the promoted pointer once in a turn of the event loop.

        Requests that run in a turn were read from their connections before it, so before the look; those read
        later run after `_look_again`. So no request that began after a promotion is answered by an older version.
        """
        if self._answers is None:
            self._answers = self._core.answering()
            asyncio.get_running_loop().call_soon(self._look_again)
        return self._answers

    def _look_again(self) -> None:
        self._answers = None

    def _trace_id(self) -> str:
        if not self._core.settings.bentoml.tracing:
            return ""
        return format_trace_id(get_current_span().get_span_context().trace_id)


def _sends_body(request: Request) -> bool:
    """Whether the client may still be sending a body; one that expects ``100 Continue`` waits to be told to."""
    return not request.body_is_read and b"expect" not in request.headers


async def _send(send: Send, answer: Answer, request_id: str) -> None:
    headers = [
        (b"content-type", answer.content_type),
        (b"content-length", b"%d" % len(answer.body)),
        (b"x-request-id", request_id.encode()),
        *answer.headers,
    ]
    await send({"type": "http.response.start", "status": answer.status, "headers": headers})
    await send({"type": "http.response.body", "body": answer.body})


def _failed(error: Exception, request_id: str) -> Answer:
    """Answer 500 and log where it happened, but not the error's text: that may hold an applicant's values."""
    where = "".join(traceback.format_tb(error.__traceback__))
    logger.error("request %s failed with %s\n%s", request_id, type(error).__name__, where)
    return Answer(orjson.dumps({"error": "the service failed; its log says where", "detail": []}), 500)
