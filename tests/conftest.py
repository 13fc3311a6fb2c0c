"""Fixtures that many tests share."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd
import pytest

from pipeline.core.contract.schema import Schema
from pipeline.core.promoted import Promotion
from pipeline.tables.labelled import ingest
from service.answering.core import Core
from tests.testkit import DATA, PROJECT
from tests.testkit import store as stores
from tests.testkit.cluster import dask_cluster
from tests.testkit.projects import Project, changed_conf, copy_project
from tests.testkit.servers import Server

if TYPE_CHECKING:
    from tests.testkit.registry import Machine

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


# A registry of good and bad models, and machines that promote from it (see tests/testkit/registry.py).


@pytest.fixture(scope="session")
def registry(tmp_path_factory: pytest.TempPathFactory, schema: Schema, applications: pd.DataFrame) -> Path:
    """SQLite file of a tracking store that holds the versions of `tests.testkit.registry`."""
    from tests.testkit.registry import make_registry  # mlflow: seconds that other tests do not need

    return make_registry(tmp_path_factory.mktemp("registry"), schema, applications)


@pytest.fixture(scope="session")
def first_promoted(registry: Path, tmp_path_factory: pytest.TempPathFactory) -> Machine:
    """A machine on which the first good version is promoted; tests take copies."""
    from tests.testkit.registry import new_machine

    machine = new_machine(tmp_path_factory.mktemp("first"), registry)
    done = machine.run("promote", "--version", "1")
    assert done.code == 0, done.err
    return machine


@pytest.fixture
def machine(registry: Path, tmp_path: Path) -> Machine:
    """A machine on which nothing is promoted."""
    from tests.testkit.registry import new_machine

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
    return stores.rows_of(applications, schema)


@pytest.fixture(scope="session")
def filled_store(
    tmp_path_factory: pytest.TempPathFactory,
    applications: pd.DataFrame,
    schema: Schema,
    rows: list[dict[str, Any]],
) -> tuple[Path, dict[int, Promotion]]:
    """A store's folder to be copied, and what is in it."""
    home = tmp_path_factory.mktemp("filled")
    return home, stores.fill_store(home, applications, schema, rows[:20])


@pytest.fixture
def store(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, filled_store: tuple[Path, dict[int, Promotion]]
) -> stores.Store:
    """A store of this test's own, with versions 1 and 2 and nothing promoted."""
    source, promotions = filled_store
    shutil.copytree(source, tmp_path / "bentoml")
    monkeypatch.setenv("BENTOML_HOME", str(tmp_path / "bentoml"))
    return stores.Store(promotions)


@pytest.fixture(scope="session")
def core(filled_store: tuple[Path, dict[int, Promotion]], tmp_path_factory: pytest.TempPathFactory) -> Core:
    """The service's core over version 1, in this process; tests that share it must not promote."""
    source, promotions = filled_store
    home = tmp_path_factory.mktemp("core") / "bentoml"
    shutil.copytree(source, home)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("BENTOML_HOME", str(home))
        stores.Store(promotions).promote(1)
        core = stores.make_core()
        core.start()
    return core


@pytest.fixture(scope="session")
def server(
    tmp_path_factory: pytest.TempPathFactory, filled_store: tuple[Path, dict[int, Promotion]]
) -> Iterator[Server]:
    """A running service with one worker over version 1; tests that share it must not promote."""
    folder = tmp_path_factory.mktemp("server")
    source, promotions = filled_store
    shutil.copytree(source, folder / "bentoml")
    conf = changed_conf(folder, workers=1, decision_log__flush_seconds=0.02)
    with ExitStack() as stack, pytest.MonkeyPatch.context() as patch:
        patch.setenv("BENTOML_HOME", str(folder / "bentoml"))
        patch.setenv("CREDIT_RISK_CONF", str(conf))
        stores.Store(promotions).promote(1)
        running = stack.enter_context(stores.serving())
        patch.undo()  # other tests of this process run while the server does
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
