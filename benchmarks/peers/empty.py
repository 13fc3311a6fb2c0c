"""An endpoint of BentoML that does nothing: what its own path costs a request, as it comes and stripped.

``default`` is what ``@bentoml.service`` gives. ``lean`` has access log and tracing off, a short timeout
(each request keeps a timer alive that long) and its long-lived objects out of the garbage collector's sight.
"""

from __future__ import annotations

import gc
from typing import Any

import bentoml
from pydantic import BaseModel

LEAN: dict[str, Any] = {
    "traffic": {"timeout": 2},
    "logging": {"access": {"enabled": False}},
    "tracing": {"excluded_urls": "classify"},
}


class Anything(BaseModel):
    """A JSON object; its keys are ignored."""


class Answer(BaseModel):
    """What the smallest answer holds."""

    Status: str


class Empty:
    """Answers everybody alike."""

    @bentoml.api
    async def classify(self, application: Anything, /) -> Answer:
        """Approve without looking."""
        return Answer(Status="APPROVED")


class LeanEmpty(Empty):
    """The same, with what was made at start out of the collector's sight."""

    @bentoml.on_startup
    def settle(self) -> None:
        """Spare the garbage collector from walking over what stays."""
        gc.collect()
        gc.freeze()


default = bentoml.service(Empty, name="empty_default")
lean = bentoml.service(LeanEmpty, name="empty_lean", **LEAN)
