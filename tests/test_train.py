from __future__ import annotations

import json
import signal
import socket
import sqlite3
import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import optuna
import pandas as pd
import pytest
import xgboost as xgb
import yaml

from pipeline.__main__ import main
from pipeline.core.contract.schema import Schema
from pipeline.core.errors import TrackingError
from pipeline.core.model.encoders import FrameEncoder
from pipeline.core.model.features import make_vectorizer
from pipeline.evaluation.metrics import metrics
from pipeline.tables.holdout import is_test_row
from pipeline.training.folds import FoldSet, FoldSettings
from pipeline.training.search import search
from pipeline.training.settings import TrainSettings
from pipeline.training.study import open_study
from pipeline.training.tracking import parent_run
from pipeline.training.trial_writer import TrialWriter
from pipeline.training.trials import finished_trials
from pipeline.training.workers import InProcess
from tests.testkit import PROJECT
from tests.testkit.projects import Project, copy_project
from tests.testkit.servers import Service, running
from tests.testkit.waiting import eventually

FIGURES = {
    "roc", "precision_recall", "calibration", "scores", "gain_and_lift", "ks", "feature_importance",
    "contributions", "study_history",
}  # fmt: skip


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Project:
    """A copy of the project whose trials are quick."""
    project = copy_project(tmp_path_factory.mktemp("train"))
    adapt(project, folds=3, max_rounds=40, early_stopping_rounds=5)
    return project


def adapt(project: Project, **changes: Any) -> None:
    """Change the project's conf/train.yaml."""
    path = project.folder / "conf/train.yaml"
    path.write_text(yaml.safe_dump({**yaml.safe_load(path.read_text()), **changes}))


def train(project: Project, *flags: str) -> dict[str, Any]:
    """Train with one worker, and return the printed JSON object: all of stdout."""
    done = project.pipeline("train", "--json", "--workers", "1", *flags)
    result: dict[str, Any] = json.loads(done.stdout)
    return result


def query(path: Path, statement: str) -> list[tuple[Any, ...]]:
    """Read from one of the project's databases; nothing if its tables are not made yet."""
    with suppress(sqlite3.OperationalError):
        connection = sqlite3.connect(f"file:{path}?mode=ro", uri=True)
        try:
            return connection.execute(statement).fetchall()
        finally:
            connection.close()
    return []


def runs(project: Project, parent: str | None = None) -> list[tuple[str, str]]:
    """Names and statuses of the parents, or of the children of one."""
    condition = f"t.value = '{parent}'" if parent else "t.value IS NULL"
    join = "LEFT JOIN tags t ON t.run_uuid = r.run_uuid AND t.key = 'mlflow.parentRunId'"
    return query(
        project.folder / "mlflow.db",
        f"SELECT r.name, r.status FROM runs r {join} WHERE {condition} ORDER BY r.name, r.start_time",
    )


@pytest.fixture(scope="module")
def first(project: Project) -> dict[str, Any]:
    """A first training of three trials."""
    return train(project, "--trials", "3", "--study", "first")


def booster_bytes(project: Project, version: int) -> bytes:
    """The booster's file of a version."""
    rows = query(
        project.folder / "mlflow.db", f"SELECT storage_location FROM model_versions WHERE version = {version}"
    )
    return (Path(rows[0][0].removeprefix("file://")) / "artifacts/booster.ubj").read_bytes()


