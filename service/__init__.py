"""The service that answers with the promoted version.

``bentoml serve service:svc``, or plain ``bentoml serve``: everything in each worker, the default.
``bentoml serve service:front``: the booster in processes of its own, see docs/scaling.md.
"""

from __future__ import annotations

from typing import Any

from service.app import svc

__all__ = ["svc"]


def __getattr__(name: str) -> Any:
    """Declare ``front`` when it is asked for: nobody else needs what it consists of."""
    if name != "front":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from service.split.services import front

    return front
