"""Attacks on promotions: kills, races, hung and odd MLflow servers, damaged stores, other users."""

from __future__ import annotations

import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import cloudpickle
import xgboost as xgb

from benchmarks.attacks.attack import Attack, Skipped, Tally
from benchmarks.attacks.damage import damage
from benchmarks.attacks.lab import Lab, done, one_line
from benchmarks.attacks.lanes import Lane, in_lanes
from pipeline.core.errors import StoreError
from pipeline.core.files import file_digests
from pipeline.core.model.bundle import open_bundle
from tests.testkit import PROJECT
from tests.testkit.odd_servers import ScriptedServer, SilentServer
from tests.testkit.other_user import NOBODY, answer_as
from tests.testkit.registry import BETTER, GOOD, NARROWER, SHUFFLED, SWAPPED, THIRD, Command, Machine
from tests.testkit.waiting import eventually

AWAY = "http://127.0.0.1:9"
MOST_ROLLBACK_SECONDS = 3.0
ROLLBACK = """
import sys
from pathlib import Path
from pipeline.__main__ import main
code = main(sys.argv[1:])
print(int(Path("/proc/self/schedstat").read_text().split()[1]) / 1e9, file=sys.stderr)
sys.exit(code)
"""
"""The command, and the seconds for which its process was ready to run and had no core."""

LONG = 2400.0
"""For the two attacks that take minutes on quiet cores."""


def bad_models(lab: Lab, tally: Tally) -> None:
    machine = lab.machine()
    names = {SHUFFLED: "labels shuffled", SWAPPED: "amount and price swapped", NARROWER: "contract without debt"}
    for version, name in names.items():
        refused = machine.run("promote", "--version", str(version))
        tally.count(one_line(refused) and _version(machine) == GOOD, f"{name}: {refused.out}{refused.err}")


def kills(lab: Lab, tally: Tally) -> None:
    lanes = in_lanes(_killed, lab, lab.counts.kills)
    for lane, _ in lanes:
        tally.add(lane)
    moved = sum(moved for _, moved in lanes)
    tally.note(f"at a random moment; the pointer had moved {moved} times")


def races(lab: Lab, tally: Tally) -> None:
    lanes = in_lanes(_raced, lab, lab.counts.races)
    for lane, _ in lanes:
        tally.add(lane)
    late = sum(late for _, late in lanes)
    tally.note(f"{late} times one was told in a line that the other had promoted")


def store_files(lab: Lab, tally: Tally) -> None:
    machine, generator = lab.machine(), lab.random()
    promoted = machine.pointer()
    assert promoted
    folder = machine.folder(promoted.version)
    with _counting_opens() as opened:
        for _ in range(lab.counts.corruptions):
            what, undo = damage(folder, generator, b"\x80\x04.")
            try:
                open_bundle(folder, promoted.digests)
                tally.count(held=False, what=f"{what}: opened")
            except StoreError:
                tally.count(not opened["count"], f"{what}: interpreted before it was refused")
            undo()
    what, undo = damage(folder, generator, b"\x80\x04.")
    table, output = PROJECT / "data/credit_risk.csv", lab.folder() / "scored.csv"
    for command in (("score", "--input", str(table), "--output", str(output)), ("package",)):
        refused = machine.run(*command)
        tally.count(one_line(refused), f"{what}: {command[0]} exits {refused.code}: {refused.err}")
    undo()


def hung(lab: Lab, tally: Tally) -> None:
    machine = lab.machine()
    done(machine, "promote", "--version", str(BETTER))
    with closing(SilentServer()) as server:
        stuck = machine.on(server.uri)
        promoting = stuck.start("promote", "--version", str(THIRD))
        watching = stuck.start("sync", "--watch", "0.1")
        eventually(lambda: server.asked >= 2)
        seconds = [_rollback_seconds(stuck, tally) for _ in range(5)]
        tally.count(promoting.process.is_alive() or promoting.code == 1, "the promotion ended otherwise")
        tally.count(watching.process.is_alive(), f"sync --watch ended: {watching.err}")
        _stop(watching)
    promoting.wait(120)
    tally.count(one_line(promoting), f"promote, once the server was gone: {promoting.code} {promoting.err}")
    tally.note(f"rollback with MLflow hung: {_spread(seconds)}")


