"""A store filled in milliseconds, and the service over it."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import cloudpickle
import numpy as np
import pandas as pd
import xgboost as xgb
import yaml
from sklearn.feature_extraction import DictVectorizer

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
from tests.testkit.projects import changed_conf
from tests.testkit.servers import Server, Service, running

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


def fill_store(
    home: Path, applications: pd.DataFrame, schema: Schema, golden_rows: Sequence[Mapping[str, Any]]
) -> dict[int, Promotion]:
    """Write versions 1 and 2 of a quick model below a folder, which may be copied; neither is promoted."""
    before = os.environ.get("BENTOML_HOME")
    os.environ["BENTOML_HOME"] = str(home)
    try:
        return {
            version: put_in_store(version, *quick_booster(applications, schema, version), schema, golden_rows)
            for version in (1, 2)
        }
    finally:
        os.environ.pop("BENTOML_HOME")
        if before is not None:
            os.environ["BENTOML_HOME"] = before


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


def make_core(**changes: Any) -> Core:
    """The service's core over ``$BENTOML_HOME`` in this process; it records nothing unless told to.

    `changes` are keys of ``conf/serve.yaml``, written as for `changed_conf`.
    """
    with TemporaryDirectory() as folder:
        conf = changed_conf(Path(folder), **{"decision_log__enabled": False, **changes})
        return Core(ServeSettings.load(conf / "serve.yaml"), Policy.load(conf / "policy.yaml"), Path(folder))


def serving(
    *arguments: str, ready: str = "/readyz", environment: Mapping[str, str] | None = None
) -> AbstractContextManager[Server]:
    """Run ``bentoml serve`` in the project's folder over ``$BENTOML_HOME`` until the block ends.

    Parameters
    ----------
    ready
        The path whose answer 200 is awaited.
    environment
        Laid over this process's.
    """
    command = (sys.executable, "-m", "bentoml", "serve", "--port", "{port}", *arguments)
    return running(
        Service("bentoml serve", command, ready=ready, environment={**os.environ, **(environment or {})})
    )


def log_odds(probability: float) -> float:
    """Log-odds of a probability."""
    return float(np.log(probability) - np.log1p(-probability))
