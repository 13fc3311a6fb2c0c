"""One line of the decision log, as monitoring trusts it."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Annotated, Any, NotRequired

from pydantic import AfterValidator, AwareDatetime, ConfigDict, Field, with_config
from typing_extensions import TypedDict  # pydantic wants this one before Python 3.12

from pipeline.core.policy import Status

Int64 = Annotated[int, Field(ge=-(2**63), lt=2**63)]


def _in_utc(moment: datetime) -> datetime:
    try:
        return moment.astimezone(UTC)
    except OverflowError:
        raise ValueError("outside of the years 1 to 9999 in UTC") from None


_STRICT = ConfigDict(strict=True, extra="ignore", allow_inf_nan=False)


@with_config(_STRICT)
class LoggedThresholds(TypedDict):
    """The policy's thresholds at the time of a decision."""

    maybe_above: float
    declined_above: float


@with_config(_STRICT)
class DecisionRecord(TypedDict):
    """One line of the decision log; keys that a later release adds are ignored."""

    time: Annotated[AwareDatetime, AfterValidator(_in_utc)]
    """When it was decided: ISO 8601 with its offset."""
    model: str
    """Exact tag in the BentoML store."""
    digest: NotRequired[str | None]
    """Sha256 of the booster file."""
    schema: NotRequired[str]
    """Digest of the contract."""
    thresholds: NotRequired[LoggedThresholds]
    request_id: str
    probability: Annotated[float, Field(ge=0, le=1)]
    """Of default."""
    status: Status
    row: NotRequired[Int64]
    """In its batch request."""
    trace_id: NotRequired[str]
    """W3C trace: 32 hex digits."""
    reasons: NotRequired[list[Any] | None]
    """Adverse reasons, if asked for."""
    inputs: NotRequired[dict[str, Int64 | float | str | None]]
    """What the applicant stated, unless switched off."""
