"""What is promoted survives kill -9 at every step, races, full disks and dead servers: real faults."""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from pipeline.core import promoted as pointer
from pipeline.core.files import file_digests
from pipeline.core.machine import now
from pipeline.promotion.lock import promotion_lock
from pipeline.promotion.pointer import write_pointer
from tests.testkit import PROJECT
from tests.testkit.odd_servers import ScriptedServer, SilentServer
from tests.testkit.registry import BETTER, GOOD, THIRD, Machine
from tests.testkit.servers import Service, alive, free_port, running
from tests.testkit.waiting import eventually

BEFORE = ("after-lock", "after-stage", "after-verdict", "after-verify", "after-rename")
AFTER = (
    "after-pointer", "after-history", "after-latest", "after-alias", "after-settled", "after-prune",
)  # fmt: skip
"""Every step of a promotion, before and after the pointer moves."""


def whole(machine: Machine) -> int:
    """The promoted version, its files whole, and `status` showing it."""
    promoted = machine.pointer()
    assert promoted
    assert file_digests(machine.folder(promoted.version)) == promoted.digests
    with machine.entered():
        assert pointer.history().promotions[-1] == promoted
    return promoted.version


def settled(machine: Machine, version: int) -> None:
    """Nothing is left of a fault: pointer, `latest`, history and alias agree, and no rubbish lies about."""
    assert whole(machine) == version
    assert (machine.models / "latest").read_text() == f"v{version}"
    assert machine.champion() == version
    assert machine.history()[-1] == version
    assert not [path.name for path in machine.models.iterdir() if path.name.startswith(".")]
    assert sorted(path.name for path in (machine.home / ".credit_risk_model").iterdir()) == [
        "lock",
        "settled",
        "staging",
    ]
    assert not list((machine.home / ".credit_risk_model/staging").iterdir())


@pytest.mark.parametrize("failpoint", [*BEFORE, *AFTER])
def test_kill_9_at_each_step_leaves_the_old_or_the_new_version_whole(
    promoted_machine: Machine, failpoint: str
) -> None:
    machine = promoted_machine
    killed = machine.run("promote", "--version", "2", failpoint=failpoint)
    assert killed.code == -signal.SIGKILL
    assert whole(machine) == (GOOD if failpoint in BEFORE else BETTER)
    again = machine.run("promote", "--version", "2")
    assert again.code == 0, again.err
    settled(machine, BETTER)
    assert machine.history() == [1, 2]


def test_kill_9_at_any_moment(promoted_machine: Machine) -> None:
    machine = promoted_machine
    generator = random.Random(0)
    begun = time.monotonic()
    assert machine.run("promote", "--version", "2").code == 0
    usual = time.monotonic() - begun
    for round_number in range(4):
        killed = machine.start("promote", "--version", str((THIRD, BETTER)[round_number % 2]))
        killed.process.join(generator.uniform(0, usual))
        killed.process.kill()
        killed.wait()
        whole(machine)
    again = machine.run("promote", "--version", "3")
    assert again.code == 0, again.err
    settled(machine, THIRD)


def test_kill_9_during_a_rollback_and_a_sync(promoted_machine: Machine, tmp_path: Path) -> None:
    machine, other = promoted_machine, Machine(tmp_path / "other", promoted_machine.tracking)
    assert machine.run("promote", "--version", "2").code == 0
    away = machine.on("http://127.0.0.1:9")
    assert away.run("rollback", failpoint="after-pointer").code == -signal.SIGKILL
    assert whole(machine) == GOOD
    assert machine.run("sync").code == 0
    settled(machine, GOOD)
    for failpoint, version in (("after-rename", BETTER), ("after-pointer", THIRD)):
        assert machine.run("promote", "--version", str(version)).code == 0
        assert other.run("sync", failpoint=failpoint).code == -signal.SIGKILL
        assert other.run("sync").code == 0
        settled(other, version)


def test_two_promotions_at_once_are_one_after_the_other(promoted_machine: Machine) -> None:
    machine = promoted_machine
    both = {version: machine.start("promote", "--version", str(version)) for version in (BETTER, THIRD)}
    for command in both.values():
        command.wait()
    # The one that came second was judged against a champion of the past, unless it began when the first was done.
    late = [version for version, command in both.items() if command.code]
    assert len(late) <= 1
    for version in late:
        assert "Run it again" in both[version].err or "run it again" in both[version].err
        assert machine.run("promote", "--version", str(version)).code == 0
    assert sorted(machine.history()) == [1, 2, 3]
    settled(machine, machine.history()[-1])


