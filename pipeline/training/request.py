"""What ``train`` is asked to do."""

from __future__ import annotations

from pathlib import Path

from pipeline.core.settings import Request


class TrainRequest(Request):
    """Flags of ``train``; None: what ``train.yaml`` says."""

    config: Path | None = None
    """File of the settings; None: ``train.yaml`` of the conf folder."""
    schema_file: Path | None = None
    """The data contract; None: ``schema.yaml`` of the conf folder."""
    data: str | None = None
    trials: int | None = None
    workers: int | None = None
    study: str | None = None
    seed: int | None = None
