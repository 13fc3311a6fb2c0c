"""What a promotion survives, in figures: random kills, races, corruptions, bad models; how long a rollback takes.

``python -m benchmarks.faults`` prints a table; ``--kills``, ``--races`` and ``--corruptions`` say how many.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import cloudpickle
import xgboost as xgb

from pipeline.core.contract.schema import Schema
from pipeline.core.errors import StoreError
from pipeline.core.files import file_digests
from pipeline.core.model.bundle import open_bundle
from pipeline.tables.labelled import ingest
from tests.testkit import DATA
from tests.testkit.registry import (
    BETTER,
    GOOD,
    NARROWER,
    SHUFFLED,
    SWAPPED,
    THIRD,
    Machine,
    make_registry,
    new_machine,
)

AWAY = "http://127.0.0.1:9"


def main() -> None:
    options = _options()
    with tempfile.TemporaryDirectory() as folder:
        schema = Schema.load("conf/schema.yaml")
        database = make_registry(Path(folder), schema, ingest(DATA, schema).frame)
        machine = new_machine(_fresh(folder, "machine"), database)
        _done(machine, "promote", "--version", str(GOOD))
        lines = [
            *bad_models(machine),
            *kills(machine, options.kills, random.Random(options.seed)),
            *races(machine, options.races),
            *corruptions(machine, options.corruptions, random.Random(options.seed)),
            *rollbacks(machine, options.rollbacks),
        ]
    print("\n".join(lines))


def bad_models(machine: Machine) -> Iterator[str]:
    names = {SHUFFLED: "labels shuffled", SWAPPED: "amount and price swapped", NARROWER: "contract without debt"}
    for version, name in names.items():
        refused = machine.run("promote", "--version", str(version), "--json")
        broken = [rule["name"] for rule in refused.data["rules"] if not rule["passed"]]
        yield f"bad model, {name:<26} exit {refused.code}, refused by {', '.join(broken)}"


def kills(machine: Machine, count: int, generator: random.Random) -> Iterator[str]:
    usual = _usual_seconds(machine)
    outcome: Counter[str] = Counter()
    for _ in range(count):
        before = _version(machine)
        challenger = THIRD if before == BETTER else BETTER
        killed = machine.start("promote", "--version", str(challenger))
        killed.process.join(generator.uniform(0, usual))
        killed.process.kill()
        outcome["killed"] += killed.wait().code == -9
        outcome["valid pointers"] += _is_whole(machine)
        outcome["already on the new version"] += _version(machine) == challenger
        again = machine.run("promote", "--version", str(challenger))
        outcome["next promotions fine"] += again.code == 0 and _agrees(machine, challenger)
    yield f"random kill -9 during promote: {count} ({dict(outcome)}), within its usual {usual:.1f} s"


def races(machine: Machine, count: int) -> Iterator[str]:
    outcome: Counter[str] = Counter()
    for _ in range(count):
        pair = [machine.start("promote", "--version", str(version)) for version in (BETTER, THIRD)]
        codes = [command.wait(120).code for command in pair]
        outcome["both exit 0"] += codes == [0, 0]
        outcome["valid"] += _agrees(machine, _version(machine))
        _done(machine, "promote", "--version", str(GOOD))
    yield f"two promotions at once: {count} pairs ({dict(outcome)})"


def corruptions(machine: Machine, count: int, generator: random.Random) -> Iterator[str]:
    promoted = machine.pointer()
    assert promoted
    folder = machine.folder(promoted.version)
    sizes = {name: (folder / name).stat().st_size for name in promoted.digests}
    outcome: Counter[str] = Counter()
    with _counting_opens() as opened:
        for name in generator.choices(list(sizes), weights=list(sizes.values()), k=count):
            whole = (folder / name).read_bytes()
            position = generator.randrange(len(whole))
            changed = bytes([whole[position] ^ generator.randrange(1, 256)])
            (folder / name).write_bytes(whole[:position] + changed + whole[position + 1 :])
            try:
                open_bundle(folder, promoted.digests)
            except StoreError:
                outcome["refused"] += 1
            (folder / name).write_bytes(whole)
    outcome["opened before the refusal"] = opened["count"]
    yield f"one byte altered: {count} over {', '.join(sizes)} ({dict(outcome)})"


def rollbacks(machine: Machine, count: int) -> Iterator[str]:
    _done(machine, "promote", "--version", str(BETTER))
    cold = [sys.executable, "-m", "pipeline"]
    measured = {
        "status": [*cold, "status"],
        "rollback, MLflow (SQLite) reachable": [*cold, "rollback"],
        "rollback, MLflow away": [*cold, "rollback"],
        "  of it: start of Python": [sys.executable, "-c", "pass"],
        "  of it: imports to open a stored model": [
            sys.executable,
            "-c",
            "import pipeline.promotion.commands, pipeline.core.model.bundle",
        ],
        "  in a second process meanwhile: import mlflow": [sys.executable, "-c", "import mlflow"],
    }
    for name, command in measured.items():
        asked = machine.on(AWAY) if "away" in name else machine
        seconds = [_timed(command, {**os.environ, **asked.env}) for _ in range(count)]
        yield f"{name:<47} median {statistics.median(seconds):5.2f} s, best {min(seconds):5.2f} s of {count}"


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    for name, default in (("kills", 100), ("races", 50), ("corruptions", 200), ("rollbacks", 5), ("seed", 0)):
        parser.add_argument(f"--{name}", type=int, default=default, metavar="N")
    return parser.parse_args()


def _fresh(folder: str, name: str) -> Path:
    path = Path(folder) / name
    path.mkdir()
    return path


def _done(machine: Machine, *arguments: str) -> None:
    command = machine.run(*arguments)
    assert command.code == 0, command.err


def _usual_seconds(machine: Machine) -> float:
    times = []
    for version in (BETTER, THIRD, BETTER, THIRD):
        begun = time.perf_counter()
        _done(machine, "promote", "--version", str(version))
        times.append(time.perf_counter() - begun)
        # A version in the store already is not staged again: the longer way is the interesting one.
        shutil.rmtree(machine.folder(BETTER if version == THIRD else THIRD), ignore_errors=True)
    return statistics.median(times)


def _version(machine: Machine) -> int:
    promoted = machine.pointer()
    return promoted.version if promoted else 0


def _is_whole(machine: Machine) -> bool:
    promoted = machine.pointer()
    return promoted is not None and file_digests(machine.folder(promoted.version)) == promoted.digests


def _agrees(machine: Machine, version: int) -> bool:
    return (
        _is_whole(machine)
        and _version(machine) == version
        and machine.champion() == version
        and machine.history()[-1] == version
        and (machine.models / "latest").read_text() == f"v{version}"
    )


@contextmanager
def _counting_opens() -> Iterator[Counter[str]]:
    """Count what would interpret a stored file."""
    opened: Counter[str] = Counter(count=0)
    usual: tuple[Callable[..., Any], Callable[..., Any]] = (cloudpickle.loads, xgb.Booster)

    def counted(function: Callable[..., Any]) -> Callable[..., Any]:
        def count(*arguments: Any, **named: Any) -> Any:
            opened["count"] += 1
            return function(*arguments, **named)

        return count

    cloudpickle.loads, xgb.Booster = counted(usual[0]), counted(usual[1])
    try:
        yield opened
    finally:
        cloudpickle.loads, xgb.Booster = usual


def _timed(command: list[str], env: dict[str, str]) -> float:
    begun = time.perf_counter()
    subprocess.run(command, env=env, check=True, capture_output=True)
    return time.perf_counter() - begun


if __name__ == "__main__":
    main()
