"""The borders between packages hold: each kind of forbidden import, planted in a copy, fails the check."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.testkit import PROJECT

LINT = str(Path(sys.executable).with_name("lint-imports"))


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the check reads."""
    folder = tmp_path_factory.mktemp("borders")
    for name in ("pipeline", "service"):
        shutil.copytree(PROJECT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    (folder / "tests").mkdir()
    for name in ("pyproject.toml", "tests/__init__.py", "tests/borders.py"):
        shutil.copy(PROJECT / name, folder / name)
    assert check(folder).returncode == 0, check(folder).stdout
    return folder


def check(folder: Path) -> subprocess.CompletedProcess[str]:
    """Run the check as `make check` does."""
    return subprocess.run([LINT, "--no-cache"], cwd=folder, capture_output=True, text=True, check=False)


@pytest.mark.parametrize(
    ("module", "planted", "said"),
    [
        ("service/records/metrics.py", "import mlflow", "mlflow"),
        ("service/records/metrics.py", "import requests", "service.records.metrics imports requests"),
        ("service/records/metrics.py", "from pipeline.registry import client", "pipeline.registry.client"),
        ("service/answering/core.py", "def late():\n    from pipeline.tables import digest", "pipeline.tables"),
        ("service/records/metrics.py", "from service.http import openapi", "service.http"),
        ("pipeline/core/policy.py", "import optuna", "pipeline.core.policy imports optuna"),
        ("pipeline/core/policy.py", "from pipeline.tables import digest", "pipeline.tables.digest"),
        ("pipeline/core/errors.py", "from pipeline.core import settings", "pipeline.core.settings"),
        ("pipeline/promotion/store_folders.py", "from pipeline.training import folds", "pipeline.training.folds"),
        ("pipeline/tables/digest.py", "from pipeline.evaluation import metrics", "pipeline.evaluation.metrics"),
        ("pipeline/promotion/store_folders.py", "from pipeline.promotion import commands", "pipeline.promotion"),
        ("pipeline/promotion/gate.py", "import service.settings", "service.settings"),
        ("pipeline/newcomer.py", "", "newcomer"),
        ("service/newcomer.py", "", "newcomer"),
    ],
)
def test_a_planted_import_is_refused(copy: Path, module: str, planted: str, said: str) -> None:
    file = copy / module
    before = file.read_text() if file.exists() else None
    file.write_text(f"{before or ''}\n{planted}\n")
    try:
        done = check(copy)
    finally:
        file.unlink() if before is None else file.write_text(before)
    assert done.returncode == 1, done.stdout
    assert said in done.stdout
