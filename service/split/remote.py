"""The model as a service of its own: encoded applications in, probabilities out, for the HTTP front that calls it.

``service:front`` answers HTTP, validates, encodes and decides; the booster runs in ``scorer``, with workers of its
own, as runners had in BentoML's first design. The front follows the promoted pointer and names the version in each
call, so an answer comes whole from the version that was promoted when its request arrived.
"""

from __future__ import annotations

import asyncio
import gc
import logging
import re
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Sequence
from functools import cache
from pathlib import Path
from urllib.parse import unquote, urlsplit

import aiohttp
import numpy as np
import orjson

from pipeline.core.errors import StoreError
from pipeline.core.model.bundle import Bundle, open_bundle
from pipeline.core.model.features import Matrix
from pipeline.core.policy import Policy
from pipeline.core.promoted import MODEL_NAME, Promotion, version_home
from pipeline.core.settings import conf_folder
from service.answering.batcher import Batcher, GatheringBatcher
from service.answering.core import Core, PendingApplication, encoded
from service.answering.refusal import Header, Refusal
from service.answering.served_model import Decisions, ServedModel
from service.http.asgi import Receive, Scope, Send
from service.settings import FrontSettings, ServeSettings

logger = logging.getLogger("bentoml.credit_risk")

PATH = "/score"
_VERSION = "x-version"
"""Header that names the version: its tag and digests as JSON."""

_TAG = re.compile(rf"{MODEL_NAME}:v[0-9]+")
"""What a tag looks like: it becomes a path, so nothing else may."""

_KEPT = 3
"""Versions that a scorer keeps loaded: during a switch some calls still name the one before."""

_PAUSE = 0.05
"""Seconds between two tries of a call whose connection broke."""

_PROBE_SECONDS = 1.0
"""How long a readiness probe waits for a scorer; the one who asks is as impatient."""

_IDLE_SECONDS = 2.0
"""How long an idle connection is kept: less than the 5 seconds after which the other side closes it."""


class Versions:
    """The boosters of stored versions, each verified and queried before it scores."""

    def __init__(self) -> None:
        self._loaded: OrderedDict[bytes, Bundle] = OrderedDict()

    def bundle(self, name: bytes) -> Bundle:
        """Give a version, loaded on its first use.

        Parameters
        ----------
        name
            See `version_name`.

        Raises
        ------
        StoreError
            Its files are not those that the digests name.
        """
        if name not in self._loaded:
            self._load(name)
        self._loaded.move_to_end(name)
        return self._loaded[name]

    def _load(self, name: bytes) -> None:
        version = orjson.loads(name)
        if not _TAG.fullmatch(version["tag"]):
            raise StoreError(f"a version is named {MODEL_NAME}:vN, received {version['tag']!r}")
        bundle = open_bundle(version_home(version["tag"]), version["digests"])
        bundle.check_golden()
        self._loaded[name] = bundle
        while len(self._loaded) > _KEPT:
            self._loaded.popitem(last=False)
        gc.collect()
        gc.freeze()  # a full collection over what lives on would stall requests
        logger.info("%s scores from now on", version["tag"])


def version_name(promotion: Promotion) -> bytes:
    """Name exactly one version, by its tag and the digests of its files."""
    return orjson.dumps({"tag": promotion.tag, "digests": promotion.digests}, option=orjson.OPT_SORT_KEYS)


