"""Load test of a running service with Locust: decisions on the shipped rows, one in a hundred in bulk.

::

    locust -f benchmarks/locustfile.py --host http://127.0.0.1:3000
    locust -f benchmarks/locustfile.py --host http://127.0.0.1:3000 --headless -u 16 -t 30s

Locust costs more a request than the service does: start several workers (``--processes -1``) on another machine,
or take ``python -m benchmarks.serving`` when the service itself is to be measured. A key is taken from the
variable ``CREDIT_RISK_API_KEY``.
"""

from __future__ import annotations

import csv
import os
import random
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from locust import FastHttpUser, constant, task

from pipeline.core.contract.requests import request_validator
from pipeline.core.contract.schema import Schema

PROJECT = Path(__file__).resolve().parent.parent
BATCH_ROWS = 100


def applications() -> list[dict[str, Any]]:
    """Read the shipped rows as requests; what the contract does not accept is left out."""
    schema = Schema.load(PROJECT / "conf/schema.yaml")
    with (PROJECT / "data/credit_risk.csv").open(newline="") as file:
        rows = [_application(row, schema) for row in csv.DictReader(file)]
    validate = request_validator(schema).validate_python
    return [row for row in rows if _is_valid(row, validate)]


def _application(row: Mapping[str, str], schema: Schema) -> dict[str, Any]:
    given = {name: row[name] for name in schema.fields if row[name] != ""}
    return {name: float(text) if schema.fields[name].is_numeric else text for name, text in given.items()}


def _is_valid(row: dict[str, Any], validate: Callable[[Any], Any]) -> bool:
    try:
        validate(row)
    except ValueError:
        return False
    return True


class Applicant(FastHttpUser):
    """Asks for one decision after the other on a kept-alive connection."""

    wait_time = constant(0)
    rows = applications()

    def on_start(self) -> None:
        """Take the API key, if the service wants one."""
        key = os.environ.get("CREDIT_RISK_API_KEY")
        self.headers = {"X-API-Key": key} if key else {}

    @task(100)
    def classify(self) -> None:
        """Ask for one decision."""
        self._ask("/classify", random.choice(self.rows))

    @task(1)
    def classify_batch(self) -> None:
        """Ask for a hundred decisions at once."""
        self._ask("/classify_batch", random.choices(self.rows, k=BATCH_ROWS))

    def _ask(self, path: str, body: Any) -> None:
        with self.client.post(path, json=body, headers=self.headers, catch_response=True) as answer:
            if answer.status_code != 200:
                answer.failure(f"{answer.status_code}: {(answer.text or '')[:200]}")
