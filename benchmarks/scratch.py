"""A temporary copy of the project in which a benchmark trains, promotes and serves."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

from tests.testkit.projects import Project, changed_conf, copy_project


class Scratch(Project):
    """Where a benchmark keeps its state; nothing outside `folder` is touched."""

    @classmethod
    def create(cls, folder: Path) -> Scratch:
        """Copy the project; commands use the copy's state in whichever folder they run."""
        state = {
            "MLFLOW_TRACKING_URI": f"sqlite:///{folder / 'mlflow.db'}",
            "BENTOML_DO_NOT_TRACK": "true",
            "PYTHONWARNINGS": "ignore",
        }
        return cls(folder, {**copy_project(folder).env, **state})

    def train(self, seed: int) -> None:
        """Register one more version: the default recipe, one trial."""
        self.pipeline("train", "--trials", "1", "--workers", "1", "--seed", str(seed))

    def promote(self, version: int) -> None:
        """Make a version the promoted one, whatever the gate says of it."""
        self.pipeline("promote", "--version", str(version), "--force", "--reason", "benchmark")

    def copy_home(self, name: str) -> str:
        """Copy the BentoML home: two servers on one home clobber each other's metrics."""
        target = self.folder / f"bentoml-{name}"
        shutil.copytree(
            self.env["BENTOML_HOME"], target, ignore=shutil.ignore_patterns("prometheus*"), dirs_exist_ok=True
        )
        return str(target)

    def service_environment(self, name: str, workers: int) -> dict[str, str]:
        """Variables of one service: the shipped settings with so many workers, and a decision log of its own."""
        conf = changed_conf(self.folder / "services" / re.sub(r"\W+", "-", name), workers=workers)
        return {**self.env, "CREDIT_RISK_CONF": str(conf)}
