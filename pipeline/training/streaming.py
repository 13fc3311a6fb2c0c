"""Fit and test a booster on a Parquet table that is longer than memory, here or on a Dask cluster.

On a cluster each worker trains on its own share of the row groups, and the workers agree on every split.
"""

from __future__ import annotations

import socket
from collections.abc import Mapping
from contextlib import suppress
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import xgboost as xgb

from pipeline.cluster import cluster_failures, connect
from pipeline.core.contract.schema import Schema
from pipeline.core.errors import ClusterError, first_line
from pipeline.core.machine import available_cores
from pipeline.core.model.features import Matrix
from pipeline.training.settings import TrainSettings
from pipeline.training.share import Share, share_of
from pipeline.training.survey import TEST, Survey


def fit_streamed(
    settings: TrainSettings, schema: Schema, found: Survey, parameters: Mapping[str, Any], rounds: int
) -> xgb.Booster:
    """Train on every row of the training side.

    Raises
    ------
    ClusterError
        The cluster cannot be reached, or its connection broke.
    """
    share = share_of(settings, schema, found)
    if settings.cluster is None:
        return share.train({**parameters, "nthread": available_cores()}, rounds, shown=True)
    with connect(settings.cluster.address) as client, cluster_failures():
        return _train_on_cluster(client, share, dict(parameters), rounds)


def score_streamed(
    settings: TrainSettings, schema: Schema, found: Survey, booster: xgb.Booster
) -> tuple[Matrix, Matrix]:
    """Score every held-out row: labels and probabilities of default, both shape (n,), float32."""
    booster.set_param({"nthread": available_cores()})
    pages = share_of(settings, schema, found).pages(TEST)
    scored = [(labels, booster.inplace_predict(matrix)) for matrix, labels in pages]
    labels, probabilities = (np.concatenate(part) for part in zip(*scored, strict=True))
    return labels, probabilities


def _train_on_cluster(client: Any, share: Share, parameters: dict[str, Any], rounds: int) -> xgb.Booster:
    from xgboost.tracker import RabitTracker

    workers = client.nthreads()
    shares = share.split(len(workers))
    tracker = RabitTracker(len(shares), host_ip=_address_towards(client.scheduler.address), timeout=60)
    tracker.start()
    # One task a worker, all at once: they wait for each other at every split.
    futures = [
        client.submit(
            _train_on_worker,
            client.scatter(part, workers=[address], hash=False),
            {**parameters, "nthread": threads},
            rounds,
            tracker.worker_args(),
            workers=[address],
            allow_other_workers=False,
            pure=False,
            retries=0,
        )
        for part, (address, threads) in zip(shares, workers.items(), strict=False)
    ]
    try:
        return xgb.Booster(model_file=bytearray(client.gather(futures)[0]))
    except xgb.core.XGBoostError as error:  # one worker is lost, and the others notice it inside XGBoost
        raise ClusterError(
            f"a worker failed while training ({first_line(error)}). Look at its log, and run again."
        ) from None
    finally:
        with suppress(xgb.core.XGBoostError):
            tracker.free()


def _train_on_worker(share: Share, parameters: dict[str, Any], rounds: int, arguments: dict[str, Any]) -> bytes:
    from xgboost.dask import CommunicatorContext

    with CommunicatorContext(**arguments):
        return bytes(share.train(parameters, rounds, shown=False).save_raw("ubj"))


def _address_towards(scheduler: str) -> str:
    """Address of this machine on the way to the scheduler: the one at which its workers reach us."""
    host, port = urlsplit(scheduler).hostname, urlsplit(scheduler).port
    family = socket.AF_INET6 if ":" in (host or "") else socket.AF_INET
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        probe.connect((host, port))  # a datagram socket only looks up the route
        return str(probe.getsockname()[0])
