"""The promoted pointer of this machine: which stored model answers, replaced atomically, with its history.

The store's own ``latest`` means "newest" and is written in place; a crash can leave it empty. So the truth is
``promoted.json`` beside it: written to a temporary file, flushed, renamed over the old one. Reading needs
neither mlflow nor bentoml, so that the service and ``status`` can do it in microseconds.

The pointer carries its whole history record, so what follows it (the history's line, ``latest``, MLflow's alias)
can be derived: `reconcile` completes it after a crash.
"""

from __future__ import annotations

import contextlib
import fcntl
import getpass
import hashlib
import json
import os
import socket
import tempfile
import time
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, Any

from pydantic import BaseModel, ConfigDict, ValidationError

from pipeline.core.errors import PromotionRefused, StoreError
from pipeline.core.settings import MODEL_NAME
from pipeline.promotion.failpoint import failpoint


class Promotion(BaseModel):
    """One promoted version: everything that must be known to serve it, and why it is there."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    tag: str
    """Exact tag in the BentoML store, such as ``credit_risk_model:v3``."""
    version: int
    """Version of the registered model in MLflow."""
    run_id: str
    """MLflow run that trained it."""
    since: str
    """When it was promoted: ISO 8601, UTC."""
    by: str
    """Who promoted it."""
    why: str
    """What moved the pointer: promote, rollback or sync, and the reason given."""
    forced: bool = False
    previous: str | None = None
    """Tag that was promoted before, if any."""
    digests: dict[str, str]
    """Sha256 of every file of the stored model, by its path inside the model's folder."""
    replaces: list[int] = []
    """Versions that MLflow's alias ``champion`` may have named before this promotion, as far as this machine knew.
    The alias follows only from one of these: if it names another, somebody has promoted since."""


def store_home() -> Path:
    """Folder of the BentoML store: ``$BENTOML_HOME``, else ``~/bentoml``, as BentoML has it."""
    return Path(os.environ.get("BENTOML_HOME") or Path.home() / "bentoml")


def model_home(name: str = MODEL_NAME) -> Path:
    """Folder of a model's versions, its ``latest`` and the pointer."""
    return store_home() / "models" / name


def pointer_path(name: str = MODEL_NAME) -> Path:
    """The promoted pointer's file."""
    return model_home(name) / "promoted.json"


def version_home(tag: str) -> Path:
    """Folder of one stored version."""
    name, _, version = tag.partition(":")
    return model_home(name) / version


def read_pointer(name: str = MODEL_NAME) -> Promotion | None:
    """Read what is promoted; None if nothing is.

    Raises
    ------
    StoreError
        The pointer exists but is not one.
    """
    path = pointer_path(name)
    try:
        return Promotion.model_validate_json(path.read_bytes())
    except FileNotFoundError:
        return None
    except (OSError, ValidationError) as error:
        raise StoreError(
            f"{path}: not a promoted pointer ({type(error).__name__}); promote again, or roll back"
        ) from None


def file_digests(folder: Path) -> dict[str, str]:
    """Sha256 of every file below a folder, by its relative path: 64 hex digits each."""
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def write_pointer(promotion: Promotion, name: str = MODEL_NAME) -> None:
    """Make a version the promoted one, atomically and durably, and append it to the history."""
    replace_file(pointer_path(name), promotion.model_dump_json(indent=2).encode() + b"\n")
    failpoint("after-pointer")
    append_history(promotion.model_dump(), name)


