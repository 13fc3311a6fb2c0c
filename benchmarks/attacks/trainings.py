"""Attacks on training: equal rows with random labels, two people at one study."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import pandas as pd
import pytest
import yaml
from mlflow import MlflowClient
from optuna.trial import TrialState

from benchmarks.attacks.attack import Attack, Skipped, Tally
from benchmarks.attacks.lab import Lab
from pipeline.training.fitting import fold_settings
from pipeline.training.folds import FoldSet
from pipeline.training.preparation import prepare
from pipeline.training.settings import TrainSettings
from tests.testkit import PROJECT
from tests.testkit.postgres import no_heartbeats, postgres
from tests.testkit.projects import Project, copy_project
from tests.testkit.servers import Process
from tests.testkit.waiting import eventually

TRIALS = 8


def folds(lab: Lab, tally: Tally) -> None:
    """Nothing can be learnt of random labels, unless copies of a fold's rows were seen in training."""
    distinct = lab.applications.drop_duplicates(list(lab.schema.fields)).head(1200)
    shown = []
    for seed in range(3):
        draw = np.random.default_rng(seed)
        labelled = distinct.assign(status=draw.choice(["ok", "default"], len(distinct)))
        table = lab.folder() / "table.csv"
        pd.concat([labelled] * 4).sample(frac=1, random_state=seed).to_csv(table, index=False)
        settings = TrainSettings.load(PROJECT / "conf/train.yaml", data=str(table))
        data = prepare(settings, lab.schema)
        matrix, labels, wanted = data.train.matrix, data.train.labels, fold_settings(settings, data)
        parameters = {**settings.first_parameters, "eta": 0.3, "max_depth": 6}
        found = FoldSet(matrix, labels, wanted, data.groups).evaluate(parameters, threads=2).means["auc"]
        tally.count(found < 0.58, f"folds say AUC {found:.2f} of random labels")
        shown.append(found)
    split = FoldSet(matrix, labels, wanted).evaluate(parameters, threads=2).means["auc"]
    tally.note(f"AUC of random labels at most {max(shown):.2f}; {split:.2f} if copies are split over the folds")


def shared_study(lab: Lab, tally: Tally) -> None:
    """Both have a trial under way when both go on."""
    project = copy_project(lab.folder())
    try:
        with postgres() as database:
            tracking = _share(project, database)
            with no_heartbeats(database) as waiting:
                first = _begin(project)
                eventually(lambda: waiting.count >= 1 or _has_ended(first), 100)
                second = _begin(project)
                eventually(lambda: waiting.count >= 2 or _has_ended(second), 100)
            reports = [_finish(process, tally) for process in (first, second)]
            trials = optuna.load_study(study_name="both", storage=database).get_trials(deepcopy=False)
    except pytest.skip.Exception as error:
        raise Skipped(str(error)) from None
    for trial in trials:
        tally.count(trial.state == TrialState.COMPLETE, f"trial {trial.number} is {trial.state.name}")
    for report in reports:
        status = tracking.get_run(report["run_id"]).info.status if report else "unknown"
        tally.count(status == "FINISHED", f"an MLflow run is {status}")
    tally.count(len(trials) in (TRIALS, TRIALS + 1), f"{len(trials)} trials instead of {TRIALS}")
    tally.note(f"{len(trials)} trials of two trainings at once on PostgreSQL")


def image(_: Lab, tally: Tally) -> None:
    raise Skipped(
        "it takes minutes and needs docker, podman or buildah; `make image-test` builds it, runs it and tests it"
    )


ATTACKS = [
    Attack("folds", "Folds find nothing in random labels, though each row is there four times", folds),
    Attack("shared-study", "Two people train one study at once on PostgreSQL, and nothing is lost", shared_study),
    Attack("image", "The image builds, serves and rolls back", image),
]


def _share(project: Project, database: str) -> MlflowClient:
    path = project.folder / "conf/train.yaml"
    changes = {"storage": database, "folds": 2, "max_rounds": 20, "workers": 1, "trials": TRIALS}
    changes |= {"heartbeat": 1, "stale_after": 10}
    path.write_text(yaml.safe_dump({**yaml.safe_load(path.read_text()), **changes}))
    # Its tables are made before two processes use it at once: SQLite is one person's tracking store.
    client = MlflowClient(f"sqlite:///{project.folder}/mlflow.db")
    client.create_experiment("credit_risk", artifact_location=Path(project.folder / "mlruns").as_uri())
    return client


def _begin(project: Project) -> Process:
    return project.start("python", "-m", "pipeline", "train", "--study", "both", "--json")


def _has_ended(process: Process) -> bool:
    return process.poll() is not None


def _finish(process: Process, tally: Tally) -> dict[str, Any]:
    with process:
        output, error = process.communicate(timeout=200)
    tally.count(process.returncode == 0, f"a training exits {process.returncode}: {error[-300:]}")
    return dict(json.loads(output)) if process.returncode == 0 else {}
