"""The booster in processes of its own behind the HTTP front: the same answers, none lost, the promoted one's."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path
from typing import Any, cast

import pandas as pd
import psutil
import pytest

from benchmarks.endurance import Switch, stale_answers
from benchmarks.load import LoadResult, await_answers, request, under_load
from benchmarks.rounds import failed_requests
from pipeline.core.contract.schema import Schema
from pipeline.core.model.bundle import open_bundle
from pipeline.core.model.encoders import RowEncoder
from pipeline.core.policy import Policy
from pipeline.core.promoted import Promotion, version_home
from service.answering.batcher import GatheringBatcher
from service.answering.core import Core
from service.answering.refusal import Refusal
from service.settings import ServeSettings
from service.split.protocol import TOKEN_VARIABLE, version_name
from service.split.scorer import LoadedVersions
from tests.testkit.projects import changed_conf
from tests.testkit.servers import Server, receive
from tests.testkit.store import promote, put_in_store, quick_booster, rows_of, serving
from tests.testkit.waiting import eventually

BROKEN: list[dict[str, Any]] = [
    {"age": "30"}, {"age": None}, {"age": 1e400}, {"home": "castle"}, {"unknown": 1}, {"income": -1}, {"time": 1.5}
]  # fmt: skip


@pytest.fixture(scope="module")
def versions(
    tmp_path_factory: pytest.TempPathFactory, applications: pd.DataFrame, schema: Schema
) -> Iterator[list[Promotion]]:
    """A store of its own with versions 1 and 2, and 1 promoted."""
    golden = rows_of(applications.head(5), schema)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("BENTOML_HOME", str(tmp_path_factory.mktemp("store")))
        stored = [put_in_store(n, *quick_booster(applications, schema, n), schema, golden) for n in (1, 2)]
        promote(stored[0])
        yield stored


@pytest.fixture(scope="module")
def conf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return changed_conf(tmp_path_factory.mktemp("front"), front__patience_seconds=30)


@pytest.fixture(scope="module")
def front(versions: list[Promotion], conf: Path) -> Iterator[Server]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CREDIT_RISK_CONF", str(conf))
        with serving("service:front") as server:
            yield server


def test_answers_are_those_of_the_service_in_one_process(
    front: Server, conf: Path, applications: pd.DataFrame, schema: Schema
) -> None:
    core = Core(ServeSettings.load(conf / "serve.yaml"), Policy.load(conf / "policy.yaml"), conf.parent / "core")
    rows = rows_of(applications.sample(60, random_state=1), schema)
    bodies = [*rows, *({**rows[0], **change} for change in BROKEN)]
    for body in bodies:
        raw = json.dumps(body).encode()
        assert _without_id(front.call("/classify", raw=raw)[:2]) == _without_id(asyncio.run(_answer(core, raw)))
    status, answers, _ = front.call("/classify_batch", rows)
    single = [front.call("/classify", row)[1] for row in rows]
    assert status == 200
    assert [_without_id((200, answer)) for answer in answers] == [_without_id((200, answer)) for answer in single]
    assert front.call("/explain", rows[0])[1]["probability"] == single[0]["probability"]


def test_promotions_under_load_lose_nothing_and_each_answer_is_whole(
    front: Server, versions: list[Promotion], applications: pd.DataFrame, schema: Schema
) -> None:
    row = rows_of(applications.head(1), schema)[0]
    switches = []
    with _load(front, row) as result:
        for promotion in (versions[1], versions[0], versions[1], versions[0]):
            await_answers(result)
            began = time.monotonic()
            promote(promotion)
            switches.append(Switch("promote", promotion.tag, began, time.monotonic()))
        await_answers(result)
    assert failed_requests(result) == 0
    assert {version for version, _ in _given(result)} == {promotion.tag for promotion in versions}
    assert _given(result) <= {(promotion.tag, *_probabilities(promotion, [row])) for promotion in versions}
    assert stale_answers(result, switches) == 0


def test_an_answer_names_the_version_that_scored_it_though_another_is_promoted_meanwhile(
    front: Server, versions: list[Promotion], applications: pd.DataFrame, schema: Schema
) -> None:
    promote(versions[0])
    rows = rows_of(applications.head(2000), schema)  # in one request more than is scored in one call
    asked = [*(("/classify", row) for row in rows[:5]), ("/classify_batch", rows)]
    scorer = _scorer(front)
    with ExitStack() as stack:
        connections = [stack.enter_context(front.connection()) for _ in asked]
        scorer.send_signal(signal.SIGSTOP)
        try:
            for connection, (path, body) in zip(connections, asked, strict=True):
                connection.sendall(request(path, json.dumps(body).encode()))
            eventually(lambda: _has_read_all(front.port))  # each takes hold of a version, and waits for the scorer
            promote(versions[1])
            assert front.call("/model")[1]["loaded"]["tag"] == versions[1].tag
        finally:
            scorer.send_signal(signal.SIGCONT)
        *singles, batch = [json.loads(receive(connection).partition(b"\r\n\r\n")[2]) for connection in connections]
    answers = singles + batch
    said = {promotion.tag: _probabilities(promotion, rows) for promotion in versions}
    for row, answer in zip([*range(5), *range(len(rows))], answers, strict=True):
        assert answer["probability"] == said[answer["model"]][row]
    assert len({answer["model"] for answer in answers[5:]}) == 1
    assert versions[0].tag in {answer["model"] for answer in answers}
    assert front.call("/classify", rows[0])[1]["probability"] == said[versions[1].tag][0]


def test_front_and_scorer_share_a_secret_of_this_server(front: Server) -> None:
    processes = psutil.Process(front.process.pid).children(recursive=True)
    tokens = {
        process.environ()[TOKEN_VARIABLE]
        for process in processes
        if "_bentoml_impl.worker.service" in process.cmdline()
    }
    (secret,) = tokens
    assert len(secret) > 30
    assert secret != os.environ.get(TOKEN_VARIABLE)


def test_scorer_that_dies_under_load_costs_no_request(
    front: Server, applications: pd.DataFrame, schema: Schema
) -> None:
    with _load(front, rows_of(applications.head(1), schema)[0]) as result:
        await_answers(result)
        killed = _scorer(front)
        killed.kill()
        await_answers(result)
    assert failed_requests(result) == 0
    assert _scorer(front).pid != killed.pid


def test_scorer_that_hangs_is_told_within_the_patience(
    versions: list[Promotion], tmp_path: Path, schema: Schema, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(
        "CREDIT_RISK_CONF", str(changed_conf(tmp_path, front__patience_seconds=0.5, front__calls=1))
    )
    with serving("service:front") as server:
        scorer = _scorer(server)
        scorer.send_signal(signal.SIGSTOP)
        try:
            status, answer, headers = server.call("/classify", schema.example())
            probe = server.call("/readyz")[0]
        finally:
            scorer.send_signal(signal.SIGCONT)
        assert (status, probe, headers["retry-after"]) == (503, 503, "1")
        assert answer["error"] == "the model's own service does not answer; try again"
        assert server.call("/classify", schema.example())[0] == 200


def test_scorer_opens_no_folder_but_that_of_a_version(versions: list[Promotion]) -> None:
    outside = versions[0].model_copy(update={"tag": "credit_risk_model:../../elsewhere"})
    with pytest.raises(ValueError, match="credit_risk_model:vN"):
        LoadedVersions().bundle(version_name(outside))
    assert LoadedVersions().bundle(version_name(versions[0])).schema.name == "credit_risk_application"


def test_gathering_batcher_answers_every_item_in_batches_of_the_limit() -> None:
    sizes: list[int] = []

    async def answer(items: Any) -> list[int]:
        sizes.append(len(items))
        await asyncio.sleep(0)
        return [2 * item for item in items]

    async def ask() -> list[int]:
        batcher: GatheringBatcher[int, int] = GatheringBatcher(answer, limit=4, calls=2)
        first = [batcher.submit(item) for item in range(10)]
        answers = list(await asyncio.gather(*first))
        # Once more right after the last batch: its sender has just ended.
        return [*answers, await batcher.submit(10)]

    assert asyncio.run(ask()) == [2 * item for item in range(11)]
    assert max(sizes) == 4


def test_gathering_batcher_gives_a_failure_to_its_batch_only() -> None:
    async def answer(items: Any) -> list[int]:
        if 0 in items:
            raise Refusal(503, "away")
        return list(items)

    async def ask() -> list[Any]:
        batcher: GatheringBatcher[int, int] = GatheringBatcher(answer, limit=2, calls=1)
        return await asyncio.gather(*(batcher.submit(item) for item in range(4)), return_exceptions=True)

    failed, beside, *others = asyncio.run(ask())
    assert isinstance(failed, Refusal)
    assert isinstance(beside, Refusal)
    assert others == [2, 3]


async def _answer(core: Core, body: bytes) -> tuple[int, Any]:
    try:
        return 200, json.loads(await core.classify(body, "id"))
    except Refusal as refusal:
        return refusal.status, json.loads(refusal.body)


def _without_id(answer: tuple[int, Any]) -> tuple[int, Any]:
    status, body = answer
    return status, {name: value for name, value in body.items() if name != "request_id"}


def _load(server: Server, row: dict[str, Any]) -> AbstractContextManager[LoadResult]:
    return under_load(server.port, [request("/classify", json.dumps(row).encode())])


def _has_read_all(port: int) -> bool:
    """Whether no byte waits to be read by the process that listens on a port: see proc_net_tcp(5)."""
    sockets = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    waiting = [queues for _, local, _, _, queues, *_ in sockets if local.endswith(f":{port:04X}")]
    return all(queues.endswith(":00000000") for queues in waiting)


def _given(result: LoadResult) -> set[tuple[str, float]]:
    answers = (json.loads(body) for *_, body in result.answers)
    return {(answer["model"], answer["probability"]) for answer in answers}


def _probabilities(promotion: Promotion, rows: list[dict[str, Any]]) -> list[float]:
    bundle = open_bundle(version_home(promotion.tag), promotion.digests)
    matrix = RowEncoder(bundle.schema, bundle.vectorizer).transform(rows)
    probabilities: list[float] = bundle.probabilities(matrix).tolist()
    return probabilities


def _scorer(server: Server) -> psutil.Process:
    """The process that runs the booster, as its command line says; waits for it to be there."""

    def found() -> psutil.Process | None:
        below = psutil.Process(server.process.pid).children(recursive=True)
        return next((process for process in below if "credit_risk_scorer" in process.cmdline()), None)

    return cast("psutil.Process", eventually(found))
