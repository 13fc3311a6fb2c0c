"""Score encoded applications with stored versions, for the front: the booster in a process of its own."""

from __future__ import annotations

import asyncio
import gc
import logging
import re
from collections import OrderedDict
from secrets import compare_digest

import numpy as np
from pydantic import BaseModel, ConfigDict, ValidationError
from starlette.types import ASGIApp, Receive, Scope, Send

from pipeline.core.errors import StoreError
from pipeline.core.model.bundle import Bundle, open_bundle
from pipeline.core.promoted import MODEL_NAME, version_home
from service.answering.refusal import Refusal
from service.settings import ServeSettings
from service.split.protocol import PATH, TOKEN_HEADER, TOKEN_VARIABLE, VERSION_HEADER

logger = logging.getLogger("bentoml.credit_risk")

_PROBES = frozenset({"/livez", "/healthz", "/readyz"})
"""All that is open without the token."""

_TAG = re.compile(rf"{MODEL_NAME}:v[0-9]+")
"""What a tag looks like: it becomes a path, so nothing else may."""

_KEPT = 3
"""Versions that a scorer keeps loaded: during a switch some calls still name the one before."""

_FLOAT_BYTES = 4
"""Size of a value: float32."""

Headers = dict[bytes, bytes]


class _VersionName(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")

    tag: str
    digests: dict[str, str]


class LoadedVersions:
    """The boosters of stored versions, each verified and queried before it scores."""

    def __init__(self) -> None:
        self._loaded: OrderedDict[bytes, Bundle] = OrderedDict()

    def bundle(self, name: bytes) -> Bundle:
        """Return a version, loaded on its first use.

        Parameters
        ----------
        name
            See `service.split.protocol.version_name`.

        Raises
        ------
        ValueError
            It names no version.
        StoreError
            The stored files are not those that the digests name.
        OSError
            The system does not let them be read.
        """
        if name not in self._loaded:
            self._load(name)
        self._loaded.move_to_end(name)
        return self._loaded[name]

    def _load(self, name: bytes) -> None:
        version = _VersionName.model_validate_json(name)
        if not _TAG.fullmatch(version.tag):
            raise ValueError(f"a version is named {MODEL_NAME}:vN, received {version.tag!r}")
        bundle = open_bundle(version_home(version.tag), version.digests)
        bundle.check_golden()
        self._loaded[name] = bundle
        while len(self._loaded) > _KEPT:
            self._loaded.popitem(last=False)
        gc.collect()
        gc.freeze()  # a full collection over what lives on would stall requests
        logger.info("%s scores from now on", version.tag)


class ScoringEndpoint:
    """ASGI middleware of the scorer: takes encoded rows, float32 as bytes, and answers with their probabilities.

    Who calls must know the token, before anything of its request is read.

    Parameters
    ----------
    app
        BentoML's application, for the probes.
    settings
        ``conf/serve.yaml``.
    token
        Secret that the front sends.
    """

    def __init__(self, app: ASGIApp, settings: ServeSettings, token: str) -> None:
        self._app = app
        self._token = token.encode()
        self._most_rows = max(settings.limits.batch_rows, settings.micro_batch_rows)
        self._body_seconds = settings.limits.body_seconds
        self._versions = LoadedVersions()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a call, or hand a probe through to BentoML."""
        if scope["type"] != "http" or scope["path"] in _PROBES:
            await self._app(scope, receive, send)
            return
        try:
            status, body = 200, await self._score(scope, receive)
        except Refusal as refusal:
            status, body = refusal.status, refusal.body
        headers = [(b"content-length", b"%d" % len(body))]
        if status in {401, 408, 413}:  # the body was not read to its end
            headers.append((b"connection", b"close"))
        await send({"type": "http.response.start", "status": status, "headers": headers})
        await send({"type": "http.response.body", "body": body})

    async def _score(self, scope: Scope, receive: Receive) -> bytes:
        headers: Headers = dict(scope["headers"])
        if not compare_digest(headers.get(TOKEN_HEADER.encode(), b""), self._token):
            raise Refusal(401, f"the token is not the scorer's; give both services the same {TOKEN_VARIABLE}")
        if scope["path"] != PATH:
            raise Refusal(404, f"no such path; the scorer answers POST {PATH}")
        if scope["method"] != "POST":
            raise Refusal(405, f"the scorer answers POST {PATH}")
        bundle = self._bundle(headers.get(VERSION_HEADER.encode(), b""))
        width = len(bundle.vectorizer.feature_names_) * _FLOAT_BYTES
        rows = await self._body(headers, receive, self._most_rows * width)
        if not rows or len(rows) % width:
            raise Refusal(400, f"a row of this version has {width} bytes; {len(rows)} bytes are not whole rows")
        matrix = np.frombuffer(rows, dtype=np.float32).reshape(-1, width // _FLOAT_BYTES)
        return bundle.probabilities(matrix).tobytes()

    def _bundle(self, name: bytes) -> Bundle:
        try:
            return self._versions.bundle(name)
        except StoreError as error:
            raise Refusal(409, str(error)) from None
        except ValidationError:
            raise Refusal(400, f"{VERSION_HEADER} must name a version by tag and digests, as JSON") from None
        except ValueError as error:
            raise Refusal(400, str(error)) from None
        except OSError as error:
            raise Refusal(503, f"the version cannot be read: {error.strerror}") from None

    async def _body(self, headers: Headers, receive: Receive, limit: int) -> bytes:
        """Read a body of at most so many bytes."""
        body = bytearray()
        too_large = Refusal(413, f"the rows must not exceed {limit} bytes")
        if int(headers.get(b"content-length", b"0")) > limit:
            raise too_large
        try:
            async with asyncio.timeout(self._body_seconds):
                while True:
                    message = await receive()
                    body += message.get("body", b"")
                    if len(body) > limit:
                        raise too_large
                    if not message.get("more_body"):
                        return bytes(body)
        except TimeoutError:
            raise Refusal(408, f"the rows must arrive within {self._body_seconds:g} seconds") from None
