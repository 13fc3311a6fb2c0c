"""Attacks on the commands that read history and decision log: damaged lines."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.attacks.attack import Attack, Tally
from benchmarks.attacks.lab import Lab, done
from pipeline.core import promoted
from pipeline.monitoring.log_reader import read_decisions
from tests.testkit.registry import BETTER, Machine

MUTATIONS = 300

JUNK = [b"\x00", b"\xff", b'"', b"{", b"[" * 2000, b"1e999", b"null", b"\\ud800", b",", b"\n"]

DAMAGED = {
    "100,000 brackets": b"[" * 100_000,
    "100,000 braces": b'{"a":' * 100_000,
    "a cut line": b'{"tag": "credit_ri',
    "null": b"null",
    "a number of 5,000 digits": b"9" * 5000,
    "no UTF-8": b"\xff\xfe\x00",
    "blank bytes": b"\x00" * 4096,
    "another object": b'{"version": 1e999, "time": 1}',
}


def history(lab: Lab, tally: Tally) -> None:
    machine = lab.machine()
    done(machine, "promote", "--version", str(BETTER))
    path = machine.models / "history.jsonl"
    for number, (what, line) in enumerate(DAMAGED.items(), 1):
        first, *rest = path.read_bytes().splitlines()
        path.write_bytes(b"\n".join([first, line, *rest]) + b"\n")
        shown = machine.run("status", "--json")
        counted = shown.code == 0 and shown.data.get("damaged_lines") == number
        tally.count(counted, f"{what}: status exits {shown.code}: {shown.out} {shown.err}")
        before = machine.pointer()
        back = machine.run("rollback")
        tally.count(back.code == 0 and machine.pointer() != before, f"{what}: rollback: {back.err}")
    _mutated_history(machine, lab.random(), tally)


def decisions(lab: Lab, tally: Tally) -> None:
    machine, folder = lab.machine(), lab.folder()
    good = json.dumps(_decision()).encode()
    for what, line in {**DAMAGED, **dict(_odd_decisions())}.items():
        _write_log(folder, good, line)
        found = machine.run("decisions", "--folder", str(folder), "--output", str(folder / "table.parquet"))
        tally.count(
            found.code == 0 and "2 decisions" in found.out and "1 line is no decision" in found.out,
            f"{what}: exit {found.code}: {found.out} {found.err}",
        )
    generator = lab.random()
    for _ in range(MUTATIONS):
        line = _mutated(good, generator)
        _write_log(folder, good, line)
        read = read_decisions(folder)
        lines = line.split(b"\n")
        tally.count(len(read.frame) + read.broken_lines == 2 + len(lines), f"{line!r}: {read.broken_lines} broken")


ATTACKS = [
    Attack("history", "Damaged lines of the history are counted by status, and stop no rollback", history),
    Attack("decisions", "Whatever in a decision log is no decision is counted and left out", decisions),
]


def _mutated_history(machine: Machine, generator: random.Random, tally: Tally) -> None:
    path = machine.models / "history.jsonl"
    whole = path.read_bytes()
    with machine.entered():
        good = whole.splitlines()[0]
        for _ in range(MUTATIONS):
            line = _mutated(good, generator)
            path.write_bytes(good + b"\n" + line + b"\n" + good + b"\n")
            found = promoted.recorded_history()
            tally.count(2 <= len(found.promotions) <= 3 + line.count(b"\n"), f"{line!r}: {found}")
    path.write_bytes(whole)


def _mutated(line: bytes, generator: random.Random) -> bytes:
    """Cut a line, change bytes of it, or put something into it."""
    junk = generator.choice(
        [b"\x00", b"\xff", b'"', b"{", b"[" * 2000, b"1e999", b"null", b"\\ud800", b",", b"\n"]
    )
    for _ in range(generator.randrange(1, 4)):
        at, end = sorted(generator.randrange(len(line) + 1) for _ in range(2))
        start, rest = line[:at], line[end:]
        line = generator.choice([start + junk + line[at:], start + rest, start, start + junk + rest])
    return line


def _write_log(folder: Path, good: bytes, line: bytes) -> None:
    (folder / "decisions-0.jsonl").write_bytes(b"\n".join([good, line, good]) + b"\n")


def _decision() -> dict[str, Any]:
    return {
        "time": "2026-01-01T00:00:00.5+00:00", "model": "credit_risk_model:v1", "digest": "d", "schema": "s",
        "thresholds": {"maybe_above": 0.3, "declined_above": 0.5}, "request_id": "good", "probability": 0.25,
        "status": "APPROVED", "inputs": {"age": 30, "home": "owner", "income": None},
    }  # fmt: skip


def _odd_decisions() -> Iterator[tuple[str, bytes]]:
    odd = {
        "time": "0001-01-01T00:00:00+14:00",
        "model": ["credit_risk_model:v1"],
        "probability": 10**400,
        "status": "MAYBE NOT",
        "thresholds": [0.3, 0.5],
        "inputs": {"age": {"x": 1}},
        "row": 10**30,
        "request_id": 7,
    }
    for key, value in odd.items():
        yield f"{key} of another kind", json.dumps({**_decision(), key: value}).encode()
