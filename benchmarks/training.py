"""What a tuning costs: the loop that everyone writes, the same without tracking, ours with one and two workers.

    python -m benchmarks.training [--rounds 3] [--trials 40] [--more]

Every way evaluates the same parameters on the same rows: 5 stratified folds, 200 boosting rounds, one thread a
booster; the naive loop with XGBoost's own 256 bins, the others with ``max_bin`` of ``conf/train.yaml``. Each runs
in a process of its own, in interleaved rounds; the time is that of the whole search, from rows in memory to the
last trial written, without imports and without making the tracking database. Two workers include starting their
processes. Prints ratios of medians, and draws ``figures/training.png``.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from pipeline.cluster import ClusterSettings
from pipeline.core.settings import conf_folder
from tests.testkit.cluster import dask_cluster
from tests.testkit.servers import Service, running

ROUNDS = 200
FOLDS = 5


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure a tuning with and without this project.")
    parser.add_argument("--rounds", type=int, default=3, help="how often each way is measured")
    parser.add_argument("--trials", type=int, default=40)
    parser.add_argument("--more", action="store_true", help="an MLflow server and a Dask cluster instead")
    parser.add_argument("--one", choices=[*WAYS, *MORE], help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps({**WAYS, **MORE}[options.one](options.trials)))
    elif options.more:
        report_more(measure(["floor", "one worker", *MORE], options.rounds, options.trials))
    else:
        results = measure(list(WAYS), options.rounds, options.trials)
        report(results, options.trials)
        draw(results, options.trials)


def measure(ways: list[str], rounds: int, trials: int) -> dict[str, list[dict[str, float]]]:
    """Measure every way in turn, again and again, so that a busy minute hurts all of them."""
    results: dict[str, list[dict[str, float]]] = {way: [] for way in ways}
    for _ in range(rounds):
        for way in ways:
            command = [sys.executable, "-m", "benchmarks.training", "--one", way, "--trials", str(trials)]
            done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
            results[way].append(json.loads(done.stdout.splitlines()[-1]))
            print(f"  {way:24}{results[way][-1]['seconds']:8.2f} s", file=sys.stderr)
    return results


def report(results: dict[str, list[dict[str, float]]], trials: int) -> None:
    seconds = {way: median(result["seconds"] for result in found) for way, found in results.items()}
    auc = {way: found[0]["auc"] for way, found in results.items()}
    print(
        f"{trials} trials x {FOLDS} folds x {ROUNDS} rounds, {os.cpu_count()} cores, "
        f"medians of {len(results['naive'])}"
    )
    print(f"{'':26}{'seconds':>9}{'x floor':>9}{'faster than naive':>19}{'best AUC':>10}")
    for way, value in seconds.items():
        print(
            f"{way:26}{value:9.2f}{value / seconds['floor']:9.2f}{seconds['naive'] / value:19.2f}{auc[way]:10.4f}"
        )
    targets = {
        "one worker <= 1.1 x floor": seconds["one worker"] / seconds["floor"] <= 1.1,
        "one worker >= 2 x faster than naive": seconds["naive"] / seconds["one worker"] >= 2,
        "two workers >= 3.4 x faster than naive": seconds["naive"] / seconds["two workers"] >= 3.4,
        "best AUC >= naive's - .002": auc["one worker"] >= auc["naive"] - 0.002,
    }
    for target, met in targets.items():
        print(f"  {'ok    ' if met else 'MISSED'} {target}")


def report_more(results: dict[str, list[dict[str, float]]]) -> None:
    seconds = {way: median(result["seconds"] for result in found) for way, found in results.items()}
    for way, value in seconds.items():
        print(f"{way:26}{value:9.2f} s{value / seconds['floor']:9.2f} x floor")
    rate = {way: median(result["rate"] for result in results[way]) for way in MORE}
    one, two = rate["Dask, one process"], rate["Dask, two processes"]
    print(f"  trials a second from the first to the last: one Dask process {one:.2f}, two {two:.2f}")
    print(f"  {'ok    ' if two / one >= 1.8 else 'MISSED'} two Dask processes {two / one:.2f} x one (>= 1.8)")
    for way in ("one worker", "one worker, server"):
        ratio = seconds[way] / seconds["floor"]
        print(f"  {'ok    ' if ratio <= 1.1 else 'MISSED'} {way}: {ratio:.2f} x floor (<= 1.1)")


def draw(results: dict[str, list[dict[str, float]]], trials: int) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 3), dpi=110, layout="constrained")
    axes = figure.add_subplot()
    ways = list(results)
    values = [median(result["seconds"] for result in results[way]) for way in ways]
    bars = axes.barh(ways, values, color=["#8c8c8c", "#8c8c8c", "#2c7fb8", "#2c7fb8"])
    axes.bar_label(bars, labels=[f"{value:.1f} s" for value in values], padding=3)
    axes.invert_yaxis()
    axes.margins(x=0.15)
    axes.set_xlabel("seconds")
    axes.set_title(f"{trials} trials x {FOLDS} folds x {ROUNDS} rounds", loc="left")
    axes.spines[["top", "right"]].set_visible(False)
    Path("figures").mkdir(exist_ok=True)
    figure.savefig("figures/training.png")


def rows() -> tuple[Any, Any]:
    """The contract and the training side of the shipped data."""
    from pipeline.core.contract.schema import Schema
    from pipeline.training.preparation import prepare
    from pipeline.training.settings import TrainSettings

    settings = TrainSettings.load("conf/train.yaml")
    return settings, prepare(settings, Schema.load(conf_folder() / "schema.yaml"))


def parameter_sets(settings: Any, trials: int) -> list[dict[str, Any]]:
    """The same parameters for every way: trial 0, then draws from the search space."""
    random = np.random.default_rng(settings.seed)
    drawn = [
        {name: draw_one(random, allowed) for name, allowed in settings.search_space.items()} for _ in range(trials)
    ]
    return [settings.first_parameters, *drawn][:trials]


def draw_one(random: np.random.Generator, allowed: Any) -> float:
    if allowed.integer:
        return int(random.integers(int(allowed.low), int(allowed.high) + 1))
    if allowed.log:
        return float(np.exp(random.uniform(np.log(allowed.low), np.log(allowed.high))))
    return float(random.uniform(allowed.low, allowed.high))


def naive(trials: int) -> dict[str, float]:
    """A scikit-learn pipeline in ``cross_val_score``, and a fluent nested run a trial."""
    import mlflow
    from sklearn.feature_extraction import DictVectorizer
    from sklearn.model_selection import StratifiedKFold, cross_val_score
    from sklearn.pipeline import Pipeline
    from xgboost import XGBClassifier

    from pipeline.core.model.features import feature_dict

    settings, prepared = rows()
    applications = [
        feature_dict(row, prepared.schema)
        for row in prepared.train.frame.replace({np.nan: None}).to_dict("records")
    ]
    sets = parameter_sets(settings, trials)
    with ExitStack() as stack:
        tracked(stack, server=False)
    best = 0.0
    begin = time.perf_counter()
    with mlflow.start_run():
        for parameters in sets:
            with mlflow.start_run(nested=True):
                model = XGBClassifier(
                    n_estimators=ROUNDS, n_jobs=1, random_state=settings.seed, **xgb_names(parameters)
                )
                pipeline = Pipeline([("vectorizer", DictVectorizer()), ("model", model)])
                folds = StratifiedKFold(FOLDS, shuffle=True, random_state=settings.seed)
                scores = cross_val_score(
                    pipeline, applications, prepared.train.labels, cv=folds, scoring="roc_auc"
                )
                for name, value in parameters.items():
                    mlflow.log_param(name, value)
                for fold, score in enumerate(scores):
                    mlflow.log_metric("fold_auc", score, step=fold)
                mlflow.log_metric("cv_auc", float(scores.mean()))
                best = max(best, float(scores.mean()))
    return {"seconds": time.perf_counter() - begin, "auc": best}


def xgb_names(parameters: dict[str, Any]) -> dict[str, Any]:
    """The scikit-learn interface calls eta otherwise."""
    return {{"eta": "learning_rate"}.get(name, name): value for name, value in parameters.items()}


def floor(trials: int) -> dict[str, float]:
    """No tracking: rows encoded and binned once, one thread, an Optuna study in memory, no MLflow."""
    import optuna

    from pipeline.training.sampling import distributions

    settings, prepared = rows()
    folds = fold_set(settings, prepared)
    sampler = replaying_sampler(settings, parameter_sets(settings, trials))
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    begin = time.perf_counter()
    study = optuna.create_study(sampler=sampler)
    best = 0.0
    for _ in range(trials):
        trial = study.ask(distributions(settings))
        means = folds.evaluate(trial.params, threads=1).means
        study.tell(trial, means["log_loss"])
        best = max(best, means["auc"])
    return {"seconds": time.perf_counter() - begin, "auc": best}


def ours(
    workers: int | None, *, server: bool = False, processes: int | None = None
) -> Callable[[int], dict[str, float]]:
    """Measure the search of this project, as ``train`` runs it: Optuna in SQLite, every trial an MLflow run.

    Parameters
    ----------
    workers
        As of ``train --workers``.
    server
        Write to an MLflow server instead of straight into SQLite.
    processes
        Evaluate on a Dask cluster of so many processes, which runs already when the time begins.
    """

    def search_all(trials: int) -> dict[str, float]:
        with ExitStack() as stack:
            address = stack.enter_context(dask_cluster(processes)) if processes else None
            return search_on(ClusterSettings(address=address) if address else None, tracked(stack, server), trials)

    def search_on(cluster: ClusterSettings | None, folder: str, trials: int) -> dict[str, float]:
        from pipeline.training.search import search
        from pipeline.training.study import open_study
        from pipeline.training.tracking import parent_run
        from pipeline.training.trial_writer import trial_writer
        from pipeline.training.trials import evaluation_of, finished_trials
        from pipeline.training.workers import open_pool

        settings, prepared = rows()
        settings = settings.model_copy(update={"trials": trials, "storage": f"sqlite:///{folder}/optuna.db"})
        folds = fold_set(settings, prepared)
        finished: list[float] = []
        with open_study(settings, "benchmark", {}) as study:
            study.sampler = replaying_sampler(settings, parameter_sets(settings, trials))
            begin = time.perf_counter()
            with (
                parent_run("benchmark", "benchmark", lock=None, heartbeat=10, stale_after=60) as parent,
                trial_writer(parent, "benchmark", [], 60) as writer,
                open_pool(folds, workers, cluster) as pool,
            ):

                def on_finished(trial: Any) -> None:
                    finished.append(time.perf_counter())
                    writer.put(trial)

                search(study, pool, settings, on_finished)
            seconds = time.perf_counter() - begin
            best = max(evaluation_of(trial).means["auc"] for trial in finished_trials(study))
        return {"seconds": seconds, "auc": best, "rate": (trials - 1) / (finished[-1] - finished[0])}

    return search_all


def replaying_sampler(settings: Any, sets: list[dict[str, Any]]) -> Any:
    """A sampler that works as hard as the search's own, and then gives trial n the parameters that are n-th."""
    from pipeline.training.sampling import SeededSampler

    class Replaying(SeededSampler):
        def sample_relative(self, study: Any, trial: Any, search_space: Any) -> dict[str, Any]:
            super().sample_relative(study, trial, search_space)
            return {name: sets[trial.number][name] for name in search_space}

        def sample_independent(self, study: Any, trial: Any, name: str, distribution: Any) -> Any:
            super().sample_independent(study, trial, name, distribution)
            return sets[trial.number][name]

    return Replaying(settings.seed)


