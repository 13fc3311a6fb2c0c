"""The Bento that `package` builds, installed and served as its user would."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pandas as pd
import pytest

from pipeline.core.contract.schema import Schema
from tests.testkit.projects import Project, copy_project
from tests.testkit.servers import Service, running
from tests.testkit.store import promote, put_in_store, quick_booster, rows_of

BIN = Path(sys.executable).parent


@pytest.fixture(scope="module")
def project(
    tmp_path_factory: pytest.TempPathFactory, applications: pd.DataFrame, schema: Schema
) -> Iterator[Project]:
    """A copy of the project with version 1 promoted in a store of its own."""
    project = copy_project(tmp_path_factory.mktemp("project"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("BENTOML_HOME", project.env["BENTOML_HOME"])
        golden = rows_of(applications.head(5), schema)
        promote(put_in_store(1, *quick_booster(applications, schema), schema, golden))
        yield project


@pytest.fixture(scope="module")
def bento(project: Project) -> Path:
    """Folder of a Bento with the promoted version pinned."""
    built = json.loads(project.pipeline("package", "--json").stdout)
    assert built["pinned"] == "credit_risk_model:v1"
    assert built["tag"].startswith("credit_risk_classifier:")
    return Path(built["path"])


@pytest.fixture(scope="module")
def environment(bento: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A fresh virtual environment with what the Bento's lock names, and nothing else."""
    folder = tmp_path_factory.mktemp("environment")
    subprocess.run([str(BIN / "uv"), "venv", "--quiet", "--python", sys.executable, str(folder)], check=True)
    install = [str(BIN / "uv"), "pip", "install", "--quiet", "--python", str(folder / "bin/python"), "--no-deps"]
    subprocess.run([*install, "--require-hashes", "-r", str(bento / "src/requirements.serve.lock")], check=True)
    return folder


def test_bento_holds_the_serving_side_and_nothing_else(bento: Path) -> None:
    packages = {path.name for path in (bento / "src/pipeline").iterdir()}
    assert packages == {"__init__.py", "core"}
    assert {path.name for path in (bento / "src/conf").iterdir()} == {"schema.yaml", "serve.yaml", "policy.yaml"}
    assert not list(bento.rglob("*.csv"))
    assert not (bento / "src/tests").exists()


def test_requirements_are_hashed_and_free_of_the_training_side(bento: Path) -> None:
    lines = (bento / "src/requirements.serve.lock").read_text().splitlines()
    packages = {line.partition("==")[0] for line in lines if "==" in line and not line.startswith((" ", "#"))}
    assert {"bentoml", "xgboost-cpu", "scikit-learn"} <= packages
    assert packages.isdisjoint(
        {"mlflow", "mlflow-skinny", "optuna", "xgboost", "matplotlib", "dask", "distributed"}
    )
    installed = (bento / "env/python/requirements.txt").read_text()
    assert all(f"{package}==" in installed for package in packages)


def test_container_file_runs_as_a_user_checks_health_and_has_no_compiler(bento: Path) -> None:
    text = (bento / "env/docker/Dockerfile").read_text()
    final = text[text.rindex("\nFROM ") :]
    assert final.index("\nUSER bentoml") < final.index("\nCMD [")
    assert "/readyz" in final[final.index("HEALTHCHECK") :]
    assert "--require-hashes" in text
    assert not [tool for tool in ("build-essential", "gcc", "apt-get") if tool in text]


@pytest.mark.timeout(600)  # a cold cache downloads 150 MB
def test_fresh_environment_serves_the_pinned_version_and_a_mounted_store(
    bento: Path, environment: Path, project: Project, applications: pd.DataFrame, schema: Schema
) -> None:
    golden = rows_of(applications.head(5), schema)
    promote(put_in_store(2, *quick_booster(applications, schema, seed=2), schema, golden))
    answers = {}
    for name, home in (("pinned", bento / "src/pinned"), ("mounted", project.folder / "bentoml")):
        with _served(bento, environment, home) as url:
            assert httpx.get(f"{url}/readyz").status_code == 200
            answers[name] = httpx.post(f"{url}/classify", json=schema.example()).json()
    assert answers["pinned"]["model"] == "credit_risk_model:v1"
    assert answers["mounted"]["model"] == "credit_risk_model:v2"
    assert answers["pinned"]["probability"] != answers["mounted"]["probability"]


def test_nothing_is_packaged_without_a_promotion(project: Project, tmp_path: Path) -> None:
    env = {**project.env, "BENTOML_HOME": str(tmp_path)}
    done = Project(project.folder, env).pipeline("package", check=False)
    assert done.returncode == 1
    assert "--unpinned" in done.stderr
    assert "Traceback" not in done.stderr


@contextmanager
def _served(bento: Path, environment: Path, home: Path) -> Iterator[str]:
    """Serve from the Bento's folder by the fresh environment alone."""
    env = {
        name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "BENTOML", "MLFLOW"))
    }
    env |= {"BENTOML_HOME": str(home), "PATH": f"{environment / 'bin'}{os.pathsep}{os.environ['PATH']}"}
    command = (environment / "bin/bentoml", "serve", bento, "--port", "{port}")
    with running(Service("Bento", command, ready="/livez", environment=env, folder=environment)) as server:
        yield server.url
