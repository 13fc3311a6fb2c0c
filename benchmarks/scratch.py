"""A temporary state of the project: MLflow store and BentoML home, with trained and promoted versions."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from benchmarks.servers import PROJECT


@dataclass(frozen=True)
class Scratch:
    """Where a benchmark keeps its state; nothing outside `folder` is touched."""

    folder: Path

    @cached_property
    def environment(self) -> Mapping[str, str]:
        """Variables that make every command use this state."""
        return {
            "MLFLOW_TRACKING_URI": f"sqlite:///{self.folder / 'mlflow.db'}",
            "BENTOML_HOME": str(self.folder / "bentoml"),
            "BENTOML_DO_NOT_TRACK": "true",
            "PYTHONWARNINGS": "ignore",
        }

    @property
    def home(self) -> Path:
        """The BentoML home with the promoted version."""
        return self.folder / "bentoml"

    def pipeline(self, *arguments: str) -> str:
        """Run one command of the pipeline and return what it printed.

        Raises
        ------
        RuntimeError
            It did not exit with 0.
        """
        done = subprocess.run(
            [sys.executable, "-m", "pipeline", *arguments],
            cwd=PROJECT,
            env={**os.environ, **self.environment},
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            raise RuntimeError(f"python -m pipeline {' '.join(arguments)}: {done.stderr[-3000:]}")
        return done.stdout

    def train(self, seed: int) -> None:
        """Register one more version: the default recipe, one trial."""
        config = self.folder / f"train-{seed}.yaml"
        text = (PROJECT / "conf/train.yaml").read_text()
        config.write_text(text.replace("sqlite:///optuna.db", f"sqlite:///{self.folder / 'optuna.db'}"))
        self.pipeline("train", "--config", str(config), "--trials", "1", "--workers", "1", "--seed", str(seed))

    def promote(self, version: int) -> None:
        """Make a version the promoted one, whatever the gate says of it."""
        self.pipeline("promote", "--version", str(version), "--force", "--reason", "benchmark")

    def copy_home(self, name: str) -> str:
        """Copy the BentoML home: two servers on one home clobber each other's metrics."""
        target = self.folder / f"bentoml-{name}"
        shutil.copytree(self.home, target, ignore=shutil.ignore_patterns("prometheus*"))
        return str(target)

    def service_environment(self, name: str, workers: int) -> dict[str, str]:
        """Variables of one service: the shipped settings with so many workers, and a decision log of its own."""
        conf = self.folder / name.replace(" ", "-").replace(":", "-") / "conf"
        shutil.copytree(PROJECT / "conf", conf, dirs_exist_ok=True)
        text = (conf / "serve.yaml").read_text()
        (conf / "serve.yaml").write_text(re.sub(r"^workers: \S+", f"workers: {workers}", text, flags=re.MULTILINE))
        return {**self.environment, "CREDIT_RISK_CONF": str(conf)}