def rollback_seconds(lab: Lab, tally: Tally) -> None:
    machine = lab.machine()
    done(machine, "promote", "--version", str(BETTER))
    for name, asked in (("reachable", machine), ("away", machine.on(AWAY))):
        tally.note(f"MLflow {name}: {_spread([_rollback_seconds(asked, tally) for _ in range(3)])}")
    for name, code in (
        ("of it Python's start", "pass"),
        ("and the imports", "import pipeline.promotion.commands, pipeline.core.model.bundle"),
    ):
        tally.note(f"{name} {_timed([sys.executable, '-c', code], dict(os.environ))[0]:.2f} s")


ODD_ANSWERS = {
    "an empty 200": (200, b""),
    "version abc": (200, b'{"model_version": {"name": "credit_risk_model", "version": "abc", "run_id": "x"}}'),
    "no version": (200, b'{"model_version": {}}'),
    "a list": (200, b"[]"),
    "brackets": (200, b"[" * 100_000),
    "a page": (200, b"<html><body>Log in, please</body></html>"),
    "a login": (401, b"<html>401</html>"),
    "a proxy's 502": (502, b"Bad Gateway"),
    "a 404 of another server": (404, b"nothing here"),
    "no text": (200, b"\xff\xfe\x00"),
}


def watching(lab: Lab, tally: Tally) -> None:
    machine = lab.machine()
    with closing(ScriptedServer()) as server:
        watcher = machine.on(server.uri).start("sync", "--watch", "0.05")
        for name, (server.status, server.answer) in ODD_ANSWERS.items():
            tally.count(_goes_on(watcher, server), f"{name}: {watcher.err}")
        lines = watcher.err.splitlines()
        told_once = all(" error: " in line for line in lines) and len(lines) <= 3 * len(ODD_ANSWERS)
        tally.count(told_once, f"{len(lines)} lines: {watcher.err}")
        tally.count(_version(machine) == GOOD, "another version is promoted")
        tally.count(_stop(watcher) == 0, f"SIGTERM: exit {watcher.code}")


def other_user(lab: Lab, tally: Tally) -> None:
    if os.getuid() != 0:
        raise Skipped("only root can become another user")
    application = lab.rows[0]

    def answers(machine: Machine, version: int, what: str) -> None:
        found = answer_as(NOBODY, machine, application)
        tally.count(found.model == f"credit_risk_model:v{version}", f"{what}: {found}")

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        folder.chmod(0o755)
        machine = lab.machine().copy(folder)
        done(machine, "promote", "--version", str(BETTER))
        answers(machine, BETTER, "after promote")
        done(machine, "rollback")
        answers(machine, GOOD, "after rollback")
        for path in [machine.models, *machine.models.rglob("*")]:
            path.chmod(path.stat().st_mode & ~0o222)
        answers(machine, GOOD, "read-only, as a container mounts it")
        for private, what in ((machine.folder(GOOD), "folder"), (machine.models / "promoted.json", "pointer")):
            private.chmod(0o700)
            found = answer_as(NOBODY, machine, application)
            held = found.model != f"credit_risk_model:v{GOOD}" and "ermission" in found.refused
            tally.count(held, f"a private {what}: {found}")


ATTACKS = [
    Attack("bad-models", "A model that lost its labels, columns or a field is refused", bad_models),
    Attack(
        "kills",
        "kill -9 in a promotion leaves the old or the new version whole, and the next one works",
        kills,
        LONG,
    ),
    Attack("races", "Of two promotions at once one wins; the other is next, or is told in one line", races, LONG),
    Attack(
        "store", "A stored model with a changed, added or missing byte or file is refused unopened", store_files
    ),
    Attack("other-user", "What one user promotes another's service reads, or names the permission", other_user),
    Attack("hung-mlflow", "A rollback takes 3 s at most, beside a promote and a sync that wait for MLflow", hung),
    Attack("rollback", "A rollback takes 3 s at most, with MLflow reachable or not", rollback_seconds),
    Attack("sync-watch", "sync --watch survives whatever the server answers, and tells it once", watching),
]


