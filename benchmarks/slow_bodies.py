"""Look for request bodies that cost the service too much: time in its event loop, or memory.

    python -m benchmarks.slow_bodies --seconds 120

Families of hostile bodies as large as the limits allow come first. Then the costliest are changed at random, and
a change is kept when it costs more. Both run against the service's ASGI application in this process. The exit code
is 1 if any body keeps the loop for over 50 ms of processor time, or takes more memory than ten times its size.
"""

from __future__ import annotations

import argparse
import asyncio
import ctypes
import gc
import json
import os
import random
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.core.contract.schema import Schema
from pipeline.tables.labelled import ingest
from service.http.middleware import FastPath
from tests.testkit import PROJECT
from tests.testkit.store import Store, make_core, put_in_store, quick_booster, rows_of

MOST_HELD_MS = 50.0
MOST_GROWTH = 10.0
FLOOR_BYTES = 3 << 20
"""Growth that is not blamed on a body: buffers, and what the allocator keeps."""

Body = tuple[str, bytes]
"""A path and what is sent there."""

_CHUNK = 64 * 1024
"""Bytes in which a body arrives from uvicorn."""

_JUNK = [
    *(
        b"[",
        b"{",
        b"]",
        b"}",
        b",",
        b":",
        b'"',
        b"\\",
        b"\\u0061",
        b"\\ud83d\\ude00",
        b"\xf0\x9f\x98\x80",
        b"\xff",
    ),
    *(
        b"[],",
        b"{},",
        b'"",',
        b"0,",
        b'"a":1,',
        b'"age":30,',
        b"},{",
        b'"},{"',
        b"9" * 50,
        b"1e999,",
        b"NaN,",
        b" ",
    ),
]


@dataclass(frozen=True)
class Cost:
    """What a body cost.

    Attributes
    ----------
    held_ms
        Longest turn of the event loop, in processor time of its thread.
    growth
        Peak of the resident memory above that before, in multiples of the body's size.
    """

    path: str
    size: int
    status: int
    held_ms: float
    growth: float

    @property
    def is_too_high(self) -> bool:
        """Whether it breaks the service's promise."""
        return self.held_ms > MOST_HELD_MS or self.growth > MOST_GROWTH

    def __str__(self) -> str:
        cost = f"{self.held_ms:7.1f} ms {self.growth:6.1f} x"
        return f"{cost}  {self.path} {self.size:>8} bytes, answered {self.status}"


class Target:
    """The service's ASGI application over a promoted version, in this process.

    Parameters
    ----------
    app
        The middleware.
    """

    def __init__(self, app: FastPath) -> None:
        self._app = app
        self._libc = ctypes.CDLL(None)

    def cost(self, body: Body) -> Cost:
        """Send a body and measure what it costs; of two measurements the lower, as other processes disturb."""
        first = self._measure(*body)
        if not first.is_too_high:
            return first
        second = self._measure(*body)
        held, growth = min(first.held_ms, second.held_ms), min(first.growth, second.growth)
        return Cost(first.path, first.size, first.status, held, growth)

    def _measure(self, path: str, body: bytes) -> Cost:
        gc.collect()
        self._libc.malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
        before = _memory("VmRSS")
        status, held = asyncio.run(self._send(path, body))
        grown = max(0, _memory("VmHWM") - before - FLOOR_BYTES)
        return Cost(path, len(body), status, held * 1000, grown / len(body))

    async def _send(self, path: str, body: bytes) -> tuple[int, float]:
        request = asyncio.create_task(self._request(path, body))
        held = 0.0
        while not request.done():
            began = time.thread_time()
            await asyncio.sleep(0)
            held = max(held, time.thread_time() - began)
        return await request, held

    async def _request(self, path: str, body: bytes) -> int:
        chunks = [body[start : start + _CHUNK] for start in range(0, len(body), _CHUNK)]
        statuses: list[int] = []

        async def receive() -> dict[str, Any]:
            await asyncio.sleep(0)  # each chunk arrives in a turn of its own
            return {"type": "http.request", "body": chunks.pop(0), "more_body": bool(chunks)}

        async def send(message: Any) -> None:
            if message["type"] == "http.response.start":
                statuses.append(message["status"])

        headers = [(b"host", b"localhost"), (b"content-type", b"application/json")]
        scope = {"type": "http", "method": "POST", "path": path, "headers": headers, "client": ("127.0.0.1", 1)}
        await self._app(scope, receive, send)
        return statuses[0]


