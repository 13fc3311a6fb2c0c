"""Make the archive of this folder with the commands of release 0.1: see README.md."""

from __future__ import annotations

import csv
import json
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Mapping
from contextlib import AbstractContextManager, closing, suppress
from pathlib import Path
from typing import Any
from urllib.request import Request, urlopen

from tests.testkit.servers import Server, Service, running
from tests.upgrade import ARCHIVE, MADE_IN

RELEASE = Path(MADE_IN)

SMALL = {
    "trials: 50 ": "trials: 3 ",
    "folds: 5 ": "folds: 3 ",
    "max_rounds: 1000 ": "max_rounds: 50 ",
    "  eta: 0.05": "  eta: 0.15",
}
"""Changes of ``conf/train.yaml`` that keep the boosters, and so the archive, small."""

OTHERS = {"second": {"max_rounds: 50 ": "max_rounds: 70 "}, "third": {"max_rounds: 50 ": "max_rounds: 90 "}}
"""Further changes for the two later trainings: more rounds, each a little better than the one before. The seed
stays: with another one, only 4 % of the rows would be held out of both models, and the gate wants 200 rows."""

NAMELESS = 'import socket\nsocket.gethostname = lambda: "lender"\n'
"""A ``sitecustomize`` module, so that the archive does not name the machine on which it is made."""

KEPT = {name: name for name in ("mlflow.db", "optuna.db", "mlruns", "bentoml", "decisions")} | {"conf": "conf-0.1"}
"""What the archive holds, and under which name: a new release has a ``conf`` of its own."""


def main() -> None:
    """Run the release in its folder, and pack what it left there."""
    with tempfile.TemporaryDirectory() as site:
        (Path(site) / "sitecustomize.py").write_text(NAMELESS)
        env = _environment(site)
        _configure()
        _train_and_promote(env)
        _interrupt_a_study(env)
        _decide(env)
    _remove_what_nothing_reads()
    _pack()


def _environment(site: str) -> dict[str, str]:
    """What a user of the release sets, and a neutral user and host."""
    names = dict.fromkeys(("USER", "LOGNAME", "USERNAME"), "analyst")
    switches = {"MLFLOW_DISABLE_TELEMETRY": "true", "BENTOML_DO_NOT_TRACK": "True", "TZ": "UTC"}
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    places = {"HOME": site, "PYTHONPATH": site, "BENTOML_HOME": str(RELEASE / "bentoml"), "PATH": path}
    return {**names, **switches, **places}


def _configure() -> None:
    shipped = _replaced((RELEASE / "conf/train.yaml").read_text(), SMALL)
    (RELEASE / "conf/train.yaml").write_text(shipped)
    for name, changes in OTHERS.items():
        (RELEASE / f"conf/{name}.yaml").write_text(_replaced(shipped, changes))
    serve = RELEASE / "conf/serve.yaml"
    serve.write_text(_replaced(serve.read_text(), {"\nworkers: null ": "\nworkers: 2 "}))


def _replaced(text: str, changes: Mapping[str, str]) -> str:
    for old, new in changes.items():
        assert text.count(old) == 1, f"{old!r} stands {text.count(old)} times"
        text = text.replace(old, new)
    return text


def _train_and_promote(env: dict[str, str]) -> None:
    """Three versions; the first two are promoted, one after the other, and the third is not."""
    local = ("--env-manager", "local", "--experiment-name", "credit_risk")
    _run(env, "mlflow", "run", ".", *local, "-P", "trials=3", "-P", "workers=1")
    _run(env, "python", "-m", "pipeline", "promote")
    _run(env, "python", "-m", "pipeline", "train", "--workers", "1", "--config", "conf/second.yaml")
    _run(env, "python", "-m", "pipeline", "promote", "--reason", "deeper trees")
    _run(env, "python", "-m", "pipeline", "train", "--workers", "1", "--config", "conf/third.yaml")


def _interrupt_a_study(env: dict[str, str]) -> None:
    """Kill a training after three of its six trials, while the fourth runs."""
    command = ("python", "-m", "pipeline", "train", "--trials", "6", "--study", "half", "--workers", "1")
    training = subprocess.Popen(command, cwd=RELEASE, env=env)
    while not _is_stopped_half_done(training):
        assert training.poll() is None, "the training ended before it could be killed"
        training.send_signal(signal.SIGCONT)
        time.sleep(0.002)
    training.kill()
    training.wait()


