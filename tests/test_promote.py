"""Promote, rollback, status and sync as a user runs them: what is said, what is promoted, what MLflow knows."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient
from mlflow.artifacts import load_dict

from pipeline.core.files import file_digests
from pipeline.core.promoted import MODEL_NAME, Promotion
from tests.testkit import PROJECT
from tests.testkit.registry import BETTER, GOOD, NARROWER, SHUFFLED, SWAPPED, THIRD, Command, Machine

AWAY = "http://127.0.0.1:9"
"""An MLflow server that is not there (port 9 discards, if it is anything)."""


def promoted(machine: Machine) -> Promotion:
    found = machine.pointer()
    assert found
    return found


def succeed(command: Command) -> Command:
    assert command.code == 0, command.err
    return command


def fail(command: Command) -> str:
    """The one line that a refused command says."""
    assert command.code == 1
    lines = command.err.strip().splitlines()
    assert len(lines) == 1, command.err
    assert lines[0].startswith("error: ")
    return lines[0]


def agrees(machine: Machine, version: int) -> None:
    """Pointer, `latest`, files, history and MLflow's alias all say the same."""
    now = promoted(machine)
    assert now.version == version
    assert now.tag == f"{MODEL_NAME}:v{version}"
    assert (machine.models / "latest").read_text() == f"v{version}"
    assert file_digests(machine.folder(version)) == now.digests
    assert machine.history()[-1] == version
    assert machine.champion() == version


def version_tags(machine: Machine, version: int) -> dict[str, str]:
    found = MlflowClient(machine.tracking).get_model_version(MODEL_NAME, str(version))
    return dict(found.tags)


def settings(tmp_path: Path, **changes: Any) -> str:
    """A copy of conf/promote.yaml with other values."""
    text = (PROJECT / "conf/promote.yaml").read_text()
    for key, value in changes.items():
        line = next(line for line in text.splitlines() if line.startswith(f"{key}:"))
        text = text.replace(line, f"{key}: {value}")
    path = tmp_path / "promote.yaml"
    path.write_text(text)
    return str(path)


def test_the_candidate_is_promoted_and_everything_agrees(machine: Machine) -> None:
    assert "nothing is promoted" in succeed(machine.run("status")).out
    assert succeed(machine.run("status", "--json")).data["promoted"] is None
    told = succeed(machine.run("promote")).out
    assert "promoted credit_risk_model:v1" in told
    assert "holdout_rows" in told
    agrees(machine, GOOD)
    status = succeed(machine.run("status", "--json")).data
    assert set(status) == {
        "promoted", "version", "run_id", "since", "by", "why", "previous", "digests", "history",
    }  # fmt: skip
    assert status["promoted"] == "credit_risk_model:v1"
    assert status["previous"] is None
    assert status["digests"] == file_digests(machine.folder(1))
    assert not list((machine.home / ".credit_risk_model/staging").iterdir())


def test_promoting_what_is_promoted_changes_nothing(promoted_machine: Machine) -> None:
    before = (promoted_machine.models / "promoted.json").read_bytes()
    assert "already" in succeed(promoted_machine.run("promote", "--version", "1")).out
    assert (promoted_machine.models / "promoted.json").read_bytes() == before
    assert promoted_machine.history() == [1]


def test_there_and_back_again(promoted_machine: Machine) -> None:
    machine = promoted_machine
    report = succeed(machine.run("promote", "--best", "--reason", "lower loss", "--json")).data
    assert report["promoted"] == "credit_risk_model:v2"
    assert report["previous"] == "credit_risk_model:v1"
    agrees(machine, BETTER)
    assert promoted(machine).why == "promote: lower loss"

    succeed(machine.run("rollback", "--reason", "complaints"))
    agrees(machine, GOOD)
    assert promoted(machine).previous == "credit_risk_model:v2"
    assert "rollback: complaints" in succeed(machine.run("status")).out

    succeed(machine.run("promote", "--version", str(THIRD)))
    agrees(machine, THIRD)
    succeed(machine.run("rollback", "--to", str(BETTER)))
    agrees(machine, BETTER)
    assert machine.history() == [1, 2, 1, 3, 2]
    # The versions' own tags tell the same history in MLflow.
    events = [json.loads(text) for key, text in version_tags(machine, 2).items() if key.startswith("promotion.")]
    assert {event["why"] for event in events} == {"promote: lower loss", "rollback"}