def test_a_parent_run_holds_everything_that_led_to_the_version(project: Project, first: dict[str, Any]) -> None:
    code = f"""
import json, mlflow
client = mlflow.MlflowClient()
run = client.get_run({first["run_id"]!r})
found = lambda folder: [item.path for item in client.list_artifacts(run.info.run_id, folder)]
print(json.dumps({{
    "params": run.data.params, "metrics": run.data.metrics, "tags": run.data.tags, "status": run.info.status,
    "files": found("conf") + found("figures"),
    "datasets": [[item.tags[0].value, item.dataset.digest] for item in run.inputs.dataset_inputs],
    "candidate": client.get_model_version_by_alias("credit_risk_model", "candidate").version,
}}))
"""
    run = json.loads(project.run("python", "-c", code).stdout.splitlines()[-1])
    assert run["status"] == "FINISHED"
    assert run["params"]["train.seed"] == "42"
    assert run["params"]["train.data"] == "data/credit_risk.csv"
    assert {"eta", "max_depth", "rounds", "train.data_digest", "train.test_share"} <= run["params"].keys()
    wanted = {
        "auc",
        "gini",
        "ks",
        "brier",
        "log_loss",
        "calibration_slope",
        "ece",
        "share_maybe",
        "bad_rate_declined",
    }
    assert {f"test_{name}" for name in wanted} <= run["metrics"].keys()
    assert run["metrics"]["test_auc"] == first["test"]["auc"] > 0.8
    assert len(run["tags"]["lock.sha256"]) == 64
    assert {Path(name).stem for name in run["files"] if name.startswith("figures")} >= FIGURES
    assert {Path(name).name for name in run["files"]} >= {
        "train.yaml",
        "schema.yaml",
        "policy.yaml",
        "resolved.json",
    }
    assert [context for context, _ in run["datasets"]] == ["training", "holdout"]
    assert len({digest for _, digest in run["datasets"]}) == 2
    assert first["version"] == 1
    assert str(run["candidate"]) == "1"


def test_each_trial_is_a_child_run(project: Project, first: dict[str, Any]) -> None:
    assert runs(project, first["run_id"]) == [(f"trial {number:03d}", "FINISHED") for number in range(3)]
    scores = query(project.folder / "mlflow.db", "SELECT DISTINCT key FROM metrics WHERE key LIKE 'cv%'")
    assert {"cv_log_loss", "cv_auc", "cv_brier", "cv_ks"} <= {key for (key,) in scores}
    tags = query(
        project.folder / "mlflow.db",
        "SELECT t.key, t.value FROM tags t JOIN tags p USING (run_uuid) "
        f"WHERE p.value = '{first['run_id']}' AND t.key IN ('trial', 'pruned', 'study') ORDER BY t.key, t.value",
    )
    assert tags == [("pruned", "false")] * 3 + [("study", "first")] * 3 + [("trial", str(n)) for n in range(3)]


def test_what_is_reported_is_what_the_version_does_on_rows_it_was_not_trained_on(
    project: Project, first: dict[str, Any], applications: pd.DataFrame, schema: Schema
) -> None:
    held_out = applications[is_test_row(applications, schema, seed=42, share=0.2)]
    booster = xgb.Booster(model_file=bytearray(booster_bytes(project, first["version"])))
    answers = booster.inplace_predict(FrameEncoder(schema, make_vectorizer(schema)).transform(held_out))
    assert first["test"] == metrics(schema.labels(held_out), answers)
    assert first["rounds"] == booster.num_boosted_rounds()


def test_the_same_training_gives_the_same_bytes(project: Project, first: dict[str, Any]) -> None:
    again = train(project, "--trials", "3", "--study", "second")
    for key in ("parameters", "rounds", "cv", "test", "bands"):
        assert again[key] == first[key]
    assert again["version"] > first["version"]
    assert booster_bytes(project, again["version"]) == booster_bytes(project, first["version"])


def test_an_interrupted_and_a_killed_training_lose_no_trial(project: Project, first: dict[str, Any]) -> None:
    interrupted = stopped_after(project, 2, signal.SIGINT, "--workers", "2")
    assert interrupted.returncode == 130
    error = interrupted.stderr.splitlines()[-1]
    assert error.startswith("error: interrupted; study long keeps its finished trials")
    assert "Traceback" not in interrupted.stderr
    assert ("train long", "KILLED") in runs(project)
    assert ("train long", "RUNNING") not in runs(project)

    done = finished(project)
    assert stopped_after(project, done + 2, signal.SIGKILL, "--workers", "1").returncode == -signal.SIGKILL
    assert ("train long", "RUNNING") in runs(project)

    done = finished(project)
    result = train(project, "--study", "long", "--trials", str(done + 2))
    assert result["resumed"] == done
    assert [status for name, status in runs(project) if name == "train long"] == ["KILLED", "KILLED", "FINISHED"]
    children = runs(project, result["run_id"])
    assert [status for _, status in children] == ["FINISHED"] * (done + 2)
    assert len({name for name, _ in children}) == done + 2
    assert not query(project.folder / "mlflow.db", "SELECT 1 FROM runs WHERE status = 'RUNNING'")