def _rollback_seconds(machine: Machine, tally: Tally) -> float:
    """Roll back in a process that starts cold, with the shipped settings, and count whether it was in time.

    The limit holds where a core is free: what the process has waited for one is not held against it.
    """
    before = _version(machine)
    command = [sys.executable, "-c", ROLLBACK, "rollback", "--conf", str(PROJECT / "conf")]
    seconds, output = _timed(command, {**os.environ, **machine.env})
    waited = float(output.split()[-1])
    tally.count(
        _version(machine) != before and _is_whole(machine) and seconds - waited <= MOST_ROLLBACK_SECONDS,
        f"rollback from v{before} to v{_version(machine)} in {seconds:.2f} s, of it {waited:.2f} s without a core",
    )
    return seconds


def _timed(command: list[str], env: dict[str, str]) -> tuple[float, str]:
    """Run a command that must succeed: seconds, and what it wrote to stderr."""
    began = time.perf_counter()
    done = subprocess.run(command, env=env, cwd=PROJECT, check=True, capture_output=True, timeout=60, text=True)
    return time.perf_counter() - began, done.stderr


def _spread(seconds: list[float]) -> str:
    return f"median {statistics.median(seconds):.2f} s, longest {max(seconds):.2f} s of {len(seconds)}"


def _goes_on(watcher: Command, server: ScriptedServer) -> bool:
    """Whether a follower asks again after an answer that it has had."""
    before = server.requests
    try:
        eventually(lambda: server.requests >= before + 4 or not watcher.process.is_alive(), 60)
    except TimeoutError:
        return False
    return watcher.process.is_alive()


def _stop(command: Command) -> int | None:
    os.kill(command.process.pid or 0, signal.SIGTERM)
    return command.wait(30).code


def _says_run_again(command: Command) -> bool:
    return one_line(command) and "un it again" in command.err


def _killed(machine: Machine, lane: Lane) -> tuple[Tally, int]:
    """Kill promotions; gives also how many had moved the pointer."""
    tally, moved, generator = Tally(), 0, lane.random()
    usual = _usual_seconds(machine)
    for number in lane:
        challenger = THIRD if _version(machine) == BETTER else BETTER
        moment = generator.uniform(0, usual)
        killed = machine.start("promote", "--version", str(challenger))
        killed.process.join(moment)
        killed.process.kill()
        killed.wait()
        whole, moved = _is_whole(machine), moved + (_version(machine) == challenger)
        again = machine.run("promote", "--version", str(challenger))
        tally.count(
            whole and again.code == 0 and _agrees(machine, challenger),
            f"kill {number} after {moment:.2f} s: pointer {'whole' if whole else 'not whole'}, then {again.err}",
        )
    return tally, moved


def _raced(machine: Machine, lane: Lane) -> tuple[Tally, int]:
    """Promote two versions at once, neither of them promoted; gives also how often one came too late."""
    tally, late = Tally(), 0
    for _ in lane:
        versions = {GOOD, BETTER, THIRD} - {_version(machine)}
        forced = ("--force", "--reason", "race")
        pair = {version: machine.start("promote", "--version", str(version), *forced) for version in versions}
        won = [version for version, command in pair.items() if command.wait().code == 0]
        late += len(won) == 1
        tally.count(
            _version(machine) in won
            and _agrees(machine, _version(machine))
            and all(command.code == 0 or _says_run_again(command) for command in pair.values()),
            f"won {won}, promoted {_version(machine)}: {[command.err for command in pair.values()]}",
        )
    return tally, late


def _usual_seconds(machine: Machine) -> float:
    times = []
    for version in (BETTER, THIRD, BETTER, THIRD):
        begun = time.perf_counter()
        done(machine, "promote", "--version", str(version))
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