def test_a_promotion_that_waits_too_long_is_refused_in_one_line(promoted_machine: Machine, tmp_path: Path) -> None:
    text = Path("conf/promote.yaml").read_text().replace("lock_seconds: 60.0", "lock_seconds: 0.1")
    config = tmp_path / "impatient.yaml"
    config.write_text(text)
    with promoted_machine.entered(), promotion_lock(0):
        refused = promoted_machine.run("promote", "--version", "2", "--config", str(config))
    assert refused.code == 1
    assert f"process {os.getpid()}" in refused.err
    assert len(refused.err.splitlines()) == 1
    settled(promoted_machine, GOOD)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can mount a small filesystem")
@pytest.mark.parametrize("kilobytes", [0, 60, 120])
def test_a_full_disk_loses_nothing_and_says_so(first_promoted: Machine, tmp_path: Path, kilobytes: int) -> None:
    disk = tmp_path / "home"
    disk.mkdir()
    with mounted(disk):
        machine = first_promoted.copy(tmp_path)
        filler = fill(disk, kilobytes)
        full = machine.run("promote", "--version", "2")
        assert full.code == 1
        assert len(full.err.splitlines()) == 1
        assert "space" in full.err
        assert whole(machine) == GOOD
        assert machine.run("status").code == 0
        filler.unlink()
        again = machine.run("promote", "--version", "2")
        assert again.code == 0, again.err
        settled(machine, BETTER)


@contextlib.contextmanager
def mounted(folder: Path) -> Iterator[None]:
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(folder)], check=False)
    if done.returncode:
        pytest.skip("mounting is not allowed here")
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def fill(disk: Path, spare_kilobytes: int) -> Path:
    """Leave only so much space."""
    filler = disk / "filler"
    free = os.statvfs(disk).f_bavail * os.statvfs(disk).f_frsize
    filler.write_bytes(b"\0" * (free - spare_kilobytes * 1024))
    return filler


class MlflowServer:
    """A real MLflow server over a machine's tracking database, which can be killed and started again."""

    def __init__(self, machine: Machine, stack: contextlib.ExitStack) -> None:
        command = (sys.executable, "-m", "mlflow", "server", "--workers", "1")
        where = ("--backend-store-uri", machine.tracking, "--port", "{port}")
        quiet = {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "MLFLOW_DISABLE_TELEMETRY": "true"}
        self._service = Service(
            "mlflow server", (*command, *where), ready="/health", environment={**os.environ, **quiet}
        )
        self._stack = stack
        self._port = free_port()
        self.start()

    def start(self) -> None:
        self._server = self._stack.enter_context(running(self._service, self._port))
        self.uri = self._server.url

    def kill(self) -> None:
        self._server.kill()


@pytest.fixture
def server(promoted_machine: Machine) -> Iterator[MlflowServer]:
    with contextlib.ExitStack() as stack:
        yield MlflowServer(promoted_machine, stack)


def test_a_server_that_dies_stops_neither_a_follower_nor_a_rollback(
    promoted_machine: Machine, server: MlflowServer, tmp_path: Path
) -> None:
    machine = promoted_machine
    follower = Machine(tmp_path / "follower", server.uri)
    watching = follower.start("sync", "--watch", "0.2")
    eventually(lambda: follower.pointer() is not None)
    assert whole(follower) == GOOD

    # Killed in the middle of a promotion: the old or the new version, and one line.
    promoting = machine.on(server.uri).start("promote", "--version", "3")
    benches = machine.home / ".credit_risk_model/staging"
    eventually(lambda: any(benches.glob("bench-*/models")) or not promoting.process.is_alive())
    server.kill()
    assert promoting.wait(120).code in {0, 1}
    assert len(promoting.err.splitlines()) <= 1
    outcome = whole(machine)

    # While it is away the follower stays as it is; a promotion is refused, a rollback is not.
    eventually(lambda: "no answer" in watching.err)
    assert watching.process.is_alive()
    assert whole(follower) == GOOD
    refused = machine.on(server.uri).run("promote", "--version", "2")
    assert refused.code == 1
    assert len(refused.err.splitlines()) == 1
    assert machine.run("promote", "--version", "2").code == 0  # straight into the server's database
    settled(machine, BETTER)
    offline = machine.on(server.uri).run("rollback")
    assert offline.code == 0, offline.err
    assert whole(machine) == outcome

    server.start()
    eventually(lambda: whole(follower) == BETTER)
    assert machine.on(server.uri).run("sync").code == 0
    settled(machine, outcome)
    eventually(lambda: whole(follower) == outcome)

    assert watching.process.pid
    os.kill(watching.process.pid, signal.SIGTERM)
    assert watching.wait().code == 0
    assert "stopped following" in watching.out