def finished(project: Project) -> int:
    """Trials of the study "long" that are finished."""
    rows = query(
        project.folder / "optuna.db",
        "SELECT count(*) FROM trials NATURAL JOIN studies WHERE state = 'COMPLETE' AND study_name = 'long'",
    )
    return int(rows[0][0]) if rows else 0


def stopped_after(
    project: Project, trials: int, number: signal.Signals, *flags: str
) -> subprocess.CompletedProcess[str]:
    """Begin the study "long", and send a signal when so many trials are finished."""
    command = ["python", "-m", "pipeline", "train", "--study", "long", "--trials", "5000", *flags]
    with project.start(*command) as process:
        eventually(lambda: finished(project) >= trials or process.poll() is not None, 120)
        process.send_signal(number)
        output, error = process.communicate(timeout=60)
    return subprocess.CompletedProcess(command, process.returncode, output, error)


def still_running(process: subprocess.Popen[Any]) -> None:
    """Fail if a process has ended; takes a moment."""
    try:
        process.wait(0.05)
    except subprocess.TimeoutExpired:
        return
    pytest.fail(f"ended too early:\n{process.communicate()[1]}")


def test_a_complete_study_is_logged_again_and_says_so(project: Project, first: dict[str, Any]) -> None:
    done = project.pipeline("train", "--trials", "3", "--study", "first")
    assert "study first was complete (3 trials): nothing evaluated" in done.stdout
    assert "make promote" in done.stdout.splitlines()[-1]
    assert "credit_risk_model" in done.stdout


@pytest.mark.parametrize(("flags", "conf", "message"), [
    (("--data", "nowhere.csv"), {}, "nowhere.csv: no such file"),
    (("--data", "renamed.csv"), {}, "required columns are absent: age; columns unknown to the contract: years"),
    (("--data", "broken.csv"), {}, "age: must be in [18, 100]: 2 rows, first at 1, 3"),
    (("--schema", "nowhere.yaml"), {}, "nowhere.yaml: cannot be read"),
    ((), {"trails": 3}, "trails: unknown key; allowed: data, experiment"),
    ((), {"folds": 1}, "folds: Input should be greater than or equal to 2, received 1"),
    ((), {"search_space": {"etta": {"low": 0, "high": 1}}}, "etta"),
    ((), {"first_trial": {}}, "first_trial and search_space must name the same parameters"),
])  # fmt: skip
def test_what_cannot_be_trained_is_refused_in_one_message_and_nothing_is_logged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], flags: tuple[str, ...],
    conf: dict[str, Any], message: str,
) -> None:  # fmt: skip
    project = copy_project(tmp_path)
    adapt(project, **conf)
    rows = pd.read_csv(project.folder / "data/credit_risk.csv")
    rows.rename(columns={"age": "years"}).to_csv(tmp_path / "renamed.csv", index=False)
    rows.assign(age=np.where(rows.index.isin([0, 2]), 7, 30)).to_csv(tmp_path / "broken.csv", index=False)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CREDIT_RISK_CONF", str(tmp_path / "conf"))
    assert main(["train", *flags]) == 1
    output = capsys.readouterr()
    assert output.out == ""
    assert output.err.startswith("error: ")
    assert message in output.err
    assert not (tmp_path / "mlflow.db").exists()


def opened_run(
    study: str, *, lock: str | None = None, heartbeat: float = 10, stale_after: float = 60
) -> AbstractContextManager[mlflow.ActiveRun]:
    """Open the parent run of a training."""
    return parent_run("ignored", study, lock=lock, heartbeat=heartbeat, stale_after=stale_after)


