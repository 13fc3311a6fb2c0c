"""What release 0.1 left on a machine works with this code: commands and HTTP only, as its users have them."""

from __future__ import annotations

import csv
import json
import sqlite3
from contextlib import closing
from pathlib import Path
from typing import Any

import httpx
import pyarrow.parquet as pq
import pytest
import yaml

from tests.testkit.projects import Project, copy_project
from tests.upgrade import unpack

V1, V2, V3 = (f"credit_risk_model:v{number}" for number in (1, 2, 3))


@pytest.fixture
def upgraded(tmp_path: Path) -> Project:
    """This code in the folder in which the release ran, with the user's contract and training settings kept."""
    project = copy_project(tmp_path)
    unpack(tmp_path)
    _keep_settings(tmp_path / "conf-0.1", tmp_path / "conf")
    return project


def _keep_settings(old: Path, new: Path) -> None:
    (new / "schema.yaml").write_text((old / "schema.yaml").read_text())
    for name in ("train.yaml", "second.yaml", "third.yaml"):
        kept = yaml.safe_load((old / name).read_text())
        shipped = yaml.safe_load((new / "train.yaml").read_text())
        merged = shipped | {key: value for key, value in kept.items() if key in shipped}
        (new / name).write_text(yaml.safe_dump(merged))


def _decisions(project: Project, model: str) -> list[dict[str, Any]]:
    """What the release's service recorded of a version."""
    files = sorted((project.folder / "decisions").glob("*.jsonl"))
    records = [json.loads(line) for file in files for line in file.read_text().splitlines()]
    return [record for record in records if record["model"] == model]


def _json(project: Project, *arguments: str) -> dict[str, Any]:
    answer: dict[str, Any] = json.loads(project.pipeline(*arguments, "--json").stdout)
    return answer


def _rows(project: Project, database: str, query: str) -> list[Any]:
    with closing(sqlite3.connect(project.folder / database)) as connection:
        return connection.execute(query).fetchall()


def _champion(project: Project) -> int:
    query = "SELECT version FROM registered_model_aliases WHERE alias = 'champion'"
    [(version,)] = _rows(project, "mlflow.db", query)
    return int(version)


def test_status_shows_what_the_release_promoted(upgraded: Project) -> None:
    written = json.loads((upgraded.folder / "bentoml/models/credit_risk_model/promoted.json").read_text())
    status = _json(upgraded, "status")
    assert (status["promoted"], status["version"], status["previous"]) == (V2, 2, V1)
    assert {key: status[key] for key in ("run_id", "since", "digests")} == {
        key: written[key] for key in ("run_id", "since", "digests")
    }
    assert (status["by"], status["why"]) == ("analyst@lender", "rollback: rehearsal over")
    assert [(record["tag"], record["why"]) for record in status["history"]] == [
        (V1, "promote"),
        (V2, "promote: deeper trees"),
        (V1, "rollback: rehearsal"),
        (V2, "rollback: rehearsal over"),
    ]


def test_service_answers_with_the_recorded_probabilities_there_and_back(upgraded: Project) -> None:
    with upgraded.serve() as url:
        _check_answers(url, _decisions(upgraded, V2))
        assert _json(upgraded, "rollback")["promoted"] == V1
        _check_answers(url, _decisions(upgraded, V1))
        assert _json(upgraded, "rollback", "--to", "2")["promoted"] == V2
        _check_answers(url, _decisions(upgraded, V2))
    assert _champion(upgraded) == 2
    assert [record["version"] for record in _json(upgraded, "status")["history"]] == [1, 2, 1, 2, 1, 2]


def _check_answers(url: str, recorded: list[dict[str, Any]]) -> None:
    assert len(recorded) >= 8
    with httpx.Client(base_url=url) as client:
        for record in recorded:
            answer = client.post("/classify", json=record["inputs"]).json()
            told = {"Status": record["status"], "probability": record["probability"], "model": record["model"]}
            assert {key: answer[key] for key in told} == told


