"""The service that answers with the promoted version: ``bentoml serve service:svc``, or plain ``bentoml serve``."""

from service.app import svc

__all__ = ["svc"]