def test_a_command_ends_with_the_process_that_started_it(promoted_machine: Machine) -> None:
    code = (
        "from pathlib import Path; from tests.testkit.registry import Machine; "
        f"started = Machine(Path({str(promoted_machine.home)!r}), {promoted_machine.tracking!r})"
        ".start('sync', '--watch', '0.2'); print(started.process.pid, flush=True); started.wait()"
    )
    runner = subprocess.Popen([sys.executable, "-c", code], cwd=PROJECT, stdout=subprocess.PIPE)
    with runner:
        assert runner.stdout
        command = psutil.Process(int(runner.stdout.readline()))
        runner.kill()
    eventually(lambda: not alive(command))


def test_the_history_shows_a_line_for_each_promotion_whatever_was_killed(promoted_machine: Machine) -> None:
    machine = promoted_machine
    with (machine.models / "history.jsonl").open("ab") as file:
        file.write(b'{"tag": "credit_ri')  # a disk that was full for a moment
    assert machine.run("promote", "--version", "2", failpoint="after-pointer").code == -signal.SIGKILL
    shown = machine.run("status", "--json").data["history"]
    assert [record["version"] for record in shown] == [1, 2]
    assert machine.on("http://127.0.0.1:9").run("rollback").code == 0
    lines = (machine.models / "history.jsonl").read_bytes().splitlines()
    assert [json.loads(line)["version"] for line in lines if line.endswith(b"}")] == [1, 2, 1]


@pytest.fixture
def silent() -> Iterator[SilentServer]:
    with contextlib.closing(SilentServer()) as server:
        yield server


def test_a_rollback_waits_for_nobody_who_waits_for_a_hung_mlflow(
    promoted_machine: Machine, silent: SilentServer, tmp_path: Path
) -> None:
    machine = promoted_machine
    assert machine.run("promote", "--version", "2").code == 0
    hung = machine.on(silent.uri)
    promoting, watching = hung.start("promote", "--version", "3"), hung.start("sync", "--watch", "0.1")
    eventually(lambda: silent.asked >= 2)
    conf = shutil.copytree(PROJECT / "conf", tmp_path / "impatient")  # the shipped settings
    done = hung.run("rollback", "--conf", str(conf))
    assert done.code == 0, done.err
    assert "has not answered yet" in done.out
    assert promoting.process.is_alive()
    assert watching.process.is_alive()
    assert whole(machine) == GOOD
    assert machine.champion() == BETTER
    os.kill(watching.process.pid or 0, signal.SIGTERM)
    assert watching.wait().code == 0  # although it waits for an answer
    silent.close()
    assert promoting.wait(120).code == 1
    assert len(promoting.err.splitlines()) == 1
    assert machine.run("sync").code == 0
    settled(machine, GOOD)


def test_a_verdict_is_discarded_if_somebody_promoted_meanwhile(promoted_machine: Machine) -> None:
    machine = promoted_machine
    assert machine.run("promote", "--version", "2").code == 0
    judging = machine.start("promote", "--version", "3")
    benches = machine.home / ".credit_risk_model/staging"
    eventually(lambda: any(benches.glob("bench-*")))  # it has looked at the pointer
    with machine.entered(), promotion_lock(60):
        present, *_, first = pointer.promotions()
        assert (present.version, first.version) == (BETTER, GOOD)
        write_pointer(first.model_copy(update={"since": now(), "why": "rollback"}))
    assert judging.wait(120).code == 1
    assert "was promoted while this command was judging" in judging.err
    assert whole(machine) == GOOD
    assert not machine.folder(THIRD).exists()


def test_a_follower_survives_any_answer_of_mlflow(promoted_machine: Machine) -> None:
    server = ScriptedServer()
    watching = promoted_machine.on(server.uri).start("sync", "--watch", "0.05")
    try:
        eventually(lambda: len(watching.err.splitlines()) == 1)
        server.answer = json.dumps(
            {"model_version": {"name": "credit_risk_model", "version": "abc", "run_id": "x"}}
        ).encode()
        eventually(lambda: len(watching.err.splitlines()) == 2)
        server.answer = b"[[[["
        eventually(lambda: len(watching.err.splitlines()) == 3)
        assert all("error: MLflow at" in line for line in watching.err.splitlines())
        assert watching.process.is_alive()
        assert whole(promoted_machine) == GOOD
    finally:
        os.kill(watching.process.pid or 0, signal.SIGTERM)
        server.close()
    assert watching.wait().code == 0
