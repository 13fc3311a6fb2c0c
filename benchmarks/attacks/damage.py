"""Damage to files, undone afterwards."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path


def damage(folder: Path, generator: random.Random, planted: bytes) -> tuple[str, Callable[[], object]]:
    """Change, add or remove a byte or a file below a folder.

    Parameters
    ----------
    planted
        What a new file holds.

    Returns
    -------
    tuple
        What was done, and a function that undoes it.
    """
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    path = generator.choices(files, weights=[50 + path.stat().st_size ** 0.5 for path in files])[0]
    whole, name = path.read_bytes(), path.relative_to(folder)
    kind = generator.choices(["changed", "added", "cut", "missing file", "new file"], weights=[12, 3, 3, 1, 1])[0]
    if kind == "new file":
        new = path.with_name(generator.choice(["sitecustomize.py", "extra.pkl", ".hidden", "model.py"]))
        if not new.exists():
            new.write_bytes(planted)
            return f"{new.relative_to(folder)} added", new.unlink
    if kind == "missing file":
        path.unlink()
    else:
        path.write_bytes(_altered(whole, kind, generator))
    return f"{name}: {kind}", lambda: path.write_bytes(whole)


def _altered(whole: bytes, kind: str, generator: random.Random) -> bytes:
    if kind == "cut" and whole:
        return whole[: generator.randrange(len(whole))]
    if kind == "changed" and whole:
        at = generator.randrange(len(whole))
        return whole[:at] + bytes([whole[at] ^ generator.randrange(1, 256)]) + whole[at + 1 :]
    at = generator.randrange(len(whole) + 1)
    return whole[:at] + generator.randbytes(1) + whole[at:]
