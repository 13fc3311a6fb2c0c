"""The BentoML service; ``bentoml serve`` loads this package.

``bentoml serve service:svc``, or plain ``bentoml serve``: everything in each worker, the default.
``bentoml serve service:front``: the booster in processes of its own, see docs/service-scaling.md.
"""

from __future__ import annotations

from typing import Any

from bentoml._internal.utils.analytics.usage_stats import do_not_track

from service.app import svc

# The command line has asked already whether it may report usage, before `pipeline` could set the variable.
do_not_track.cache_clear()

__all__ = ["svc"]


def __getattr__(name: str) -> Any:
    """Declare ``front`` when it is asked for: nobody else needs what it consists of."""
    if name != "front":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from service.split.services import front

    return front
