"""The promoted pointer of this machine: which stored model answers, replaced atomically, with its history.

The store's own ``latest`` means "newest" and is written in place; a crash can leave it empty. So the truth is
``promoted.json`` beside it: written to a temporary file, flushed, renamed over the old one. Reading needs
neither mlflow nor bentoml, so that the service and ``status`` can do it in microseconds.

The pointer carries its whole history record, so what follows it (the history's line, ``latest``, MLflow's alias)
can be derived: `reconcile` completes it after a crash.
"""

from __future__ import annotations

import contextlib
import os
from dataclasses import dataclass, replace
from pathlib import Path

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
    """Read the promoted pointer; None if nothing is promoted.

    Raises
    ------
    PointerUnreadable
        It exists but cannot be read: no permission, no free file descriptor, a disk error.
    StoreError
        It can be read, but is not a pointer.
    """
    path = pointer_path(name)
    try:
        return Promotion.model_validate_json(read_regular_file(path, _POINTER_BYTES))
    except FileNotFoundError:
        return None
    except PermissionError as error:
        raise PointerUnreadable(access_denied(error)) from error
    except OSError as error:
        raise PointerUnreadable(f"{path}: cannot be read ({error.strerror})") from error
    except ValueError as error:  # ValidationError is one
        found = type(error).__name__ if isinstance(error, ValidationError) else str(error)
        raise StoreError(f"{path}: not a promoted pointer ({found}); promote again, or roll back") from None


@dataclass(frozen=True)
class History:
    """Every promotion, rollback and sync on this machine.

    Attributes
    ----------
    promotions
        Oldest first; the last is what is promoted, if the pointer is whole.
    damaged_lines
        Lines of the history's file that are no promotions, and were left out: a crash cut them short, or somebody
        wrote into the file.
    """

    promotions: tuple[Promotion, ...]
    damaged_lines: int


def history(name: str = MODEL_NAME) -> History:
    """Read the history; a promotion whose line was never written is known from the pointer."""
    recorded = recorded_history(name)
    with contextlib.suppress(StoreError):
        promoted = read_pointer(name)
        if promoted and promoted not in recorded.promotions[-1:]:
            return replace(recorded, promotions=(*recorded.promotions, promoted))
    return recorded


def recorded_history(name: str = MODEL_NAME) -> History:
    """Read the history's file alone."""
    try:
        lines = history_path(name).read_bytes().splitlines()
    except FileNotFoundError:
        return History((), 0)
    found = [_parsed(line) for line in lines if line.strip()]
    whole = tuple(promotion for promotion in found if promotion)
    return History(whole, len(found) - len(whole))


def history_path(name: str = MODEL_NAME) -> Path:
    """The history's file: one JSON object a line, only ever appended to."""
    return model_home(name) / "history.jsonl"


def promotions(name: str = MODEL_NAME) -> list[Promotion]:
    """Every stored version that was ever promoted here, with the digests that it must have: last promoted first.

    Each tag occurs once. The first is the promoted version if the pointer is whole; the others are what to fall
    back on. The folders are not checked: a version may have been removed or altered since.
    """
    newest: dict[str, Promotion] = {}
    for promotion in reversed(history(name).promotions):
        newest.setdefault(promotion.tag, promotion)
    return list(newest.values())


def _parsed(line: bytes) -> Promotion | None:
    try:
        return Promotion.model_validate_json(line)
    except ValidationError:
        return None
