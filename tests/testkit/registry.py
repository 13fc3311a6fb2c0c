"""A small MLflow registry of good and bad models, and machines that promote from it: for tests and benchmarks."""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import re
import shutil
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import pandas as pd
import xgboost as xgb
from mlflow import MlflowClient

from pipeline.__main__ import main
from pipeline.core.contract.schema import Schema
from pipeline.core.model.encoders import FrameEncoder
from pipeline.core.model.features import make_vectorizer, monotone_constraints
from pipeline.core.promoted import MODEL_NAME, Promotion
from pipeline.promotion.failpoint import VARIABLE
from pipeline.registry.client import CANDIDATE
from pipeline.registry.logged_model import DATA, SEED, TEST_SHARE, log_model
from pipeline.tables.holdout import is_test_row
from tests.testkit import DATA as TABLE

SHARE = 0.2

GOOD, BETTER, THIRD = 1, 2, 3
"""Versions that pass the gate."""
SHUFFLED, SWAPPED, NARROWER = 4, 5, 6
"""Trained on shuffled labels; with two columns swapped; under a contract without the field `debt`."""


def make_registry(folder: Path, schema: Schema, frame: pd.DataFrame) -> Path:
    """Log the six versions; returns the SQLite file of the tracking store."""
    uri = f"sqlite:///{folder}/mlflow.db"
    mlflow.set_tracking_uri(uri)
    try:
        mlflow.set_experiment(
            experiment_id=mlflow.create_experiment("registry", artifact_location=str(folder / "artifacts"))
        )
        for seed, rounds in ((GOOD, 60), (BETTER, 90), (THIRD, 75)):
            log_version(schema, frame, seed, rounds)
        log_version(schema, frame, SHUFFLED, 60, shuffle=True)
        log_version(schema, frame, SWAPPED, 60, swap=("amount", "price"))
        log_version(_without(schema, "debt"), frame, NARROWER, 60)
        MlflowClient().set_registered_model_alias(MODEL_NAME, CANDIDATE, str(GOOD))
    finally:
        mlflow.set_tracking_uri(None)
    return folder / "mlflow.db"


def _without(schema: Schema, field: str) -> Schema:
    document = schema.document()
    del document["fields"][field]
    document["ratios"] = {name: ratio for name, ratio in document["ratios"].items() if field not in str(ratio)}
    return Schema.model_validate(document)


def log_version(
    schema: Schema,
    frame: pd.DataFrame,
    seed: int,
    rounds: int,
    *,
    shuffle: bool = False,
    swap: tuple[str, str] | None = None,
) -> None:
    """Train a small model on the training rows, and register it as the next version."""
    training = frame[~is_test_row(frame, schema, 42, SHARE)]
    vectorizer = make_vectorizer(schema)
    matrix = FrameEncoder(schema, vectorizer).transform(training)
    labels = schema.labels(training)
    directions = list(monotone_constraints(schema, vectorizer))
    if shuffle:
        np.random.default_rng(seed).shuffle(labels)
    if swap:
        here, there = (vectorizer.vocabulary_[name] for name in swap)
        matrix[:, [here, there]] = matrix[:, [there, here]]
        directions[here], directions[there] = directions[there], directions[here]
    parameters = {
        "objective": "binary:logistic",
        "eta": 0.1,
        "max_depth": 3,
        "subsample": 0.7,
        "seed": seed,
        "nthread": 1,
        "monotone_constraints": tuple(directions),
    }
    booster = xgb.train(parameters, xgb.DMatrix(matrix, label=labels), rounds)
    with mlflow.start_run():
        mlflow.log_params({DATA: str(TABLE), SEED: 42, TEST_SHARE: SHARE})
        mlflow.log_metric("test_log_loss", 0.4 + abs(seed - BETTER) / 100)
        log_model(booster, vectorizer, schema)


