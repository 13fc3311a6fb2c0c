"""Attacks by somebody who may write MLflow's artifacts, but not its tracking database."""

from __future__ import annotations

import random
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import mlflow
from mlflow import MlflowClient

from benchmarks.attacks.attack import Attack, Tally
from benchmarks.attacks.damage import damage
from benchmarks.attacks.lab import Lab, done, one_line
from pipeline.core.errors import TrackingError
from pipeline.core.promoted import MODEL_NAME
from pipeline.registry.logged_model import open_model
from pipeline.registry.seal import DIGESTS_TAG, GOLDEN_TAG
from tests.testkit import DATA
from tests.testkit.registry import BETTER, GOOD, Command, Machine

URI = f"models:/{MODEL_NAME}/{BETTER}"


def artifacts(lab: Lab, tally: Tally) -> None:
    """Random damage first, then code in every place from which Python or MLflow would run it."""
    machine, generator = lab.machine(), lab.random()
    folder, mark = _artifacts(machine), lab.folder() / "planted-code-ran"
    payload = f"open({str(mark)!r}, 'w').close()\n".encode()
    mlflow.set_tracking_uri(machine.tracking)
    try:
        for _ in range(lab.counts.corruptions):
            _refused_by_open(folder, generator, payload, tally)
    finally:
        mlflow.set_tracking_uri(None)
    planted = 0
    for what, undo in _plants(folder, payload):
        planted += 1
        for command in _commands(machine, lab.folder()):
            tally.count(
                one_line(command) and not mark.exists(), f"{what}: {command.code} {command.out}{command.err}"
            )
        undo()
    tally.count(not mark.exists(), "planted code ran")
    done(machine, "promote", "--version", str(BETTER))
    tally.note(f"then {planted} plants against promote, promote --force, --dry-run, sync and score")


def seals(lab: Lab, tally: Tally) -> None:
    machine = lab.machine()
    client = MlflowClient(machine.tracking)
    model_id = str(client.get_model_version(MODEL_NAME, str(BETTER)).source).removeprefix("models:/")
    tags = dict(client.get_logged_model(model_id).tags)
    odd: dict[str, tuple[dict[str, str | None], str]] = {
        "no digests": ({DIGESTS_TAG: None}, "train` again"),
        "digests that are none": ({DIGESTS_TAG: "[[[["}, "train` again"),
        "no golden answers": ({GOLDEN_TAG: None}, "train` again"),
        "other golden answers": ({GOLDEN_TAG: tags[GOLDEN_TAG].replace("0.", "0.1", 1)}, "cannot be forced"),
    }
    for what, (changes, said) in odd.items():
        for tag, value in changes.items():
            client.delete_logged_model_tag(model_id, tag)
            if value is not None:
                client.set_logged_model_tags(model_id, {tag: value})
        refused = machine.run("promote", "--version", str(BETTER), "--force", "--reason", "attack")
        tally.count(one_line(refused) and said in refused.err, f"{what}: {refused.code} {refused.err}")
        client.set_logged_model_tags(model_id, tags)


ATTACKS = [
    Attack(
        "artifacts",
        "One changed, added or missing byte or file of a logged model: refused, nothing runs",
        artifacts,
    ),
    Attack("seals", "A model without digests or golden answers is refused, with the cure", seals),
]


def _artifacts(machine: Machine) -> Path:
    """Folder of the logged model in the artifact store."""
    client = MlflowClient(machine.tracking)
    model_id = str(client.get_model_version(MODEL_NAME, str(BETTER)).source).removeprefix("models:/")
    return Path(client.get_logged_model(model_id).artifact_location.removeprefix("file://"))


def _refused_by_open(folder: Path, generator: random.Random, payload: bytes, tally: Tally) -> None:
    what, undo = damage(folder, generator, payload)
    name = what.partition(": ")[0].removesuffix(" added")
    try:
        open_model(URI)
        tally.count(held=False, what=f"{what}: opened")
    except TrackingError as error:
        tally.count(name in str(error), f"{what}: the file is not named: {error}")
    finally:
        undo()


def _plants(folder: Path, payload: bytes) -> Iterator[tuple[str, Callable[[], object]]]:
    """Put code, one place after the other, where it would run."""
    for path in [*sorted(folder.rglob("*.py"))[:3], folder / "artifacts/pyfunc.py"]:
        if path.exists():
            yield _written(path, path.read_bytes() + b"\n" + payload)
    for name in ("sitecustomize.py", "code/sitecustomize.py", "artifacts/usercustomize.py"):
        yield _written(folder / name, payload)
    mlmodel = folder / "MLmodel"
    text = mlmodel.read_bytes()
    loader = text.replace(b"loader_module: mlflow.pyfunc.model", b"loader_module: planted")
    yield _written(mlmodel, loader if loader != text else text + b"\n# planted\n")


def _written(path: Path, content: bytes) -> tuple[str, Callable[[], object]]:
    before = path.read_bytes() if path.exists() else None
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(content)
    undo = path.unlink if before is None else lambda: path.write_bytes(before)
    return f"code in {path.parent.name}/{path.name}", undo


def _commands(machine: Machine, folder: Path) -> Iterator[Command]:
    """Every command that reads the artifacts, each refused."""
    version = ("promote", "--version", str(BETTER))
    yield machine.run(*version)
    yield machine.run(*version, "--force", "--reason", "attack")
    yield machine.run(*version, "--dry-run")
    yield machine.run("score", "--input", str(DATA), "--output", str(folder / "out.csv"), "--model", URI)
    with tempfile.TemporaryDirectory() as name:
        client = MlflowClient(machine.tracking)
        client.set_registered_model_alias(MODEL_NAME, "champion", str(BETTER))
        yield Machine(Path(name) / "home", machine.tracking).run("sync")
        client.set_registered_model_alias(MODEL_NAME, "champion", str(GOOD))
