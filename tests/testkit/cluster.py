"""A Dask cluster of processes on this machine."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from tests.testkit.servers import Process

_CLUSTER = """
import sys
from distributed import Client, LocalCluster
def work_before():
    import sklearn.model_selection, xgboost
with LocalCluster(
    n_workers={workers}, threads_per_worker=1, host="127.0.0.1", dashboard_address=None, memory_limit=0
) as cluster:
    with Client(cluster) as client:
        client.run(work_before)
    print(cluster.scheduler_address, flush=True)
    sys.stdin.read()
"""


@contextmanager
def dask_cluster(workers: int) -> Iterator[str]:
    """Run a Dask cluster of processes with one thread each, and yield its scheduler's address.

    They have imported XGBoost, like those of a cluster that has worked before.

    It stands in processes of its own, as users start it elsewhere: in this one it would import the code that it is
    sent, in the place of the code that runs here.
    """
    command = [sys.executable, "-c", _CLUSTER.format(workers=workers)]
    with Process(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd="/") as process:
        assert process.stdin is not None
        assert process.stdout is not None
        yield process.stdout.readline().strip()
        process.stdin.close()
