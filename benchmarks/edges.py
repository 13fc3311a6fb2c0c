"""Look for requests that hurt a running service: schemathesis over its documents, then Hypothesis.

    python -m benchmarks.edges http://127.0.0.1:3000 --bodies 20000

Each body is judged by an oracle of its own: Python's ``json`` and the contract, read plainly. An answer of 500 or
above, a body accepted against the oracle (a silent coercion) or refused against it, ends the run with exit code 1.
"""

from __future__ import annotations

import argparse
import http.client
import json
import math
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from pipeline.core.contract.schema import Field, Schema
from pipeline.core.settings import conf_folder

JSON = {"Content-Type": "application/json"}


_ODD = [
    *("NaN", "Infinity", "-Infinity", "1e400", "-1e400", "1e-400", "0x10", "+1", "01", "9" * 400),
    *("0", "-0.0", "1.5", "30.0", "3e1", "true", "null", '"30"', '""', '"\\ud800"', '"\\u0000"', "[]", "{}"),
    *("[" * 300, '{"a":' * 100),
]
"""Values, as JSON or almost, that lenient parsers take for something else."""


class Client:
    """One keep-alive connection."""

    def __init__(self, url: str) -> None:
        parts = urlsplit(url)
        self._connection = http.client.HTTPConnection(parts.hostname or "127.0.0.1", parts.port, timeout=60)

    def post(self, path: str, body: bytes) -> tuple[int, bytes]:
        """Send a body as JSON: status and answer."""
        self._connection.request("POST", path, body, JSON)
        response = self._connection.getresponse()
        return response.status, response.read()


def is_valid(body: bytes, schema: Schema) -> bool:
    """Whether a body is one application by the contract, decided without pydantic."""
    repeated: list[str] = []

    def pairs(found: list[tuple[str, Any]]) -> dict[str, Any]:
        repeated.extend(name for name, times in Counter(name for name, _ in found).items() if times > 1)
        return dict(found)

    try:
        application = json.loads(body.decode("utf-8"), object_pairs_hook=pairs)
    except (ValueError, RecursionError):
        return False
    if not isinstance(application, dict) or repeated or not application.keys() <= schema.fields.keys():
        return False
    return all(_fits(application, name, field) for name, field in schema.fields.items())


def _fits(application: dict[str, Any], name: str, field: Field) -> bool:
    value = application.get(name)
    if value is None:
        return field.optional
    if not field.is_numeric:
        return isinstance(value, str) and value in field.categories
    if (
        isinstance(value, bool)
        or not isinstance(value, int | float)
        or abs(value) > 1e300
        or not math.isfinite(value)
    ):
        return False
    low, high = field.bounds
    return low <= value <= high and (field.kind != "integer" or value == round(value))


def bodies(schema: Schema) -> st.SearchStrategy[bytes]:
    """Bodies of every kind: valid, almost valid, odd JSON, and no JSON at all."""
    texts = {name: _texts(field) for name, field in schema.fields.items()}
    valid = st.fixed_dictionaries(texts)
    changes = st.dictionaries(
        st.sampled_from([*schema.fields, "unknown", "", "AGE", "age ", "a:b"]),
        st.sampled_from(_ODD) | st.text().map(json.dumps),
        max_size=2,
    )
    almost = st.builds(
        _written, valid, changes, st.sets(st.sampled_from(list(schema.fields)), max_size=1), st.booleans()
    )
    anything = st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
        lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
        max_leaves=10,
    ).map(lambda value: json.dumps(value).encode())
    return st.one_of(almost, almost, almost, almost, anything, st.binary(max_size=200))


def _texts(field: Field) -> st.SearchStrategy[str]:
    if not field.is_numeric:
        return st.sampled_from(field.categories).map(json.dumps)
    low, high = field.bounds
    whole = st.integers(math.ceil(low), math.floor(high)).map(str)
    return whole if field.kind == "integer" else whole | st.floats(low, high).map(repr)


def _written(valid: dict[str, str], changes: dict[str, str], left_out: set[str], repeat: bool) -> bytes:
    members = [(name, text) for name, text in {**valid, **changes}.items() if name not in left_out]
    if repeat and len(changes) == 2 and members:
        members.append(members[0])
    return ("{" + ",".join(f"{json.dumps(name)}: {text}" for name, text in members) + "}").encode(
        "utf-8", "surrogatepass"
    )


def check_bodies(url: str, schema: Schema, count: int) -> dict[str, Any]:
    """Send bodies to every endpoint that takes one, and judge each answer.

    Returns
    -------
    dict
        Statuses and findings; a finding is a body and what was wrong with its answer.
    """
    client, statuses, findings = Client(url), Counter[int](), []

    def judge(path: str, body: bytes, *, valid: bool) -> None:
        status, answer = client.post(path, body)
        statuses[status] += 1
        if status not in ({200} if valid else {400, 413}):
            findings.append({"path": path, "status": status, "valid": valid, "body": body[:500].decode("latin-1")})
        json.loads(answer)

    @settings(
        max_examples=count,
        deadline=None,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(bodies(schema))
    def send(body: bytes) -> None:
        valid = is_valid(body, schema)
        judge("/classify", body, valid=valid)
        judge("/explain", body, valid=valid)
        judge("/classify_batch", b"[" + body + b"]", valid=valid or not body.strip(b" \t\r\n"))

    send()
    return {"bodies": sum(statuses.values()), "statuses": dict(statuses), "findings": findings}


def check_documents(url: str, examples: int) -> dict[str, Any]:
    """Run schemathesis over ``/docs.json``."""
    done = subprocess.run(
        [
            str(Path(sys.executable).with_name("schemathesis")),
            "run",
            f"{url}/docs.json",
            f"--url={url}",
            f"--max-examples={examples}",
            "--phases=examples,coverage,fuzzing",
            "--no-color",
        ],
        capture_output=True,
        text=True,
        check=False,
    )
    return {"exit_code": done.returncode, "output": done.stdout[-6000:] + done.stderr[-2000:]}


def main(arguments: Sequence[str] | None = None) -> int:
    """Check a running service; the exit code says whether it stood."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.edges", description=__doc__)
    parser.add_argument("url")
    parser.add_argument("--bodies", type=int, default=20_000)
    parser.add_argument("--examples", type=int, default=200, help="of schemathesis, for each operation and phase")
    options = parser.parse_args(arguments)
    documents = check_documents(options.url, options.examples)
    print(documents["output"])
    found = check_bodies(options.url, Schema.load(conf_folder() / "schema.yaml"), options.bodies)
    print(json.dumps(found, indent=1))
    return int(bool(found["findings"]) or documents["exit_code"] != 0)


if __name__ == "__main__":
    sys.exit(main())
