"""Settings of the promotion commands: ``conf/promote.yaml``."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from pipeline.core.settings import Settings

Metric = Literal["auc", "gini", "ks", "brier", "log_loss", "calibration_slope", "calibration_intercept", "ece"]
"""A metric of `pipeline.evaluation.metrics.metrics`."""


class ChampionSettings(Settings):
    """How a candidate is compared with the champion, on the same rows."""

    margins: dict[Literal["auc", "brier", "log_loss"], float]
    """How much worse than the champion the candidate may be, at the upper end of the confidence interval."""
    confidence: float = Field(gt=0.5, lt=1)
    """One-sided confidence of the interval."""
    resamples: int = Field(ge=100)
    """Bootstrap resamples."""
    rows: int = Field(ge=100)
    """Maximum holdout rows in a resample; a longer holdout is thinned evenly."""
    decision_flips: float = Field(ge=0, le=1)
    """Share of holdout applicants whose decision may differ from the champion's."""


class ApprovalSettings(Settings):
    """How the approval rates of the groups of each audit field may differ."""

    at_least: float | None = Field(ge=0, le=1)
    """Lowest group's approval rate over the highest's; null: reported, never a reason to refuse."""
    group_rows: int = Field(ge=1)
    """Groups with fewer holdout rows are left out."""


class PromoteSettings(Settings):
    """``conf/promote.yaml``: what a candidate must show before it is promoted, and how promotions are kept."""

    data: str | None
    """Labelled table whose held-out rows judge; null: the table that the candidate was trained on."""
    holdout_rows: int = Field(ge=1)
    """Minimum held-out rows."""
    at_least: dict[Metric, float]
    """Metric on the holdout → floor."""
    at_most: dict[Metric, float]
    """Metric on the holdout → ceiling."""
    against_champion: ChampionSettings
    milliseconds: float = Field(gt=0)
    """Maximum time to score one application."""
    megabytes: float = Field(gt=0)
    """Maximum size of the stored model."""
    approval_ratio: ApprovalSettings
    keep: int = Field(ge=2)
    """Versions kept in the store; the promoted and the previous one always are."""
    lock_seconds: float = Field(ge=0)
    """How long to wait for another promotion on this machine."""
    alias_seconds: float = Field(gt=0)
    """How long MLflow's alias is given to follow a rollback, in the background; then the next `sync` moves it."""
    rollback_seconds: float = Field(gt=0)
    """Maximum duration of a rollback if MLflow does not answer; it then ends with a note."""
