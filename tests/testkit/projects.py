"""Copies of the project, each with a state of its own."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from tests.testkit import PROJECT
from tests.testkit.servers import Process, Service, running


@dataclass(frozen=True)
class Project:
    """A copy of the project with state of its own: MLflow store, studies and BentoML store below `folder`."""

    folder: Path
    env: dict[str, str]

    def run(self, *command: str, check: bool = True, timeout: float = 240) -> subprocess.CompletedProcess[str]:
        """Run a command in the copy, as a user would in the activated environment."""
        with self.start(*command) as process:
            try:
                output, error = process.communicate(timeout=timeout)
            finally:
                process.kill()
        assert not check or process.returncode == 0, f"{command}\n{output}\n{error}"
        return subprocess.CompletedProcess(command, process.returncode, output, error)

    def start(self, *command: str) -> Process:
        """Start a command in the copy; its output is text."""
        pipe = subprocess.PIPE
        return Process(command, cwd=self.folder, env=self.env, stdout=pipe, stderr=pipe, text=True)

    def pipeline(self, *arguments: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        """Run ``python -m pipeline``."""
        return self.run("python", "-m", "pipeline", *arguments, check=check)

    @contextmanager
    def serve(self, **env: str) -> Iterator[str]:
        """Run plain ``bentoml serve`` until the block ends; yields its address once it is live."""
        command = ("bentoml", "serve", "--port", "{port}")
        service = Service(
            "bentoml serve", command, ready="/livez", environment={**self.env, **env}, folder=self.folder
        )
        with running(service) as server:
            yield server.url


def copy_project(folder: Path) -> Project:
    """Copy what the project consists of; state is made anew below `folder`."""
    for name in ("pipeline", "service", "conf", "data"):
        shutil.copytree(PROJECT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("MLproject", "pyproject.toml", "python_env.yaml", "requirements.lock", "requirements.serve.lock"):
        shutil.copy(PROJECT / name, folder / name)
    settings = ("MLFLOW_", "BENTOML_", "CREDIT_RISK_")
    env = {name: value for name, value in os.environ.items() if not name.startswith(settings)}
    env["BENTOML_HOME"] = str(folder / "bentoml")
    env["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), env.get("PATH", "")])
    return Project(folder, env)


def changed_conf(folder: Path, **changes: Any) -> Path:
    """Copy the shipped ``conf/`` with some keys of ``serve.yaml`` changed: ``a__b=1`` sets ``b`` below ``a``."""
    conf = folder / "conf"
    conf.mkdir(parents=True, exist_ok=True)
    for name in ("schema.yaml", "policy.yaml"):
        shutil.copy(PROJECT / "conf" / name, conf / name)
    document = yaml.safe_load((PROJECT / "conf/serve.yaml").read_text())
    for path, value in changes.items():
        *owners, key = path.split("__")
        owner = document
        for name in owners:
            owner = owner[name]
        assert key in owner, path
        owner[key] = value
    (conf / "serve.yaml").write_text(yaml.safe_dump(document))
    return conf
