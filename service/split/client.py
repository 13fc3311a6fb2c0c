"""Call the scorers from an HTTP worker of the front."""

from __future__ import annotations

import asyncio
import logging
from urllib.parse import unquote, urlsplit

import aiohttp
import numpy as np

from pipeline.core.model.features import Matrix
from pipeline.core.promoted import Promotion
from service.answering.refusal import Refusal
from service.settings import FrontSettings
from service.split.protocol import PATH, TOKEN_HEADER, VERSION_HEADER, version_name

logger = logging.getLogger("bentoml.credit_risk")

_PAUSE_SECONDS = 0.05
"""Between two tries of a call whose connection broke."""

_IDLE_SECONDS = 2.0
"""How long an idle connection is kept: less than the 5 seconds after which the other side closes it."""


class ScorerClient:
    """Calls the scorers.

    BentoML starts the scorers and says where they are; the calls are made here: BentoML's own client replaces its
    session after every 100 calls and breaks those under way, and costs several times what scoring does.

    Parameters
    ----------
    url
        Where the scorers listen: a socket file or an HTTP address.
    token
        Secret that the scorers expect.
    settings
        ``front`` of ``conf/serve.yaml``.
    retry_after_seconds
        What clients are told when no scorer answered in time.
    """

    def __init__(self, url: str, token: str, settings: FrontSettings, retry_after_seconds: int) -> None:
        self._url = urlsplit(url)
        self._token = token
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
            503: no scorer answered in time, or it refused the call.
        """
        patience = patience_seconds or self._settings.patience_seconds
        try:
            async with asyncio.timeout(patience), self._free:
                return await self._call_until_answered(version_name(promotion), matrix.tobytes())
        except TimeoutError:
            logger.error("no scorer answered in %g s", patience)
            raise self._no_answer() from None

    async def close(self) -> None:
        """Close the open connections."""
        if self._session is not None:
            await self._session.close()

    async def _call_until_answered(self, name: bytes, rows: bytes) -> Matrix:
        while True:
            try:
                return await self._call(name, rows)
            except aiohttp.ClientError:
                await asyncio.sleep(_PAUSE_SECONDS)

    async def _call(self, name: bytes, rows: bytes) -> Matrix:
        if self._session is None:
            self._session = self._open_session()
        headers = {VERSION_HEADER: name.decode(), TOKEN_HEADER: self._token}
        async with self._session.post(PATH, data=rows, headers=headers) as answer:
            body = await answer.read()
        if answer.status != 200:
            logger.error("the scorer answered %d: %s", answer.status, body.decode(errors="replace"))
            raise self._no_answer()
        return np.frombuffer(body, dtype=np.float32)

    def _open_session(self) -> aiohttp.ClientSession:
        if self._url.scheme == "file":
            path = unquote(self._url.path)
            local = aiohttp.UnixConnector(path, limit=self._settings.calls, keepalive_timeout=_IDLE_SECONDS)
            return aiohttp.ClientSession("http://scorer", connector=local)
        remote = aiohttp.TCPConnector(limit=self._settings.calls, keepalive_timeout=_IDLE_SECONDS)
        return aiohttp.ClientSession(f"http://{self._url.netloc}", connector=remote)

    def _no_answer(self) -> Refusal:
        retry_after = (b"retry-after", b"%d" % self._retry_after_seconds)
        return Refusal(503, "the model's own service does not answer; try again", headers=[retry_after])