@pytest.mark.parametrize(
    ("version", "rule"),
    [(SHUFFLED, "auc is"), (SWAPPED, "monotone: the probability moves"), (NARROWER, "schema differs")],
)
def test_a_bad_model_is_refused_by_its_rule_and_mlflow_knows_why(
    promoted_machine: Machine, version: int, rule: str
) -> None:
    machine = promoted_machine
    refused = machine.run("promote", "--version", str(version))
    assert rule in fail(refused)
    assert "FAIL" in refused.out
    agrees(machine, GOOD)
    assert not machine.folder(version).exists()
    tags = version_tags(machine, version)
    assert tags["gate"] == "refused"
    name = rule.split()[0].rstrip(":")
    assert name in tags["gate.broken"]
    client = MlflowClient(machine.tracking)
    run = client.get_run(client.get_model_version(MODEL_NAME, str(version)).run_id)
    artifact = next(item.path for item in client.list_artifacts(run.info.run_id, "gate"))
    document = load_dict(f"{run.info.artifact_uri}/{artifact}")
    broken = {found["name"] for found in document["rules"] if not found["passed"]}
    assert name in broken


def test_a_dry_run_judges_and_changes_nothing(promoted_machine: Machine) -> None:
    machine = promoted_machine
    before = file_digests(machine.models)
    judged = succeed(machine.run("promote", "--version", "2", "--dry-run"))
    assert "dry run: passed" in judged.out
    refused = succeed(machine.run("promote", "--version", str(SWAPPED), "--dry-run", "--json")).data
    assert refused["verdict"] == "refused"
    assert file_digests(machine.models) == before
    assert "gate" not in version_tags(machine, 2)
    agrees(machine, GOOD)


def test_force_needs_a_reason_and_is_remembered(promoted_machine: Machine) -> None:
    machine = promoted_machine
    assert "--reason" in fail(machine.run("promote", "--version", str(SWAPPED), "--force"))
    succeed(machine.run("promote", "--version", str(SWAPPED), "--force", "--reason", "drill"))
    agrees(machine, SWAPPED)
    assert promoted(machine).forced
    assert promoted(machine).why == "promote: drill"
    assert "FORCED" in succeed(machine.run("status")).out
    assert version_tags(machine, SWAPPED)["gate"] == "forced"


def test_an_altered_version_is_no_target_of_a_rollback_until_promoted_again(promoted_machine: Machine) -> None:
    machine = promoted_machine
    succeed(machine.run("promote", "--version", "2"))
    booster = machine.folder(1) / "saved_model.ubj"
    booster.write_bytes(booster.read_bytes()[:-1] + b"\0")
    assert "whole" in succeed(machine.run("status")).out
    assert "promote --version 1" in fail(machine.run("rollback"))
    agrees(machine, BETTER)
    shutil.rmtree(machine.folder(1))
    assert "was removed" in fail(machine.run("rollback"))
    succeed(machine.run("promote", "--version", "1"))
    agrees(machine, GOOD)


def test_what_cannot_be_found_is_said_in_one_line(machine: Machine) -> None:
    assert "nothing was promoted before" in fail(machine.run("rollback"))
    assert "never promoted on this machine" in fail(machine.run("rollback", "--to", "7"))
    assert "version 99" in fail(machine.run("promote", "--version", "99"))
    assert "registered no version" in fail(machine.run("promote", "--run-id", "0" * 32))
    assert "no champion yet" in fail(machine.run("sync"))
    assert "start the server" in fail(machine.on(AWAY).run("promote"))
    assert "secret" not in fail(machine.on("http://me:secret@127.0.0.1:9").run("promote"))
    assert "train first" in fail(machine.on("sqlite:////nowhere/mlflow.db").run("promote"))
    assert "no such file" in fail(machine.run("promote", "--data", "nowhere.csv"))
    assert machine.pointer() is None


@pytest.mark.parametrize("damage", ["cut", "fifo", "link to a device"])
def test_a_damaged_pointer_is_replaced_by_the_next_promotion(promoted_machine: Machine, damage: str) -> None:
    machine = promoted_machine
    pointer = machine.models / "promoted.json"
    if damage == "cut":
        pointer.write_text('{"tag": "credit_risk')
    else:
        pointer.unlink()
        os.mkfifo(pointer) if damage == "fifo" else pointer.symlink_to("/dev/zero")
    assert "promote again, or roll back" in fail(machine.run("status"))
    succeed(machine.run("promote", "--version", "2"))
    agrees(machine, BETTER)
    assert promoted(machine).previous == "credit_risk_model:v1"


