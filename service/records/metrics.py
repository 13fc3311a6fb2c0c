"""Requests and decisions in, Prometheus metrics out, added up over the workers by prometheus_client's own files.

Raising a value that processes share costs 2 µs and observing a histogram 3 µs. So requests are tallied in plain
integers, and the tally is handed over once in each turn of the event loop: at 16 requests a turn for a sixteenth
of the cost, and always before anybody can ask for the figures.
"""

from __future__ import annotations

import asyncio
import os
from bisect import bisect_left
from collections import Counter as Tally
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

import numpy as np
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest, multiprocess

from pipeline.core.promoted import Promotion

CONTENT_TYPE = b"text/plain; version=0.0.4; charset=utf-8"

_PROBABILITIES = tuple(round(0.05 * step, 2) for step in range(1, 21))
_SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)
_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)


class _Distribution:
    """A histogram's values, tallied in plain integers until `hand_over`."""

    def __init__(self, child: Histogram, bounds: Sequence[float]) -> None:
        self._child = child
        self._bounds = bounds
        self._tally: Tally[int] = Tally()
        self._sum = 0.0

    def add(self, value: float) -> None:
        self._tally[bisect_left(self._bounds, value)] += 1
        self._sum += value

    def add_many(self, values: Sequence[float]) -> None:
        buckets = np.searchsorted(self._bounds, values, side="left")
        self._tally.update(buckets.tolist())
        self._sum += sum(values)

    def hand_over(self) -> None:
        if not self._tally:
            return
        # `Histogram.observe` takes one value at a time: twice the cost of these for each of a thousand rows.
        for bucket, times in self._tally.items():
            self._child._buckets[bucket].inc(times)
        self._child._sum.inc(self._sum)
        self._tally.clear()
        self._sum = 0.0


class Metrics:
    """The service's own metrics, all under ``credit_risk_``."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._requests = self._counter("requests", "Requests answered", "endpoint", "code")
        self._decisions = self._counter("decisions", "Decisions made: rows scored", "status", "model")
        self._swaps = self._counter("model_swaps", "Times that a version began to answer in a worker")
        self._refusals = self._counter("model_refusals", "Times that a promoted version failed its checks")
        self._dropped = self._counter("decision_log_dropped", "Decisions answered but not recorded", "why")
        self._duration = self._histogram("request_seconds", "Time to answer", _SECONDS, "endpoint")
        self._probability = _Distribution(
            self._histogram("probability", "Probability of default", _PROBABILITIES), _PROBABILITIES
        )
        self._batches = _Distribution(self._histogram("batch_rows", "Rows scored in one call", _SIZES), _SIZES)
        self._info = self._gauge("model_info", "1 for the version that answers", "model", "version", "run_id")
        self._age = self._gauge("promoted_seconds", "Seconds since the promoted version was promoted")
        self._behind = self._gauge("model_behind", "1 while another version than the promoted one answers")
        self._tally: Tally[tuple[Counter, tuple[str, ...]]] = Tally()
        self._durations: dict[str, _Distribution] = {}
        self._scheduled = False
        self._shown: Any = None

    def answered(self, endpoint: str, code: int, seconds: float) -> None:
        """Count one answer."""
        self._tally[self._requests, (endpoint, str(code))] += 1
        duration = self._durations.get(endpoint)
        if duration is None:
            duration = self._durations[endpoint] = _Distribution(self._duration.labels(endpoint), _SECONDS)
        duration.add(seconds)
        self._schedule()

    def decided(self, model: str, statuses: Sequence[str], probabilities: Sequence[float]) -> None:
        """Count one batch of decisions, scored in one call of the booster."""
        for status, times in Tally(statuses).items():
            self._tally[self._decisions, (status, model)] += times
        self._probability.add_many(probabilities)
        self._batches.add(len(statuses))
        self._schedule()

    def swapped(self, promotion: Promotion) -> None:
        """Count a switch, and show the version that answers now."""
        self._swaps.inc()
        if self._shown is not None:
            self._shown.set(0)
        self._shown = self._info.labels(promotion.tag, str(promotion.version), promotion.run_id)
        self._shown.set(1)

    def refused(self) -> None:
        """Count a promoted version that failed its checks."""
        self._refusals.inc()

    def dropped(self, why: str, rows: int) -> None:
        """Count decisions that the decision log could not take. Called from its thread too."""
        self._dropped.labels(why).inc(rows)

    def show(self, promotion: Promotion | None, *, behind: bool) -> None:
        """Bring what changes with time up to this moment."""
        self._hand_over()
        if promotion is not None:
            self._age.set(max(0.0, (datetime.now(UTC) - _moment(promotion.since)).total_seconds()))
        self._behind.set(int(behind))

    def exposition(self) -> bytes:
        """Give all metrics of all workers in Prometheus' text format."""
        if "PROMETHEUS_MULTIPROC_DIR" not in os.environ:
            return generate_latest(self.registry)
        everyone = CollectorRegistry()
        multiprocess.MultiProcessCollector(everyone)  # type: ignore[no-untyped-call]
        return generate_latest(everyone)

    def _schedule(self) -> None:
        if not self._scheduled:
            self._scheduled = True
            asyncio.get_running_loop().call_soon(self._hand_over)

    def _hand_over(self) -> None:
        self._scheduled = False
        for (counter, labels), times in self._tally.items():
            counter.labels(*labels).inc(times)
        self._tally.clear()
        for distribution in (self._probability, self._batches, *self._durations.values()):
            distribution.hand_over()

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(f"credit_risk_{name}", f"{text}.", labels, registry=self.registry)

    def _histogram(self, name: str, text: str, bounds: Sequence[float], *labels: str) -> Histogram:
        return Histogram(f"credit_risk_{name}", f"{text}.", labels, registry=self.registry, buckets=bounds)

    def _gauge(self, name: str, text: str, *labels: str) -> Gauge:
        # The worker that set it last knows best; a dead worker's value is soon overwritten.
        return Gauge(
            f"credit_risk_{name}", f"{text}.", labels, registry=self.registry, multiprocess_mode="mostrecent"
        )


def _moment(text: str) -> datetime:
    moment = datetime.fromisoformat(text)
    return moment if moment.tzinfo else moment.replace(tzinfo=UTC)
