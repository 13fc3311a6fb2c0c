"""The promoted pointer of this machine: which stored model answers, replaced atomically, with its history.

The store's own ``latest`` means "newest" and is written in place; a crash can leave it empty. So the truth is
``promoted.json`` beside it: written to a temporary file, flushed, renamed over the old one. Reading needs
neither mlflow nor bentoml, so that the service and ``status`` can do it in microseconds.

The pointer carries its whole history record, so what follows it (the history's line, ``latest``, MLflow's alias)
can be derived: `reconcile` completes it after a crash.
"""

from __future__ import annotations

import contextlib
import json
import os
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from pipeline.core.errors import PointerUnreadable, StoreError
from pipeline.core.files import access_denied, read_regular_file

MODEL_NAME = "credit_risk_model"
"""The registered model in MLflow and the model in the BentoML store."""

_POINTER_BYTES = 1 << 20
"""Largest pointer that is read; a real one has about a kilobyte."""


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
    PointerUnreadable
        The system does not let it be read: no permission, no free file descriptor, a disk error.
    StoreError
        It was read, but is no pointer.
    """
    path = pointer_path(name)
    try:
        return Promotion.model_validate_json(read_regular_file(path, _POINTER_BYTES))
    except FileNotFoundError:
        return None
    except PermissionError as error:
        raise PointerUnreadable(access_denied(error)) from error
    except OSError as error:
        raise PointerUnreadable(f"{path}: cannot be read: {error.strerror}") from error
    except ValueError as error:  # ValidationError is one
        found = type(error).__name__ if isinstance(error, ValidationError) else str(error)
        raise StoreError(f"{path}: not a promoted pointer ({found}); promote again, or roll back") from None


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


def _history_path(name: str) -> Path:
    return model_home(name) / "history.jsonl"


def _recorded(name: str) -> list[dict[str, Any]]:
    try:
        lines = _history_path(name).read_bytes().splitlines()
    except FileNotFoundError:
        return []
    return [record for record in map(_parse, lines) if record]


def _parse(line: bytes) -> dict[str, Any] | None:
    try:
        record = json.loads(line)
    except ValueError:
        return None
    return record if isinstance(record, dict) else None