def replace_file(path: Path, content: bytes) -> None:
    """Replace a file's content so that a reader, after any crash, sees the old or the new one, whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        # mkstemp makes it private to its writer; the service may run as another user.
        Path(temporary).chmod(0o644)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Flush a folder's entries to the disk, so that a rename survives a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def history(name: str = MODEL_NAME) -> list[dict[str, Any]]:
    """Every promotion, rollback and sync on this machine, oldest first.

    A line cut short by a crash is skipped; a promotion whose line was never written is known from the pointer.
    """
    records = _recorded(name)
    with contextlib.suppress(StoreError):
        promoted = read_pointer(name)
        if promoted and promoted.model_dump() not in records[-1:]:
            records.append(promoted.model_dump())
    return records


def promotions(name: str = MODEL_NAME) -> list[Promotion]:
    """Every stored version that was ever promoted here, with the digests that it must have: last promoted first.

    Each tag stands once. The first is the promoted version if the pointer is whole; those after it are what to
    fall back on. Folders are not looked at: a version may have been removed or altered since.
    """
    newest: dict[str, Promotion] = {}
    for record in reversed(history(name)):
        with contextlib.suppress(ValidationError):
            promotion = Promotion.model_validate(record)
            newest.setdefault(promotion.tag, promotion)
    return list(newest.values())


def append_history(record: Mapping[str, Any], name: str = MODEL_NAME) -> None:
    """Append one line to the history and flush it."""
    line = json.dumps(record).encode() + b"\n"
    with _history_path(name).open("a+b") as file:
        # A crash or a full disk may have cut the last line: the next one must not continue it.
        file.write(line if _ends_with_newline(file) else b"\n" + line)
        file.flush()
        os.fsync(file.fileno())


def reconcile(name: str = MODEL_NAME) -> None:
    """Complete on this machine what a killed promotion left undone. Idempotent; call it under the lock.

    Afterwards the history ends with the pointer's promotion, ``latest`` names the promoted version whole, and no
    temporary file is left.
    """
    if not model_home(name).is_dir():
        return
    for temporary in model_home(name).glob(".*.tmp"):
        temporary.unlink(missing_ok=True)
    promoted = read_pointer(name)
    if promoted is None:
        return
    if promoted.model_dump() not in _recorded(name)[-1:]:
        append_history(promoted.model_dump(), name)
    write_latest(promoted.tag)


def is_settled(promotion: Promotion, name: str = MODEL_NAME) -> bool:
    """Whether MLflow's alias is known to have followed this promotion."""
    try:
        return _settled_path(name).read_text() == promotion.since
    except FileNotFoundError:
        return False


def mark_settled(promotion: Promotion, name: str = MODEL_NAME) -> None:
    """Remember that MLflow's alias followed this promotion."""
    replace_file(_settled_path(name), promotion.since.encode())


def write_latest(tag: str) -> None:
    """Make BentoML's ``latest`` name this version, whole at every moment."""
    name, _, version = tag.partition(":")
    path = model_home(name) / "latest"
    if not path.is_file() or path.read_bytes() != version.encode():
        replace_file(path, version.encode())


def work_home(name: str = MODEL_NAME) -> Path:
    """Hidden folder for the lock and for what is not in the store yet: on its filesystem, outside its listings."""
    return store_home() / f".{name}"


@contextlib.contextmanager
def promotion_lock(seconds: float, name: str = MODEL_NAME) -> Iterator[None]:
    """Hold the right to change what is promoted on this machine.

    The kernel releases it when the process ends, however it ends.

    Parameters
    ----------
    seconds
        How long to wait for another command.

    Raises
    ------
    PromotionRefused
        Another command held it all that time.
    """
    path = work_home(name) / "lock"
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+b") as file:
        _acquire(file, time.monotonic() + seconds)
        with contextlib.suppress(OSError):  # who holds it is a courtesy: a full disk must not stop a rollback
            file.truncate(0)
            file.write(f"{whoami()}, process {os.getpid()}, since {now()}".encode())
            file.flush()
        yield


def whoami() -> str:
    """``user@host`` of this process."""
    try:
        user = getpass.getuser()
    except (KeyError, OSError):  # a container's user may have no name
        user = str(os.getuid())
    return f"{user}@{socket.gethostname()}"


def now() -> str:
    """The present moment: ISO 8601, UTC, to the microsecond."""
    return datetime.now(UTC).isoformat(timespec="microseconds")


def _acquire(file: IO[bytes], deadline: float) -> None:
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() >= deadline:
                file.seek(0)
                holder = file.read().decode(errors="replace") or "unknown"
                raise PromotionRefused(
                    f"one promotion at a time: another is under way ({holder}); try again when it has ended"
                ) from None
            time.sleep(0.05)
        else:
            return


def _history_path(name: str) -> Path:
    return model_home(name) / "history.jsonl"


def _settled_path(name: str) -> Path:
    return work_home(name) / "settled"


def _recorded(name: str) -> list[dict[str, Any]]:
    try:
        lines = _history_path(name).read_bytes().splitlines()
    except FileNotFoundError:
        return []
    return [record for record in map(_parse, lines) if record]


def _ends_with_newline(file: IO[bytes]) -> bool:
    if file.seek(0, os.SEEK_END) == 0:
        return True
    file.seek(-1, os.SEEK_END)
    return file.read(1) == b"\n"


def _parse(line: bytes) -> dict[str, Any] | None:
    try:
        record = json.loads(line)
    except ValueError:
        return None
    return record if isinstance(record, dict) else None
