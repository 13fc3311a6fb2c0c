"""The Bento that `package` builds, installed and served as its user would."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
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


@pytest.fixture
def builders(project: Project, tmp_path: Path) -> Builders:
    """No builder on the PATH but those that a test puts there."""
    folder = tmp_path / "bin"
    folder.mkdir()
    env = {**project.env, "PATH": os.pathsep.join([str(folder), str(BIN), "/usr/lib/absent"])}
    return Builders(folder, Project(project.folder, env))


@dataclass(frozen=True)
class Builders:
    """Stand-ins for docker, podman and buildah, and a project whose commands find only them."""

    folder: Path
    project: Project

    def put(self, name: str, script: str = "") -> None:
        """Install one that notes how it was called, then runs a script."""
        path = self.folder / name
        noted = 'echo "$BUILDAH_FORMAT $DOCKER_BUILDKIT" "$@" >> "$0.calls"'
        path.write_text(f'#!/bin/sh\n{noted}\ncase "$1" in images) echo "804 MB";; esac\n{script}\n')
        path.chmod(0o755)

    def calls(self, name: str) -> list[str]:
        """How it was called: each call is a line."""
        return (self.folder / f"{name}.calls").read_text().splitlines()

    def image(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """Run the image command."""
        return self.project.pipeline("image", *arguments, check=False)


def test_image_is_built_from_the_bento_by_the_first_builder_that_works(builders: Builders, bento: Path) -> None:
    tag = f"credit_risk_classifier:{bento.name}"
    builders.put("docker", "echo 'Cannot connect to the Docker daemon' >&2; exit 1")
    builders.put("podman", '[ "$1" != build ] || echo progress')
    builders.put("buildah")
    done = builders.image("--json", "--bento", tag, "--base", "python:3.12-slim", "--option", "network=host")
    assert done.returncode == 0, done.stderr
    expected = {"image": tag, "builder": "podman", "size": "804 MB", "bento": tag}
    assert json.loads(done.stdout) == {**expected, "pinned": "credit_risk_model:v1"}
    assert "progress" in done.stderr  # of the build, while it runs
    build = next(call for call in builders.calls("podman") if " build " in call)
    options = f"--file {bento}/env/docker/Dockerfile --tag {tag} --build-arg=BASE=python:3.12-slim --network=host"
    assert build == f"docker 1 build {options} {bento}"


def test_image_command_builds_a_bento_if_none_is_named(builders: Builders) -> None:
    builders.put("docker")
    done = builders.image("--unpinned", "--tag", "risk:1")
    assert done.returncode == 0, done.stderr
    assert "Built risk:1 with docker" in done.stdout
    assert "pinned  nothing" in done.stdout
    assert "804 MB" in done.stdout


@pytest.mark.parametrize(
    ("scripts", "arguments", "said"),
    [
        ({}, [], "docker: No such file or directory"),
        ({}, [], "install or start docker, podman or buildah"),
        ({"podman": "echo 'no such runtime' >&2; exit 1"}, ["--builder", "podman"], "podman: no such runtime"),
        ({"docker": "[ $1 != build ] || exit 3"}, [], "docker could not build the image"),
        ({"docker": ""}, ["--bento", "credit_risk_classifier:absent"], "`bentoml list`"),
    ],
)
def test_image_command_says_in_one_line_why_it_failed(
    builders: Builders, bento: Path, scripts: dict[str, str], arguments: list[str], said: str
) -> None:
    for name, script in scripts.items():
        builders.put(name, script)
    named = [] if "--bento" in arguments else ["--bento", f"credit_risk_classifier:{bento.name}"]
    done = builders.image(*arguments, *named)
    assert done.returncode == 1
    assert said in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr


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
