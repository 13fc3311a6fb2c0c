"""The ``train`` command: tune, fit, test, explain and register a version of the model."""

from __future__ import annotations

import mlflow
import optuna
from optuna.trial import FrozenTrial

from pipeline.core.contract.schema import Schema
from pipeline.core.policy import Policy
from pipeline.registry.logged_model import log_model
from pipeline.report import Report
from pipeline.training.conf_files import ConfFiles
from pipeline.training.fitting import fit_and_test, fold_settings
from pipeline.training.folds import FoldSet
from pipeline.training.interruptions import Interruptions, resumable
from pipeline.training.logged_run import log_inputs, log_outcome, provenance
from pipeline.training.preparation import PreparedData, prepare
from pipeline.training.progress import progress_bar
from pipeline.training.request import TrainRequest
from pipeline.training.search import search
from pipeline.training.settings import TrainSettings
from pipeline.training.study import fold_groups, fold_notes, lock_of, open_study, study_inputs, study_name
from pipeline.training.summary import summarise
from pipeline.training.tracking import parent_run
from pipeline.training.trial_writer import trial_writer
from pipeline.training.trials import Best, best_of, finished_trials
from pipeline.training.workers import begin_to_start, open_pool


def run(request: TrainRequest) -> Report:
    """Read the table, search, fit the best, test it, log everything and register the version.

    Raises
    ------
    PipelineError
        The settings, data, study, cluster or tracking server cannot be used; no run is logged as finished.
    """
    files = ConfFiles.of(request)
    settings = files.settings(request)
    thresholds = Policy.load(files.policy).thresholds
    data = prepare(settings, Schema.load(files.schema))
    begin_to_start(settings.workers, settings.cluster)
    inputs = study_inputs(settings, data=data.digest, schema=data.schema.digest, **data.fold_inputs)
    name = study_name(settings, inputs)
    with (
        resumable(name) as interruptions,
        open_study(settings, name, inputs) as study,
        parent_run(
            settings.experiment,
            name,
            lock=lock_of(study, settings),
            heartbeat=settings.heartbeat,
            stale_after=settings.stale_after,
        ) as parent,
    ):
        log_inputs(settings, data, files)
        earlier = len(finished_trials(study))
        best = _search(study, settings, data, parent, interruptions)
        outcome = fit_and_test(settings, data, best, thresholds)
        log_outcome(outcome, study, data, thresholds)
        version = log_model(outcome.booster, data.vectorizer, data.schema, metadata=provenance(settings, data))
    return summarise(
        outcome, version, name, earlier, settings.trials, [*data.notes, *fold_notes(study, data.groups)]
    )


def _search(
    study: optuna.Study,
    settings: TrainSettings,
    data: PreparedData,
    parent: mlflow.ActiveRun,
    interruptions: Interruptions,
) -> Best:
    finished = finished_trials(study)
    with trial_writer(parent, study.study_name, finished, settings.tracking_patience) as writer:
        if len(finished) >= settings.trials:
            return best_of(study)
        groups = fold_groups(study, data.groups)
        folds = FoldSet(data.train.matrix, data.train.labels, fold_settings(settings, data), groups)
        with (
            open_pool(folds, settings.workers, settings.cluster) as pool,
            progress_bar(settings.trials, finished) as show,
        ):

            def on_finished(trial: FrozenTrial) -> None:
                writer.put(trial)
                show(trial)

            best = search(study, pool, settings, on_finished, interruptions.deferred)
        for trial in finished_trials(study):  # also those that another process finished meanwhile
            writer.put(trial)
        return best