@dataclass(frozen=True)
class Machine:
    """One machine: a BentoML store of its own, and the MLflow server that it asks."""

    home: Path
    tracking: str

    @property
    def models(self) -> Path:
        """The model's folder in the store."""
        return self.home / "models" / MODEL_NAME

    @property
    def env(self) -> dict[str, str]:
        """What makes a process run on this machine."""
        return {
            "BENTOML_HOME": str(self.home),
            "MLFLOW_TRACKING_URI": self.tracking,
            "MLFLOW_DISABLE_TELEMETRY": "true",
            "BENTOML_DO_NOT_TRACK": "True",
            "CREDIT_RISK_CONF": str(self._patient_conf()),
        }

    def _patient_conf(self) -> Path:
        """The shipped conf, but a rollback waits for MLflow however busy this computer is."""
        folder = self.home.with_name(f"{self.home.name}-conf")
        if not folder.exists():
            shutil.copytree(TABLE.parents[1] / "conf", folder)
            text = (folder / "promote.yaml").read_text()
            text = re.sub(r"(?m)^(alias|rollback)_seconds: \S+", r"\1_seconds: 200.0", text)
            (folder / "promote.yaml").write_text(text)
        return folder

    @contextlib.contextmanager
    def entered(self) -> Iterator[None]:
        """Let this process be on the machine."""
        before = dict(os.environ)
        os.environ.update(self.env)
        try:
            yield
        finally:
            os.environ.clear()
            os.environ.update(before)

    def pointer(self) -> Promotion | None:
        """What is promoted, read from the file itself."""
        path = self.models / "promoted.json"
        return Promotion.model_validate_json(path.read_bytes()) if path.exists() else None

    def champion(self) -> int | None:
        """What MLflow's alias names."""
        try:
            return int(MlflowClient(self.tracking).get_model_version_by_alias(MODEL_NAME, "champion").version)
        except mlflow.MlflowException:
            return None

    def copy(self, folder: Path) -> Machine:
        """Another machine in the same state, with a tracking database of its own."""
        shutil.copytree(self.home, folder / "home", dirs_exist_ok=True)
        shutil.copy(self.tracking.removeprefix("sqlite:///"), folder / "mlflow.db")
        return Machine(folder / "home", f"sqlite:///{folder}/mlflow.db")

    def folder(self, version: int) -> Path:
        """Folder of a stored version."""
        return self.models / f"v{version}"

    def history(self) -> list[int]:
        """The versions promoted, in order, as the history's whole lines tell."""
        lines = (self.models / "history.jsonl").read_text().splitlines()
        return [json.loads(line)["version"] for line in lines]

    def on(self, tracking: str) -> Machine:
        """The same machine, asking another MLflow."""
        return Machine(self.home, tracking)

    def start(self, *arguments: str, failpoint: str = "") -> Command:
        """Run ``python -m pipeline`` in a process of its own, whose imports are done already."""
        return Command(self, arguments, failpoint)

    def run(self, *arguments: str, failpoint: str = "") -> Command:
        """Run a command and wait for its end."""
        return self.start(*arguments, failpoint=failpoint).wait()


class Command:
    """A command in a process forked from one that has imported everything: a tenth of a cold start."""

    def __init__(self, machine: Machine, arguments: tuple[str, ...], failpoint: str) -> None:
        self._log = machine.home.with_name(f"{machine.home.name}-{os.urandom(4).hex()}")
        env = {**machine.env, VARIABLE: failpoint}
        self.process: BaseProcess = _context().Process(target=_run, args=(arguments, env, str(self._log)))
        self.process.start()

    def wait(self, seconds: float = 240) -> Command:
        """Wait for the end of the process."""
        self.process.join(seconds)
        assert self.process.exitcode is not None, "the command did not end"
        return self

    @property
    def code(self) -> int | None:
        """Exit code; negative: the signal that killed it."""
        return self.process.exitcode

    @property
    def out(self) -> str:
        """Standard output."""
        return _text(self._log.with_suffix(".out"))

    @property
    def err(self) -> str:
        """Standard error."""
        return _text(self._log.with_suffix(".err"))

    @property
    def data(self) -> dict[str, Any]:
        """What ``--json`` printed."""
        value: dict[str, Any] = json.loads(self.out)
        return value


def _text(path: Path) -> str:
    return path.read_text() if path.exists() else ""  # the command has not begun


_PRELOADED = [
    "bentoml.xgboost",
    "skops.io",
    "mlflow.pyfunc",
    "mlflow.store.model_registry.sqlalchemy_store",
    "mlflow.store.tracking.sqlalchemy_store",
    "pipeline.promotion.evidence",
    "pipeline.promotion.candidates",
    "pipeline.promotion.following",
    "pipeline.promotion.judgement",
    "pipeline.promotion.commands",
    "pipeline.promotion.staging",
    "pipeline.registry.logged_model",
    "tests.testkit.registry",
]


def _context() -> multiprocessing.context.ForkServerContext:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_PRELOADED)
    return context


def _run(arguments: tuple[str, ...], env: dict[str, str], log: str) -> None:
    threading.Thread(target=_end_with_parent, daemon=True).start()
    os.environ.update(env)
    for descriptor, ending in ((1, "out"), (2, "err")):
        file = os.open(f"{log}.{ending}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(file, descriptor)
    sys.stdout = open(1, "w", closefd=False)  # noqa: SIM115
    sys.stderr = open(2, "w", closefd=False)  # noqa: SIM115
    code = main(list(arguments))
    sys.stdout.flush()
    sys.exit(code)


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def new_machine(folder: Path, database: Path) -> Machine:
    """A machine with an empty store and a tracking database of its own; the models' files are shared."""
    shutil.copy(database, folder / "mlflow.db")
    return Machine(folder / "home", f"sqlite:///{folder}/mlflow.db")
