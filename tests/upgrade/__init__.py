"""The state that release 0.1 left on a machine, kept as an archive: see README.md."""

from __future__ import annotations

import sqlite3
import tarfile
from contextlib import closing
from pathlib import Path

ARCHIVE = Path(__file__).with_name("release-0.1.tar.xz")

MADE_IN = "/tmp/release-0.1"
"""Folder in which the state was made: MLflow keeps absolute paths of artifacts."""


def unpack(folder: Path) -> Path:
    """Unpack the state into a folder as if the release had run there, and return the folder.

    It holds ``mlflow.db``, ``mlruns/``, ``optuna.db``, ``bentoml/`` (the BentoML home), ``decisions/`` and
    ``conf-0.1/``, the configuration that the release ran with.
    """
    with tarfile.open(ARCHIVE) as archive:
        archive.extractall(folder, filter="data")
    _move_database(folder / "mlflow.db", str(folder))
    for description in folder.glob("mlruns/**/MLmodel"):
        description.write_text(description.read_text().replace(MADE_IN, str(folder)))
    return folder


def _move_database(path: Path, folder: str) -> None:
    with closing(sqlite3.connect(path)) as database, database:
        tables = [name for (name,) in database.execute("SELECT name FROM sqlite_master WHERE type = 'table'")]
        for table in tables:
            for _, column, *_ in database.execute(f"PRAGMA table_info({table})").fetchall():
                database.execute(
                    f"UPDATE {table} SET {column} = replace({column}, ?, ?)"
                    f" WHERE typeof({column}) = 'text' AND instr({column}, ?)",
                    (MADE_IN, folder, MADE_IN),
                )
