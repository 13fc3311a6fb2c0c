"""What the scorer of ``service:front`` refuses, and with which status."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from collections.abc import AsyncIterator
from typing import Any

import httpx
import numpy as np
import pandas as pd
import pytest

from pipeline.core.contract.schema import Schema
from pipeline.core.model.bundle import open_bundle
from pipeline.core.model.encoders import RowEncoder
from pipeline.core.promoted import version_home
from pipeline.core.settings import conf_folder
from service.settings import ServeSettings
from service.split.protocol import PATH, TOKEN_HEADER, VERSION_HEADER, version_name
from service.split.scorer import ScoringEndpoint
from tests.testkit import PROJECT
from tests.testkit.store import Store, rows_of

pytestmark = pytest.mark.anyio

TOKEN = "secret"


async def probes(scope: Any, receive: Any, send: Any) -> None:
    """Stands for BentoML's application."""
    await send({"type": "http.response.start", "status": 299, "headers": []})
    await send({"type": "http.response.body", "body": b""})


@pytest.fixture
async def client(store: Store) -> AsyncIterator[httpx.AsyncClient]:
    settings = ServeSettings.load(conf_folder() / "serve.yaml")
    limits = settings.limits.model_copy(update={"batch_rows": 100, "body_seconds": 0.05})
    endpoint = ScoringEndpoint(probes, settings.model_copy(update={"limits": limits}), TOKEN)
    transport = httpx.ASGITransport(endpoint)
    async with httpx.AsyncClient(transport=transport, base_url="http://scorer") as asked:
        yield asked


def headers(store: Store, **changes: str | None) -> dict[str, str]:
    """Headers of a good call, changed; None leaves one out."""
    given: dict[str, str | None] = {
        "token": TOKEN,
        "version": version_name(store.promotions[1]).decode(),
        **changes,
    }
    names = {"token": TOKEN_HEADER, "version": VERSION_HEADER}
    return {names[name]: value for name, value in given.items() if value is not None}


def encoded(store: Store, applications: pd.DataFrame, schema: Schema, number: int) -> tuple[bytes, Any]:
    """Rows as the front sends them, and the probabilities that they have."""
    promotion = store.promotions[1]
    bundle = open_bundle(version_home(promotion.tag), promotion.digests)
    matrix = RowEncoder(schema, bundle.vectorizer).transform(rows_of(applications.head(number), schema))
    return matrix.tobytes(), bundle.probabilities(matrix)


async def test_rows_get_their_probabilities(
    client: httpx.AsyncClient, store: Store, applications: pd.DataFrame, schema: Schema
) -> None:
    for number in (1, 100):
        rows, expected = encoded(store, applications, schema, number)
        answer = await client.post(PATH, content=rows, headers=headers(store))
        assert answer.status_code == 200
        np.testing.assert_array_equal(np.frombuffer(answer.content, dtype=np.float32), expected)


@pytest.mark.parametrize("token", [None, "", "Secret", "secret2", "secre"])
@pytest.mark.parametrize("path", [PATH, "/", "/metrics", "/docs.json", "/anything"])
async def test_without_the_token_nothing_is_answered(
    client: httpx.AsyncClient, store: Store, token: str | None, path: str
) -> None:
    answer = await client.post(path, content=b"x" * 10_000_000, headers=headers(store, token=token))
    assert answer.status_code == 401
    assert "CREDIT_RISK_SCORER_TOKEN" in answer.json()["error"]


async def test_probes_are_open(client: httpx.AsyncClient) -> None:
    for path in ("/livez", "/readyz", "/healthz"):
        assert (await client.get(path)).status_code == 299


async def test_other_paths_and_methods_are_refused(client: httpx.AsyncClient, store: Store) -> None:
    assert (await client.post("/metrics", headers=headers(store))).status_code == 404
    assert (await client.get(PATH, headers=headers(store))).status_code == 405


VERSIONS: dict[str | None, int] = {
    None: 400, "": 400, "x": 400, "[]": 400, "{}": 400, "[" * 10_000: 400, '{"tag": 1, "digests": {}}': 400,
    '{"tag": "credit_risk_model:v1", "digests": ["x"]}': 400, '{"tag": "../v1", "digests": {}}': 400,
    '{"tag": "credit_risk_model:v1", "digests": {}}': 409, '{"tag": "credit_risk_model:v9", "digests": {}}': 409,
    '{"tag": "credit_risk_model:v9", "digests": {"a": "b"}}': 409,
}  # fmt: skip


@pytest.mark.parametrize("version", VERSIONS)
async def test_what_names_no_stored_version_is_refused(
    client: httpx.AsyncClient, store: Store, version: str | None
) -> None:
    answer = await client.post(PATH, content=b"", headers=headers(store, version=version))
    assert answer.status_code == VERSIONS[version]


async def test_a_wrong_width_is_refused(
    client: httpx.AsyncClient, store: Store, applications: pd.DataFrame, schema: Schema
) -> None:
    rows, _ = encoded(store, applications, schema, 3)
    for body in (b"", rows[:-1], rows[:-4], rows + b"\0" * 4, b"\0"):
        answer = await client.post(PATH, content=body, headers=headers(store))
        assert answer.status_code == 400
        assert f"{len(body)} bytes are not whole rows" in answer.json()["error"]


@pytest.mark.parametrize("is_declared", [True, False])
async def test_too_many_rows_are_refused(
    client: httpx.AsyncClient, store: Store, applications: pd.DataFrame, schema: Schema, is_declared: bool
) -> None:
    rows, _ = encoded(store, applications, schema, 101)

    async def chunks() -> AsyncIterator[bytes]:
        for start in range(0, len(rows), 1000):
            yield rows[start : start + 1000]

    answer = await client.post(PATH, content=rows if is_declared else chunks(), headers=headers(store))
    assert answer.status_code == 413
    assert str(len(rows) // 101 * 100) in answer.json()["error"]


async def test_rows_that_do_not_come_are_not_waited_for(client: httpx.AsyncClient, store: Store) -> None:
    async def never() -> AsyncIterator[bytes]:
        yield b"x"
        await asyncio.Event().wait()

    answer = await client.post(PATH, content=never(), headers=headers(store))
    assert answer.status_code == 408


def test_the_default_service_does_not_know_of_it() -> None:
    script = """
import json, sys
from service.app import svc
before = [name for name in sys.modules if name.startswith("service.split")]
import service
print(json.dumps([svc.name, before, service.front.name]))
try:
    service.other
except AttributeError as error:
    assert "has no attribute" in str(error)
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=PROJECT, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == ["credit_risk_classifier", [], "credit_risk_front"]
