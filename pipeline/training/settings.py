"""Settings of ``train``: ``conf/train.yaml``."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from pipeline.cluster import ClusterSettings
from pipeline.core.settings import Settings

Parameter = Literal[
    "eta", "max_depth", "max_leaves", "min_child_weight", "max_delta_step", "gamma", "subsample",
    "colsample_bytree", "colsample_bylevel", "colsample_bynode", "reg_lambda", "reg_alpha",
]  # fmt: skip
"""XGBoost's numeric tree parameters: XGBoost itself only warns about a name that it does not know."""


class Range(Settings):
    """One dimension of the search space."""

    low: float
    high: float
    log: bool = False
    """Sample on a logarithmic scale."""
    integer: bool = False
    """Whole numbers only."""

    @model_validator(mode="after")
    def _is_range(self) -> Self:
        if self.low > self.high:
            raise ValueError("low must not exceed high")
        if self.log and self.low <= 0:
            raise ValueError("a logarithmic scale needs low > 0")
        if self.integer and not (self.low.is_integer() and self.high.is_integer()):
            raise ValueError("with integer, low and high must be whole numbers")
        return self


class TrainSettings(Settings):
    """``conf/train.yaml``: data, split, search and resources of one training."""

    data: str
    """CSV or Parquet file, or folder of Parquet files."""
    experiment: str
    """MLflow experiment."""
    seed: int
    test_share: float = Field(gt=0, lt=1)
    """Share of rows held out by content hash."""
    trials: int = Field(ge=1)
    """Trials of the study in all; a resumed study runs the rest."""
    folds: int = Field(ge=2)
    max_rounds: int = Field(ge=1)
    early_stopping_rounds: int = Field(ge=1)
    max_bin: int = Field(ge=2, le=65535)
    """Bins a numeric column is cut into before any booster sees it."""
    workers: int | None = Field(ge=1)
    """Parallel evaluations; null: one for each core."""
    cluster: ClusterSettings | None
    """Dask cluster to evaluate on; null: processes of this machine."""
    search_rows: int = Field(ge=1)
    """Rows to search on: a longer Parquet table is searched on a sample and streamed for the final fit."""
    page_rows: int = Field(ge=1)
    """Rows in memory at a time when a table is streamed."""
    cache: str | None
    """Folder for the pages of a streamed table; null: the system's folder for temporary files."""
    pruning: bool
    """Stop a trial that is worse than the median of the others after a fold."""
    study: str | None = Field(pattern=r"^[^\s/]+$")
    """Name of the study; null: derived, so that a changed input starts a new study."""
    storage: str
    """SQLAlchemy address of Optuna's storage: a SQLite file for one process, a database server for several."""
    heartbeat: int = Field(ge=1)
    """Seconds between two signs of life of a training, in MLflow and, on a database server, in the study."""
    stale_after: int = Field(ge=1)
    """Seconds without a sign of life after which a training counts as dead."""
    tracking_patience: float = Field(ge=0)
    """Seconds to wait at the end for an MLflow server that is slow or away."""
    first_trial: dict[Parameter, float]
    """Parameters tried first, before the sampler has learnt anything."""
    search_space: dict[Parameter, Range]
    """XGBoost parameter → range."""

    @property
    def first_parameters(self) -> dict[str, float]:
        """`first_trial` in the types that XGBoost wants: YAML's whole numbers were read as floats."""
        whole = {name for name, allowed in self.search_space.items() if allowed.integer}
        return {str(name): int(value) if name in whole else value for name, value in self.first_trial.items()}

    @model_validator(mode="after")
    def _stale_is_longer_than_a_heartbeat(self) -> Self:
        if self.stale_after < 2 * self.heartbeat:
            raise ValueError(f"stale_after is {self.stale_after}, below twice the heartbeat of {self.heartbeat} s")
        return self

    @model_validator(mode="after")
    def _first_trial_is_in_space(self) -> Self:
        if self.first_trial.keys() != self.search_space.keys():
            odd = ", ".join(sorted(self.first_trial.keys() ^ self.search_space.keys()))
            raise ValueError(f"first_trial and search_space must name the same parameters; only one names {odd}")
        for name, value in self.first_trial.items():
            allowed = self.search_space[name]
            if not allowed.low <= value <= allowed.high:
                raise ValueError(f"first_trial.{name} must be in [{allowed.low:g}, {allowed.high:g}]")
        return self
