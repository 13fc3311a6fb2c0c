"""Install, set aside, restore and remove the folders of stored versions, each by one rename."""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import secrets
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from pipeline.core.errors import StoreError
from pipeline.core.files import file_digests, flush, umask
from pipeline.core.promoted import MODEL_NAME, model_home, version_home
from pipeline.promotion.failpoint import failpoint
from pipeline.promotion.lock import work_home


@contextlib.contextmanager
def writing() -> Iterator[None]:
    """Turn disk errors into one readable line.

    Raises
    ------
    StoreError
        The disk is full, or a permission is missing.
    """
    try:
        yield
    except OSError as error:
        place = f" ({error.filename})" if error.filename else ""
        raise StoreError(
            f"cannot write to the store: {error.strerror or error}{place}. The promoted version has not changed. "
            "Free space or correct the permissions, then run the command again"
        ) from error


@contextlib.contextmanager
def workbench() -> Iterator[Path]:
    """Make an empty folder on the store's filesystem, outside the store, and remove it afterwards.

    Several commands may have one each. If a process is killed, nobody holds its lock file, and the next command
    removes its folder.
    """
    with writing(), _workbench(_benches()) as bench:
        yield bench


@contextlib.contextmanager
def _workbench(benches: Path) -> Iterator[Path]:
    benches.mkdir(parents=True, exist_ok=True)
    bench = benches / f"bench-{secrets.token_hex(4)}"
    unlocked, lock = bench.with_suffix(".new"), bench.with_suffix(".lock")
    with unlocked.open("wb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        unlocked.rename(lock)  # under this name others look for it, and find it locked
        try:
            bench.mkdir()
            yield bench
        finally:
            shutil.rmtree(bench, ignore_errors=True)
            lock.unlink(missing_ok=True)


def clear() -> None:
    """Remove what was set aside, and the workbenches of killed commands; call it while holding the lock."""
    shutil.rmtree(_aside(), ignore_errors=True)
    for lock in _benches().glob("bench-*.lock"):
        with contextlib.suppress(FileNotFoundError), lock.open("rb") as file, contextlib.suppress(BlockingIOError):
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(lock.with_suffix(""), ignore_errors=True)
            lock.unlink()


def is_intact(tag: str, digests: Mapping[str, str]) -> bool:
    """Whether a stored version has exactly the bytes that were promoted; nothing is interpreted."""
    return file_digests(version_home(tag)) == dict(digests)


def install(folder: Path, tag: str) -> None:
    """Move a staged version into the store by one rename, all of it flushed to the disk first.

    A folder of the same tag that is there already is put aside; `restore` brings it back if this process is
    killed before the pointer says that the new one counts.
    """
    target = version_home(tag)
    share(folder)
    for path in folder.rglob("*"):
        flush(path)
    flush(folder)
    target.parent.mkdir(parents=True, exist_ok=True)
    if target.exists():
        _put_aside(tag)
        failpoint("after-aside")
    os.replace(folder, target)
    flush(target.parent)
    failpoint("after-rename")


def share(folder: Path) -> None:
    """Set the modes of a version by the umask, so that a service of another user can read it.

    BentoML makes its folders private to their owner.
    """
    mask = umask()
    for path in [folder, *folder.rglob("*")]:
        mode = (0o777 if path.is_dir() else 0o666) & ~mask
        if path.stat().st_mode & 0o777 != mode:
            path.chmod(mode)


def restore(tag: str, digests: Mapping[str, str]) -> None:
    """Bring back the promoted version that a killed command had put aside."""
    kept, target = _aside() / version_home(tag).name, version_home(tag)
    if not kept.is_dir() or file_digests(kept) != dict(digests) or is_intact(tag, digests):
        return
    shutil.rmtree(target, ignore_errors=True)
    os.replace(kept, target)
    flush(target.parent)


def prune(keep: int, order: Sequence[str], protected: Sequence[str | None]) -> list[str]:
    """Remove the versions promoted longest ago, beyond `keep` of them.

    Parameters
    ----------
    order
        Tags, last promoted first. A version that is not among them was never promoted here, and goes first.
    protected
        Tags that stay in any case.

    Returns
    -------
    list
        Tags removed.
    """
    rank = {tag: position for position, tag in enumerate(dict.fromkeys([*protected, *order]))}
    stored = sorted(_stored_tags(), key=lambda tag: rank.get(tag, len(rank)))
    removed = [tag for tag in stored[keep:] if tag not in protected]
    for tag in removed:
        # Whole or gone: a half-removed folder would break every listing of the store.
        _put_aside(tag)
    shutil.rmtree(_aside(), ignore_errors=True)
    return removed


def _benches() -> Path:
    return work_home() / "staging"


def _aside() -> Path:
    return work_home() / "aside"


def _put_aside(tag: str) -> None:
    _aside().mkdir(parents=True, exist_ok=True)
    os.replace(version_home(tag), _aside() / version_home(tag).name)


def _stored_tags() -> list[str]:
    if not model_home().is_dir():
        return []
    names = [path.name for path in model_home().iterdir() if path.is_dir() and re.fullmatch(r"v\d+", path.name)]
    return [f"{MODEL_NAME}:{name}" for name in sorted(names, key=lambda name: -int(name[1:]))]
