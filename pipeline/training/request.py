"""What ``train`` is asked to do."""

from __future__ import annotations

from pathlib import Path

from pipeline.core.settings import Request


class TrainRequest(Request):
    """Flags of ``train``; None where ``train.yaml`` decides."""

    config: Path | None = None
    """Settings file; None for ``train.yaml`` of the conf folder."""
    schema_file: Path | None = None
    """Data contract; None for ``schema.yaml`` of the conf folder."""
    data: str | None = None
    trials: int | None = None
    workers: int | None = None
    study: str | None = None
    seed: int | None = None
