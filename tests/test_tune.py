from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import pandas as pd
import psutil
import pytest
from distributed import Client
from optuna.trial import FrozenTrial, TrialState

from pipeline.cluster import ClusterSettings, connect
from pipeline.core.contract.schema import Schema
from pipeline.core.errors import ClusterError, ConfigError
from pipeline.core.model.encoders import FrameEncoder
from pipeline.core.model.features import make_vectorizer
from pipeline.training.fold_split import EQUAL_ROWS
from pipeline.training.folds import FoldScore, FoldSet, FoldSettings
from pipeline.training.sampling import distributions
from pipeline.training.search import search
from pipeline.training.settings import TrainSettings
from pipeline.training.study import fold_groups, fold_notes, open_study, study_inputs, study_name
from pipeline.training.trials import Best, finished_trials
from pipeline.training.workers import InProcess, Pool, open_pool
from tests.testkit import PROJECT

INPUTS = {"data": "d1", "seed": 42}


@pytest.fixture(scope="module")
def folds(schema: Schema, applications: pd.DataFrame) -> FoldSet:
    """A few rows of the data, in three folds."""
    rows = applications.head(400)
    matrix = FrameEncoder(schema, make_vectorizer(schema)).transform(rows)
    fixed = {"objective": "binary:logistic", "eval_metric": "logloss", "max_bin": 64, "seed": 1}
    return FoldSet(matrix, schema.labels(rows), FoldSettings(fixed, 3, 1, 30, 5))


def settings(folder: Path, **changes: Any) -> TrainSettings:
    """The shipped settings, with a study of their own."""
    return TrainSettings.load(PROJECT / "conf/train.yaml", storage=f"sqlite:///{folder}/optuna.db", **changes)


@contextmanager
def opened(
    folder: Path, name: str = "s", inputs: dict[str, Any] = INPUTS, **changes: Any
) -> Iterator[optuna.Study]:
    with open_study(settings(folder, **changes), name, inputs) as study:
        yield study


def run(
    folder: Path, rows: FoldSet, trials: int, name: str = "s", **changes: Any
) -> tuple[Best, list[FrozenTrial]]:
    """Search to a total in this process; returns the best and all finished trials."""
    with opened(folder, name, **changes) as study:
        best = search(study, InProcess(rows, 1), settings(folder, trials=trials, **changes), lambda trial: None)
        return best, finished_trials(study)


def test_the_first_trial_is_the_one_in_the_settings(tmp_path: Path, folds: FoldSet) -> None:
    _, trials = run(tmp_path, folds, 2)
    assert trials[0].params == settings(tmp_path).first_trial
    assert trials[1].params != trials[0].params


def test_the_best_trial_has_the_lowest_log_loss_and_the_rounds_of_its_folds(
    tmp_path: Path, folds: FoldSet
) -> None:
    best, trials = run(tmp_path, folds, 6)
    assert best.scores["log_loss"] == min(trial.value for trial in trials if trial.value is not None)
    evaluation = folds.evaluate(best.parameters, threads=1)
    assert best.scores == evaluation.means
    assert best.rounds == round(np.mean([fold.rounds for fold in evaluation.folds]))
    assert all(fold.rounds <= 30 for fold in evaluation.folds)


def test_a_study_goes_on_to_its_total_and_keeps_what_is_finished(tmp_path: Path, folds: FoldSet) -> None:
    _, first = run(tmp_path, folds, 3)
    _, all_trials = run(tmp_path, folds, 5)
    assert len(all_trials) == 5
    assert [trial.params for trial in all_trials[:3]] == [trial.params for trial in first]
    _, same = run(tmp_path, folds, 4)
    assert len(same) == 5


def test_a_killed_study_finds_what_an_uninterrupted_one_finds(tmp_path: Path, folds: FoldSet) -> None:
    _, whole = run(tmp_path, folds, 14, name="whole")
    run(tmp_path, folds, 12, name="killed")

    class Killed(BaseException):
        pass

    class DyingPool(InProcess):
        def submit(self, parameters: Any, bars: Any) -> Any:
            raise Killed  # the trial is asked for, and never told

    with pytest.raises(Killed), opened(tmp_path, "killed") as study:
        search(study, DyingPool(folds, 1), settings(tmp_path, trials=14), lambda trial: None)
    _, resumed = run(tmp_path, folds, 14, name="killed")
    assert [trial.params for trial in resumed] == [trial.params for trial in whole]
    assert [trial.value for trial in resumed] == [trial.value for trial in whole]


def test_no_two_trials_draw_the_same_parameters_however_many_are_under_way(tmp_path: Path, folds: FoldSet) -> None:
    class ThreeAtOnce(InProcess):
        slots = 3

    with opened(tmp_path) as study:
        search(study, ThreeAtOnce(folds, 1), settings(tmp_path, trials=9), lambda trial: None)
        drawn = {tuple(trial.params.values()) for trial in finished_trials(study)}
    assert len(drawn) == 9


def test_a_study_killed_in_its_first_trial_still_tries_the_one_in_the_settings(
    tmp_path: Path, folds: FoldSet
) -> None:
    with opened(tmp_path) as study:
        study.ask(distributions(settings(tmp_path)))  # and the process is gone
    _, trials = run(tmp_path, folds, 2)
    assert settings(tmp_path).first_trial in [trial.params for trial in trials]


