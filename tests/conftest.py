"""Fixtures that many tests share."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
import pandas as pd
import pytest

from benchmarks.servers import dask_cluster, free_port
from pipeline.core.contract.schema import Schema
from pipeline.core.promoted import Promotion
from pipeline.tables.labelled import ingest
from service.answering.core import Core
from tests import serving

if TYPE_CHECKING:
    from tests.registry import Machine

PROJECT = Path(__file__).parent.parent
DATA = PROJECT / "data/credit_risk.csv"


_JOURNEY = {"test_journey.py", "test_browser.py", "test_parity.py"}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Keep tests that share costly fixtures on one worker: those of a file, and those of the journey."""
    for item in items:
        group = "journey" if item.path.name in _JOURNEY else item.path.name
        item.add_marker(pytest.mark.xdist_group(group))


@pytest.fixture(scope="session")
def schema() -> Schema:
    """The shipped contract."""
    return Schema.load(PROJECT / "conf/schema.yaml")


@pytest.fixture(scope="session")
def applications(schema: Schema) -> pd.DataFrame:
    """The shipped data, validated."""
    return ingest(DATA, schema).frame


# The journey as a user makes it: a copy of the project, a real training, a promotion and a running service.


@dataclass(frozen=True)
class Project:
    """A copy of the project with state of its own: MLflow store, studies and BentoML store below `folder`."""

    folder: Path
    env: dict[str, str]

    def run(self, *command: str, check: bool = True, timeout: float = 240) -> subprocess.CompletedProcess[str]:
        """Run a command in the copy, as a user would in the activated environment."""
        done = subprocess.run(
            command, cwd=self.folder, env=self.env, capture_output=True, text=True, timeout=timeout, check=False
        )
        assert not check or done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
        return done

    def pipeline(self, *arguments: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        """Run ``python -m pipeline``."""
        return self.run("python", "-m", "pipeline", *arguments, check=check)

    @contextmanager
    def serve(self, **env: str) -> Iterator[str]:
        """Run plain ``bentoml serve`` until the block ends; yields its address once it is live."""
        port = free_port()
        log = self.folder / f"serve-{port}.log"
        with log.open("wb") as output:
            server = subprocess.Popen(
                ["bentoml", "serve", "--port", str(port)],
                cwd=self.folder,
                env={**self.env, **env},
                stdout=output,
                stderr=subprocess.STDOUT,
            )
        try:
            url = f"http://127.0.0.1:{port}"
            wait_until_live(url, server, log)
            yield url
        finally:
            server.terminate()
            server.wait(30)


def wait_until_live(url: str, server: subprocess.Popen[bytes], log: Path, path: str = "/livez") -> None:
    """Wait for a service to answer; its log is the message when it does not."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and server.poll() is None:
        with suppress(httpx.TransportError):
            if httpx.get(url + path, timeout=2).status_code == 200:
                return
        time.sleep(0.05)
    raise AssertionError(f"no service at {url}:\n{log.read_text()}")


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


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Project:
    """A project trained by the real ``mlflow run``."""
    project = copy_project(tmp_path_factory.mktemp("project"))
    local = ("--env-manager", "local", "--experiment-name", "credit_risk")
    project.run("mlflow", "run", ".", *local, "-P", "trials=3")
    return project


@pytest.fixture(scope="session")
def promoted(trained: Project) -> Project:
    """The trained project with its candidate promoted."""
    trained.pipeline("promote")
    return trained


@pytest.fixture(scope="session")
def served(promoted: Project) -> Iterator[str]:
    """Address of the service that answers with the promoted version."""
    with promoted.serve() as url:
        yield url


# A registry of good and bad models, and machines that promote from it (see tests/registry.py).


@pytest.fixture(scope="session")
def registry(tmp_path_factory: pytest.TempPathFactory, schema: Schema, applications: pd.DataFrame) -> Path:
    """SQLite file of a tracking store that holds the versions of `tests.registry`."""
    from tests.registry import make_registry  # mlflow: seconds that other tests do not need

    return make_registry(tmp_path_factory.mktemp("registry"), schema, applications)


@pytest.fixture(scope="session")
def first_promoted(registry: Path, tmp_path_factory: pytest.TempPathFactory) -> Machine:
    """A machine on which the first good version is promoted; tests take copies."""
    from tests.registry import new_machine

    machine = new_machine(tmp_path_factory.mktemp("first"), registry)
    done = machine.run("promote", "--version", "1")
    assert done.code == 0, done.err
    return machine


@pytest.fixture
def machine(registry: Path, tmp_path: Path) -> Machine:
    """A machine on which nothing is promoted."""
    from tests.registry import new_machine

    return new_machine(tmp_path, registry)


@pytest.fixture
def promoted_machine(first_promoted: Machine, tmp_path: Path) -> Machine:
    """A machine on which the first good version is promoted."""
    return first_promoted.copy(tmp_path)


# A Dask cluster of two processes on this machine, for what runs on one.


@pytest.fixture(scope="session")
def scheduler() -> Iterator[str]:
    """Address of a scheduler with two workers of one thread each."""
    with dask_cluster(2) as address:
        yield address


# Serving: a store filled in milliseconds, and running servers that many tests share.


@pytest.fixture
def anyio_backend() -> str:
    """Coroutine tests (marked ``anyio``) run on asyncio."""
    return "asyncio"


@pytest.fixture(scope="session")
def rows(applications: pd.DataFrame, schema: Schema) -> list[dict[str, Any]]:
    """The shipped data as request bodies."""
    return serving.rows_of(applications, schema)


@pytest.fixture(scope="session")
def filled_store(
    tmp_path_factory: pytest.TempPathFactory,
    applications: pd.DataFrame,
    schema: Schema,
    rows: list[dict[str, Any]],
) -> tuple[Path, dict[int, Promotion]]:
    """A store's folder to be copied, and what is in it."""
    home = tmp_path_factory.mktemp("filled")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("BENTOML_HOME", str(home))
        promotions = {}
        for version in (1, 2):
            booster, vectorizer = serving.quick_booster(applications, schema, seed=version)
            promotions[version] = serving.put_in_store(version, booster, vectorizer, schema, rows[:20])
    return home, promotions


@pytest.fixture
def store(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, filled_store: tuple[Path, dict[int, Promotion]]
) -> serving.Store:
    """A store of this test's own, with versions 1 and 2 and nothing promoted."""
    source, promotions = filled_store
    shutil.copytree(source, tmp_path / "bentoml")
    monkeypatch.setenv("BENTOML_HOME", str(tmp_path / "bentoml"))
    return serving.Store(promotions)


@pytest.fixture(scope="session")
def core(filled_store: tuple[Path, dict[int, Promotion]], tmp_path_factory: pytest.TempPathFactory) -> Core:
    """The service's core over version 1, in this process; tests that share it must not promote."""
    source, promotions = filled_store
    home = tmp_path_factory.mktemp("core") / "bentoml"
    shutil.copytree(source, home)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("BENTOML_HOME", str(home))
        serving.Store(promotions).promote(1)
        core = serving.make_core()
        core.start()
    return core


@pytest.fixture(scope="session")
def server(
    tmp_path_factory: pytest.TempPathFactory, filled_store: tuple[Path, dict[int, Promotion]]
) -> Iterator[serving.Server]:
    """A running service with one worker over version 1; tests that share it must not promote."""
    folder = tmp_path_factory.mktemp("server")
    source, promotions = filled_store
    shutil.copytree(source, folder / "bentoml")
    conf = serving.changed_conf(folder, workers=1, decision_log__flush_seconds=0.02)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("BENTOML_HOME", str(folder / "bentoml"))
        patch.setenv("CREDIT_RISK_CONF", str(conf))
        serving.Store(promotions).promote(1)
        with serving.serving(folder) as running:
            yield running


# Tracking: an MLflow store for tests that call the code in this process.


@pytest.fixture(scope="session")
def _tracking_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with an MLflow database: making its tables takes seconds, so all tests share one."""
    return tmp_path_factory.mktemp("tracking")


@pytest.fixture(scope="module")
def tracking_store(_tracking_folder: Path) -> Iterator[str]:
    """Address of an MLflow store; `mlflow` uses it until the module's tests are done."""
    import mlflow

    address = f"sqlite:///{_tracking_folder}/mlflow.db"
    mlflow.set_tracking_uri(address)
    if mlflow.get_experiment_by_name("tests") is None:
        mlflow.create_experiment("tests", artifact_location=(_tracking_folder / "artifacts").as_uri())
    mlflow.set_experiment("tests")
    yield address
    mlflow.set_tracking_uri(None)  # not the address from before: an explicit one outdoes the environment
