"""A temporary copy of the project, with an MLflow store and a BentoML home of its own."""

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

_COPIED = ("pipeline", "service", "conf", "data")
_FILES = ("pyproject.toml", "requirements.lock", "requirements.serve.lock")


@dataclass(frozen=True)
class Scratch:
    """Where a benchmark keeps its state; nothing outside `folder` is touched."""

    folder: Path

    @classmethod
    def create(cls, folder: Path) -> Scratch:
        """Copy the project's code, settings and data into a folder."""
        for name in _COPIED:
            shutil.copytree(PROJECT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
        for name in _FILES:
            shutil.copy(PROJECT / name, folder / name)
        return cls(folder)

    @cached_property
    def environment(self) -> Mapping[str, str]:
        """Variables that make every command use this state."""
        return {
            "MLFLOW_TRACKING_URI": f"sqlite:///{self.folder / 'mlflow.db'}",
            "BENTOML_HOME": str(self.home),
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
            cwd=self.folder,
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
        self.pipeline("train", "--trials", "1", "--workers", "1", "--seed", str(seed))

    def promote(self, version: int) -> None:
        """Make a version the promoted one, whatever the gate says of it."""
        self.pipeline("promote", "--version", str(version), "--force", "--reason", "benchmark")

    def copy_home(self, name: str) -> str:
        """Copy the BentoML home: two servers on one home clobber each other's metrics."""
        target = self.folder / f"bentoml-{name}"
        shutil.copytree(self.home, target, ignore=shutil.ignore_patterns("prometheus*"), dirs_exist_ok=True)
        return str(target)

    def service_environment(self, name: str, workers: int) -> dict[str, str]:
        """Variables of one service: the shipped settings with so many workers, and a decision log of its own."""
        conf = self.folder / "services" / re.sub(r"\W+", "-", name) / "conf"
        shutil.copytree(PROJECT / "conf", conf, dirs_exist_ok=True)
        text = (conf / "serve.yaml").read_text()
        (conf / "serve.yaml").write_text(re.sub(r"^workers: \S+", f"workers: {workers}", text, flags=re.MULTILINE))
        return {**self.environment, "CREDIT_RISK_CONF": str(conf)}
