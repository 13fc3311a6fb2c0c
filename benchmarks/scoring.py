"""Batch scoring, measured: naive, MLflow's pyfunc, ours, and the bare prediction as the limit.

    python -m benchmarks.scoring                    # 1M rows, the encoders and the scorers
    python -m benchmarks.scoring --memory           # and the peak memory of 1M and of 10M rows

Rounds are interleaved: what a busy machine does to one, it does to all. The bare prediction gets a matrix that is
ready in memory and writes nothing; `score` reads Parquet, checks every row, encodes, predicts and writes Parquet.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import xgboost as xgb

from benchmarks.big_table import write_table
from pipeline.core.contract.schema import Schema
from pipeline.core.machine import available_cores
from pipeline.core.model.encoders import FrameEncoder
from pipeline.core.model.features import feature_dict, make_vectorizer
from pipeline.core.policy import Policy
from pipeline.core.settings import conf_folder
from pipeline.registry.logged_model import Parts, read_parts, write_parts
from pipeline.scoring.engine import Model
from pipeline.scoring.output import Files, score_file
from pipeline.scoring.settings import ScoreSettings
from pipeline.tables.sources import open_source
from pipeline.training.fitting import fit, xgboost_parameters
from pipeline.training.preparation import prepare
from pipeline.training.settings import TrainSettings
from pipeline.training.trials import Best

NAIVE_ROWS = 50_000
"""The naive ways are measured on so many rows and scaled up: they take the same time for each row."""

TREES = 200
"""Trees of the measured model."""

OURS_ENCODE = "FrameEncoder, Arrow"
BARE = "bare inplace_predict"
FIGURES = Path("figures")

Timed = Callable[[], float]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=available_cores())
    parser.add_argument("--memory", action="store_true", help="also the peak memory at one and ten times the rows")
    parser.add_argument("--alone", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.alone:
        source, target, parts = map(Path, options.alone)
        score_alone(source, target, parts, options.threads)
        return
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(Path(folder), options.rows, options.threads)
        print(f"{options.rows:,} rows, {options.threads} threads, medians of {options.rounds} interleaved rounds")
        encoding = interleaved(bench.encoders(), options.rounds)
        show("seconds to encode", encoding, OURS_ENCODE)
        scoring = interleaved(bench.scorers(), options.rounds)
        show("seconds to score", scoring, BARE)
        draw(encoding, scoring, options.rows)
        if options.memory:
            show_memory(bench, options.rows)


class Bench:
    """A table, a model of the default recipe, and every way to bring them together."""

    def __init__(self, folder: Path, rows: int, threads: int) -> None:
        self.folder, self.threads = folder, threads
        self.table = folder / "table"
        write_table(self.table, rows)
        schema, booster = default_model()
        self.model = Model("benchmark", booster, make_vectorizer(schema), schema)
        self.parts = folder / "parts"
        self.parts.mkdir()
        write_parts(self.parts, Parts(booster, self.model.vectorizer, schema))
        self.frame = pd.read_parquet(self.table)
        self.arrow = pq.read_table(self.table)
        self.matrix = FrameEncoder(schema, self.model.vectorizer).transform(self.arrow)
        self._check()

    def _check(self) -> None:
        """What is measured must be the same matrix, bit for bit."""
        rows: list[dict[str, Any]] = self.frame.head(2000).replace({np.nan: None}).to_dict("records")  # type: ignore[assignment]
        expected = self.model.vectorizer.transform([feature_dict(row, self.model.schema) for row in rows])
        found = self.matrix[:2000]
        if not (found.view(np.uint32) == expected.view(np.uint32)).all():
            raise RuntimeError("the encoder's matrix is not the DictVectorizer's")

    def encoders(self) -> dict[str, Timed]:
        """Name → seconds to encode all rows."""
        encode = FrameEncoder(self.model.schema, self.model.vectorizer).transform
        return {
            "to_dict + DictVectorizer (no ratios)": self._scaled(self._naive_matrix),
            OURS_ENCODE: timed(lambda: encode(self.arrow)),
            "FrameEncoder, pandas": timed(lambda: encode(self.frame)),
        }

    def scorers(self) -> dict[str, Timed]:
        """Name → seconds to score all rows; all but the bare prediction read and write Parquet."""
        return {
            "to_dict + DictVectorizer + predict": self._scaled(self._naive_score),
            "mlflow.pyfunc": timed(self._pyfunc_score()),
            "score": timed(self._score),
            BARE: timed(self._bare),
        }

    def _scaled(self, work: Callable[[pd.DataFrame], object]) -> Timed:
        part = self.frame.head(NAIVE_ROWS)
        measure = timed(lambda: work(part))
        return lambda: measure() * len(self.frame) / len(part)

    def _naive_matrix(self, frame: pd.DataFrame) -> Any:
        return self.model.vectorizer.transform(frame[list(self.model.schema.features)].to_dict("records"))

    def _naive_score(self, frame: pd.DataFrame) -> None:
        self.model.booster.set_param({"nthread": self.threads})
        found = frame.assign(probability=self.model.booster.inplace_predict(self._naive_matrix(frame)))
        found.to_parquet(self.folder / "naive.parquet")

    def _pyfunc_score(self) -> Callable[[], None]:
        import mlflow

        code = Path("pipeline")
        artifacts = {path.stem: str(path) for path in self.parts.iterdir()}
        folder = self.folder / "pyfunc"
        mlflow.pyfunc.save_model(
            str(folder),
            python_model=str(code / "pyfunc.py"),
            artifacts=artifacts,
            code_paths=[str(code)],
            pip_requirements=["mlflow"],
        )
        model = mlflow.pyfunc.load_model(str(folder))

        def work() -> None:
            frame = pd.read_parquet(self.table)
            frame.assign(probability=model.predict(frame)).to_parquet(self.folder / "pyfunc.parquet")

        return work

    def _score(self) -> None:
        run_score(self.table, self.folder / "ours.parquet", self.model, self.threads)

    def _bare(self) -> None:
        self.model.booster.set_param({"nthread": self.threads})
        self.model.booster.inplace_predict(self.matrix)


def timed(work: Callable[[], object]) -> Timed:
    def measure() -> float:
        begin = time.perf_counter()
        work()
        return time.perf_counter() - begin

    return measure


def interleaved(ways: Mapping[str, Timed], rounds: int) -> dict[str, float]:
    """Median seconds of each way, all of them run in turn, round after round."""
    seen: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, measure in ways.items():
            seen[name].append(measure())
    return {name: median(seconds) for name, seconds in seen.items()}


def default_model() -> tuple[Schema, xgb.Booster]:
    """The contract, and a booster of the recipe that the search tries first."""
    settings = TrainSettings.load(conf_folder() / "train.yaml")
    schema = Schema.load(conf_folder() / "schema.yaml")
    prepared = prepare(settings, schema)
    fixed = xgboost_parameters(settings, schema, prepared.vectorizer)
    return schema, fit(prepared.train, Best(0, settings.first_parameters, TREES, {}), fixed)


def run_score(source: Path, target: Path, model: Model, threads: int) -> None:
    settings = ScoreSettings.load(conf_folder() / "score.yaml", threads=threads)
    thresholds = Policy.load(conf_folder() / "policy.yaml").thresholds
    score_file(open_source(source), model, settings, thresholds, Files(target, target.with_suffix(".rejects.csv")))


def score_alone(source: Path, target: Path, parts: Path, threads: int) -> None:
    """Score in this process and print its peak memory in MiB."""
    run_score(source, target, Model("benchmark", *read_parts(parts)), threads)
    print(peak_memory())


def peak_memory() -> int:
    """Highest resident memory of this process so far, in MiB (Linux)."""
    # Not getrusage: its figure is handed down from the process that started this one.
    peak = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM:"))
    return int(peak.split()[1]) // 1024


def show_memory(bench: Bench, rows: int) -> None:
    print("\n| rows | peak resident MiB of `score` |\n|---:|---:|")
    for times in (1, 10):
        table = bench.table
        if times > 1:
            table = bench.folder / "long"
            write_table(table, times * rows)
        arguments = [str(table), str(bench.folder / "out.parquet"), str(bench.parts)]
        command = [
            sys.executable,
            "-m",
            "benchmarks.scoring",
            "--threads",
            str(bench.threads),
            "--alone",
            *arguments,
        ]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        print(f"| {times * rows:,} | {int(done.stdout):,} |", flush=True)


def show(title: str, seconds: Mapping[str, float], base: str) -> None:
    print(f"\n| {title} | median | ÷ {base} |\n|---|---:|---:|")
    for name, value in seconds.items():
        print(f"| {name} | {value:.2f} | {value / seconds[base]:.2f} |", flush=True)


def draw(encoding: Mapping[str, float], scoring: Mapping[str, float], rows: int) -> None:
    import matplotlib as mpl
    from matplotlib.figure import Figure

    mpl.use("Agg")
    figure = Figure(figsize=(9, 4.5), layout="constrained")
    for axes, seconds, title in zip(
        figure.subplots(2, 1, height_ratios=(len(encoding), len(scoring))),
        (encoding, scoring),
        ("encode", "score"),
        strict=True,
    ):
        names = list(seconds)[::-1]
        bars = axes.barh(names, [seconds[name] for name in names], color="#0b6e4f")
        axes.bar_label(bars, [f"{seconds[name]:.2f} s" for name in names], padding=4)
        axes.set_xscale("log")
        axes.set_xlim(right=4 * max(seconds.values()))
        axes.set_title(f"Seconds to {title} {rows:,} rows (log scale)", loc="left")
        axes.spines[["top", "right"]].set_visible(False)
    FIGURES.mkdir(exist_ok=True)
    figure.savefig(FIGURES / "scoring.png", dpi=150)
    print(f"\n{FIGURES / 'scoring.png'}")


if __name__ == "__main__":
    main()
