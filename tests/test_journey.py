"""The whole journey, as a newcomer makes it: real mlflow run, promote, bentoml serve and HTTP."""

from __future__ import annotations

import json
from pathlib import Path

import httpx

from tests.testkit.projects import Project, copy_project

APPLICANT = {
    "seniority": 3, "home": "owner", "time": 36, "age": 26, "marital": "single", "records": "no",
    "job": "freelance", "expenses": 35, "income": 0.0, "assets": 60000.0, "debt": 3000.0, "amount": 800,
    "price": 1000,
}  # fmt: skip


def test_applicant_gets_a_decision_from_the_promoted_version(promoted: Project, served: str) -> None:
    status = json.loads(promoted.pipeline("status", "--json").stdout)
    answer = httpx.post(f"{served}/classify", json=APPLICANT)
    assert answer.status_code == 200
    assert answer.json().keys() == {"Status", "probability", "model", "request_id"}
    assert answer.json()["Status"] in {"APPROVED", "MAYBE", "DECLINED"}
    assert answer.json()["model"] == status["promoted"] == "credit_risk_model:v1"
    assert httpx.get(f"{served}/readyz").status_code == 200
    assert httpx.get(f"{served}/model").json()["loaded"]["tag"] == "credit_risk_model:v1"


def test_runs_models_and_aliases_are_where_a_user_of_mlflow_looks(promoted: Project) -> None:
    code = """
import json, mlflow
client = mlflow.MlflowClient()
champion = client.get_model_version_by_alias("credit_risk_model", "champion")
parent = client.get_run(champion.run_id)
candidate = client.get_model_version_by_alias("credit_risk_model", "candidate")
below = f"tags.mlflow.parentRunId = '{champion.run_id}'"
children = client.search_runs([parent.info.experiment_id], below)
print(json.dumps({
    "version": champion.version, "candidate": candidate.version, "status": parent.info.status,
    "children": [child.info.status for child in children], "metrics": parent.data.metrics,
}))
"""
    found = json.loads(promoted.run("python", "-c", code).stdout.splitlines()[-1])
    assert (int(found["version"]), int(found["candidate"]), found["status"]) == (1, 1, "FINISHED")
    assert found["children"] == ["FINISHED"] * 3
    assert found["metrics"]["test_auc"] > 0.8


def test_no_pickle_in_mlflow_artifacts(trained: Project) -> None:
    files = [path.name for path in (trained.folder / "mlruns").rglob("*") if path.is_file()]
    assert "booster.ubj" in files
    assert not [name for name in files if name.endswith((".pkl", ".pickle", ".joblib"))]


def test_service_without_a_promotion_says_what_to_run(tmp_path: Path) -> None:
    project = copy_project(tmp_path)
    with project.serve() as url:
        assert httpx.get(f"{url}/readyz").status_code == 503
        answer = httpx.post(f"{url}/classify", json=APPLICANT)
        assert answer.status_code == 503
        assert "python -m pipeline promote" in answer.json()["error"]
