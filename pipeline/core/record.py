"""The decision log, as the service writes it and monitoring reads it."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any, NotRequired

from pydantic import AfterValidator, AwareDatetime, ConfigDict, Field, with_config
from typing_extensions import TypedDict  # pydantic wants this one before Python 3.12

from pipeline.core.policy import Status
from pipeline.core.settings import Settings, parse_settings, read_yaml

DECISION_FILE = "decisions-{}.jsonl"
"""Name of a file of the decision log: the placeholder holds the worker's number and, once rotated, the file's."""

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


class DecisionLogSettings(Settings):
    """The record of every decision: JSON lines in rotating files, written off the hot path."""

    enabled: bool
    folder: str
    """Relative to the folder above ``conf/``."""
    inputs: bool
    """Whether the applicants' values are recorded too."""
    file_bytes: int = Field(ge=4096)
    """Size at which a file is rotated."""
    files: int = Field(ge=1)
    """Files kept of each worker, the current one included."""
    queue_rows: int = Field(ge=1)
    """Decisions that may wait to be written; beyond it they are dropped and counted."""
    flush_seconds: float = Field(gt=0)
    """Decisions are written within this time: what a kill -9 can lose.

    Waiting takes half of it, so that the other half is left to write; a busy machine may need longer.
    """


def decision_log_settings(serve_yaml: Path) -> DecisionLogSettings:
    """Read ``decision_log`` of a ``serve.yaml``, for those that look at the log and not at the rest.

    Raises
    ------
    ConfigError
        The file cannot be read, or these settings break a rule.
    """
    values = read_yaml(serve_yaml).get("decision_log", {})
    return parse_settings(DecisionLogSettings, values, source=f"{serve_yaml}: decision_log")
