"""Requests of the promotion commands."""

from __future__ import annotations

from pathlib import Path
from typing import Self

from pydantic import model_validator

from pipeline.core.settings import Request


class PromotionRequest(Request):
    """Flags that all promotion commands share."""

    config: Path | None = None
    """File of the settings; None: ``promote.yaml`` of the conf folder."""

    @property
    def settings_file(self) -> Path:
        """The file of the settings."""
        return self.config or self.conf / "promote.yaml"


class PromoteRequest(PromotionRequest):
    """Flags of ``promote``. At most one of `version`, `run_id` and `best`; none: the alias ``candidate``."""

    version: int | None = None
    run_id: str | None = None
    best: bool = False
    data: str | None = None
    """Labelled table that judges; None: what the settings say."""
    dry_run: bool = False
    force: bool = False
    reason: str | None = None
    allow_schema_change: bool = False

    @model_validator(mode="after")
    def _says_why(self) -> Self:
        if not self.reason and (self.force or self.allow_schema_change):
            flag = "--force" if self.force else "--allow-schema-change"
            raise ValueError(f"{flag} needs a reason; add --reason TEXT")
        return self


class RollbackRequest(PromotionRequest):
    """Flags of ``rollback``."""

    to: int | None = None
    """Version; None: the previous one."""
    reason: str | None = None


class SyncRequest(PromotionRequest):
    """Flags of ``sync``."""

    watch: float | None = None
    """Seconds between two looks; None: look once."""


class StatusRequest(Request):
    """Flags of ``status``."""
