"""Settings of ``score``: ``conf/score.yaml``."""

from __future__ import annotations

from pydantic import Field

from pipeline.cluster import ClusterSettings
from pipeline.core.settings import Settings


class ScoreSettings(Settings):
    """``conf/score.yaml``: resources of batch scoring."""

    batch_rows: int = Field(ge=1)
    """Rows read, scored and written at a time."""
    threads: int | None = Field(ge=1)
    """Batches scored at once on this machine; null: one for each core."""
    cluster: ClusterSettings | None
    """Dask cluster over which the batches are spread; null: this machine."""
