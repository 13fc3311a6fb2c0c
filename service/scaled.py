"""The service in two parts that scale apart: HTTP in ``front``, the booster in ``scorer``.

Like `service.app` this imports nothing heavy: ``bentoml serve`` loads it only to start workers.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

import bentoml
import numpy as np

from service.app import SETTINGS, CreditRiskClassifier, LeanService, bentoml_options, make_service

if TYPE_CHECKING:
    from service.core import Core
    from service.remote import FrontCore


class Scorer:
    """Scores encoded applications with stored versions, for the front alone."""

    def __init__(self) -> None:
        from service.remote import Versions

        self._versions = Versions()

    @bentoml.api(route="/score")
    async def score(self, tag: str, digests: dict[str, str], matrix: np.ndarray) -> np.ndarray:
        """Give probabilities of default, shape (n,), for a matrix (n, k), by exactly the version named."""
        return self._versions.bundle(tag, digests).probabilities(matrix)


scorer = bentoml.service(
    name="credit_risk_scorer",
    service_class=LeanService,
    **{**bentoml_options(SETTINGS, with_keys=True), "workers": SETTINGS.front.scorers},
)(Scorer)


class CreditRiskFront(CreditRiskClassifier):
    """Decide on applications for credit with the promoted version, whose booster runs in other processes."""

    def __init__(self) -> None:
        super().__init__()
        core = cast("FrontCore", self._core)
        core.lanes.open([getattr(self, name) for name in _LANES])

    @staticmethod
    def make_core() -> Core:
        """Give this process's core."""
        from service.remote import front_core

        return front_core()

    async def __is_ready__(self) -> bool:
        """Tell ``/readyz`` whether a version answers, scorer and all."""
        return await cast("FrontCore", self._core).is_ready()


_LANES = [f"scorer_{number}" for number in range(SETTINGS.front.calls)]
for _name in _LANES:
    # One proxy for each call under way: see `service.remote.Lanes`.
    setattr(CreditRiskFront, _name, bentoml.depends(scorer))

front = make_service(CreditRiskFront, "credit_risk_front", SETTINGS.front.workers)
