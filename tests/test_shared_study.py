"""Two people train on one study, kept by a real PostgreSQL server, with real processes."""

from __future__ import annotations

import json
import subprocess
import threading
from collections.abc import Iterator
from typing import Any

import optuna
import pytest
import yaml
from mlflow import MlflowClient
from optuna.trial import FrozenTrial, TrialState

from pipeline.core.errors import ConfigError
from pipeline.training.settings import TrainSettings
from pipeline.training.study import open_study
from tests.testkit import PROJECT
from tests.testkit.postgres import WaitingConnections, no_heartbeats, postgres
from tests.testkit.projects import Project, copy_project

TRIALS = 10


@pytest.fixture(scope="module")
def database() -> Iterator[str]:
    """Address of a PostgreSQL database, empty at first."""
    with postgres() as address:
        yield address


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory, database: str) -> Project:
    """A copy of the project that keeps its studies in PostgreSQL; the signs of life are quick."""
    project = copy_project(tmp_path_factory.mktemp("shared"))
    path = project.folder / "conf/train.yaml"
    changes = {"storage": database, "folds": 2, "max_rounds": 20, "workers": 1, "trials": TRIALS}
    changes |= {"heartbeat": 1, "stale_after": 3}
    path.write_text(yaml.safe_dump({**yaml.safe_load(path.read_text()), **changes}))
    # Its tables are made before two processes use it at once: SQLite is one person's tracking store.
    tracking(project).create_experiment("credit_risk", artifact_location=(project.folder / "mlruns").as_uri())
    return project


def settings(database: str, **changes: Any) -> TrainSettings:
    """The shipped settings with a study in PostgreSQL."""
    return TrainSettings.load(PROJECT / "conf/train.yaml", storage=database, **changes)


def test_a_new_database_can_be_opened_by_many_at_once(database: str) -> None:
    together = threading.Barrier(4)
    problems: list[Exception] = []

    def open_it() -> None:
        together.wait()
        try:
            with open_study(settings(database), "opened", {}) as study:
                study.ask()
        except Exception as problem:
            problems.append(problem)

    threads = [threading.Thread(target=open_it) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert problems == []


def test_two_people_train_at_once_and_nothing_is_lost(project: Project, database: str) -> None:
    with no_heartbeats(database) as waiting:
        first = begin(project, "both")
        until(waiting, 1, first)
        second = begin(project, "both")
        until(waiting, 2, first, second)  # both have a trial under way
    reports = [finish(first), finish(second)]
    done = trials(database, "both")
    assert [trial.state for trial in done] == [TrialState.COMPLETE] * len(done)
    assert len(done) in (TRIALS, TRIALS + 1)  # each may ask for the last one at the same moment
    assert len({tuple(trial.params.values()) for trial in done}) == len(done)
    for report in reports:
        assert status(project, report["run_id"]) == "FINISHED"
        assert len(children(project, report["run_id"])) >= TRIALS
    assert {report["version"] for report in reports} == {1, 2}
    best = min(trial.value for trial in done if trial.value is not None)
    assert [report["cv"]["log_loss"] for report in reports] == [best, best]


def test_what_a_killed_person_left_is_taken_over(project: Project, database: str) -> None:
    with no_heartbeats(database) as waiting:
        killed = begin(project, "left")
        until(waiting, 1, killed)
        left = trials(database, "left")[0]
        killed.kill()
        killed.communicate()
    report = finish(begin(project, "left"))
    done = trials(database, "left")
    assert done[left.number].state == TrialState.FAIL
    assert left.params in [trial.params for trial in done if trial.state == TrialState.COMPLETE]
    assert [trial.state for trial in done].count(TrialState.COMPLETE) == TRIALS
    assert status(project, report["run_id"]) == "FINISHED"


def test_an_interrupted_person_hands_the_trials_on_at_once(project: Project, database: str) -> None:
    process = begin(project, "other", "--trials", "100000")
    while not trials(database, "other", TrialState.COMPLETE):
        still_running(process)
    process.terminate()
    _, error = process.communicate(timeout=60)
    assert process.returncode == 130, error
    assert not trials(database, "other", TrialState.RUNNING)


def test_a_database_that_does_not_answer_is_one_readable_error_without_the_password() -> None:
    away = "postgresql+psycopg://someone:secret@127.0.0.1:1/optuna"
    shown = r"storage postgresql\+psycopg://someone:\*\*\*@127"
    with pytest.raises(ConfigError, match=shown) as error, open_study(settings(away), "s", {}):
        pass
    assert "secret" not in str(error.value)
    assert "\n" not in str(error.value)


def until(waiting: WaitingConnections, count: int, *processes: subprocess.Popen[str]) -> None:
    """Wait until so many connections wait."""
    while waiting.count < count:
        for process in processes:
            still_running(process)


def begin(project: Project, study: str, *flags: str) -> subprocess.Popen[str]:
    """Begin a training in a process of its own."""
    command = ["python", "-m", "pipeline", "train", "--study", study, "--json", *flags]
    return subprocess.Popen(
        command, cwd=project.folder, env=project.env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def finish(process: subprocess.Popen[str]) -> dict[str, Any]:
    """Wait for a training, and return its report."""
    output, error = process.communicate(timeout=240)
    assert process.returncode == 0, error
    report: dict[str, Any] = json.loads(output)
    return report


def still_running(process: subprocess.Popen[str]) -> None:
    """Fail if a process has ended; takes a moment."""
    try:
        process.wait(0.05)
    except subprocess.TimeoutExpired:
        return
    pytest.fail(f"ended too early:\n{process.communicate()[1]}")


def trials(database: str, study: str, *states: TrialState) -> list[FrozenTrial]:
    """Trials of a study; none if it does not exist yet."""
    try:
        found = optuna.load_study(study_name=study, storage=database)
    except KeyError:
        return []
    return list(found.get_trials(deepcopy=False, states=states or None))


def status(project: Project, run_id: str) -> str:
    """Status of an MLflow run."""
    return str(tracking(project).get_run(run_id).info.status)


def children(project: Project, run_id: str) -> list[str]:
    """Names of the finished trials of a parent run."""
    condition = f"tags.`mlflow.parentRunId` = '{run_id}' AND status = 'FINISHED'"
    experiment = tracking(project).get_run(run_id).info.experiment_id
    return sorted(run.info.run_name for run in tracking(project).search_runs([experiment], condition))


def tracking(project: Project) -> MlflowClient:
    """The project's tracking store."""
    return MlflowClient(f"sqlite:///{project.folder}/mlflow.db")
