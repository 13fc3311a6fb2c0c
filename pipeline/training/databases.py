"""Tell SQLite databases from others, and make them quick enough to write each trial to."""

from __future__ import annotations

import sqlite3
from pathlib import Path

from sqlalchemy import Engine, event, make_url
from sqlalchemy.exc import ArgumentError


def sqlite_path(address: str) -> Path | None:
    """File behind a SQLAlchemy address; None if it is not SQLite."""
    prefix = "sqlite:///"
    return Path(address.removeprefix(prefix)) if address.startswith(prefix) else None


def shown_address(address: str) -> str:
    """SQLAlchemy address without the password that it may hold."""
    try:
        return make_url(address).render_as_string(hide_password=True)
    except ArgumentError:
        return "(not an address)"


def use_wal(path: Path) -> None:
    """Let SQLite append to a log: a commit then costs a tenth, and readers do not block the writer."""
    connection = sqlite3.connect(path)
    connection.execute("PRAGMA journal_mode=wal")
    connection.close()


def spare_the_disk(engine: Engine) -> None:
    """Let SQLite leave a commit to the system: a killed process loses nothing, a power cut the last trial."""

    @event.listens_for(engine, "connect")
    def set_synchronous(connection: sqlite3.Connection, _: object) -> None:
        connection.execute("PRAGMA synchronous=normal")

    engine.dispose()  # connections that were opened before this
