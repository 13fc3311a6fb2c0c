"""Declare the service in two parts that scale apart: HTTP in ``front``, the booster in ``scorer``.

Like `service.app` this imports nothing heavy: ``bentoml serve`` loads it only to start workers.
"""

from __future__ import annotations

import os
import secrets
from typing import TYPE_CHECKING, Any, cast

import bentoml

from service.app import SETTINGS, CreditRiskClassifier, LeanService, bentoml_options, make_service
from service.split.protocol import TOKEN_VARIABLE, token

if TYPE_CHECKING:
    from service.answering.core import Core
    from service.split.front import FrontCore
    from service.split.scorer import ScoringEndpoint

# The processes that `bentoml serve` starts inherit it.
os.environ.setdefault(TOKEN_VARIABLE, secrets.token_urlsafe())


class Scorer:
    """Scores encoded applications with stored versions, for the front alone; see `ScoringEndpoint`."""


class CreditRiskFront(CreditRiskClassifier):
    """Decide on applications for credit with the promoted version, whose booster runs in other processes."""

    @staticmethod
    def make_core() -> Core:
        """Give this process's core; on its own, without scorers, the booster runs here too."""
        from service.answering.core import core
        from service.split.front import front_core

        return front_core(scorer.url) if scorer.url else core()

    async def __is_ready__(self) -> bool:
        """Tell ``/readyz`` whether a version answers, scorer and all."""
        return await cast("FrontCore", self._core).is_ready() if scorer.url else self._core.version() is not None

    @bentoml.on_shutdown
    async def close_connections(self) -> None:
        """Close the connections to the scorers."""
        if scorer.url:
            await cast("FrontCore", self._core).scorers.close()


def _scoring_endpoint(app: Any) -> ScoringEndpoint:
    """Build the middleware when a worker builds its application, with what it imports."""
    from service.split.scorer import ScoringEndpoint

    return ScoringEndpoint(app, SETTINGS, token())


scorer = bentoml.service(
    name="credit_risk_scorer",
    service_class=LeanService,
    **{**bentoml_options(SETTINGS, with_keys=True), "workers": SETTINGS.front.scorers},
)(Scorer)
scorer.add_asgi_middleware(_scoring_endpoint)

CreditRiskFront.scorer = bentoml.depends(scorer)  # type: ignore[attr-defined] # BentoML starts what is depended on
front = make_service(CreditRiskFront, "credit_risk_front", SETTINGS.front.workers)
