"""What a developer's machine and CI rely on: the Makefile's choice of a Python, `.ci/run`, and the locks."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[1]
PYTHONS = ("3.11", "3.12", "3.13")


@pytest.fixture
def commands(tmp_path: Path) -> Path:
    """Return a folder with the few commands of the system that the scripts need, for a PATH of its own."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name in ("sh", "bash", "make", "awk", "dirname", "env"):
        (folder / name).symlink_to(str(shutil.which(name)))
    return folder


def command(folder: Path, name: str, script: str) -> None:
    path = folder / name
    path.write_text(f"#!{shutil.which('sh')}\n{script}\n")
    path.chmod(0o755)


def run(commands: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    env = {"PATH": str(commands), "HOME": str(commands)}
    return subprocess.run(arguments, cwd=ROOT, env=env, capture_output=True, text=True, timeout=60, check=False)


def test_make_takes_the_newest_python_that_runs(commands: Path) -> None:
    command(commands, "python3.13", "echo 'pyenv: python3.13: command not found' >&2; exit 127")
    command(commands, "python3.12", f'exec {sys.executable} "$@"')
    command(commands, "python3.11", f'exec {sys.executable} "$@"')
    made = run(commands, "make", "--dry-run", "setup", f"VENV={commands / 'absent'}")
    assert "python3.12 -m venv" in made.stdout, made.stderr


def test_make_says_which_python_is_required(commands: Path) -> None:
    command(commands, "python3", "exit 1")
    made = run(commands, "make", "setup", f"VENV={commands / 'absent'}")
    assert made.returncode != 0
    assert "Python 3.11, 3.12 or 3.13" in made.stderr
    assert "PYTHON=" in made.stderr


def test_make_removes_no_folder_that_is_not_an_environment(commands: Path, tmp_path: Path) -> None:
    precious = tmp_path / "work"
    precious.mkdir()
    (precious / "thesis.txt").touch()
    made = run(commands, "make", "setup", f"VENV={precious}", f"PYTHON={sys.executable}")
    assert made.returncode != 0
    assert "not a virtual environment" in made.stderr
    assert (precious / "thesis.txt").exists()


@pytest.mark.parametrize(("user", "prefix"), [("0", ""), ("1000", "sudo ")])
def test_ci_needs_root_for_system_packages_only(commands: Path, tmp_path: Path, user: str, prefix: str) -> None:
    calls = tmp_path / "calls"
    (commands / "make").unlink()
    command(commands, "id", f"echo {user}")
    for name in ("apt-get", "make"):
        command(commands, name, f'echo "{name} $*" >> {calls}')
    command(commands, "sudo", f'echo "sudo $*" >> {calls}')
    result = run(commands, ".ci/run", "check", "docs")
    assert result.returncode == 0, result.stderr
    *system, check, docs = calls.read_text().splitlines()
    assert [check, docs] == ["make check", "make docs"]
    assert len(system) == 2
    assert all(call.startswith(prefix or "apt-get") for call in system)


def pins(lock: str, python: str) -> dict[str, str]:
    """Read the versions that a lock installs on Linux with a Python."""
    environment = {
        "python_version": python, "python_full_version": f"{python}.1", "sys_platform": "linux",
        "implementation_name": "cpython", "platform_python_implementation": "CPython",
    }  # fmt: skip
    lines = re.findall(r"^([a-z0-9].*?) \\$", (ROOT / lock).read_text(), re.MULTILINE)
    found = [Requirement(line) for line in lines]
    return {pin.name: str(pin.specifier) for pin in found if not pin.marker or pin.marker.evaluate(environment)}


@pytest.mark.parametrize("lock", ["requirements.lock", "requirements.serve.lock"])
def test_a_lock_installs_the_same_versions_on_each_python(lock: str) -> None:
    oldest, *newer = (pins(lock, python) for python in PYTHONS)
    for other in newer:
        assert {name: other.get(name) for name in oldest} == oldest


@pytest.mark.parametrize("python", PYTHONS)
def test_what_serves_has_the_versions_that_trained(python: str) -> None:
    training = pins("requirements.lock", python)
    serving = pins("requirements.serve.lock", python)
    training["xgboost-cpu"] = training["xgboost"]
    assert {name: training.get(name) for name in serving} == serving


@pytest.mark.parametrize("lock", ["requirements.lock", "requirements.serve.lock"])
def test_a_lock_names_no_index(lock: str) -> None:
    assert not re.search(r"://|index-url|find-links", (ROOT / lock).read_text())