def test_score_gives_the_recorded_probabilities(upgraded: Project) -> None:
    recorded = _decisions(upgraded, V2)
    table, scored = upgraded.folder / "applications.csv", upgraded.folder / "scored.parquet"
    with table.open("w", newline="") as file:
        writer = csv.DictWriter(file, recorded[0]["inputs"])
        writer.writeheader()
        writer.writerows(record["inputs"] for record in recorded)
    upgraded.pipeline("score", "--input", str(table), "--output", str(scored))
    columns = pq.read_table(scored).to_pydict()
    assert columns["probability"] == [record["probability"] for record in recorded]
    assert columns["decision"] == [record["status"] for record in recorded]
    assert set(columns["model"]) == {V2}


def test_decisions_of_the_release_are_read(upgraded: Project) -> None:
    found = _json(upgraded, "decisions")
    assert (found["decisions"], found["broken_lines"]) == (26, 0)
    assert {tag: told["decisions"] for tag, told in found["models"].items()} == {V1: 8, V2: 18}
    for tag, told in found["models"].items():
        statuses = [record["status"] for record in _decisions(upgraded, tag)]
        assert told["statuses"] == {status: statuses.count(status) for status in told["statuses"]}


def test_interrupted_study_is_resumed(upgraded: Project) -> None:
    trials = """
        SELECT number, state, group_concat(param_name || '=' || param_value) FROM (
            SELECT * FROM trials JOIN studies USING (study_id) JOIN trial_params USING (trial_id)
            WHERE study_name = 'half' ORDER BY param_name)
        GROUP BY number ORDER BY number
    """
    before = _rows(upgraded, "optuna.db", trials)
    assert [state for _, state, _ in before] == ["COMPLETE"] * 3 + ["RUNNING"]
    told = _json(upgraded, "train", "--trials", "6", "--study", "half", "--workers", "1")
    assert (told["trials"], told["resumed"], told["version"]) == (6, 3, 4)
    after = _rows(upgraded, "optuna.db", trials)
    finished = [parameters for _, state, parameters in after if state == "COMPLETE"]
    assert after[:3] == before[:3]
    assert (after[3][1], len(finished), len(after)) == ("FAIL", 6, 7)
    assert before[3][2] in finished
    _check_tracked(upgraded, told["run_id"])


def _check_tracked(project: Project, run_id: str) -> None:
    """The new run has every trial, and nothing that the kill left is still said to run."""
    children = f"""
        SELECT status FROM runs JOIN tags USING (run_uuid)
        WHERE key = 'mlflow.parentRunId' AND tags.value = '{run_id}'
    """
    assert _rows(project, "mlflow.db", children) == [("FINISHED",)] * 6
    parents = "SELECT status FROM runs WHERE name = 'train half' ORDER BY start_time"
    assert _rows(project, "mlflow.db", parents) == [("KILLED",), ("FINISHED",)]
    assert _rows(project, "mlflow.db", "SELECT name FROM runs WHERE status = 'RUNNING'") == []


def test_version_in_the_store_is_promoted_again(upgraded: Project) -> None:
    told = _json(upgraded, "promote", "--version", "1", "--reason", "fewer trees")
    assert (told["promoted"], told["previous"], told["verdict"]) == (V1, V2, "passed")
    assert _champion(upgraded) == 1


def test_a_version_without_recorded_digests_is_refused_with_a_cure_that_works(upgraded: Project) -> None:
    done = upgraded.pipeline("promote", "--version", "3", check=False)
    assert done.returncode == 1
    assert "holds no digests of its files" in done.stderr
    assert "python -m pipeline train" in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert _json(upgraded, "status")["promoted"] == V2
    _check_registered_anew(upgraded)


def _check_registered_anew(project: Project) -> None:
    """The cure: the finished study's best trial is fitted and registered again, and that version is promoted."""
    [(study,)] = _rows(
        project,
        "mlflow.db",
        "SELECT tags.value FROM tags JOIN model_versions ON run_uuid = run_id WHERE key = 'study' AND version = 3",
    )
    told = _json(project, "train", "--study", study, "--config", "conf/third.yaml", "--workers", "1")
    assert (told["resumed"], told["trials"], told["version"]) == (3, 3, 4)
    assert _json(project, "promote", "--version", "4")["promoted"] == "credit_risk_model:v4"
