from __future__ import annotations

import asyncio
import contextlib
import gc
import json
import os
import random
import shutil
import socket
import tempfile
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import cloudpickle
import pytest

from pipeline.core.contract.schema import Schema
from pipeline.core.files import file_digests
from pipeline.core.model.bundle import BOOSTER_FILE, OBJECTS_FILE
from pipeline.core.policy import Policy
from pipeline.core.promoted import pointer_path, version_home
from pipeline.monitoring.log_reader import read_decisions
from pipeline.promotion.pointer import write_pointer
from service.answering import follower
from service.answering.core import Core
from service.answering.refusal import Refusal
from service.settings import ServeSettings
from tests.test_decision_log import no_free_descriptor
from tests.testkit.projects import changed_conf
from tests.testkit.store import Store, log_odds, make_core

pytestmark = pytest.mark.anyio


@pytest.fixture
def example(schema: Schema) -> bytes:
    return json.dumps(schema.example()).encode()


async def answering(core: Core, body: bytes) -> Any:
    """Tag of the version that answers now; the 503's status if none does."""
    try:
        return json.loads(await core.classify(body, "id"))["model"]
    except Refusal as refusal:
        return refusal.status


def flip(path: Path, position: int) -> None:
    content = bytearray(path.read_bytes())
    content[position] ^= 0xFF
    path.write_bytes(content)


async def test_every_answer_follows_the_pointer(store: Store, example: bytes) -> None:
    core = make_core()
    core.start()
    assert await answering(core, example) == 503
    for version in (1, 2, 1, 1, 2):
        store.promote(version)
        assert await answering(core, example) == f"credit_risk_model:v{version}"


async def test_versions_differ_in_their_answers(store: Store, example: bytes) -> None:
    core, found = make_core(), set()
    for version in (1, 2):
        store.promote(version)
        found.add(json.loads(await core.classify(example, "id"))["probability"])
    assert len(found) == 2


async def test_the_same_model_promoted_again_is_not_loaded_again(store: Store, example: bytes) -> None:
    core = make_core()
    store.promote(1)
    await answering(core, example)
    again = store.promote(1)
    await answering(core, example)
    told = core.model()
    assert told["swaps"] == 1
    assert told["promoted"]["since"] == again.since


