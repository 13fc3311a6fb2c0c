"""``train``: rows in, a tuned, tested, explained and registered version of the model out."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Self

import mlflow
import numpy as np
import optuna
import pandas as pd
import xgboost as xgb
from mlflow.data.sources import LocalArtifactDatasetSource
from optuna.trial import FrozenTrial
from sklearn.feature_extraction import DictVectorizer
from tqdm import tqdm

from pipeline.core.contract.schema import Schema
from pipeline.core.files import sha256
from pipeline.core.machine import available_cores
from pipeline.core.model.encoders import FrameEncoder
from pipeline.core.model.features import Matrix, make_vectorizer, monotone_constraints
from pipeline.core.policy import Policy, Thresholds
from pipeline.core.promoted import MODEL_NAME
from pipeline.evaluation.metrics import Band, Probabilities, bands, metrics
from pipeline.registry.client import CANDIDATE
from pipeline.registry.logged_model import DATA, DATA_DIGEST, SCHEMA_DIGEST, SEED, TEST_SHARE, log_model
from pipeline.report import Report
from pipeline.tables.digest import frame_digest
from pipeline.tables.holdout import is_test_row
from pipeline.tables.labelled import ingest
from pipeline.training import streaming as stream
from pipeline.training.folds import FoldSet, FoldSettings, quantised, useful_threads
from pipeline.training.request import TrainRequest
from pipeline.training.search import Best, best_of, finished_trials, open_study, search, study_inputs, study_name
from pipeline.training.settings import TrainSettings
from pipeline.training.survey import Survey, is_streamed, survey
from pipeline.training.tracking import TrialWriter, log_facts, parent_run, trial_writer
from pipeline.training.workers import begin_to_start, open_pool

NEXT = "make promote    (python -m pipeline promote)"

_PROJECT = Path(__file__).parents[2]
_LOCK = _PROJECT / "requirements.lock"
_EXPLAINED_ROWS = 1000
_DRAWN_ROWS = 500_000
"""From so many held-out rows on, the figures are drawn from every n-th of them; metrics always count all."""


@dataclass(frozen=True)
class Side:
    """Rows of one side of the split: the frame, its matrix of shape (n, k), its labels of shape (n,)."""

    frame: pd.DataFrame
    matrix: Matrix
    labels: Matrix


@dataclass(frozen=True)
class Prepared:
    """Everything that is known before the search begins."""

    schema: Schema
    vectorizer: DictVectorizer
    train: Side
    test: Side
    digest: str
    notes: tuple[str, ...]
    survey: Survey | None = None
    """What was found in a table that is streamed; the two sides are then those of the sample."""


@dataclass(frozen=True)
class Outcome:
    """What a training found: on held-out rows, unless it says otherwise."""

    best: Best
    booster: xgb.Booster
    labels: Matrix
    probabilities: Probabilities
    metrics: dict[str, float]
    bands: list[Band]


def run(request: TrainRequest) -> Report:
    """Train: ingest, split, encode, search, fit, evaluate, log and register.

    Raises
    ------
    PipelineError
        Settings, data, study, cluster or tracking server are not usable; nothing is logged as finished.
    """
    files = _Files.of(request)
    settings = _settings(request, files)
    thresholds = Policy.load(files.policy).thresholds
    prepared = prepare(settings, Schema.load(files.schema))
    begin_to_start(settings.workers, settings.cluster)
    inputs = study_inputs(settings, data=prepared.digest, schema=prepared.schema.digest)
    name = study_name(settings, inputs)
    with (
        _resumable(name),
        open_study(settings, name, inputs) as study,
        parent_run(settings.experiment, name) as parent,
    ):
        _log_inputs(settings, prepared, files)
        earlier = finished_trials(study)
        with trial_writer(parent, name, earlier, settings.tracking_patience) as writer:
            best = _search(study, settings, prepared, writer)
        booster = _fit(settings, prepared, best)
        outcome = judge(booster, best, *_held_out(settings, prepared, booster), thresholds)
        _log_outcome(outcome, study, prepared, thresholds)
        version = log_model(
            booster, prepared.vectorizer, prepared.schema, metadata=_provenance(settings, prepared)
        )
    return _report(outcome, version, name, len(earlier), settings, prepared.notes)


def prepare(settings: TrainSettings, schema: Schema) -> Prepared:
    """Read, validate, split and encode the table."""
    if is_streamed(settings):
        found = survey(settings, schema)
        return _prepared(settings, schema, found.sample, found.digest, found.notes, found)
    table = ingest(settings.data, schema)
    return _prepared(settings, schema, table.frame, frame_digest(table.frame), table.notes)


def _prepared(
    settings: TrainSettings,
    schema: Schema,
    rows: pd.DataFrame,
    digest: str,
    notes: tuple[str, ...],
    found: Survey | None = None,
) -> Prepared:
    vectorizer = make_vectorizer(schema)
    held_out = is_test_row(rows, schema, settings.seed, settings.test_share)
    encode = FrameEncoder(schema, vectorizer).transform
    train, test = (Side(frame, encode(frame), schema.labels(frame)) for frame in (rows[~held_out], rows[held_out]))
    return Prepared(schema, vectorizer, train, test, digest, notes, found)


def xgboost_parameters(settings: TrainSettings, schema: Schema, vectorizer: DictVectorizer) -> dict[str, Any]:
    """XGBoost parameters that the search does not vary.

    No ``scale_pos_weight``: the probabilities carry the decision, so they must stay calibrated.
    """
    return {
        "objective": "binary:logistic",
        "eval_metric": "logloss",
        "tree_method": "hist",
        "max_bin": settings.max_bin,
        "seed": settings.seed,
        "monotone_constraints": monotone_constraints(schema, vectorizer),
    }


def fold_settings(settings: TrainSettings, prepared: Prepared) -> FoldSettings:
    """How the search evaluates parameters."""
    fixed = xgboost_parameters(settings, prepared.schema, prepared.vectorizer)
    return FoldSettings(fixed, settings.folds, settings.seed, settings.max_rounds, settings.early_stopping_rounds)


def fit(side: Side, best: Best, fixed: dict[str, Any]) -> xgb.Booster:
    """Train on a whole side with the best parameters, for the rounds on which the folds agreed."""
    threads = useful_threads(len(side.labels), available_cores())
    data = quantised(side.matrix, side.labels, fixed, threads)
    return xgb.train({**fixed, **best.parameters, "nthread": threads}, data, best.rounds)


def judge(
    booster: xgb.Booster, best: Best, labels: Matrix, probabilities: Matrix, thresholds: Thresholds
) -> Outcome:
    """Evaluate a booster on held-out rows: their labels and its probabilities, both shape (n,)."""
    return Outcome(
        best,
        booster,
        labels,
        probabilities,
        metrics(labels, probabilities),
        bands(labels, probabilities, thresholds),
    )


def _fit(settings: TrainSettings, prepared: Prepared, best: Best) -> xgb.Booster:
    fixed = xgboost_parameters(settings, prepared.schema, prepared.vectorizer)
    if prepared.survey is None:
        return fit(prepared.train, best, fixed)
    return stream.fit(settings, prepared.schema, prepared.survey, {**fixed, **best.parameters}, best.rounds)


def _held_out(settings: TrainSettings, prepared: Prepared, booster: xgb.Booster) -> tuple[Matrix, Matrix]:
    if prepared.survey is None:
        return prepared.test.labels, np.asarray(booster.inplace_predict(prepared.test.matrix))
    return stream.held_out(settings, prepared.schema, prepared.survey, booster)


class _Files(NamedTuple):
    """The files that a training reads besides its table."""

    config: Path
    schema: Path
    policy: Path

    @classmethod
    def of(cls, request: TrainRequest) -> Self:
        conf = request.conf
        return cls(
            request.config or conf / "train.yaml",
            request.schema_file or conf / "schema.yaml",
            conf / "policy.yaml",
        )


def _settings(request: TrainRequest, files: _Files) -> TrainSettings:
    flags = request.model_dump(include={"data", "trials", "workers", "study", "seed"})
    return TrainSettings.load(files.config, **flags)


@contextmanager
def _resumable(study: str) -> Iterator[None]:
    """Turn the first SIGINT or SIGTERM into an interruption, and tell whoever interrupts how to go on.

    Those that follow are ignored, because the end is bounded in time and must not be cut short:
    ``mlflow run`` sends SIGTERM after the SIGINT that the terminal has sent.
    """

    def interrupt(*_: object) -> None:
        for number in numbers:
            signal.signal(number, signal.SIG_IGN)
        raise KeyboardInterrupt

    numbers = (signal.SIGINT, signal.SIGTERM)
    before = [signal.signal(number, interrupt) for number in numbers]
    try:
        yield
    except KeyboardInterrupt:
        raise KeyboardInterrupt(
            f"interrupted; study {study} keeps its finished trials: run the same command again to go on"
        ) from None
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)


def _search(study: optuna.Study, settings: TrainSettings, prepared: Prepared, writer: TrialWriter) -> Best:
    folds = FoldSet(prepared.train.matrix, prepared.train.labels, fold_settings(settings, prepared))
    finished = finished_trials(study)
    if len(finished) >= settings.trials:
        return best_of(study)
    with (
        open_pool(folds, settings.workers, settings.cluster) as pool,
        _progress(settings.trials, finished) as show,
    ):

        def on_finished(trial: FrozenTrial) -> None:
            writer.put(trial)
            show(trial)

        return search(study, pool, settings, on_finished)


@contextmanager
def _progress(total: int, finished: list[FrozenTrial]) -> Iterator[Callable[[FrozenTrial], None]]:
    # In a log file, a line every ten seconds; on a terminal, a bar.
    interval = 0.1 if sys.stderr.isatty() else 10
    values = [trial.value for trial in finished if trial.value is not None]
    with tqdm(total=total, initial=len(finished), desc="trials", unit="trial", mininterval=interval) as bar:

        def show(trial: FrozenTrial) -> None:
            if trial.value is not None:
                values.append(trial.value)
            if values:
                bar.set_postfix_str(f"best log loss {min(values):.4f}", refresh=False)
            bar.update()

        yield show


def _log_inputs(settings: TrainSettings, prepared: Prepared, files: _Files) -> None:
    values = settings.model_dump(mode="json", exclude={"search_space", "first_trial"})
    facts = {f"train.{key}": value for key, value in values.items()}
    facts |= _provenance(settings, prepared)
    log_facts(params=facts, tags=_environment())
    # Named, because MLflow has two classes of this name, and warns when it has to choose.
    source = LocalArtifactDatasetSource(str(Path(settings.data).resolve()))
    for context, side in (("training", prepared.train), ("holdout", prepared.test)):
        dataset = mlflow.data.from_pandas(
            side.frame,
            source=source,
            targets=prepared.schema.target.name,
            name=prepared.schema.name,
            digest=frame_digest(side.frame),
        )
        mlflow.log_input(dataset, context=context)
    with tempfile.TemporaryDirectory() as folder:
        for file in files:
            (Path(folder) / file.name).write_bytes(file.read_bytes())
        resolved = json.dumps(settings.model_dump(mode="json"), indent=2)
        (Path(folder) / "resolved.json").write_text(resolved, encoding="utf-8")
        mlflow.log_artifacts(folder, "conf")


def _provenance(settings: TrainSettings, prepared: Prepared) -> dict[str, Any]:
    """What a later comparison on the same held-out rows needs to know."""
    return {
        DATA: settings.data,
        DATA_DIGEST: prepared.digest,
        SEED: settings.seed,
        TEST_SHARE: settings.test_share,
        SCHEMA_DIGEST: prepared.schema.digest,
    }


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


def _log_outcome(outcome: Outcome, study: optuna.Study, prepared: Prepared, thresholds: Thresholds) -> None:
    from pipeline.evaluation import figures  # matplotlib costs half a second, and a failing training needs none

    log_facts(
        params={**outcome.best.parameters, "rounds": outcome.best.rounds, "best_trial": outcome.best.number},
        metrics={f"test_{name}": value for name, value in outcome.metrics.items()}
        | {f"cv_{name}": value for name, value in outcome.best.scores.items()}
        | _band_metrics(outcome.bands),
    )
    shown = slice(None, None, 1 + len(outcome.labels) // _DRAWN_ROWS)
    drawn = figures.performance_figures(outcome.labels[shown], outcome.probabilities[shown], thresholds)
    drawn |= figures.booster_figures(*_explanation(outcome.booster, prepared))
    scores = {trial.number: trial.value for trial in finished_trials(study) if trial.value is not None}
    drawn |= figures.study_figures(scores, _importances(study))
    with tempfile.TemporaryDirectory() as folder:
        for name, figure in drawn.items():
            figure.savefig(Path(folder) / f"{name}.png")
        mlflow.log_artifacts(folder, "figures")


def _band_metrics(found: list[Band]) -> dict[str, float]:
    shares = {f"test_share_{band.decision.lower()}": band.share for band in found}
    rates = {f"test_bad_rate_{band.decision.lower()}": band.bad_rate for band in found if band.share > 0}
    return shares | rates


def _explanation(booster: xgb.Booster, prepared: Prepared) -> tuple[list[float], Matrix, Matrix, list[str]]:
    names = list(prepared.vectorizer.feature_names_)
    # The booster has no column names: XGBoost calls its columns f0, f1, …
    gains = booster.get_score(importance_type="total_gain")
    rows = prepared.test.matrix[:_EXPLAINED_ROWS]
    contributions = booster.predict(xgb.DMatrix(rows), pred_contribs=True)[:, :-1]
    return [float(gains.get(f"f{position}", 0)) for position in range(len(names))], contributions, rows, names


def _importances(study: optuna.Study) -> dict[str, float]:
    varied = {tuple(trial.params.values()) for trial in finished_trials(study)}
    if len(varied) < 4:
        return {}  # too few to tell one parameter from another
    evaluator = optuna.importance.PedAnovaImportanceEvaluator()
    return dict(optuna.importance.get_param_importances(study, evaluator=evaluator))


def _report(
    outcome: Outcome, version: Any, study: str, earlier: int, settings: TrainSettings, notes: tuple[str, ...]
) -> Report:
    resumed = _resumed(study, earlier, settings.trials)
    data = {
        "model": MODEL_NAME,
        "version": int(version.version),
        "run_id": version.run_id,
        "study": study,
        "trials": max(settings.trials, earlier),
        "resumed": earlier,
        "best_trial": outcome.best.number,
        "parameters": outcome.best.parameters,
        "rounds": outcome.best.rounds,
        "cv": outcome.best.scores,
        "test": outcome.metrics,
        "bands": [band._asdict() for band in outcome.bands],
    }
    return Report("\n".join([*notes, *resumed, *_lines(outcome, data)]), data)


def _resumed(study: str, earlier: int, total: int) -> list[str]:
    if earlier >= total:
        return [
            f"study {study} was complete ({earlier} trials): nothing evaluated, the best refitted and logged again"
        ]
    return [f"study {study} went on from {earlier} of {total} trials"] if earlier else []


def _lines(outcome: Outcome, data: dict[str, Any]) -> list[str]:
    test, cv = outcome.metrics, outcome.best.scores
    shares = "   ".join(f"{band.decision} {band.share:.0%} (bad {band.bad_rate:.0%})" for band in outcome.bands)
    return [
        f"{'':12}{'AUC':>8}{'Gini':>8}{'KS':>8}{'Brier':>8}{'log loss':>10}{'slope':>8}{'ECE':>8}",
        f"{'test':12}{test['auc']:8.4f}{test['gini']:8.4f}{test['ks']:8.4f}{test['brier']:8.4f}"
        f"{test['log_loss']:10.4f}{test['calibration_slope']:8.3f}{test['ece']:8.4f}",
        f"{'folds':12}{cv['auc']:8.4f}{2 * cv['auc'] - 1:8.4f}{cv['ks']:8.4f}{cv['brier']:8.4f}"
        f"{cv['log_loss']:10.4f}",
        f"{'decisions':12}{shares}",
        f"{'study':12}{data['study']}: trial {data['best_trial']} of {data['trials']}, {data['rounds']} rounds",
        f"{'run':12}{data['run_id']}",
        f"{'version':12}{MODEL_NAME} {data['version']}, alias {CANDIDATE}",
        f"{'next':12}{NEXT}",
    ]
