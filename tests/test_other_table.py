"""Another table needs another contract and no code: other columns, other target, Parquet instead of CSV."""

from __future__ import annotations

import json
from pathlib import Path

import httpx
import numpy as np
import pandas as pd
import pytest

from tests.testkit.projects import Project, copy_project

CONTRACT = """
name: leasing
target: {name: returned_damaged, negative: 0, positive: 1}
fields:
  mileage: {kind: number, unit: km, min: 0, max: 500000, monotone: increasing, description: Use, example: 30000}
  months: {kind: integer, min: 1, max: 96, description: Age of the car., example: 24}
  fuel: {kind: category, categories: [petrol, diesel, electric], description: Fuel., example: diesel}
  deposit: {kind: number, min: -1, max: 9999, optional: true, missing: [-1], description: Paid., example: 500}
  region: {kind: category, categories: [north, south], role: audit, description: Region., example: north}
ratios:
  per_month: {expression: mileage / months, monotone: increasing, description: Use.}
"""

SERVED = {"mileage": 90000, "months": 36, "fuel": "diesel", "deposit": -1, "region": "south"}


def leasing_table(rows: int = 1500) -> pd.DataFrame:
    """Cars that come back damaged the more, the more they were driven a month."""
    random = np.random.default_rng(7)
    table = pd.DataFrame(
        {
            "region": random.choice(["north", "south"], rows),
            "fuel": pd.Categorical(random.choice(["petrol", "diesel", "electric"], rows)),
            "months": random.integers(1, 97, rows),
            "mileage": random.uniform(0, 200_000, rows).astype(np.float32),
            "deposit": np.where(random.random(rows) < 0.2, -1, random.integers(0, 3000, rows)),
        }
    )
    use = table["mileage"] / table["months"]
    logit = np.log(use + 1) - 8 + (table["fuel"] == "diesel") - (table["deposit"] > 1500)
    return table.assign(returned_damaged=(random.random(rows) < 1 / (1 + np.exp(-logit))).astype(int))


@pytest.fixture(scope="module")
def leasing(tmp_path_factory: pytest.TempPathFactory) -> Project:
    project = copy_project(tmp_path_factory.mktemp("leasing"))
    (project.folder / "leasing.yaml").write_text(CONTRACT)
    leasing_table().to_parquet(project.folder / "leasing.parquet", index=False)
    flags = ("--data", "leasing.parquet", "--schema", "leasing.yaml", "--trials", "2", "--workers", "1")
    project.pipeline("train", *flags)
    return project


def test_other_table_is_trained_promoted_and_served(leasing: Project) -> None:
    # Gates are thresholds for the shipped data; this table's model is judged by a person.
    leasing.pipeline("promote", "--force", "--reason", "first model of another table")
    with leasing.serve() as url:
        answer = httpx.post(f"{url}/classify", json=SERVED)
        assert answer.status_code == 200, answer.text
        assert httpx.post(f"{url}/classify", json={**SERVED, "fuel": "steam"}).status_code == 400
        documented = httpx.get(f"{url}/docs.json").json()
    assert 0 < answer.json()["probability"] < 1
    assert "mileage" in json.dumps(documented)


def test_bad_rows_of_the_other_table_name_its_columns(leasing: Project, tmp_path: Path) -> None:
    bad = leasing_table().assign(months=0)
    bad.to_csv(tmp_path / "bad.csv", index=False)
    done = leasing.pipeline("train", "--data", str(tmp_path / "bad.csv"), "--schema", "leasing.yaml", check=False)
    assert done.returncode == 1
    assert "months: must be in [1, 96]: 1500 rows, first at 1, 2, 3, 4, 5" in done.stderr
    assert "Traceback" not in done.stderr
