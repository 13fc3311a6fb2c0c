"""The core of the HTTP front: all but the booster's call, which is made in the scorer.

The front follows the promoted pointer and names the version in each call, so an answer comes whole from the
version that was promoted when its request arrived.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from pathlib import Path

from pipeline.core.model.features import Matrix
from pipeline.core.policy import Policy
from pipeline.core.settings import conf_folder
from service.answering.batcher import Batcher, GatheringBatcher
from service.answering.core import Core, PendingApplication, encoded
from service.answering.refusal import Refusal
from service.answering.served_model import Decisions, ServedModel
from service.settings import ServeSettings
from service.split.client import ScorerClient
from service.split.protocol import token

_PROBE_SECONDS = 1.0
"""How long a readiness probe waits for a scorer; the one who asks is as impatient."""


class FrontCore(Core):
    """Answers requests, with probabilities that the scorers give.

    Parameters
    ----------
    settings, policy, home
        As of `Core`.
    url
        Where the scorers listen.
    """

    def __init__(self, settings: ServeSettings, policy: Policy, home: Path, url: str) -> None:
        super().__init__(settings, policy, home)
        self.scorers = ScorerClient(url, token(), settings.front, settings.limits.retry_after_seconds)

    async def is_ready(self) -> bool:
        """Whether a version is promoted and a scorer has it: it checks the golden rows when it loads a version."""
        version = self.version()
        if version is None:
            return False
        example = version.model.encode([version.model.schema.example()])
        try:
            await self.scorers.score(version.promotion, example, _PROBE_SECONDS)
        except Refusal:
            return False
        return True

    def _batcher(self, model: ServedModel) -> Batcher[PendingApplication, bytes]:
        async def answer(cases: Sequence[PendingApplication]) -> list[bytes]:
            return self._answers(model, cases, await self._decide_many(model, encoded(model, cases)))

        return GatheringBatcher(answer, self.settings.micro_batch_rows, self.settings.front.calls)

    async def _decide_many(self, model: ServedModel, matrix: Matrix) -> Decisions:
        return model.decisions(matrix, await self.scorers.score(model.promotion, matrix))


@cache
def front_core(url: str) -> FrontCore:
    """Make this process's core from ``conf/serve.yaml``, once."""
    folder = conf_folder()
    return FrontCore(
        ServeSettings.load(folder / "serve.yaml"), Policy.load(folder / "policy.yaml"), folder.parent, url
    )