class ScorePath:
    """ASGI middleware of the scorer: float32 rows in, float32 probabilities out, as bytes.

    Parameters
    ----------
    app
        BentoML's application, for everything but `PATH`.
    """

    def __init__(self, app: Callable[[Scope, Receive, Send], Awaitable[None]]) -> None:
        self._app = app
        self._versions = Versions()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a call, or hand it through to BentoML."""
        if scope["type"] != "http" or scope["path"] != PATH:
            await self._app(scope, receive, send)
            return
        rows = await _whole_body(receive)
        status, body = self._score(dict(scope["headers"]).get(_VERSION.encode(), b""), rows)
        headers: list[Header] = [(b"content-length", b"%d" % len(body))]
        await send({"type": "http.response.start", "status": status, "headers": headers})
        await send({"type": "http.response.body", "body": body})

    def _score(self, name: bytes, rows: bytes) -> tuple[int, bytes]:
        try:
            bundle = self._versions.bundle(name)
        except (StoreError, ValueError) as error:
            return 409, str(error).encode()
        matrix = np.frombuffer(rows, dtype=np.float32).reshape(-1, len(bundle.vectorizer.feature_names_))
        return 200, bundle.probabilities(matrix).tobytes()


class Line:
    """The way from one HTTP worker to the scorers.

    BentoML starts the scorers and says where they are; the calls are made here: BentoML's own client replaces its
    session after every 100 calls and breaks those under way, and costs several times what scoring does.

    Parameters
    ----------
    url
        Where the scorers listen: a socket file or an HTTP address.
    settings
        ``front`` of ``conf/serve.yaml``.
    retry_after_seconds
        What clients are told when no scorer answered in time.
    """

    def __init__(self, url: str, settings: FrontSettings, retry_after_seconds: int) -> None:
        self._url = urlsplit(url)
        self._settings = settings
        self._retry_after_seconds = retry_after_seconds
        self._free = asyncio.Semaphore(settings.calls)
        self._session: aiohttp.ClientSession | None = None

    async def score(self, promotion: Promotion, matrix: Matrix, patience_seconds: float | None = None) -> Matrix:
        """Score encoded applications, shape (n, k), by the version of a promotion: shape (n,), float32.

        Scoring changes nothing, so a call whose connection broke is made again.

        Parameters
        ----------
        patience_seconds
            Instead of the usual.

        Raises
        ------
        Refusal
            503: no scorer answered in time, or it refused the version.
        """
        patience = patience_seconds or self._settings.patience_seconds
        try:
            async with asyncio.timeout(patience), self._free:
                return await self._persistently(version_name(promotion), matrix.tobytes())
        except TimeoutError:
            logger.error("no scorer answered in %g s", patience)
            raise self._away() from None

    async def close(self) -> None:
        """Close what connections are open."""
        if self._session is not None:
            await self._session.close()

    async def _persistently(self, name: bytes, rows: bytes) -> Matrix:
        while True:
            try:
                return await self._call(name, rows)
            except aiohttp.ClientError:
                await asyncio.sleep(_PAUSE)

    async def _call(self, name: bytes, rows: bytes) -> Matrix:
        if self._session is None:
            self._session = self._open()
        async with self._session.post(PATH, data=rows, headers={_VERSION: name.decode()}) as answer:
            body = await answer.read()
        if answer.status != 200:
            logger.error("the scorer answered %d: %s", answer.status, body.decode(errors="replace"))
            raise self._away()
        return np.frombuffer(body, dtype=np.float32)

    def _open(self) -> aiohttp.ClientSession:
        if self._url.scheme == "file":
            path = unquote(self._url.path)
            local = aiohttp.UnixConnector(path, limit=self._settings.calls, keepalive_timeout=_IDLE_SECONDS)
            return aiohttp.ClientSession("http://scorer", connector=local)
        remote = aiohttp.TCPConnector(limit=self._settings.calls, keepalive_timeout=_IDLE_SECONDS)
        return aiohttp.ClientSession(f"http://{self._url.netloc}", connector=remote)

    def _away(self) -> Refusal:
        retry_after = (b"retry-after", b"%d" % self._retry_after_seconds)
        return Refusal(503, "the model's own service does not answer; try again", headers=[retry_after])


class FrontCore(Core):
    """The core of the HTTP front: the booster's call is made in the scorer, everything else here.

    Parameters
    ----------
    settings, policy, home
        As of `Core`.
    url
        Where the scorers listen.
    """

    def __init__(self, settings: ServeSettings, policy: Policy, home: Path, url: str) -> None:
        super().__init__(settings, policy, home)
        self.line = Line(url, settings.front, settings.limits.retry_after_seconds)

    async def is_ready(self) -> bool:
        """Whether a version is promoted and a scorer has it: it checks the golden rows when it loads a version."""
        version = self.version()
        if version is None:
            return False
        example = version.model.encode([version.model.schema.example()])
        try:
            await self.line.score(version.promotion, example, _PROBE_SECONDS)
        except Refusal:
            return False
        return True

    def _batcher(self, model: ServedModel) -> Batcher[PendingApplication, bytes]:
        async def answer(pending: Sequence[PendingApplication]) -> list[bytes]:
            return self._answers(model, pending, await self._decide_many(model, encoded(model, pending)))

        return GatheringBatcher(answer, self.settings.micro_batch_rows, self.settings.front.calls)

    async def _decide_many(self, model: ServedModel, matrix: Matrix) -> Decisions:
        return model.decisions(matrix, await self.line.score(model.promotion, matrix))


@cache
def front_core(url: str) -> FrontCore:
    """Make this process's core from ``conf/serve.yaml``, once."""
    folder = conf_folder()
    return FrontCore(
        ServeSettings.load(folder / "serve.yaml"), Policy.load(folder / "policy.yaml"), folder.parent, url
    )


async def _whole_body(receive: Receive) -> bytes:
    chunks: list[bytes] = []
    while True:
        message = await receive()
        chunks.append(message.get("body", b""))
        if not message.get("more_body"):
            return b"".join(chunks)
