"""The service that answers with the promoted version.

``bentoml serve service:svc``, or plain ``bentoml serve``: everything in each worker, the default.
``bentoml serve service:front``: the booster in processes of its own, see docs/service-scaling.md.
"""

from service.app import svc
from service.split.services import front

__all__ = ["front", "svc"]
