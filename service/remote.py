"""The model as a service of its own: encoded applications in, probabilities out, for the HTTP front that calls it.

``service:front`` answers HTTP, validates, encodes and decides; the booster runs in ``Scorer``, with workers of
its own, as runners had in BentoML's first design. The front follows the promoted pointer and names the version in
each call, so an answer comes whole from the version that was promoted when its request arrived.
"""

from __future__ import annotations

import asyncio
import logging
from collections import OrderedDict
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from functools import cache
from pathlib import Path
from typing import Any

import aiohttp
from bentoml.exceptions import BentoMLException

from pipeline.bundle import Bundle, open_bundle
from pipeline.config import ServeSettings, conf_folder
from pipeline.features import Matrix
from pipeline.pointer import Promotion, version_home
from service.batcher import Batcher, GatheringBatcher
from service.core import Case, Core, encoded
from service.refusal import Refusal
from service.served import Application, Decisions, ServedModel

logger = logging.getLogger("bentoml.credit_risk")

_KEPT = 3
"""Versions that a scorer keeps loaded: during a switch some calls still name the one before."""

_PAUSE = 0.05
"""Seconds between two tries of a call that found no scorer."""

_PROBE_SECONDS = 1.0
"""How long a readiness probe waits for a scorer; the one who asks is as impatient."""

_BROKEN = (aiohttp.ClientError, OSError)
"""What a call raises when its connection breaks: a worker ended, or closed a connection that was idle for long."""


class Versions:
    """The boosters of stored versions, each verified and queried before it scores."""

    def __init__(self) -> None:
        self._loaded: OrderedDict[tuple[str, frozenset[tuple[str, str]]], Bundle] = OrderedDict()

    def bundle(self, tag: str, digests: dict[str, str]) -> Bundle:
        """Give a version, loaded on its first use.

        Raises
        ------
        StoreError
            Its files are not those that the digests name.
        """
        key = (tag, frozenset(digests.items()))
        if key not in self._loaded:
            bundle = open_bundle(version_home(tag), digests)
            bundle.check_golden()
            self._loaded[key] = bundle
            logger.info("%s scores from now on", tag)
        self._loaded.move_to_end(key)
        while len(self._loaded) > _KEPT:
            self._loaded.popitem(last=False)
        return self._loaded[key]


class Lanes:
    """The calls to the scorer that one HTTP worker may have under way.

    BentoML's client replaces its session every 100 calls and with it breaks those under way: hence one proxy for
    each call under way.

    Parameters
    ----------
    patience_seconds
        How long a call may take, tries and waiting for a lane included.
    retry_after_seconds
        What clients are told when it took longer.
    """

    def __init__(self, patience_seconds: float, retry_after_seconds: int) -> None:
        self._patience_seconds = patience_seconds
        self._retry_after_seconds = retry_after_seconds
        self._free: asyncio.Queue[Any] = asyncio.Queue()

    def open(self, proxies: Sequence[Any]) -> None:
        """Open one lane for each proxy of the scorer."""
        for proxy in proxies:
            self._free.put_nowait(proxy)

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
        patience = patience_seconds or self._patience_seconds
        try:
            async with asyncio.timeout(patience), self._lane() as proxy:
                return await _persistently(
                    lambda: proxy.score(tag=promotion.tag, digests=promotion.digests, matrix=matrix)
                )
        except TimeoutError:
            logger.error("the scorer did not answer in %g s", patience)
            raise self._away() from None
        except BentoMLException as error:
            logger.error("the scorer refused %s: %s", promotion.tag, error)
            raise self._away() from None

    def _away(self) -> Refusal:
        retry_after = (b"retry-after", b"%d" % self._retry_after_seconds)
        return Refusal(503, "the model's own service does not answer; try again", headers=[retry_after])

    @asynccontextmanager
    async def _lane(self) -> AsyncIterator[Any]:
        proxy = await self._free.get()
        try:
            yield proxy
        finally:
            self._free.put_nowait(proxy)


class FrontCore(Core):
    """The core of the HTTP front: the booster's call is made in the scorer, everything else here.

    Parameters
    ----------
    settings, home
        As of `Core`.
    """

    def __init__(self, settings: ServeSettings, home: Path) -> None:
        super().__init__(settings, home)
        self.lanes = Lanes(settings.front.patience_seconds, settings.limits.retry_after_seconds)

    async def is_ready(self) -> bool:
        """Whether a version is promoted and a scorer has it: it checks the golden rows when it loads a version."""
        version = self.version()
        if version is None:
            return False
        example = version.model.encode([version.model.schema.example()])
        try:
            await self.lanes.score(version.promotion, example, _PROBE_SECONDS)
        except Refusal:
            return False
        return True

    def _batcher(self, model: ServedModel) -> Batcher[Case, bytes]:
        async def answer(cases: Sequence[Case]) -> list[bytes]:
            return self._answers(model, cases, await self._decide(model, encoded(model, cases)))

        return GatheringBatcher(answer, self.settings.micro_batch_rows, self.settings.front.calls)

    async def _decide_many(self, model: ServedModel, applications: Sequence[Application]) -> Decisions:
        return await self._decide(model, model.encode(applications))

    async def _decide(self, model: ServedModel, matrix: Matrix) -> Decisions:
        return model.decisions(matrix, await self.lanes.score(model.promotion, matrix))


@cache
def front_core() -> FrontCore:
    """Make this process's core from ``conf/serve.yaml``, once."""
    folder = conf_folder()
    return FrontCore(ServeSettings.load(folder / "serve.yaml"), folder.parent)


async def _persistently(call: Callable[[], Awaitable[Matrix]]) -> Matrix:
    while True:
        try:
            return await call()
        except _BROKEN:
            await asyncio.sleep(_PAUSE)