@pytest.mark.parametrize("name", [BOOSTER_FILE, OBJECTS_FILE, "model.yaml"])
async def test_a_flipped_byte_is_refused_and_the_old_version_answers(
    store: Store, example: bytes, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    core = make_core()
    store.promote(1)
    await answering(core, example)
    flip(store.file(2, name), 10)
    store.promote(2)
    for _ in range(3):
        assert await answering(core, example) == "credit_risk_model:v1"
    told = core.model()
    assert told["promoted"]["tag"] == "credit_risk_model:v2"
    assert told["loaded"]["tag"] == "credit_risk_model:v1"
    assert told["refused"]["tag"] == "credit_risk_model:v2"
    assert name in told["refused"]["error"]
    assert len([record for record in caplog.records if "REFUSED" in record.message]) == 1
    core.show()
    exposed = core.metrics.exposition().decode()
    assert "credit_risk_model_behind 1.0" in exposed
    assert "credit_risk_model_refusals_total 1.0" in exposed


async def test_random_corruptions_are_all_refused_before_loading(store: Store, example: bytes) -> None:
    core = make_core()
    store.promote(1)
    await answering(core, example)
    chance = random.Random(7)
    for _ in range(20):
        path = store.file(2, chance.choice([BOOSTER_FILE, OBJECTS_FILE, "model.yaml"]))
        whole = path.read_bytes()
        flip(path, chance.randrange(len(whole)))
        store.promote(2)
        assert await answering(core, example) == "credit_risk_model:v1"
        path.write_bytes(whole)


@pytest.mark.parametrize("damage", ["unlink", "extra"])
async def test_absent_and_unexpected_files_are_refused(store: Store, example: bytes, damage: str) -> None:
    core = make_core()
    store.promote(1)
    await answering(core, example)
    if damage == "unlink":
        store.file(2).unlink()
    else:
        store.file(2, "extra.bin").write_bytes(b"x")
    store.promote(2)
    assert await answering(core, example) == "credit_risk_model:v1"


# What cannot be read at all says nothing: then no version may answer, as another one may be promoted.


def move_the_pointer(store: Store, version: int) -> Path:
    """Write a pointer beside the one that counts; to rename it takes no descriptor."""
    was = pointer_path().read_bytes()
    store.promote(version)
    prepared = pointer_path().with_name("prepared.json")
    pointer_path().rename(prepared)
    pointer_path().write_bytes(was)
    return prepared


async def test_without_a_free_descriptor_the_promoted_version_answers(store: Store, example: bytes) -> None:
    core = make_core()
    store.promote(1)
    assert await answering(core, example) == "credit_risk_model:v1"
    prepared = move_the_pointer(store, 2)
    with no_free_descriptor():
        prepared.rename(pointer_path())
        assert await answering(core, example) == "credit_risk_model:v2"


async def test_if_even_the_reserved_descriptor_is_gone_no_version_answers_until_one_is_free(
    store: Store, example: bytes
) -> None:
    core = make_core()
    store.promote(1)
    await answering(core, example)
    prepared = move_the_pointer(store, 2)
    with no_free_descriptor() as taken:
        core.promoted._reserve._free()  # another thread was faster
        taken.append(os.open(os.devnull, os.O_RDONLY))
        prepared.rename(pointer_path())
        for _ in range(2):
            with pytest.raises(Refusal, match="cannot be read at the moment") as caught:
                await core.classify(example, "id")
            assert caught.value.status == 503
        assert core.version() is None
        core.show()
        assert "credit_risk_model_behind 1.0" in core.metrics.exposition().decode()
        os.close(taken.pop())
        assert await answering(core, example) == "credit_risk_model:v2"
    core.show()
    assert "credit_risk_model_behind 0.0" in core.metrics.exposition().decode()


async def test_a_start_without_a_free_descriptor_waits_for_one(store: Store, example: bytes) -> None:
    store.promote(1)
    core = make_core()
    with no_free_descriptor() as taken:
        core.promoted._reserve._free()
        taken.append(os.open(os.devnull, os.O_RDONLY))
        core.start()
        assert await answering(core, example) == 503
    assert await answering(core, example) == "credit_risk_model:v1"


@pytest.mark.parametrize("kind", ["fifo", "folder", "socket", "device", "huge"])
async def test_what_is_no_file_is_refused_at_once(store: Store, example: bytes, kind: str) -> None:
    core = make_core()
    store.promote(1)
    await answering(core, example)
    pointer_path().unlink()
    reason = "not a regular file"
    match kind:
        case "fifo":
            os.mkfifo(pointer_path())
        case "folder":
            pointer_path().mkdir()
        case "device":
            pointer_path().symlink_to("/dev/zero")
        case "socket":
            with socket.socket(socket.AF_UNIX) as listening, contextlib.chdir(pointer_path().parent):
                listening.bind(pointer_path().name)
        case "huge":
            with pointer_path().open("wb") as file:
                file.truncate(1 << 40)
            reason = "larger than 1048576 bytes"
    assert await answering(core, example) == "credit_risk_model:v1"
    assert reason in core.model()["refused"]["error"]


async def test_a_version_with_a_fifo_for_a_file_is_refused_at_once(store: Store, example: bytes) -> None:
    core = make_core()
    store.promote(1)
    await answering(core, example)
    store.file(2).unlink()
    os.mkfifo(store.file(2))
    store.promote(2)
    assert await answering(core, example) == "credit_risk_model:v1"
    assert f"{store.file(2)}: not a regular file" in core.model()["refused"]["error"]


@pytest.fixture
def open_store(store: Store, monkeypatch: pytest.MonkeyPatch) -> Iterator[Store]:
    """The store in a folder that every user can reach."""
    with tempfile.TemporaryDirectory() as folder:
        home = shutil.copytree(os.environ["BENTOML_HOME"], Path(folder) / "bentoml")
        for parent in (Path(folder), home):
            parent.chmod(0o755)
        monkeypatch.setenv("BENTOML_HOME", str(home))
        yield store


@contextmanager
def as_user(number: int) -> Iterator[None]:
    os.seteuid(number)
    try:
        yield
    finally:
        os.seteuid(0)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can act as another user")
@pytest.mark.parametrize("denied", ["pointer", "models", "version", "file"])
async def test_a_denied_permission_is_named(open_store: Store, example: bytes, denied: str) -> None:
    store = open_store
    store.promote(1)
    core = make_core()
    assert await answering(core, example) == "credit_risk_model:v1"
    store.promote(2)
    path = {
        "pointer": pointer_path(),
        "models": pointer_path().parent,
        "version": store.file(2).parent,
        "file": store.file(2),
    }[denied]
    mode = path.stat().st_mode
    path.chmod(0)
    with as_user(65534):
        known = denied in {"version", "file"}
        # A version that cannot be loaded is refused, and the one before answers; without the pointer, none does.
        assert await answering(core, example) == ("credit_risk_model:v1" if known else 503)
        error = core.model()["refused"]["error"]
        path = pointer_path() if denied == "models" else path
        assert f"{path}: permission denied; user 65534 must be allowed to read it" in error
    (pointer_path().parent if denied == "models" else path).chmod(mode)
    store.promote(2)
    assert await answering(core, example) == "credit_risk_model:v2"


async def test_a_worker_that_nobody_asks_follows_too(
    store: Store, monkeypatch: pytest.MonkeyPatch, example: bytes
) -> None:
    monkeypatch.setattr(follower, "_IDLE_SECONDS", 0.01)
    store.promote(1)
    core = make_core()
    core.start()
    followed = asyncio.Event()
    monkeypatch.setattr(core.metrics, "swapped", lambda promotion: followed.set())
    store.promote(2)
    async with asyncio.timeout(20):
        await followed.wait()
    assert core.promoted.served
    assert core.promoted.served.promotion.version == 2
    core.close()


class Planted:
    """A pickle that leaves a trace when it is opened."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.trace,))


async def test_a_planted_pickle_never_runs(store: Store, example: bytes, tmp_path: Path) -> None:
    core = make_core()
    trace = tmp_path / "trace"
    store.file(1, OBJECTS_FILE).write_bytes(cloudpickle.dumps(Planted(trace)))
    store.promote(1)
    assert await answering(core, example) == 503
    assert not trace.exists()


async def test_wrong_golden_probabilities_are_refused(store: Store, example: bytes) -> None:
    core = make_core()
    store.promote(1)
    await answering(core, example)
    # Another booster under the right digests: only its answers betray it.
    store.file(2).write_bytes(store.file(1).read_bytes())
    digests = file_digests(version_home("credit_risk_model:v2"))
    write_pointer(store.promotions[2].model_copy(update={"digests": digests}))
    assert await answering(core, example) == "credit_risk_model:v1"
    assert "golden rows" in core.model()["refused"]["error"]


@pytest.mark.parametrize("content", [b"", b"{", b'{"tag": 1}', b"\x00" * 100])
async def test_a_broken_pointer_leaves_the_version_that_answers(
    store: Store, example: bytes, content: bytes
) -> None:
    core = make_core()
    store.promote(1)
    await answering(core, example)
    pointer_path().write_bytes(content)
    assert await answering(core, example) == "credit_risk_model:v1"
    pointer_path().unlink()
    assert await answering(core, example) == "credit_risk_model:v1"
    assert "gone" in core.model()["refused"]["error"]


async def test_a_refused_version_is_tried_again_and_answers_once_it_is_whole(store: Store, example: bytes) -> None:
    core = make_core(retry_refused_seconds=1e-9)
    store.promote(1)
    await answering(core, example)
    whole = store.file(2).read_bytes()
    flip(store.file(2), 10)
    store.promote(2)
    assert await answering(core, example) == "credit_risk_model:v1"
    store.file(2).write_bytes(whole)
    assert await answering(core, example) == "credit_risk_model:v2"
    core.show()
    assert "credit_risk_model_behind 0.0" in core.metrics.exposition().decode()


async def test_a_start_with_a_broken_version_answers_with_the_last_good_one(
    store: Store, example: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    store.promote(1)
    store.promote(2)
    flip(store.file(2), 10)
    core = make_core()
    core.start()
    assert await answering(core, example) == "credit_risk_model:v1"
    assert any("credit_risk_model:v1 answers instead" in record.message for record in caplog.records)


async def test_a_start_without_any_good_version_says_what_to_run(store: Store, example: bytes) -> None:
    store.promote(1)
    flip(store.file(1), 10)
    core = make_core()
    core.start()
    with pytest.raises(Refusal) as caught:
        await core.classify(example, "id")
    assert caught.value.status == 503
    assert "python -m pipeline promote" in caught.value.error


async def test_a_request_keeps_the_version_that_it_began_with(store: Store, example: bytes) -> None:
    core = make_core()
    store.promote(1)
    first = core.classify(example, "first")
    began = first.send(None)  # scored in the next turn of the loop
    store.promote(2)
    assert json.loads(await core.classify(example, "second"))["model"] == "credit_risk_model:v2"
    assert json.loads(began.result())["model"] == "credit_risk_model:v1"
    first.close()


async def test_the_old_version_is_released(store: Store, example: bytes) -> None:
    core = make_core()
    store.promote(1)
    await answering(core, example)
    version = core.version()
    assert version is not None
    old = weakref.ref(version.model)
    del version
    store.promote(2)
    await answering(core, example)
    gc.collect()
    assert old() is None


# Version and record of one answer belong together, whatever is promoted meanwhile.


async def test_an_explanation_is_of_the_version_that_gave_the_answer(store: Store, example: bytes) -> None:
    core = make_core()
    store.promote(1)
    under_way = asyncio.create_task(core.explain(example, "first"))
    await asyncio.sleep(0)  # it has taken hold of a version, and waits to be scored
    store.promote(2)
    after = json.loads(await core.explain(example, "second"))
    before = json.loads(await under_way)
    assert (before["model"], after["model"]) == ("credit_risk_model:v1", "credit_risk_model:v2")
    for answer in (before, after):
        contributions = sum(answer["contributions"].values())
        assert answer["log_odds"] == pytest.approx(answer["bias"] + contributions, abs=1e-5)
        assert answer["log_odds"] == pytest.approx(log_odds(answer["probability"]), abs=1e-5)
    assert before["log_odds"] != pytest.approx(after["log_odds"], abs=1e-3)


async def test_rows_of_a_large_batch_are_counted_through_in_the_decision_log(
    store: Store, schema: Schema, tmp_path: Path
) -> None:
    conf = changed_conf(tmp_path)
    core = Core(ServeSettings.load(conf / "serve.yaml"), Policy.load(conf / "policy.yaml"), tmp_path)
    store.promote(1)
    core.start()
    number = 2500
    rows = [{**schema.example(), "age": 20 + row % 60} for row in range(number)]
    answers = json.loads(await core.classify_batch(json.dumps(rows).encode(), "one batch"))
    core.close()
    logged = read_decisions(tmp_path / "decisions").frame.sort_values("row")
    assert logged["row"].tolist() == list(range(number))
    assert logged["input.age"].tolist() == [row["age"] for row in rows]
    assert logged["probability"].tolist() == [answer["probability"] for answer in answers]
    assert set(logged["request_id"]) == {"one batch"}
