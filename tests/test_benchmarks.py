"""What the serving benchmark counts as a failure: its own counting must not hide one."""

from __future__ import annotations

import json
from collections import Counter

import pytest

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
