"""Files: atomic replacement, safe reading, durable folders and digests."""

from __future__ import annotations

import hashlib
import os
import secrets
import stat
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


class NotRegularFile(ValueError):
    """Found a FIFO, socket, device or folder instead of a file."""


def read_regular_file(path: Path, limit: int | None = None) -> bytes:
    """Read a regular file; refuse anything that could block or never end.

    Opening a FIFO waits for its writer, so the file is opened without blocking and checked before it is read.

    Parameters
    ----------
    limit
        Largest size in bytes; None: any.

    Raises
    ------
    NotRegularFile
        It is a FIFO, a socket, a device or a folder.
    ValueError
        It is larger than `limit`.
    OSError
        It cannot be read.
    """
    if not stat.S_ISREG(path.stat().st_mode):  # to open a device may have effects, and a socket cannot be opened
        raise NotRegularFile("not a regular file")
    with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as file:  # noqa: PTH123 # a descriptor
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise NotRegularFile("not a regular file")
        content = file.read() if limit is None else file.read(limit + 1)
    if limit is not None and len(content) > limit:
        raise ValueError(f"larger than {limit} bytes")
    return content


def access_denied(error: PermissionError) -> str:
    """Name the file that may not be read, and the user who must be allowed to read it."""
    return f"{error.filename}: permission denied; user {os.geteuid()} must be allowed to read it"


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
    """Return the permission bits that this process withholds from new files."""
    mask = os.umask(0o077)  # there is no way to read it without setting it
    os.umask(mask)
    return mask