def families(schema: Schema, size: int) -> Iterator[tuple[str, bytes]]:
    """Hostile texts of about so many bytes: where an application stands, or a row of a batch."""
    example = json.dumps(schema.example()).encode()
    number = next(name for name, field in schema.fields.items() if field.is_numeric).encode()
    category = next(name for name, field in schema.fields.items() if not field.is_numeric).encode()

    def filled(before: bytes, unit: bytes, after: bytes = b"") -> bytes:
        return before + unit * max(1, (size - len(before) - len(after)) // len(unit)) + after

    def numbered(unit: bytes) -> bytes:
        count = size // (len(unit) + 6)
        return b"{" + b",".join(unit.replace(b"#", b"%x" % number) for number in range(count)) + b"}"

    for name, unit in {
        "brackets": b"[",
        "objects": b'{"a":',
        "commas": b",",
        "quotes": b'"',
        "blanks": b" ",
    }.items():
        yield name, filled(b"", unit)
        yield f"{name} as a value", filled(b'{"%b":' % number, unit, b"}")
    yield "closed brackets", b"[" * (size // 2) + b"]" * (size // 2)
    for name, unit in {"lists": b"[],", "dicts": b"{},", "texts": b'"",', "numbers": b"0,"}.items():
        yield f"list of {name}", filled(b"[", unit, unit[:-1] + b"]")
        yield f"list of {name} as a value", filled(b'{"%b":[' % number, unit, unit[:-1] + b"]}")
    yield "unknown keys", numbered(b'"#":1')
    yield "unknown keys with lists", numbered(b'"#":[]')
    yield "escaped unknown keys", numbered(b'"\\u0061#":1')
    yield "one key", filled(b'{"', b"k", b'":1}')
    yield "one escaped key", filled(b'{"', b"\\u0061", b'":1}')
    yield "one key of pairs", filled(b'{"', b"\\ud83d\\ude00", b'":1}')
    yield "one wide key", filled(b'{"', "😀".encode(), b'":1}')
    yield "bad UTF-8", filled(b'{"', b"\xff", b'":1}')
    yield "repeated key", filled(example[:-1] + b",", b'"%b":30,' % number, b'"%b":30}' % number)
    for name, before in {
        "digits": b"1",
        "fraction": b"1.",
        "zeros": b"0.",
        "exponent": b"1e",
        "minus": b"-",
    }.items():
        yield name, filled(b'{"%b":%b' % (number, before), b"0" if name == "zeros" else b"7", b"}")
    yield "category", filled(b'{"%b":"' % category, b"},{", b'"}')
    yield "escaped category", filled(b'{"%b":"' % category, b"\\u007d", b'"}')
    yield "valid with blanks", filled(example[:-1], b" ", b"}")
    yield "valid keys escaped", _with_escaped_keys(example)
    yield "colons", filled(b'{"', b":", b'":1}')


def bodies(schema: Schema, rows: list[dict[str, Any]], batch_rows: int) -> Iterator[Body]:
    """All families, as applications and in batches, and batches that are valid or nearly."""
    for path in ("/classify", "/explain"):
        for _, text in families(schema, 65_000):
            yield path, text[:65_536]
    for size in (2_000, 8_000_000):
        for _, text in families(schema, size):
            yield "/classify_batch", b"[" + text + b"]"
            yield "/classify_batch", text
    for size in (800, 100_000):
        for _, text in families(schema, size):
            count = min(batch_rows, 8_380_000 // (len(text) + 1))
            yield "/classify_batch", b"[" + b",".join([text] * count) + b"]"
    many = (rows * (batch_rows // len(rows) + 1))[:batch_rows]
    yield "/classify_batch", json.dumps(many).encode()
    yield "/classify_batch", json.dumps(many, indent=12).encode()
    yield "/classify_batch", b"[" + b",".join(map(_with_escaped_keys, _lines(many))) + b"]"
    for every in (1, 7, 100, 5_000):
        broken = [{**row, f"k{i}": 1} if i % every == every - 1 else row for i, row in enumerate(many)]
        yield "/classify_batch", json.dumps(broken).encode()
        yield "/classify_batch", json.dumps([{**row, "age": "x"} for row in broken]).encode()
    yield "/classify_batch", json.dumps([*many[:-1], {}]).encode()
    yield "/classify_batch", json.dumps(many).encode()[:-1]


def mutated(body: bytes, generator: random.Random, limit: int) -> bytes:
    """Change a body at random: put junk in, repeat a piece of it, move one, cut one out."""
    junk = generator.choice(_JUNK) * generator.choice([1, 10, 1000, 20_000])
    start, end = sorted(generator.randrange(len(body) + 1) for _ in range(2))
    end = min(end, start + generator.choice([10, 300, 10_000, 1_000_000]))
    at = generator.randrange(len(body) + 1)
    changed = generator.choice(
        [
            body[:at] + junk + body[at:],
            body[:at] + body[start:end] * generator.choice([1, 5, 100]) + body[at:],
            body[:start] + body[end:],
            body[:start] + junk[: end - start] + body[end:],
        ]
    )
    return changed[:limit] or b"["


def climb(
    target: Target, start: Body, worth: Callable[[Cost], float], until: float, generator: random.Random
) -> Iterator[Cost]:
    """Change a body as long as there is time; go on from whatever costs more."""
    (path, body), best = start, worth(target.cost(start))
    limit = 8_388_608 if path == "/classify_batch" else 65_536
    while time.monotonic() < until:
        candidate = mutated(body, generator, limit)
        found = target.cost((path, candidate))
        yield found
        if worth(found) > best:
            body, best = candidate, worth(found)


def search(target: Target, found: list[Body], seconds: float, generator: random.Random) -> Iterator[Cost]:
    """Measure all bodies, then climb from the costliest for the seconds that are given."""
    costs = [(body, target.cost(body)) for body in found]
    yield from (cost for _, cost in costs)
    for worth in (_held, _growth):
        starts = sorted(costs, key=lambda item: worth(item[1]), reverse=True)[:10]
        for body, _ in starts:
            yield from climb(target, body, worth, time.monotonic() + seconds / 20, generator)


def start_target(home: Path, schema: Schema) -> tuple[Target, list[dict[str, Any]]]:
    """Promote a quick model in a store of its own; gives the application over it, and valid rows."""
    os.environ["BENTOML_HOME"] = str(home)
    applications = ingest(PROJECT / "data/credit_risk.csv", schema).frame
    rows = rows_of(applications, schema)
    Store({1: put_in_store(1, *quick_booster(applications, schema), schema, rows[:20])}).promote(1)
    core = make_core()
    core.start()
    gc.collect()
    gc.freeze()  # what is collected from here on is of the bodies

    async def nowhere(*_: Any) -> None:
        raise AssertionError("not an endpoint of the middleware")

    return Target(FastPath(nowhere, core, (), dict)), rows


def measure(seconds: float, seed: int) -> list[Cost]:
    """Measure the families, then search for so many seconds; in a process that does nothing else."""
    schema = Schema.load(PROJECT / "conf/schema.yaml")
    with tempfile.TemporaryDirectory() as folder:
        target, rows = start_target(Path(folder), schema)
        found = list(bodies(schema, rows, 10_000))
        return list(search(target, found, seconds, random.Random(seed)))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=60, help="for changes at random, after the families")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    costs = measure(options.seconds, options.seed)
    print(f"{len(costs)} bodies, {sum(cost.status >= 500 for cost in costs)} answers of 500 or above")
    print(f"slowest body:   {max(costs, key=_held)}")
    print(f"largest growth: {max(costs, key=_growth)}")
    return int(any(cost.is_too_high or cost.status >= 500 for cost in costs))


def _held(cost: Cost) -> float:
    return cost.held_ms


def _growth(cost: Cost) -> float:
    return cost.growth


def _lines(rows: list[dict[str, Any]]) -> Iterator[bytes]:
    return (json.dumps(row).encode() for row in rows)


def _with_escaped_keys(application: bytes) -> bytes:
    members = json.loads(application)
    escaped = {"".join(f"\\u{ord(letter):04x}" for letter in name): value for name, value in members.items()}
    return ("{" + ",".join(f'"{name}":{json.dumps(value)}' for name, value in escaped.items()) + "}").encode()


def _memory(kind: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(kind):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"the system does not tell {kind}")


if __name__ == "__main__":
    sys.exit(main())