def test_a_study_started_with_other_inputs_is_refused(tmp_path: Path) -> None:
    with opened(tmp_path):
        pass
    other = {**INPUTS, "data": "d2"}
    with (
        pytest.raises(ConfigError, match=r"started with other inputs \(data changed\)"),
        opened(tmp_path, inputs=other),
    ):
        pass


def test_a_study_of_the_release_before_goes_on_with_the_folds_it_began_with(tmp_path: Path) -> None:
    groups = np.array([0, 1, 0])
    with opened(tmp_path, "old"):
        pass
    with opened(tmp_path, "old", {**INPUTS, EQUAL_ROWS: "in one fold"}) as study:
        assert fold_groups(study, groups) is None
        assert "Start another with --study NAME" in fold_notes(study, groups)[0]
    with opened(tmp_path, "new", {**INPUTS, EQUAL_ROWS: "in one fold"}) as study:
        assert fold_groups(study, groups) is groups
        assert fold_notes(study, groups) == []


def test_a_study_that_another_process_drives_is_refused(tmp_path: Path) -> None:
    with (
        opened(tmp_path),
        pytest.raises(ConfigError, match="another process is driving study s"),
        opened(tmp_path),
    ):
        pass


@pytest.mark.parametrize(("changes", "same"), [
    ({"trials": 7}, True), ({"workers": 1}, True), ({"experiment": "other"}, True),
    ({"tracking_patience": 1}, True), ({"study": "mine"}, False), ({"pruning": True}, False),
    ({"seed": 1}, False), ({"test_share": 0.3}, False), ({"folds": 3}, False), ({"max_rounds": 5}, False),
    ({"early_stopping_rounds": 5}, False), ({"max_bin": 16}, False), ({"search_rows": 100}, False),
])  # fmt: skip
def test_the_name_of_a_study_follows_what_changes_a_score(tmp_path: Path, changes: Any, same: bool) -> None:
    def name(**changes: Any) -> str:
        given = settings(tmp_path, **changes)
        return study_name(given, study_inputs(given, data="d"))

    assert (name() == name(**changes)) is same
    assert study_name(settings(tmp_path), study_inputs(settings(tmp_path), data="e")) != name()


def test_a_hopeless_trial_stops_after_the_fold_that_shows_it(tmp_path: Path, folds: FoldSet) -> None:
    poor = {"eta": 0.02, "max_depth": 2, "min_child_weight": 30}
    assert len(folds.evaluate(poor, threads=1, bars=[9, 0.1]).folds) == 2
    assert len(folds.evaluate(poor, threads=1, bars=[0.1, 0.1]).folds) == 1
    assert len(folds.evaluate(poor, threads=1, bars=[9, 9]).folds) == 3
    _, trials = run(tmp_path, folds, 25, pruning=True, folds=3)
    pruned = [trial for trial in trials if trial.state == TrialState.PRUNED]
    assert pruned
    assert len(trials) == 25


def test_an_evaluation_that_fails_is_one_readable_error_and_is_made_again(tmp_path: Path, folds: FoldSet) -> None:
    broken = FoldSet(folds.matrix, folds.labels, FoldSettings({"objective": "no:such", "max_bin": 64}, 3, 1, 5, 5))
    with opened(tmp_path) as study, pytest.raises(ClusterError, match=r"evaluation of trial 0 failed"):
        search(study, InProcess(broken, 1), settings(tmp_path, trials=1), lambda trial: None)
    _, trials = run(tmp_path, folds, 1)
    assert len(trials) == 1


def test_scores_do_not_depend_on_where_they_are_evaluated(folds: FoldSet, scheduler: str) -> None:
    parameters = {"eta": 0.1, "max_depth": 3}
    here = folds.evaluate(parameters, threads=1)
    with open_pool(folds, None, ClusterSettings(address=scheduler)) as pool:
        there = pool.submit(parameters, ()).result().evaluation
    assert isinstance(there.folds[0], FoldScore)
    assert there == here


def test_a_cluster_runs_the_code_that_it_is_sent_down_to_the_last_package(scheduler: str) -> None:
    def where() -> str:
        import pipeline.core.contract.schema

        return pipeline.core.contract.schema.__file__

    with connect(scheduler) as client:
        assert "pipeline.zip/pipeline/core/contract" in client.submit(where).result()


def test_a_killed_worker_costs_no_trial(tmp_path: Path, folds: FoldSet, scheduler: str) -> None:
    finished: list[int] = []
    with Client(scheduler) as client:
        victims = list(client.run(os.getpid).values())[:1]

    def on_finished(trial: FrozenTrial) -> None:
        finished.append(trial.number)
        if len(finished) == 3:
            psutil.Process(victims.pop()).kill()

    address = ClusterSettings(address=scheduler)
    with opened(tmp_path) as study, open_pool(folds, None, address) as pool:
        assert pool.slots == 3  # one waits, so that no worker does
        search(study, pool, settings(tmp_path, trials=20), on_finished)
        assert not victims
        assert sorted(finished) == list(range(20))
        assert [trial.state for trial in study.trials] == [TrialState.COMPLETE] * 20


def test_one_worker_starts_no_process(folds: FoldSet) -> None:
    before = len(psutil.Process().children())
    with open_pool(folds, 1, None) as pool:
        assert isinstance(pool, InProcess)
        assert pool.slots == 1
        assert len(psutil.Process().children()) == before
        _: Pool = pool
