"""A store with promoted versions, and real servers over it, for the tests that need them."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from urllib.error import HTTPError, URLError
from urllib.request import Request, urlopen

import cloudpickle
import numpy as np
import pandas as pd
import xgboost as xgb
import yaml
from sklearn.feature_extraction import DictVectorizer

from benchmarks.servers import free_port
from pipeline.core.contract.schema import Schema
from pipeline.core.files import file_digests
from pipeline.core.model.bundle import BOOSTER_FILE, GOLDEN, OBJECTS_FILE, SCHEMA, VECTORIZER
from pipeline.core.model.encoders import FrameEncoder, RowEncoder
from pipeline.core.model.features import make_vectorizer
from pipeline.core.policy import Policy
from pipeline.core.promoted import Promotion, version_home
from pipeline.promotion.pointer import write_pointer
from service.answering.core import Core
from service.settings import ServeSettings

PROJECT = Path(__file__).parent.parent
TAG = "credit_risk_model:v{}"


def quick_booster(applications: pd.DataFrame, schema: Schema, seed: int = 0) -> tuple[xgb.Booster, DictVectorizer]:
    """Train 50 small trees on the real data; another seed gives another model."""
    vectorizer = make_vectorizer(schema)
    matrix = xgb.DMatrix(FrameEncoder(schema, vectorizer).transform(applications), schema.labels(applications))
    parameters = {"objective": "binary:logistic", "eta": 0.1, "max_depth": 3, "subsample": 0.5, "seed": seed}
    return xgb.train(parameters, matrix, 50), vectorizer


def rows_of(applications: pd.DataFrame, schema: Schema) -> list[dict[str, Any]]:
    """The applications as requests: absent numbers are null."""
    rows: list[dict[str, Any]] = json.loads(applications[list(schema.fields)].to_json(orient="records"))
    return rows


def put_in_store(
    version: int,
    booster: xgb.Booster,
    vectorizer: DictVectorizer,
    schema: Schema,
    golden_rows: Sequence[Mapping[str, Any]],
) -> Promotion:
    """Write a version into the store of ``$BENTOML_HOME`` as a promotion leaves it; it is not promoted yet."""
    tag = TAG.format(version)
    folder = version_home(tag)
    folder.mkdir(parents=True)
    booster.save_model(folder / BOOSTER_FILE)
    matrix = RowEncoder(schema, vectorizer).transform(golden_rows)
    golden = {"rows": list(golden_rows), "probabilities": booster.inplace_predict(matrix).tolist()}
    objects = {VECTORIZER: vectorizer, SCHEMA: schema.document(), GOLDEN: golden}
    (folder / OBJECTS_FILE).write_bytes(cloudpickle.dumps(objects))
    (folder / "model.yaml").write_text(yaml.safe_dump({"name": tag.partition(":")[0], "version": f"v{version}"}))
    return Promotion(
        tag=tag,
        version=version,
        run_id=f"{version:032x}",
        since=pd.Timestamp.now("UTC").isoformat(),
        by="test",
        why="promote",
        digests=file_digests(folder),
    )


class Store:
    """Versions 1 and 2 of a quick model in the BentoML store of ``$BENTOML_HOME``; nothing promoted at first."""

    def __init__(self, promotions: Mapping[int, Promotion]) -> None:
        self.promotions = promotions

    def promote(self, version: int) -> Promotion:
        """Make a version the promoted one."""
        now = pd.Timestamp.now("UTC").isoformat()
        promotion = self.promotions[version].model_copy(update={"since": now})
        write_pointer(promotion)
        return promotion

    def file(self, version: int, name: str = BOOSTER_FILE) -> Path:
        """A file of a stored version."""
        return version_home(TAG.format(version)) / name


def promote(promotion: Promotion) -> None:
    """Make a stored version the promoted one."""
    write_pointer(promotion)


def changed_conf(folder: Path, **changes: Any) -> Path:
    """Copy the shipped ``conf/`` with some keys of ``serve.yaml`` changed: ``a__b=1`` sets ``b`` below ``a``."""
    conf = folder / "conf"
    conf.mkdir(parents=True)
    for name in ("schema.yaml", "policy.yaml"):
        (conf / name).write_text((PROJECT / "conf" / name).read_text())
    document = yaml.safe_load((PROJECT / "conf/serve.yaml").read_text())
    for path, value in changes.items():
        *owners, key = path.split("__")
        owner = document
        for name in owners:
            owner = owner[name]
        assert key in owner, path
        owner[key] = value
    (conf / "serve.yaml").write_text(yaml.safe_dump(document))
    return conf


def make_core(**changes: Any) -> Core:
    """The service's core over ``$BENTOML_HOME`` in this process; it records nothing unless told to.

    `changes` are keys of ``conf/serve.yaml``, written as for `changed_conf`.
    """
    with TemporaryDirectory() as folder:
        conf = changed_conf(Path(folder), **{"decision_log__enabled": False, **changes})
        return Core(ServeSettings.load(conf / "serve.yaml"), Policy.load(conf / "policy.yaml"), Path(folder))


class Server:
    """A running ``bentoml serve``."""

    def __init__(self, process: subprocess.Popen[bytes], port: int, log: Path, conf: Path) -> None:
        self.process = process
        self.port = port
        self.decisions = conf.parent / "decisions"
        self._log = log

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def log(self) -> str:
        return self._log.read_text()

    def call(
        self,
        path: str,
        body: Any = None,
        *,
        raw: bytes | None = None,
        headers: Mapping[str, str] | None = None,
        method: str | None = None,
    ) -> tuple[int, Any, Mapping[str, str]]:
        """One request: status, decoded JSON (else text), headers in lower case."""
        data = raw if raw is not None else json.dumps(body).encode() if body is not None else None
        given = {"Content-Type": "application/json", **(headers or {})}
        request = Request(self.url + path, data=data, headers=given, method=method)
        try:
            with urlopen(request, timeout=30) as response:
                return response.status, _decoded(response.read()), _lower(response.headers)
        except HTTPError as error:
            with error:
                return error.code, _decoded(error.read()), _lower(error.headers)

    def connection(self) -> socket.socket:
        """A raw connection."""
        return socket.create_connection(("127.0.0.1", self.port), timeout=20)

    def stop(self) -> int:
        """Ask it to end as an orchestrator does, and wait."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        return self.process.wait(timeout=60)


