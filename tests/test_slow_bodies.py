"""No body within the limits costs the service much; ``python -m benchmarks.slow_bodies`` searches for longer."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from benchmarks.slow_bodies import Target, bodies, search, start_target
from pipeline.core.contract.schema import Schema


@pytest.fixture(scope="module")
def started(tmp_path_factory: pytest.TempPathFactory, schema: Schema) -> Iterator[tuple[Target, Any]]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("BENTOML_HOME", "")  # put back afterwards
        yield start_target(Path(tmp_path_factory.mktemp("home")), schema)


def test_no_body_holds_the_loop_or_takes_much_memory(started: tuple[Target, Any], schema: Schema) -> None:
    target, rows = started
    found = list(bodies(schema, rows, 10_000))
    costs = list(search(target, found, seconds=3, generator=random.Random(0)))
    assert len(costs) > 200
    assert {cost.status for cost in costs} == {200, 400}
    assert [str(cost) for cost in costs if cost.is_too_high] == []
