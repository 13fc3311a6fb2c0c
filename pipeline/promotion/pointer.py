"""Write the promoted pointer and what follows it: history, ``latest`` and the note that the alias followed."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

from pipeline.core.files import replace_file
from pipeline.core.promoted import (
    MODEL_NAME,
    Promotion,
    history_path,
    model_home,
    pointer_path,
    read_pointer,
    recorded_history,
)
from pipeline.promotion.failpoint import failpoint
from pipeline.promotion.lock import work_home


def write_pointer(promotion: Promotion, name: str = MODEL_NAME) -> None:
    """Make a version the promoted one, atomically and durably, and append it to the history."""
    replace_file(pointer_path(name), promotion.model_dump_json(indent=2).encode() + b"\n")
    failpoint("after-pointer")
    append_history(promotion.model_dump(), name)


def append_history(record: Mapping[str, Any], name: str = MODEL_NAME) -> None:
    """Append one line to the history and flush it."""
    line = json.dumps(record).encode() + b"\n"
    with history_path(name).open("a+b") as file:
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
    if promoted not in recorded_history(name).promotions[-1:]:
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


def _settled_path(name: str) -> Path:
    return work_home(name) / "settled"


def _ends_with_newline(file: IO[bytes]) -> bool:
    if file.seek(0, os.SEEK_END) == 0:
        return True
    file.seek(-1, os.SEEK_END)
    return file.read(1) == b"\n"
