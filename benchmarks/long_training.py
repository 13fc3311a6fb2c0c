"""Training on a table longer than memory, measured: seconds and peak memory of survey, fit and test.

python -m benchmarks.big_table /data/big --rows 20000000
python -m benchmarks.long_training /data/big                # on this machine
python -m benchmarks.long_training /data/big --workers 2    # the fit on a Dask cluster of so many processes
"""

from __future__ import annotations

import argparse
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import psutil
from distributed import Client

from benchmarks.rounds import markdown
from pipeline.cluster import ClusterSettings
from pipeline.core.contract.schema import Schema
from pipeline.core.model.features import make_vectorizer
from pipeline.core.settings import conf_folder
from pipeline.evaluation.metrics import auc
from pipeline.training.fitting import xgboost_parameters
from pipeline.training.settings import TrainSettings
from pipeline.training.streaming import fit_streamed, score_streamed
from pipeline.training.survey import survey
from tests.testkit.cluster import dask_cluster

ResultT = TypeVar("ResultT")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("table", help="folder of Parquet, see benchmarks.big_table")
    parser.add_argument("--rounds", type=int, default=50)
    parser.add_argument("--workers", type=int, help="fit on a local Dask cluster of so many processes")
    options = parser.parse_args()
    settings = TrainSettings.load(conf_folder() / "train.yaml", data=options.table)
    if options.workers is None:
        measure(settings, options.rounds, Watch([psutil.Process()]))
        return
    with dask_cluster(options.workers) as address:
        with Client(address) as client:
            processes = [psutil.Process(pid) for pid in client.run(os.getpid).values()]
        on_cluster = settings.model_copy(update={"cluster": ClusterSettings(address=address)})
        measure(on_cluster, options.rounds, Watch([psutil.Process(), *processes]))


def measure(settings: TrainSettings, rounds: int, watch: Watch) -> None:
    schema = Schema.load(conf_folder() / "schema.yaml")
    parameters = default_parameters(settings, schema)
    found = watch.step("survey", lambda: survey(settings, schema))
    booster = watch.step("fit", lambda: fit_streamed(settings, schema, found, parameters, rounds))
    labels, probabilities = watch.step("test", lambda: score_streamed(settings, schema, found, booster))
    print(f"\n{len(found.sides):,} rows, {rounds} rounds, test AUC {auc(labels, probabilities):.4f}\n")
    header = ["step", "seconds", "peak MiB here", *(f"worker {n}" for n in range(1, len(watch.processes)))]
    print(markdown(header, watch.rows))


def default_parameters(settings: TrainSettings, schema: Schema) -> dict[str, Any]:
    """The recipe that the search tries first."""
    return {**xgboost_parameters(settings, schema, make_vectorizer(schema)), **settings.first_parameters}


class Watch:
    """Takes the time of steps, and the peak resident memory of some processes during each."""

    def __init__(self, processes: list[psutil.Process]) -> None:
        self.processes = processes
        self.rows: list[list[object]] = []

    def step(self, name: str, work: Callable[[], ResultT]) -> ResultT:
        """Do the work, and add a row about it."""
        begin = time.perf_counter()
        with self._peaks() as peaks:
            result = work()
        seconds = time.perf_counter() - begin
        self.rows.append([name, f"{seconds:.0f}", *(f"{peak >> 20:,}" for peak in peaks)])
        return result

    @contextmanager
    def _peaks(self) -> Iterator[list[int]]:
        peaks = [0] * len(self.processes)
        done = threading.Event()

        def look() -> None:
            while not done.wait(0.05):
                peaks[:] = [
                    max(peak, process.memory_info().rss)
                    for peak, process in zip(peaks, self.processes, strict=True)
                ]

        thread = threading.Thread(target=look, daemon=True)
        thread.start()
        try:
            yield peaks
        finally:
            done.set()
            thread.join()


if __name__ == "__main__":
    main()
