"""Whoever may write MLflow's artifacts can stop a promotion, but neither change what is promoted nor run code."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from mlflow import MlflowClient

from pipeline.core.promoted import MODEL_NAME
from tests.testkit import DATA
from tests.testkit.registry import BETTER, GOOD, Machine


@pytest.fixture
def artifacts(promoted_machine: Machine, tmp_path: Path) -> Iterator[Path]:
    """The files of version 2 in the artifact store, which all tests share; put back as they were afterwards."""
    location = MlflowClient(promoted_machine.tracking).get_model_version_download_uri(MODEL_NAME, str(BETTER))
    folder = Path(urlsplit(location).path)
    kept = shutil.copytree(folder, tmp_path / "kept")
    yield folder
    shutil.rmtree(folder)
    shutil.copytree(kept, folder)


def plant(artifacts: Path, where: str, mark: Path) -> str:
    """Hide code that leaves a mark when it runs; gives the name that the refusal must name."""
    if where == "MLmodel":
        text = (artifacts / "MLmodel").read_text()
        changed = re.sub(r"loader_module: \S+", "loader_module: pipeline.planted", text)
        assert changed != text
        (artifacts / "MLmodel").write_text(changed)
    source = artifacts / ("code/pipeline/planted.py" if where == "MLmodel" else where)
    with source.open("a") as file:
        file.write(f"\nfrom pathlib import Path\nPath({str(mark)!r}).touch()\n")
    return where


@pytest.mark.parametrize("where", ["pyfunc.py", "code/pipeline/__init__.py", "code/sitecustomize.py", "MLmodel"])
def test_code_planted_in_the_artifacts_never_runs(
    promoted_machine: Machine, artifacts: Path, tmp_path: Path, where: str
) -> None:
    machine, mark = promoted_machine, tmp_path / "it-ran"
    name = plant(artifacts, where, mark)
    other = Machine(tmp_path / "other", machine.tracking)
    MlflowClient(machine.tracking).set_registered_model_alias(MODEL_NAME, "champion", str(BETTER))
    version, scored = ("--version", str(BETTER)), str(tmp_path / "scored.csv")
    for done in (
        machine.run("promote", *version, "--dry-run"),
        machine.run("promote", *version),
        machine.run("promote", *version, "--force", "--reason", "hurry", "--allow-schema-change"),
        other.run("sync"),
        machine.run(
            "score", "--input", str(DATA), "--output", scored, "--model", f"models:/{MODEL_NAME}/{BETTER}"
        ),
    ):
        assert done.code == 1, done.out
        assert name in done.err
        assert len(done.err.splitlines()) == 1, done.err
        assert not mark.exists()
    promoted = machine.pointer()
    assert promoted
    assert promoted.version == GOOD
    assert other.pointer() is None
    assert not Path(scored).exists()