def test_old_versions_go_but_never_the_promoted_or_the_previous(promoted_machine: Machine, tmp_path: Path) -> None:
    config = settings(tmp_path, keep=2)
    for version in (2, 3):
        succeed(promoted_machine.run("promote", "--version", str(version), "--config", config))
    assert sorted(path.name for path in promoted_machine.models.glob("v*")) == ["v2", "v3"]
    agrees(promoted_machine, THIRD)
    assert "promote --version 1" in fail(promoted_machine.run("rollback", "--to", "1"))


def test_rollback_works_with_mlflow_away_and_sync_moves_the_alias_later(promoted_machine: Machine) -> None:
    machine = promoted_machine
    for version in (2, 3):
        succeed(machine.run("promote", "--version", str(version)))
    told = succeed(machine.on(AWAY).run("rollback")).out
    assert "sync" in told
    assert promoted(machine).version == 2
    assert machine.champion() == 3
    assert "does not follow yet" in succeed(machine.on(AWAY).run("status")).out
    assert fail(machine.on(AWAY).run("sync"))
    # Again, before MLflow ever heard of the first: its alias still names what came before both.
    succeed(machine.on(AWAY).run("rollback", "--to", "1"))
    succeed(machine.run("sync"))
    agrees(machine, GOOD)


def test_a_newer_champion_of_another_machine_wins_over_an_offline_rollback(
    promoted_machine: Machine, tmp_path: Path
) -> None:
    machine, other = promoted_machine, Machine(tmp_path / "other", promoted_machine.tracking)
    succeed(machine.run("promote", "--version", "2"))
    succeed(machine.on(AWAY).run("rollback"))
    succeed(other.run("promote", "--version", "3"))
    succeed(machine.run("sync"))
    agrees(machine, THIRD)


def test_another_machine_follows_the_champion(promoted_machine: Machine, tmp_path: Path) -> None:
    machine, other = promoted_machine, Machine(tmp_path / "other", promoted_machine.tracking)
    succeed(other.run("sync"))
    agrees(other, GOOD)
    before = file_digests(other.models)
    succeed(other.run("sync"))
    assert file_digests(other.models) == before
    (other.folder(1) / "saved_model.ubj").write_bytes(b"")
    assert "ALTERED" in succeed(other.run("status")).out
    succeed(other.run("sync"))
    agrees(other, GOOD)
    succeed(machine.run("promote", "--version", "2"))
    succeed(other.run("sync"))
    agrees(other, BETTER)
    assert promoted(other).why == "sync"


def test_a_new_tracking_database_may_number_from_one_again(promoted_machine: Machine) -> None:
    """The same version number, another run: another model under the same tag."""
    machine = promoted_machine
    record = json.loads((machine.models / "promoted.json").read_text()) | {"run_id": "f" * 32}
    (machine.models / "promoted.json").write_text(json.dumps(record))
    (machine.models / "history.jsonl").write_text(json.dumps(record) + "\n")
    digests = file_digests(machine.folder(1))
    for failpoint in ("after-aside", "after-rename"):
        assert machine.run("promote", "--version", "1", failpoint=failpoint).code == -9
        assert promoted(machine).run_id == "f" * 32
        succeed(machine.run("promote", "--version", "1", "--dry-run"))
        assert file_digests(machine.folder(1)) == digests
    succeed(machine.run("promote", "--version", "1"))
    assert promoted(machine).run_id != "f" * 32
    agrees(machine, GOOD)


@pytest.mark.parametrize("command", ["status", "rollback"])
def test_emergency_commands_import_neither_mlflow_nor_bentoml(promoted_machine: Machine, command: str) -> None:
    """With MLflow away, in a fresh interpreter."""
    succeed(promoted_machine.run("promote", "--version", "2"))
    code = (
        "import sys; from pipeline.__main__ import main; code = main([sys.argv[1]]);"
        "print(sorted({'mlflow', 'bentoml', 'optuna'} & set(sys.modules)), file=sys.stderr); sys.exit(code)"
    )
    env = promoted_machine.on(AWAY).env
    done = subprocess.run(
        [sys.executable, "-c", code, command], cwd=PROJECT, env=env, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr.strip() == "[]"