@contextmanager
def serving(
    folder: Path,
    *,
    environment: Mapping[str, str] | None = None,
    ready: bool = True,
    arguments: Sequence[str] = (),
) -> Iterator[Server]:
    """Run ``bentoml serve`` in the project's folder over ``$BENTOML_HOME`` until the block ends.

    Parameters
    ----------
    folder
        For its log.
    ready
        Wait for ``/readyz``; else for ``/livez`` only.
    """
    port = free_port()
    log = folder / f"serve-{port}.log"
    with log.open("wb") as file:
        process = subprocess.Popen(
            [sys.executable, "-m", "bentoml", "serve", "--port", str(port), *arguments],
            cwd=PROJECT,
            env={**os.environ, **(environment or {})},
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    server = Server(process, port, log, Path(os.environ["CREDIT_RISK_CONF"]))
    try:
        _await(server, "/readyz" if ready else "/livez")
        yield server
    finally:
        _end(server)


def receive(connection: socket.socket) -> bytes:
    """One answer, or all that comes before the end."""
    received = b""
    while True:
        try:
            chunk = connection.recv(65536)
        except TimeoutError:
            return received
        received += chunk
        head, separator, body = received.partition(b"\r\n\r\n")
        length = next(
            (int(line[16:]) for line in head.lower().split(b"\r\n") if line[:15] == b"content-length:"), 0
        )
        if not chunk or (separator and len(body) >= length):
            return received


def _await(server: Server, path: str) -> None:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        if server.process.poll() is not None:
            raise AssertionError(f"the server ended with {server.process.returncode}:\n{server.log}")
        try:
            if server.call(path)[0] == 200:
                return
        except (URLError, OSError):
            pass
        time.sleep(0.05)
    raise AssertionError(f"{path} was not answered in time:\n{server.log}")


def _end(server: Server) -> None:
    try:
        server.stop()
    finally:
        if server.process.poll() is None:
            os.killpg(server.process.pid, signal.SIGKILL)
            server.process.wait()


def _decoded(body: bytes) -> Any:
    try:
        return json.loads(body)
    except ValueError:
        return body.decode(errors="replace")


def _lower(headers: Any) -> dict[str, str]:
    return {name.lower(): value for name, value in headers.items()}


def log_odds(probability: float) -> float:
    """Log-odds of a probability."""
    return float(np.log(probability) - np.log1p(-probability))
