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
import pytest

from tests.conftest import Project, free_port, wait_until_live
from tests.test_journey import APPLICANT

BIN = Path(sys.executable).parent


@pytest.fixture(scope="module")
def bento(promoted: Project) -> Path:
    """Folder of a Bento with the promoted version pinned."""
    built = json.loads(promoted.pipeline("package", "--json").stdout)
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
    modules = {path.stem for path in (bento / "src/pipeline").glob("*.py")}
    assert modules == {"__init__", "errors", "config", "schema", "features", "decision", "bundle", "pointer"}
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
    bento: Path, environment: Path, promoted: Project
) -> None:
    with _served(bento, environment, home=bento / "src/pinned") as url:
        pinned = httpx.post(f"{url}/classify", json=APPLICANT)
        assert httpx.get(f"{url}/readyz").status_code == 200
        assert "pinned at build" in json.dumps(httpx.get(f"{url}/model").json())
    with _served(bento, environment, home=promoted.folder / "bentoml") as url:
        mounted = httpx.post(f"{url}/classify", json=APPLICANT)
    assert pinned.status_code == mounted.status_code == 200
    assert pinned.json()["model"] == "credit_risk_model:v1"
    assert _decision(pinned) == _decision(mounted)


def test_nothing_is_packaged_without_a_promotion(promoted: Project, tmp_path: Path) -> None:
    env = {**promoted.env, "BENTOML_HOME": str(tmp_path)}
    done = Project(promoted.folder, env).pipeline("package", check=False)
    assert done.returncode == 1
    assert "--unpinned" in done.stderr
    assert "Traceback" not in done.stderr


def _decision(answer: httpx.Response) -> dict[str, object]:
    return {name: value for name, value in answer.json().items() if name != "request_id"}


@contextmanager
def _served(bento: Path, environment: Path, home: Path) -> Iterator[str]:
    """Serve from the Bento's folder by the fresh environment alone."""
    port = free_port()
    env = {
        name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "BENTOML", "MLFLOW"))
    }
    env |= {"BENTOML_HOME": str(home), "PATH": f"{environment / 'bin'}{os.pathsep}{os.environ['PATH']}"}
    log = environment / f"serve-{port}.log"
    with log.open("wb") as output:
        server = subprocess.Popen(
            [environment / "bin/bentoml", "serve", bento, "--port", str(port)],
            cwd=environment,
            env=env,
            stdout=output,
            stderr=subprocess.STDOUT,
        )
    try:
        wait_until_live(f"http://127.0.0.1:{port}", server, log)
        yield f"http://127.0.0.1:{port}"
    finally:
        server.terminate()
        server.wait(30)
