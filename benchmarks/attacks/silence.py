"""What commands and service would send to other machines, if nobody told them to be quiet."""

from __future__ import annotations

import sys
from pathlib import Path

from benchmarks.attacks.attack import Attack, Tally
from benchmarks.attacks.lab import Lab
from tests.testkit.projects import Project, copy_project
from tests.testkit.recorder import CALLS_OUT, recorded_environment

COMMANDS = [
    ("train", "--trials", "1", "--workers", "1"),
    ("promote", "--force", "--reason", "attack"),
    ("status",),
    ("sync",),
    ("score", "--input", "data/credit_risk.csv", "--output", "scored.csv"),
    ("rollback",),
    ("package",),
]


def silence(lab: Lab, tally: Tally) -> None:
    project = copy_project(lab.folder())
    project = Project(project.folder, recorded_environment(project.env, lab.folder()))
    calls = Path(project.env[CALLS_OUT])
    for arguments in COMMANDS:
        project.pipeline(*arguments, check=False)
        tally.count(not _taken(calls), f"{arguments[0]} called out")
    with project.serve() as url:
        tally.count(bool(url), "no service")
    tally.count(not (found := _taken(calls)), f"bentoml serve called {found}")
    # The recorder does see what BentoML's own commands report.
    project.run(sys.executable, "-m", "bentoml", "models", "list")
    tally.count(_taken(calls), "the recorder sees nothing")


ATTACKS = [
    Attack("silence", "Commands and service send nothing to another machine", silence),
]


def _taken(calls: Path) -> str:
    found = calls.read_text() if calls.exists() else ""
    calls.unlink(missing_ok=True)
    return found