def _is_stopped_half_done(training: subprocess.Popen[bytes]) -> bool:
    """Stop the training and look; what is seen twice is what a kill leaves."""
    if not _is_half_done():
        return False
    training.send_signal(signal.SIGSTOP)
    os.waitid(os.P_PID, training.pid, os.WSTOPPED | os.WEXITED | os.WNOWAIT)
    return _is_half_done()


def _is_half_done() -> bool:
    query = """
        SELECT sum(state = 'COMPLETE') = 3 AND sum(state = 'RUNNING') = 1 AND (
            SELECT count(*) FROM trial_params JOIN trials USING (trial_id) JOIN studies USING (study_id)
            WHERE study_name = 'half' AND state = 'RUNNING') = 6
        FROM trials JOIN studies USING (study_id) WHERE study_name = 'half'
    """
    with suppress(sqlite3.OperationalError), closing(_opened(RELEASE / "optuna.db")) as database:
        (answer,) = database.execute(query).fetchone()
        return bool(answer)
    return False


def _opened(path: Path) -> sqlite3.Connection:
    return sqlite3.connect(f"file:{path}?mode=ro", uri=True, timeout=0)


def _decide(env: dict[str, str]) -> None:
    """Decisions of both promoted versions: the service runs through a rollback and back."""
    rows = _applications()
    with _serving(env) as server:
        for row in rows[:12]:
            _post(f"{server.url}/classify", row)
        _run(env, "python", "-m", "pipeline", "rollback", "--reason", "rehearsal")
        for row in rows[:8]:
            _post(f"{server.url}/classify", row)
        _run(env, "python", "-m", "pipeline", "rollback", "--to", "2", "--reason", "rehearsal over")
        _post(f"{server.url}/classify_batch", rows[12:17])
        _post(f"{server.url}/explain", rows[17])


def _applications() -> list[dict[str, Any]]:
    """Eighteen rows of the shipped table as request bodies."""
    with (RELEASE / "data/credit_risk.csv").open() as file:
        rows = list(csv.DictReader(file))[::240][:18]
    for row in rows:
        del row["status"]
    return [{name: _number(value) for name, value in row.items()} for row in rows]


def _number(text: str) -> Any:
    if not text:
        return None
    with suppress(ValueError):
        return int(text)
    return text


def _serving(env: dict[str, str]) -> AbstractContextManager[Server]:
    command = ("bentoml", "serve", "--port", "{port}")
    return running(Service("release 0.1", command, environment=env, folder=RELEASE))


def _post(url: str, body: Any) -> None:
    request = Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
    with urlopen(request, timeout=30) as response:
        assert response.status == 200, response.status


def _run(env: dict[str, str], *command: str) -> None:
    subprocess.run(command, cwd=RELEASE, env=env, check=True)


def _remove_what_nothing_reads() -> None:
    """Leave the figures, the lock files, and what BentoML writes beside its models, out of the archive."""
    for folder in [*RELEASE.glob("mlruns/**/figures"), *RELEASE.glob("**/__pycache__")]:
        shutil.rmtree(folder)
    for lock in RELEASE.glob("decisions/.*.lock"):
        lock.unlink()
    for path in (RELEASE / "bentoml").iterdir():
        if path.name not in {"models", ".credit_risk_model"}:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    for name in ("mlflow.db", "optuna.db"):
        # Both databases are whole files afterwards; a write-ahead log, or the journal of the kill, is applied.
        with closing(sqlite3.connect(RELEASE / name)) as database:
            database.execute("PRAGMA wal_checkpoint(truncate)")
            database.execute("VACUUM")


def _pack() -> None:
    with tarfile.open(ARCHIVE, "w:xz", preset=9) as archive:
        for name, packed in KEPT.items():
            archive.add(RELEASE / name, packed, filter=_neutral)
    sys.stdout.write(f"{ARCHIVE}: {ARCHIVE.stat().st_size:,} bytes\n")


def _neutral(member: tarfile.TarInfo) -> tarfile.TarInfo:
    member.uid = member.gid = 0
    member.uname = member.gname = ""
    return member


if __name__ == "__main__":
    main()
