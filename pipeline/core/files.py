"""Files: atomic replacement, durable folders and digests."""

from __future__ import annotations

import hashlib
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Write a file so that a reader, after any crash, sees the old one or the new one, whole.

    Yields a path beside `path` to write to. When the block ends, that file is flushed to the disk and renamed over
    `path`; when the block raises, it is removed and `path` is left as it was. Its mode is the umask's, so that a
    service which runs as another user can read it.
    """
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        yield temporary
        flush(temporary)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    flush(path.parent)


def replace_file(path: Path, content: bytes) -> None:
    """Replace a file's content atomically and durably; its folder is made if it is absent."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary:
        temporary.write_bytes(content)


def flush(path: Path) -> None:
    """Flush a file, or a folder's entries, to the disk, so that it survives a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256(content: bytes) -> str:
    """Sha256 of some bytes: 64 hex digits."""
    return hashlib.sha256(content).hexdigest()


def file_digests(folder: Path) -> dict[str, str]:
    """Sha256 of every file below a folder, by its relative path."""
    return {
        path.relative_to(folder).as_posix(): sha256(path.read_bytes())
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def umask() -> int:
    """The bits that this process leaves out of the modes of new files."""
    mask = os.umask(0o077)  # there is no way to read it without setting it
    os.umask(mask)
    return mask
