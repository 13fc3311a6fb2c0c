"""The promoted pointer of this machine: which stored model answers, replaced atomically, with its history.

The store's own ``latest`` means "newest" and is written in place; a crash can leave it empty. So the truth is
``promoted.json`` beside it: written to a temporary file, flushed, renamed over the old one. Reading needs
neither mlflow nor bentoml, so that the service and ``status`` can do it in microseconds.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from pipeline.config import MODEL_NAME
from pipeline.errors import StoreError


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
    append_history(promotion.model_dump(), name)


def replace_file(path: Path, content: bytes) -> None:
    """Replace a file's content so that a reader, after any crash, sees the old or the new one, whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
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
    """Every promotion and rollback on this machine, oldest first; a line cut short by a crash is skipped."""
    try:
        lines = (model_home(name) / "history.jsonl").read_bytes().splitlines()
    except FileNotFoundError:
        return []
    return [record for record in map(_parse, lines) if record]


def append_history(record: Mapping[str, Any], name: str = MODEL_NAME) -> None:
    """Append one line to the history and flush it."""
    with (model_home(name) / "history.jsonl").open("ab") as file:
        file.write(json.dumps(record).encode() + b"\n")
        file.flush()
        os.fsync(file.fileno())


def _parse(line: bytes) -> dict[str, Any] | None:
    try:
        record = json.loads(line)
    except ValueError:
        return None
    return record if isinstance(record, dict) else None
