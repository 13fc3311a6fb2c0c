"""Figures of several workers, each a process of its own, as one of them shows them."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry, Histogram, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from service.records.metrics import Metrics, observe_many
from tests.testkit import PROJECT

SCRIPT = """
import sys
from pipeline.core.promoted import Promotion
from service.records.metrics import Metrics
metrics = Metrics()
def answer_with(version):
    tag, since = f"credit_risk_model:v{version}", "2026-01-01T00:00:00+00:00"
    metrics.swapped(Promotion(
        tag=tag, version=version, run_id=str(version), since=since, by="me", why="promote", digests={}
    ))
for line in sys.stdin:
    print(repr(eval(line)), flush=True)
"""
FOLDER = "PROMETHEUS_MULTIPROC_DIR"


class Worker:
    """A process with metrics."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process

    def do(self, expression: str) -> str:
        """Evaluate an expression over ``metrics`` there."""
        assert self.process.stdin
        assert self.process.stdout
        print(expression, file=self.process.stdin, flush=True)
        return self.process.stdout.readline()

    def figures(self, name: str) -> dict[str, float]:
        """What it shows of one metric, by the labels' values."""
        return figures(eval(self.do("metrics.exposition()")), name)


def figures(exposition: bytes, name: str) -> dict[str, float]:
    families = text_string_to_metric_families(exposition.decode())
    samples = [sample for family in families for sample in family.samples if sample.name == f"credit_risk_{name}"]
    found = {" ".join(value for _, value in sorted(sample.labels.items())): sample.value for sample in samples}
    assert len(found) == len(samples), "two samples have the same labels"
    return found


@contextmanager
def worker(folder: Path) -> Iterator[Worker]:
    command = [sys.executable, "-c", SCRIPT]
    environment = {**os.environ, FOLDER: str(folder)}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    # It ends with its input, so with this process.
    with subprocess.Popen(command, cwd=PROJECT, env=environment, text=True, **pipes) as process:  # type: ignore[call-overload]
        yield Worker(process)


def test_the_version_before_stops_being_shown(tmp_path: Path) -> None:
    with worker(tmp_path) as one:
        one.do("answer_with(1)")
        assert one.figures("model_info") == {"credit_risk_model:v1 1 1": 1}
        one.do("answer_with(2)")
        assert one.figures("model_info") == {"credit_risk_model:v1 1 1": 0, "credit_risk_model:v2 2 2": 1}


def test_a_killed_worker_shows_no_version_but_what_it_counted_stays(tmp_path: Path) -> None:
    with worker(tmp_path) as killed, worker(tmp_path) as living:
        killed.do("answer_with(1)")
        killed.do("metrics.behind(True)")
        killed.process.kill()
        os.waitid(
            os.P_PID, killed.process.pid, os.WEXITED | os.WNOWAIT
        )  # dead, and a zombie as long as nobody waits
        living.do("answer_with(2)")
        assert living.figures("model_info") == {"credit_risk_model:v2 2 2": 1}
        assert living.figures("model_behind") == {"": 0}
        assert living.figures("model_swaps_total") == {"": 2}


def test_no_worker_hides_that_another_is_behind(tmp_path: Path) -> None:
    with worker(tmp_path) as behind, worker(tmp_path) as right:
        behind.do("answer_with(1)")
        behind.do("metrics.behind(True)")
        right.do("answer_with(2)")
        right.do("metrics.behind(False)")
        for one in (behind, right):
            assert one.figures("model_behind") == {"": 1}
            assert one.figures("model_info") == {"credit_risk_model:v1 1 1": 1, "credit_risk_model:v2 2 2": 1}


def test_a_dead_workers_number_may_be_anothers_by_now(tmp_path: Path) -> None:
    with worker(tmp_path) as killed:
        killed.do("answer_with(1)")
    for file in tmp_path.glob(f"gauge_*_{killed.process.pid}.db"):
        reused = file.with_name(file.name.replace(str(killed.process.pid), str(os.getpid())))
        file.rename(reused)
        os.utime(reused, (0, 0))  # written before this process began
    with worker(tmp_path) as living:
        living.do("answer_with(2)")
        assert living.figures("model_info") == {"credit_risk_model:v2 2 2": 1}


def test_many_values_at_once_are_counted_as_one_by_one() -> None:
    bounds, values = (0.1, 0.2, 0.5), [0.0, 0.1, 0.10001, 0.2, 0.5, 0.50001, 3.0] * 30

    def histogram() -> tuple[Histogram, CollectorRegistry]:
        registry = CollectorRegistry()
        return Histogram("h", "Text.", registry=registry, buckets=bounds), registry

    (many, many_registry), (each, each_registry) = histogram(), histogram()
    observe_many(many, bounds, values)
    for value in values:
        each.observe(value)
    shown, expected = (
        {
            (sample.name, *sample.labels.values()): sample.value
            for family in text_string_to_metric_families(generate_latest(registry).decode())
            for sample in family.samples
            if not sample.name.endswith("_created")
        }
        for registry in (many_registry, each_registry)
    )
    assert shown.keys() == expected.keys()
    assert shown == pytest.approx(expected)


def test_requests_and_decisions_are_counted_at_once() -> None:
    metrics = Metrics()
    for code in (200, 200, 400):
        metrics.answered("/classify", code, 0.002)
    metrics.decided("credit_risk_model:v1", ["APPROVED", "DECLINED", "APPROVED"], [0.1, 0.9, 0.2])
    exposed = metrics.exposition()
    assert figures(exposed, "requests_total") == {"200 /classify": 2, "400 /classify": 1}
    assert figures(exposed, "decisions_total") == {
        "credit_risk_model:v1 APPROVED": 2, "credit_risk_model:v1 DECLINED": 1
    }  # fmt: skip
    assert figures(exposed, "probability_count") == {"": 3}
    assert figures(exposed, "request_seconds_count") == {"/classify": 3}
    assert figures(exposed, "batch_rows_sum") == {"": 3}
