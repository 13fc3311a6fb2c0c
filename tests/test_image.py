"""The container image, really built and run: minutes, so only `make image-test` does it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from pipeline.core.contract.schema import Schema
from tests.testkit.containers import (
    OWN_BASE,
    Container,
    Engine,
    engine_for,
    make_base,
    package_index,
)
from tests.testkit.projects import Project, copy_project
from tests.testkit.waiting import eventually

pytestmark = [pytest.mark.image, pytest.mark.timeout(3600)]

DECISIONS = "/home/bentoml/bento/src/decisions"
LIMIT_MB = 900


@dataclass(frozen=True)
class Image:
    """A built image, what runs it, and what the command said about it."""

    engine: Engine
    report: dict[str, str]

    @property
    def name(self) -> str:
        return self.report["image"]


@pytest.fixture(scope="session")
def project(tmp_path_factory: pytest.TempPathFactory) -> Project:
    """A project with version 1 promoted and version 2 trained."""
    project = copy_project(tmp_path_factory.mktemp("project"))
    train = ("train", "--trials", "1", "--workers", "1")
    project.pipeline(*train)
    project.pipeline("promote")
    project.pipeline(*train, "--seed", "2", "--study", "second")
    return project


@pytest.fixture(scope="session")
def pip_conf(project: Project, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A pip.conf for the build."""
    with package_index(project.folder / "requirements.serve.lock", tmp_path_factory.mktemp("index")) as conf:
        yield conf


@pytest.fixture(scope="session")
def base_archive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The file system of a base image."""
    if not shutil.which("mmdebstrap"):
        pytest.skip("the base image cannot be pulled, and mmdebstrap is not installed to make one")
    archive = tmp_path_factory.mktemp("base") / "base.tar"
    make_base(archive)
    return archive


@pytest.fixture(scope="session", params=["docker", "podman", "buildah"])
def image(
    request: pytest.FixtureRequest, project: Project, pip_conf: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Image]:
    """The image of a new Bento with version 1 pinned, by each builder that works here."""
    builder = request.param
    engine = engine_for(builder, tmp_path_factory.mktemp("containers") / "state")
    if not engine.works():
        pytest.skip(f"{engine.name} is not installed or not running, so an image of {builder} cannot be run")
    if not shutil.which(builder):
        pytest.skip(f"{builder} is not installed")
    base = _base(engine, request)
    name = f"localhost/credit-risk-test-{builder}"
    flags = ["--builder", builder, "--tag", name, *base]
    options = ["--option", "network=host", "--option", f"secret=id=pip,src={pip_conf}"]
    command = ("python", "-m", "pipeline", "image", "--json", *flags, *options)
    built = Project(project.folder, {**project.env, **_own(engine)}).run(*command, timeout=1800)
    yield Image(engine, json.loads(built.stdout))
    for used in (name, OWN_BASE):
        engine.run("rmi", "--force", used, check=False)


def _own(engine: Engine) -> dict[str, str]:
    return {name: value for name, value in engine.env.items() if name.startswith(("CONTAINERS_", "BUILDAH_"))}


def _base(engine: Engine, request: pytest.FixtureRequest) -> list[str]:
    """Flags that name the base: none where the one of the container file can be had."""
    if engine.has_default_base():
        return []
    engine.run("import", str(request.getfixturevalue("base_archive")), OWN_BASE)
    return ["--base", OWN_BASE]


@pytest.fixture(scope="session")
def container(image: Image) -> Iterator[Container]:
    """A container as the documentation starts it, ready."""
    with image.engine.container(image.name) as container:
        container.await_status("/readyz", 200)
        yield container


def test_container_answers_with_the_pinned_version(container: Container, schema: Schema) -> None:
    status, answer = container.call("/classify", schema.example())
    assert (status, answer["model"]) == (200, "credit_risk_model:v1")
    assert container.call("/classify", schema.example(), key=None)[0] == 401


def test_container_runs_as_a_user_without_pip_or_telemetry(container: Container) -> None:
    owner = container.execute("python", "-c", "import os; print(os.stat('/proc/1').st_uid)")
    assert owner.stdout.strip() == "1034"
    assert container.execute("python", "-m", "pip", "--version").returncode != 0
    assert container.execute("sh", "-c", "command -v pip gcc cc").returncode != 0
    assert container.execute("sh", "-c", "echo $BENTOML_DO_NOT_TRACK").stdout.strip() == "true"


def test_layers_hold_nothing_of_the_package_index(image: Image, container: Container, pip_conf: Path) -> None:
    address = pip_conf.read_text().split("http://")[1].strip("/\n")
    history = image.engine.run("history", "--no-trunc", image.name).stdout
    assert address not in history
    assert container.execute("sh", "-c", "cat /etc/pip.conf").stdout == ""
    assert container.execute("grep", "-rl", address, "/opt", "/home", "/etc").stdout == ""


def test_health_is_that_of_the_promoted_version(image: Image, container: Container, tmp_path: Path) -> None:
    told = image.engine.run("inspect", "--format", "{{json .Config.Healthcheck}}", container.name).stdout
    kind, *check = json.loads(told)["Test"]
    assert kind == "CMD"
    assert container.execute(*check).returncode == 0
    tmp_path.chmod(0o755)
    # Not a tmpfs: podman copies what the image has there into it.
    with image.engine.container(image.name, "--volume", f"{tmp_path}:/home/bentoml/models:ro") as empty:
        empty.await_status("/readyz", 503)
        assert empty.execute(*check).returncode != 0


def test_root_file_system_may_be_read_only(image: Image, schema: Schema) -> None:
    mounts = ("--tmpfs", "/tmp", "--volume", DECISIONS)
    with image.engine.container(image.name, "--read-only", *mounts) as container:
        container.await_status("/readyz", 200)
        assert container.execute("touch", "/home/bentoml/x").returncode != 0
        status, answer = container.call("/classify", schema.example())
        assert status == 200
        assert eventually(lambda: answer["request_id"] in _decisions(container))
        assert "credit_risk_decisions_total{" in container.call("/metrics")[1]


def _decisions(container: Container) -> str:
    return container.execute("sh", "-c", f"cat {DECISIONS}/*.jsonl").stdout


def test_mounted_store_is_followed(image: Image, project: Project, schema: Schema) -> None:
    store = Path(project.env["BENTOML_HOME"]) / "models"
    with image.engine.container(image.name, "--volume", f"{store}:/home/bentoml/models:ro") as container:
        container.await_status("/readyz", 200)
        assert _version(container, schema) == "v1"
        project.pipeline("promote", "--version", "2", "--force", "--reason", "the image test")
        assert _version(container, schema) == "v2"
        project.pipeline("rollback")
        assert _version(container, schema) == "v1"


def _version(container: Container, schema: Schema) -> Any:
    return container.call("/classify", schema.example())[1]["model"].partition(":")[2]


def test_size_is_as_documented(image: Image, capsys: pytest.CaptureFixture[str]) -> None:
    with capsys.disabled():
        print(f"\n{image.report['builder']}: {image.report['size']}")
    number, unit = image.report["size"].replace(" ", "")[:-2], image.report["size"][-2:]
    assert unit == "MB"
    assert float(number) < LIMIT_MB
