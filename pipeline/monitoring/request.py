"""Requests of the monitoring commands."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path

from pipeline.core.settings import Request


class DecisionsRequest(Request):
    """Flags of ``decisions``."""

    folder: Path | None = None
    """The decision log; None: ``decision_log.folder`` of ``serve.yaml``."""
    since: datetime | None = None
    """Leave out what is older; without a time zone it is UTC."""
    model: str | None = None
    """Only decisions of this tag."""
    output: Path | None = None
    """Table to write."""