def test_a_training_that_fails_is_not_logged_as_finished(
    tracking_store: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "tests")
    with pytest.raises(ZeroDivisionError), opened_run("failing") as run:
        raise ZeroDivisionError
    assert mlflow.get_run(run.info.run_id).info.status == "FAILED"
    assert mlflow.get_experiment(run.info.experiment_id).name == "tests"


def ago(seconds: float) -> str:
    """A moment as a heartbeat tells it."""
    return (datetime.now(UTC) - timedelta(seconds=seconds)).isoformat()


def as_tags(tags: dict[str, float | str]) -> dict[str, str]:
    """Tags of a run; a heartbeat is given as its age in seconds when the test runs."""
    return {name: value if isinstance(value, str) else ago(value) for name, value in tags.items()}


@pytest.mark.parametrize(("tags", "alive"), [
    ({"heartbeat": 5}, True), ({"heartbeat": 3600}, False),
    ({"heartbeat": 5, "study_lock": "other"}, True),
    ({"heartbeat": 5, "study_lock": "ours"}, False),  # nobody else can hold the lock that we hold
    ({}, False), ({"heartbeat": "yesterday"}, False),  # a run of release 0.1; a tag that somebody changed
])  # fmt: skip
def test_a_training_ends_the_runs_of_its_study_whose_process_is_gone(
    tracking_store: str, monkeypatch: pytest.MonkeyPatch, tags: dict[str, float | str], alive: bool
) -> None:
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "tests")
    client = mlflow.MlflowClient()
    experiment = client.get_experiment_by_name("tests").experiment_id
    other = client.create_run(experiment, tags={"study": "mine", **as_tags(tags)}).info.run_id
    child = client.create_run(experiment, tags={"study": "mine", "mlflow.parentRunId": other}).info.run_id
    with opened_run("mine", lock="ours", stale_after=60) as run:
        found = [client.get_run(run_id).info.status for run_id in (other, child)]
        assert client.get_run(run.info.run_id).info.status == "RUNNING"
    assert found == ["RUNNING" if alive else "KILLED"] * 2
    for run_id in (other, child):
        client.set_terminated(run_id)


def test_a_training_leaves_the_runs_of_other_studies_alone(
    tracking_store: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "tests")
    client = mlflow.MlflowClient()
    beside = client.create_run(client.get_experiment_by_name("tests").experiment_id, tags={"study": "other"})
    with opened_run("mine"):
        assert client.get_run(beside.info.run_id).info.status == "RUNNING"
    client.set_terminated(beside.info.run_id)


def test_a_training_gives_signs_of_life(tracking_store: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "tests")
    client = mlflow.MlflowClient()
    with opened_run("living", heartbeat=0.01) as run:
        first = client.get_run(run.info.run_id).data.tags["heartbeat"]
        while client.get_run(run.info.run_id).data.tags["heartbeat"] == first:
            pass  # it tells seconds


# The trial writer against a real server, behind a proxy that the tests open and shut.


