"""One conf folder decides for the service, for `score` and for the gate alike, wherever the process runs."""

from __future__ import annotations

import asyncio
import csv
import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from pipeline.__main__ import main
from pipeline.promotion.request import PromoteRequest
from pipeline.scoring.request import ScoreRequest
from pipeline.training.request import TrainRequest
from service.answering.core import core
from tests.testkit import DATA, PROJECT
from tests.testkit.projects import changed_conf
from tests.testkit.store import Store


@pytest.fixture
def strict(tmp_path: Path) -> Path:
    """A conf folder that declines nearly everybody."""
    conf = changed_conf(tmp_path, decision_log__enabled=False)
    (conf / "score.yaml").write_text((PROJECT / "conf/score.yaml").read_text())
    thresholds = {"maybe_above": 0.0001, "declined_above": 0.0002}
    (conf / "policy.yaml").write_text(yaml.safe_dump({"thresholds": thresholds}))
    return conf


@pytest.mark.parametrize("by", ["variable", "flag"])
def test_service_and_score_decide_by_the_same_thresholds(
    store: Store,
    strict: Path,
    tmp_path: Path,
    rows: list[dict[str, Any]],
    monkeypatch: pytest.MonkeyPatch,
    by: str,
) -> None:
    store.promote(1)
    monkeypatch.chdir(tmp_path)  # where no conf/ stands
    flags = ["--conf", str(strict)] if by == "flag" else []
    output = tmp_path / "scored.csv"
    if by == "variable":
        monkeypatch.setenv("CREDIT_RISK_CONF", str(strict))
    assert main(["score", "--input", str(DATA), "--output", str(output), *flags]) == 0
    with output.open() as file:
        assert {row["decision"] for row in csv.DictReader(file)} == {"DECLINED"}
    if by == "variable":
        core.cache_clear()
        answer = json.loads(asyncio.run(core().classify(json.dumps(rows[0]).encode(), "r")))
        core.cache_clear()
        assert answer["Status"] == "DECLINED"


@pytest.mark.parametrize("request_class", [TrainRequest, PromoteRequest])
def test_training_and_gate_read_the_folder_that_the_service_reads(
    strict: Path, monkeypatch: pytest.MonkeyPatch, request_class: type[TrainRequest | PromoteRequest]
) -> None:
    assert request_class().conf == PROJECT / "conf"
    monkeypatch.setenv("CREDIT_RISK_CONF", str(strict))
    assert request_class().conf == strict
    assert ScoreRequest(input=DATA, output=DATA).conf == strict
