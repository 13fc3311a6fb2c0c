"""Attacks on the processes of ``bentoml serve`` and the files that they read and write."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import socket
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from http.client import HTTPException
from pathlib import Path

import psutil
from prometheus_client.parser import text_string_to_metric_families

from benchmarks.attacks.attack import Attack, Tally
from benchmarks.attacks.lab import Lab, slowdown
from pipeline.core.promoted import pointer_path
from tests.testkit.projects import changed_conf
from tests.testkit.servers import Server, Service, alive, running
from tests.testkit.waiting import eventually

BACK_SECONDS = 5.0
MOST_LOST_SECONDS = 0.2
"""Twice the shipped ``flush_seconds``: the client that measures shares the cores with the service."""
WORKER = "_bentoml_impl.worker.service"
STAYS = '"$@" & wait $!; exec sleep 600'
"""Shell that outlives the command, whose launcher would end at once whatever the command leaves."""


def killed_supervisor(lab: Lab, tally: Tally) -> None:
    conf = changed_conf(lab.folder(), workers=2)
    serve = (sys.executable, "-m", "bentoml", "serve", "--port", "{port}")
    longest = 0.0
    for name in ("service:svc", "service:front"):
        with lab.store():
            variables = {**os.environ, "CREDIT_RISK_CONF": str(conf)}
            service = Service(name, ("sh", "-c", STAYS, "sh", *serve, name), environment=variables)
            with running(service) as server:
                below = [process for process in server.process.descendants() if "sh" not in process.name()]
                supervisor = min(below, key=psutil.Process.create_time)
                supervisor.kill()
                began = time.monotonic()
                left = _left(below, 20)
                longest = max(longest, time.monotonic() - began)
                tally.count(not left, f"{name}: {len(left)} processes are left: {left}")
    tally.note(f"all had ended after {longest:.1f} s at most")


def killed_workers(lab: Lab, tally: Tally) -> None:
    """All at once, time to the next answer; then one across a promotion, what the metrics say."""
    example, seconds = lab.schema.example(), []
    with lab.store() as store, lab.serving(workers=2) as server:
        for version in (2, 1, 2):
            dead, busy = _workers(server, 2), slowdown()
            began = time.monotonic()
            for process in dead:
                process.kill()
            store.promote(version)
            model = eventually(lambda: _model(server, example), 60)
            seconds.append(time.monotonic() - began)
            tally.count(
                seconds[-1] <= BACK_SECONDS * max(busy, slowdown()) and model.endswith(f":v{version}"),
                f"answered by {model} after {seconds[-1]:.1f} s",
            )
        for version in (1, 2, 1):
            _workers(server, 2)[0].kill()
            store.promote(version)
            _workers(server, 2)
            expected = {f"credit_risk_model:v{version}"}
            shown = _settles(server, expected)
            tally.count(shown == expected, f"model_info is 1 for {shown}, promoted is v{version}")
    tally.note(f"answering again after {statistics.median(seconds):.1f} s, longest {max(seconds):.1f} s")


def pointers(lab: Lab, tally: Tally) -> None:
    example = lab.schema.example()
    longest = 0.0
    with lab.store() as store:
        with lab.serving(workers=2) as server:
            for what, put in ODD_POINTERS.items():
                _replaced(put)
                for path, body in (
                    ("/livez", None),
                    ("/readyz", None),
                    ("/model", None),
                    *(("/classify", example),) * 4,
                ):
                    seconds, status = _timed_call(server, path, body)
                    longest = max(longest, seconds)
                    tally.count(
                        status in {200, 503} and seconds < 5, f"{what}: {path} {status} in {seconds:.1f} s"
                    )
                _removed()
                store.promote(1)
                tally.count(
                    _model(server, example) == "credit_risk_model:v1", f"after {what}: {_model(server, example)}"
                )
        _replaced(os.mkfifo)
        with lab.serving(ready="/livez", workers=1) as server:
            seconds, status = _timed_call(server, "/classify", example)
            tally.count(status in {200, 503} and seconds < 5, f"started on a FIFO: {status} in {seconds:.1f} s")
        _removed()
    tally.note(f"longest answer {longest:.2f} s")


def decision_log(lab: Lab, tally: Tally) -> None:
    folder = lab.folder() / "decisions"
    with lab.store(), lab.serving(workers=1, decision_log__folder=str(folder)) as server:
        client = _Client(server, lab.schema.example())
        for what, damage in DAMAGE.items():
            earlier = client.decide(5)
            eventually(lambda earlier=earlier: earlier <= _ids(folder))  # type: ignore[misc]
            before = _dropped(server)
            damage(folder)
            kept, counted = _kept(client.decide(20), server, folder, before)
            for number in range(20):
                tally.count(number < kept + counted, f"{what}: of 20, {kept} written and {counted:g} counted")
            if folder.is_file():
                folder.unlink()


def killed_log(lab: Lab, tally: Tally) -> None:
    """How old the oldest decision is that a ``kill -9`` of the worker loses."""
    generator, ages = lab.random(), []
    folder = lab.folder() / "decisions"
    with lab.store(), lab.serving(workers=1, decision_log__folder=str(folder)) as server:
        client = _Client(server, lab.schema.example())
        for _ in range(5):
            answered = client.decide_for(generator.uniform(0.5, 1))
            killed = time.monotonic()
            for process in _workers(server, 1):
                process.kill()
            lost = set(answered) - _ids(folder)
            ages.append(max((killed - answered[request_id] for request_id in lost), default=0.0))
            tally.count(ages[-1] <= MOST_LOST_SECONDS * slowdown(), f"lost a decision of {ages[-1]:.2f} s before")
            eventually(lambda: _model(server, lab.schema.example()), 60)
    tally.note(f"oldest decision lost: median {statistics.median(ages):.3f} s, longest {max(ages):.3f} s")


ATTACKS = [
    Attack("killed-main", "kill -9 of the supervisor leaves no process", killed_supervisor),
    Attack("killed-workers", "kill -9 of all workers: answering in 5 s; metrics show one version", killed_workers),
    Attack("pointers", "A pointer that is no regular file stops neither requests nor probes", pointers),
    Attack(
        "decision-log", "With folder or file moved or deleted each decision is written or counted", decision_log
    ),
    Attack("killed-log", "kill -9 loses the decisions of the last flush_seconds", killed_log),
]


def _socket(path: Path) -> None:
    # A socket's path is short: it is made elsewhere and moved.
    with tempfile.TemporaryDirectory() as name, socket.socket(socket.AF_UNIX) as listener:
        listener.bind(f"{name}/s")
        shutil.move(f"{name}/s", path)


ODD_POINTERS: dict[str, Callable[[Path], object]] = {
    "FIFO": os.mkfifo,
    "folder": Path.mkdir,
    "socket": _socket,
    "link to /dev/zero": lambda path: path.symlink_to("/dev/zero"),
    "link to itself": lambda path: path.symlink_to(path),
    "link to nothing": lambda path: path.symlink_to("/nowhere"),
    "100 MB": lambda path: path.write_bytes(b" " * 100_000_000),
    "brackets": lambda path: path.write_bytes(b"[" * 500_000),
    "empty": lambda path: path.write_bytes(b""),
}

DAMAGE: dict[str, Callable[[Path], object]] = {
    "folder moved": lambda folder: folder.rename(folder.with_name(f"moved-{time.monotonic_ns()}")),
    "folder deleted": shutil.rmtree,
    "file moved": lambda folder: next(folder.glob("*.jsonl")).rename(folder.with_name("moved.jsonl")),
    "file deleted": lambda folder: next(folder.glob("*.jsonl")).unlink(),
    "file emptied": lambda folder: os.truncate(next(folder.glob("*.jsonl")), 0),
    "a file in the folder's place": lambda folder: _replace_by_file(folder),
}


def _replace_by_file(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.write_text("in the way")


def _replaced(put: Callable[[Path], object]) -> None:
    _removed()
    put(pointer_path())


def _removed() -> None:
    path = pointer_path()
    if path.is_dir() and not path.is_symlink():
        path.rmdir()
    else:
        path.unlink(missing_ok=True)


def _left(processes: list[psutil.Process], seconds: float) -> list[psutil.Process]:
    with suppress(TimeoutError):
        eventually(lambda: not any(map(alive, processes)), seconds)
    return [process for process in processes if alive(process)]


def _workers(server: Server, count: int) -> list[psutil.Process]:
    """The processes that answer; waits until there are so many, each ready."""

    def found() -> list[psutil.Process]:
        workers = []
        for process in server.process.descendants():
            with suppress(psutil.NoSuchProcess):
                if WORKER in process.cmdline() and alive(process):
                    workers.append(process)
        return workers if len(workers) >= count else []

    return eventually(found)


def _model(server: Server, example: object) -> str:
    """The version that answers; empty if none does."""
    with suppress(OSError, HTTPException):
        status, answer, _ = server.call("/classify", example)
        return str(answer["model"]) if status == 200 else ""
    return ""


def _timed_call(server: Server, path: str, body: object) -> tuple[float, int]:
    began = time.monotonic()
    try:
        status = server.call(path, body)[0]
    except OSError:
        status = 0
    return time.monotonic() - began, status


def _metric(server: Server, name: str) -> Iterator[tuple[dict[str, str], float]]:
    families = text_string_to_metric_families(str(server.call("/metrics")[1]))
    for family in families:
        for sample in family.samples:
            if sample.name == f"credit_risk_{name}":
                yield sample.labels, sample.value


def _settles(server: Server, expected: set[str]) -> set[str]:
    """The versions of which ``model_info`` is 1, once it is as expected, or after all time given."""

    def shown() -> set[str]:
        return {labels["model"] for labels, value in _metric(server, "model_info") if value}

    with suppress(TimeoutError):
        eventually(lambda: shown() == expected, 15)
    return shown()


def _dropped(server: Server) -> float:
    return sum(value for _, value in _metric(server, "decision_log_dropped_total"))


def _kept(asked: set[str], server: Server, folder: Path, before: float) -> tuple[int, float]:
    """How many decisions were written where conf says, and counted as dropped; waits for all, but not forever."""

    def found() -> tuple[int, float]:
        return len(asked & _ids(folder)), _dropped(server) - before

    with suppress(TimeoutError):
        eventually(lambda: sum(found()) >= len(asked), 10)
    return found()


class _Client:
    """Has applications decided on, each under a request id of its own."""

    def __init__(self, server: Server, example: object) -> None:
        self._server, self._example = server, example
        self._numbers = itertools.count()

    def decide(self, count: int) -> set[str]:
        """Give the request ids of those that were decided on."""
        return {self._decide() for _ in range(count)}

    def decide_for(self, seconds: float) -> dict[str, float]:
        """Go on for so long; gives when each was answered."""
        answered, end = {}, time.monotonic() + seconds
        while time.monotonic() < end:
            answered[self._decide()] = time.monotonic()
        return answered

    def _decide(self) -> str:
        request_id = f"attack-{next(self._numbers)}"
        status, answer, _ = self._server.call("/classify", self._example, headers={"X-Request-ID": request_id})
        if status != 200:
            raise RuntimeError(f"{status}: {answer}")
        return request_id


def _lines(folder: Path) -> list[str]:
    if not folder.is_dir():
        return []
    return [line for path in folder.glob("*.jsonl") for line in path.read_text().splitlines()]


def _ids(folder: Path) -> set[str]:
    """Whose decisions stand where conf says, in whole lines."""
    ids = set()
    for line in _lines(folder):
        with suppress(ValueError):
            ids.add(json.loads(line)["request_id"])
    return ids
