"""What ``score`` is asked to do."""

from __future__ import annotations

from pathlib import Path

from pipeline.core.settings import Request


class ScoreRequest(Request):
    """Flags of ``score``; None: what ``score.yaml`` says."""

    input: Path
    output: Path
    rejects: Path | None = None
    """File of the rejected rows; None: beside the output."""
    model: str = "promoted"
    config: Path | None = None
    """File of the settings; None: ``score.yaml`` of the conf folder."""
    threads: int | None = None