class Proxy:
    """A TCP proxy in front of a server: open, shut, or losing the answers to what it let through."""

    def __init__(self, port: int) -> None:
        self.state = "open"
        self._target = port
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        self.lost = threading.Event()
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                threading.Thread(target=self._serve, args=(self._listener.accept()[0],), daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        with client, suppress(OSError):
            if self.state == "shut":
                self.lost.set()
                return
            with socket.create_connection(("127.0.0.1", self._target)) as server:
                threading.Thread(target=_pump, args=(client, server, lambda data: True), daemon=True).start()
                _pump(server, client, self._may_pass)
                # Not only closed: the other thread still reads from it.
                client.shutdown(socket.SHUT_RDWR)

    def _may_pass(self, data: bytes) -> bool:
        if self.state == "open":
            return True
        self.lost.set()
        return False

    def close(self) -> None:
        self._listener.close()


def _pump(source: socket.socket, target: socket.socket, may_pass: Callable[[bytes], bool]) -> None:
    with suppress(OSError):
        while (data := source.recv(65536)) and may_pass(data):
            target.sendall(data)


@pytest.fixture(scope="module")
def proxy(project: Project) -> Iterator[Proxy]:
    """A small MLflow server, reached through a proxy."""
    command = (
        "mlflow", "server", "--port", "{port}", "--workers", "1",
        "--backend-store-uri", "sqlite:///server.db", "--artifacts-destination", "served",
    )  # fmt: skip
    env = {**project.env, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    service = Service("mlflow server", command, ready="/health", environment=env, folder=project.folder)
    with running(service) as server:
        proxy = Proxy(server.port)
        yield proxy
        proxy.close()


@pytest.fixture
def away(proxy: Proxy, tracking_store: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Proxy]:
    """The proxy, with `mlflow` in front of it."""
    proxy.state = "open"
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "Default")
    mlflow.set_tracking_uri(f"http://127.0.0.1:{proxy.port}")
    mlflow.set_experiment("Default")
    yield proxy
    mlflow.set_tracking_uri(tracking_store)


@pytest.fixture(scope="module")
def trials(tmp_path_factory: pytest.TempPathFactory, applications: pd.DataFrame, schema: Schema) -> list[Any]:
    """Four finished trials."""
    rows = applications.head(300)
    matrix = FrameEncoder(schema, make_vectorizer(schema)).transform(rows)
    fixed = {"objective": "binary:logistic", "max_bin": 32}
    folds = FoldSet(matrix, schema.labels(rows), FoldSettings(fixed, 2, 1, 5, 3))
    storage = f"sqlite:///{tmp_path_factory.mktemp('study')}/optuna.db"
    settings = TrainSettings.load(PROJECT / "conf/train.yaml", storage=storage, trials=4)
    with open_study(settings, "s", {}) as study:
        search(study, InProcess(folds, 1), settings, lambda trial: None)
        return finished_trials(study)


def children(run: Any) -> list[tuple[str, str]]:
    """Names and statuses of the children, as the server has them."""
    found = mlflow.MlflowClient().search_runs(
        [run.info.experiment_id], f"tags.`mlflow.parentRunId` = '{run.info.run_id}'"
    )
    return sorted((child.info.run_name, child.info.status) for child in found)


ALL_FOUR = [(f"trial {number:03d}", "FINISHED") for number in range(4)]


def test_trials_are_written_when_the_server_is_back(away: Proxy, trials: list[optuna.trial.FrozenTrial]) -> None:
    with opened_run("away") as run:
        writer = TrialWriter(run, "away")
        away.lost.clear()
        away.state = "shut"
        for trial in trials:
            writer.put(trial)  # the study does not wait for the server: this would never return
        assert away.lost.wait(60)
        away.state = "open"
        writer.close(60)
        assert children(run) == ALL_FOUR


def test_a_server_that_stays_away_is_reported_and_waited_for_no_longer_than_asked(
    away: Proxy, trials: list[optuna.trial.FrozenTrial]
) -> None:
    run = mlflow.start_run()
    mlflow.end_run()
    away.state = "shut"
    writer = TrialWriter(run, "gone")
    for trial in trials:
        writer.put(trial)
    with pytest.raises(TrackingError, match=r"4 trials are not written .*run the same command again"):
        writer.close(0.5)
    with pytest.raises(TrackingError, match="does not answer"), opened_run("gone"):
        pass


def test_no_trial_is_written_twice_when_answers_are_lost(
    away: Proxy, trials: list[optuna.trial.FrozenTrial]
) -> None:
    with opened_run("lost") as run:
        writer = TrialWriter(run, "lost")
        writer.put(trials[0])
        eventually(lambda: children(run) == ALL_FOUR[:1])
        away.state = "losing answers"  # the first that is lost says that a child was made
        away.lost.clear()
        for trial in trials[1:]:
            writer.put(trial)
        assert away.lost.wait(60)
        away.state = "open"
        writer.close(60)
        assert children(run) == ALL_FOUR
