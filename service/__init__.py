"""The BentoML service; ``bentoml serve`` loads this package.

``bentoml serve service:svc``, or plain ``bentoml serve``: everything in each worker, the default.
``bentoml serve service:front``: the booster in processes of its own, see docs/service-scaling.md.
"""

from bentoml._internal.utils.analytics.usage_stats import do_not_track

from service.app import svc
from service.split.services import front

# The command line has asked already whether it may report usage, before `pipeline` could set the variable.
do_not_track.cache_clear()

__all__ = ["front", "svc"]
