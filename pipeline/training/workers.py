"""Evaluate parameters in this process, in worker processes of this machine, or on a Dask cluster."""

from __future__ import annotations

import gc
import logging
import multiprocessing.forkserver
import signal
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Executor, Future
from contextlib import contextmanager
from typing import Any, Protocol

from pipeline.cluster import ClusterSettings, connect
from pipeline.core.machine import available_cores
from pipeline.training.folds import FoldSet, Timed, timed

_PLUGIN = "training-rows"

_DASK = {
    # Workers are forked off one process that has imported already, instead of importing each for itself.
    "distributed.worker.multiprocessing-method": "forkserver",
    # Nobody looks at a profile of so short a life; taking it disturbs the evaluations.
    "distributed.worker.profile.enabled": False,
}


class Pool(Protocol):
    """Where parameters are evaluated.

    Attributes
    ----------
    slots
        How many evaluations to keep submitted.
    """

    slots: int

    def submit(self, parameters: Mapping[str, Any], bars: Sequence[float]) -> Future[Timed]:
        """Begin an evaluation; see `FoldSet.evaluate`."""


@contextmanager
def open_pool(folds: FoldSet, workers: int | None, cluster: ClusterSettings | None) -> Iterator[Pool]:
    """Open a pool that holds the training rows.

    Parameters
    ----------
    workers
        Parallel evaluations, at most one for each core of this machine; None: one for each core.
    cluster
        A running Dask cluster to use instead of this machine; it evaluates one set of parameters a thread.

    Raises
    ------
    ClusterError
        The cluster cannot be reached, or has no workers.
    """
    cores, workers = available_cores(), _parallel(workers)
    if cluster is None and workers == 1:
        _rest_the_collector()
        yield InProcess(folds, threads=cores)
        return
    with _client(workers, cluster) as client:
        # A plugin reaches each worker once, also one that joins later or is restarted after a crash.
        client.register_plugin(_rows_plugin(folds, ours=cluster is None), name=_PLUGIN)
        threads = 1 if cluster else cores // workers
        # One evaluation waits, so that no worker does: asking for the next takes the sampler a while.
        slots = sum(client.nthreads().values()) + 1
        yield _DaskPool(client.get_executor(pure=False), slots, threads)


def begin_to_start(workers: int | None, cluster: ClusterSettings | None) -> None:
    """Start the process that local workers are forked off, if there will be any: see `open_pool`.

    It imports what they need while the caller goes on. A second call does nothing.
    """
    if cluster is None and _parallel(workers) > 1:
        multiprocessing.get_context("forkserver").set_forkserver_preload(
            ["distributed", "sklearn.model_selection", "xgboost"]
        )
        multiprocessing.forkserver.ensure_running()


def _parallel(workers: int | None) -> int:
    cores = available_cores()
    return min(workers or cores, cores)


class InProcess:
    """Evaluates one set of parameters after another, here and now."""

    slots = 1

    def __init__(self, folds: FoldSet, threads: int) -> None:
        self._folds, self._threads = folds, threads

    def submit(self, parameters: Mapping[str, Any], bars: Sequence[float]) -> Future[Timed]:
        """Evaluate, and return what is already done."""
        future: Future[Timed] = Future()
        try:
            future.set_result(timed(self._folds, parameters, self._threads, bars))
        except Exception as error:
            future.set_exception(error)
        return future


class _DaskPool:
    def __init__(self, executor: Executor, slots: int, threads: int) -> None:
        self.slots = slots
        self._executor, self._threads = executor, threads

    def submit(self, parameters: Mapping[str, Any], bars: Sequence[float]) -> Future[Timed]:
        return self._executor.submit(_evaluate_on_worker, parameters, self._threads, bars)


def _rest_the_collector() -> None:
    """Keep what is loaded by now out of the garbage collector's rounds: 3 % of an evaluation's time."""
    gc.collect()
    gc.freeze()


def _evaluate_on_worker(parameters: Mapping[str, Any], threads: int, bars: Sequence[float]) -> Timed:
    from distributed import get_worker

    return timed(get_worker().plugins[_PLUGIN].folds, parameters, threads, bars)


def _rows_plugin(folds: FoldSet, *, ours: bool) -> Any:
    from distributed import WorkerPlugin

    class Rows(WorkerPlugin):
        def __init__(self, folds: FoldSet, ours: bool) -> None:
            self.folds, self._ours = folds, ours

        def setup(self, worker: Any) -> None:
            if self._ours:
                # A terminal sends Ctrl-C to all our processes; the one that drives the study ends the others.
                signal.signal(signal.SIGINT, signal.SIG_IGN)
                _rest_the_collector()

    return Rows(folds, ours)


@contextmanager
def _client(workers: int, cluster: ClusterSettings | None) -> Iterator[Any]:
    begin_to_start(workers, cluster)
    import dask
    from distributed import Client, LocalCluster

    if cluster:
        with connect(cluster.address) as client:
            yield client
        return
    with (
        dask.config.set(_DASK),
        LocalCluster(
            n_workers=workers,
            threads_per_worker=1,
            processes=True,
            dashboard_address="127.0.0.1:0",
            memory_limit=0,
            silence_logs=logging.CRITICAL,
        ) as local,
        Client(local) as client,
    ):
        yield client
