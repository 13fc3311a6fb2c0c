"""Log to the MLflow run what a training starts from and what it finds."""

from __future__ import annotations

import json
import subprocess
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import mlflow
import optuna
import xgboost as xgb
from mlflow.data.sources import LocalArtifactDatasetSource

from pipeline.core.files import sha256
from pipeline.core.model.features import Matrix
from pipeline.core.policy import Thresholds
from pipeline.evaluation.metrics import Band
from pipeline.registry.logged_model import DATA, DATA_DIGEST, SCHEMA_DIGEST, SEED, TEST_SHARE
from pipeline.tables.digest import frame_digest
from pipeline.training.conf_files import ConfFiles
from pipeline.training.databases import shown_address
from pipeline.training.fitting import Outcome
from pipeline.training.preparation import PreparedData
from pipeline.training.settings import TrainSettings
from pipeline.training.tracking import log_facts
from pipeline.training.trials import finished_trials

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_PROJECT = Path(__file__).parents[2]
_LOCK = _PROJECT / "requirements.lock"

_EXPLAINED_ROWS = 1000
"""Held-out rows whose contributions are drawn: more would only hide each other."""

_DRAWN_ROWS = 500_000
"""Held-out rows from which every n-th is drawn in the figures; the metrics always count all of them."""

_TRIALS_TO_COMPARE = 4
"""Different trials needed to tell which parameter mattered."""


def log_inputs(settings: TrainSettings, data: PreparedData, files: ConfFiles) -> None:
    """Log the settings, the data sets, the conf files, the code and the libraries."""
    plain = {key: value for key, value in _shown(settings).items() if key not in {"search_space", "first_trial"}}
    facts = {f"train.{key}": value for key, value in plain.items()}
    log_facts(params=facts | provenance(settings, data), tags=_environment())
    _log_data_sets(settings, data)
    _log_conf(settings, files)


def log_outcome(outcome: Outcome, study: optuna.Study, data: PreparedData, thresholds: Thresholds) -> None:
    """Log the best parameters, the metrics of the held-out rows and of the folds, and the figures."""
    log_facts(
        params={**outcome.best.parameters, "rounds": outcome.best.rounds, "best_trial": outcome.best.number},
        metrics={f"test_{name}": value for name, value in outcome.metrics.items()}
        | {f"cv_{name}": value for name, value in outcome.best.scores.items()}
        | _band_metrics(outcome.bands),
    )
    _log_figures(_figures(outcome, study, data, thresholds))


def provenance(settings: TrainSettings, data: PreparedData) -> dict[str, Any]:
    """What a later comparison on the same held-out rows needs to know."""
    return {
        DATA: settings.data,
        DATA_DIGEST: data.digest,
        SEED: settings.seed,
        TEST_SHARE: settings.test_share,
        SCHEMA_DIGEST: data.schema.digest,
    }


def _log_data_sets(settings: TrainSettings, data: PreparedData) -> None:
    # Named, because MLflow has two classes of this name, and warns when it has to choose.
    source = LocalArtifactDatasetSource(str(Path(settings.data).resolve()))
    for context, side in (("training", data.train), ("holdout", data.test)):
        dataset = mlflow.data.from_pandas(
            side.frame,
            source=source,
            targets=data.schema.target.name,
            name=data.schema.name,
            digest=frame_digest(side.frame),
        )
        mlflow.log_input(dataset, context=context)


def _log_conf(settings: TrainSettings, files: ConfFiles) -> None:
    with tempfile.TemporaryDirectory() as folder:
        for file in files:
            text = file.read_text(encoding="utf-8").replace(settings.storage, shown_address(settings.storage))
            (Path(folder) / file.name).write_text(text, encoding="utf-8")
        resolved = json.dumps(_shown(settings), indent=2)
        (Path(folder) / "resolved.json").write_text(resolved, encoding="utf-8")
        mlflow.log_artifacts(folder, "conf")


def _shown(settings: TrainSettings) -> dict[str, Any]:
    """Settings as anyone may read them in MLflow: without the password that an address may hold."""
    return {**settings.model_dump(mode="json"), "storage": shown_address(settings.storage)}


def _environment() -> dict[str, str]:
    """Tags: which code and which libraries."""
    tags = {"lock.sha256": sha256(_LOCK.read_bytes())} if _LOCK.is_file() else {}
    commit, changes = _git("rev-parse", "HEAD"), _git("status", "--porcelain")
    return tags | ({"git.commit": commit, "git.dirty": str(bool(changes)).lower()} if commit else {})


def _git(*arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", *arguments], cwd=_PROJECT, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None  # no git, or the code was copied without its history
    return done.stdout.strip()


def _band_metrics(found: list[Band]) -> dict[str, float]:
    shares = {f"test_share_{band.decision.lower()}": band.share for band in found}
    rates = {f"test_bad_rate_{band.decision.lower()}": band.bad_rate for band in found if band.share > 0}
    return shares | rates


def _figures(
    outcome: Outcome, study: optuna.Study, data: PreparedData, thresholds: Thresholds
) -> dict[str, Figure]:
    from pipeline.evaluation import figures  # matplotlib costs half a second, and a failing training needs none

    shown = slice(None, None, 1 + len(outcome.labels) // _DRAWN_ROWS)
    scores = {trial.number: trial.value for trial in finished_trials(study) if trial.value is not None}
    return {
        **figures.performance_figures(outcome.labels[shown], outcome.probabilities[shown], thresholds),
        **figures.booster_figures(*_explanation(outcome.booster, data)),
        **figures.study_figures(scores, _importances(study)),
    }


def _log_figures(figures: Mapping[str, Figure]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        for name, figure in figures.items():
            figure.savefig(Path(folder) / f"{name}.png")
        mlflow.log_artifacts(folder, "figures")


def _explanation(booster: xgb.Booster, data: PreparedData) -> tuple[list[float], Matrix, Matrix, list[str]]:
    names = list(data.vectorizer.feature_names_)
    # The booster has no column names: XGBoost calls its columns f0, f1, …
    gains = booster.get_score(importance_type="total_gain")
    rows = data.test.matrix[:_EXPLAINED_ROWS]
    contributions = booster.predict(xgb.DMatrix(rows), pred_contribs=True)[:, :-1]
    return [float(gains.get(f"f{position}", 0)) for position in range(len(names))], contributions, rows, names


def _importances(study: optuna.Study) -> dict[str, float]:
    varied = {tuple(trial.params.values()) for trial in finished_trials(study)}
    if len(varied) < _TRIALS_TO_COMPARE:
        return {}
    evaluator = optuna.importance.PedAnovaImportanceEvaluator()
    return dict(optuna.importance.get_param_importances(study, evaluator=evaluator))