def fold_set(settings: Any, prepared: Any) -> Any:
    from pipeline.training.fitting import xgboost_parameters
    from pipeline.training.folds import FoldSet, FoldSettings

    # Without early stopping and constraints, which the naive loop has not: as much work for everybody.
    fixed = xgboost_parameters(settings, prepared.schema, prepared.vectorizer)
    del fixed["monotone_constraints"]
    wanted = FoldSettings(fixed, FOLDS, settings.seed, ROUNDS, None)
    return FoldSet(prepared.train.matrix, prepared.train.labels, wanted)


def tracked(stack: ExitStack, server: bool) -> str:
    """Make an MLflow store, behind a server for as long as the stack is open or not, and have MLflow use it."""
    import mlflow

    folder = tempfile.mkdtemp(prefix="benchmark-")
    address = f"sqlite:///{folder}/mlflow.db"
    if server:
        command = (sys.executable, "-m", "mlflow", "server", "--port", "{port}", "--workers", "1",
                   "--backend-store-uri", address, "--artifacts-destination", f"{folder}/artifacts")  # fmt: skip
        environment = {**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
        service = Service("mlflow server", command, ready="/health", environment=environment)
        address = stack.enter_context(running(service)).url
    os.environ["MLFLOW_TRACKING_URI"] = address
    mlflow.set_tracking_uri(address)
    mlflow.create_experiment("benchmark", artifact_location=None if server else f"file://{folder}/artifacts")
    mlflow.set_experiment("benchmark")
    return folder


WAYS = {"naive": naive, "floor": floor, "one worker": ours(1), "two workers": ours(2)}
MORE = {
    "one worker, server": ours(1, server=True),
    "Dask, one process": ours(None, processes=1),
    "Dask, two processes": ours(None, processes=2),
}
"""Measured with ``--more``, beside the floor."""

if __name__ == "__main__":
    main()
