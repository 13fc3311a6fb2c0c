"""Find the files of the conf folder that a training reads."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple, Self

from pipeline.training.request import TrainRequest
from pipeline.training.settings import TrainSettings


class ConfFiles(NamedTuple):
    """The files that a training reads besides its table."""

    train: Path
    schema: Path
    policy: Path

    @classmethod
    def of(cls, request: TrainRequest) -> Self:
        """Take the files that the request names, and the conf folder's for the rest."""
        conf = request.conf
        return cls(
            request.config or conf / "train.yaml",
            request.schema_file or conf / "schema.yaml",
            conf / "policy.yaml",
        )

    def settings(self, request: TrainRequest) -> TrainSettings:
        """Read ``train.yaml``; the request's flags win over it."""
        flags = request.model_dump(include={"data", "trials", "workers", "study", "seed"})
        return TrainSettings.load(self.train, **flags)
