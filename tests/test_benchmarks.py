"""What the benchmarks count as a failure: their own counting must not hide one."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from benchmarks import faults
from benchmarks.attacks.attack import Attack, Skipped, Tally
from benchmarks.attacks.lab import Counts, Lab
from benchmarks.endurance import Switch, stale_answers
from benchmarks.load import LoadResult
from benchmarks.peers.by_hand import features, status
from benchmarks.rounds import failed_requests
from pipeline.core.contract.schema import Schema
from pipeline.core.model.features import feature_dict
from pipeline.core.policy import Policy, decide
from tests.testkit import PROJECT

SWITCHES = [Switch("rollback", "m:v1", began=10.0, ended=12.0), Switch("promote", "m:v2", began=20.0, ended=22.0)]


@pytest.mark.parametrize(
    ("began", "finished", "model", "stale"),
    [
        (12.1, 12.2, "m:v1", 0),
        (12.1, 12.2, "m:v2", 1),  # begun after the rollback had exited, answered by what was before
        (11.9, 12.2, "m:v2", 0),  # begun before it had exited
        (19.9, 20.1, "m:v2", 0),  # the next command may have switched already
        (22.1, 22.2, "m:v1", 1),
    ],
)
def test_stale_answers_are_those_begun_after_a_switch(
    began: float, finished: float, model: str, stale: int
) -> None:
    result = LoadResult(answers=[(began, finished, 200, json.dumps({"model": model}).encode())])
    assert stale_answers(result, SWITCHES) == stale


def test_whatever_is_not_200_has_failed() -> None:
    assert failed_requests(LoadResult(statuses=Counter({200: 7, 503: 2, 400: 1}), failures=3)) == 6


def test_peers_do_the_same_work(schema: Schema) -> None:
    application = schema.example()
    ours = {name: value for name, value in feature_dict(application, schema).items() if value == value}
    theirs = {name: value for name, value in features(application).items() if value == value}
    assert theirs == ours
    thresholds = Policy.load(PROJECT / "conf/policy.yaml").thresholds
    assert [status(p) for p in (0.3, 0.31, 0.5, 0.51)] == [decide(p, thresholds) for p in (0.3, 0.31, 0.5, 0.51)]


def test_faults_runs_the_attacks_that_are_asked_for() -> None:
    """In a process of its own, as its alarm would take the place of pytest's."""
    command = [sys.executable, "-m", "benchmarks.faults", "--only", "ratios,hosts"]
    done = subprocess.run(command, cwd=PROJECT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    first, second, last = done.stdout.splitlines()
    assert first.startswith("ratios ")
    assert re.match(r"hosts +(\d+) tried +\1 held +0 broken ", second)
    assert last.endswith(" s, 0 broke a promise")


def test_every_attack_is_listed_and_no_other_can_be_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    assert faults.main(["--list"]) == 0
    names = [line.split()[0] for line in capsys.readouterr().out.splitlines()]
    assert names == [attack.name for attack in faults.attacks()]
    assert len(names) == len(set(names))
    with pytest.raises(SystemExit, match="unknown attack: nonsense"):
        faults.main(["--only", "nonsense"])


def held(_: Lab, tally: Tally) -> None:
    tally.count(held=True, what="fine")


def broke(_: Lab, tally: Tally) -> None:
    held(_, tally)
    tally.count(held=False, what="the pointer was not whole")


def failed(_: Lab, tally: Tally) -> None:
    held(_, tally)
    raise OSError("no such server")


def skipped(_: Lab, tally: Tally) -> None:
    raise Skipped("no PostgreSQL")


@pytest.mark.parametrize(
    ("attack", "is_broken", "said"),
    [
        (held, False, "1 tried      1 held    0 broken"),
        (broke, True, "2 tried      1 held    1 broken the pointer was not whole"),
        (failed, True, "2 tried      1 held    1 broken ended by OSError in failed"),
        (lambda *_: None, True, "0 tried      0 held    0 broken"),
        (skipped, False, "skipped: no PostgreSQL"),
    ],
)
def test_an_attack_that_broke_failed_or_tried_nothing_counts_as_broken(
    attack: Callable[[Lab, Tally], None], is_broken: bool, said: str, tmp_path: Path
) -> None:
    outcome = Attack("name", "A promise", attack, seconds=None).outcome(Lab(tmp_path, Counts()))
    assert outcome.is_broken is is_broken
    shown = re.sub(r" +\d+ s(\n    broken:)?", "", str(outcome))
    assert said in shown
