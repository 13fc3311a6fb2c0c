"""Settings of the service: ``conf/serve.yaml``."""

from __future__ import annotations

from typing import Any

from pydantic import Field, model_validator

from pipeline.core.record import DecisionLogSettings
from pipeline.core.settings import Settings


class LimitSettings(Settings):
    """How much the service accepts before it refuses."""

    body_bytes: int = Field(ge=256)
    """Largest body of one application; beyond it the answer is 413."""
    batch_rows: int = Field(ge=1)
    """Maximum applications per batch request; beyond it the answer is 400."""
    batch_body_bytes: int = Field(ge=256)
    """Largest body of a batch request; beyond it the answer is 413."""
    body_seconds: float = Field(gt=0)
    """How long a client may take to send its body; then the answer is 408 and the connection is closed."""
    requests: int = Field(ge=1)
    """Maximum applications and explanations in progress per worker; beyond it the answer is 503."""
    batches: int = Field(ge=1)
    """Maximum batch requests in progress per worker; beyond it the answer is 503."""
    retry_after_seconds: int = Field(ge=1)
    """Retry-After of a 503."""
    connections: int = Field(ge=1)
    """Maximum open connections per worker (fewer if it may open few files); then the oldest idle one is closed."""
    header_seconds: float = Field(gt=0)
    """How long a client may take to send its headers, or to read on; then the connection is closed."""


class BentoSettings(Settings):
    """Which parts of BentoML's own request path stay on."""

    metrics: bool
    access_log: bool
    tracing: bool
    timeout_seconds: float | None = Field(gt=0)
    """None: BentoML's timeout is taken out."""


class FrontSettings(Settings):
    """The split of ``service:front``: HTTP in some processes, the booster in others."""

    workers: int = Field(ge=1)
    """Processes that answer HTTP."""
    scorers: int = Field(ge=1)
    """Processes that run the booster."""
    calls: int = Field(ge=1)
    """Maximum calls to the scorers in progress per HTTP process."""
    patience_seconds: float = Field(gt=0)
    """How long a request waits for a scorer before it is answered 503."""


class ServeSettings(Settings):
    """``conf/serve.yaml``: how the service answers, and its limits."""

    reasons: bool
    """Whether ``/classify`` and ``/classify_batch`` include adverse reasons."""
    workers: int | None = Field(ge=1)
    """Worker processes; None: one for each core."""
    requests_per_connection: int | None = Field(ge=1)
    """Requests that a kept connection carries on average, where several workers answer.

    Whichever worker wakes first accepts all waiting connections. Closing some at random lets clients reopen them,
    and the least busy workers accept those. None: connections are kept as long as clients like.
    """
    micro_batch_rows: int = Field(ge=1)
    """Maximum applications scored in one call of the booster."""
    retry_refused_seconds: float = Field(gt=0)
    """How often a promoted version that failed its checks is tried again."""
    hosts: tuple[str, ...] | None = Field(strict=False)
    """Accepted Host headers, without port. None: any if API keys are set, else this machine's names."""
    proxies: tuple[str, ...] = Field(strict=False)
    """Addresses or networks of proxies whose X-Forwarded-For and X-Forwarded-Proto are believed."""
    limits: LimitSettings
    decision_log: DecisionLogSettings
    bentoml: BentoSettings
    front: FrontSettings

    @model_validator(mode="before")
    @classmethod
    def _has_no_policy(cls, values: Any) -> Any:
        if isinstance(values, dict) and "thresholds" in values:
            raise ValueError("thresholds belong in policy.yaml, beside this file; move the lines there")
        return values
