"""The transaction by which another version becomes the promoted one, and the recovery from one that was killed.

A promotion prepares without the lock: it asks MLflow, stages the version and judges it. Then, under the lock and
without waiting for anything outside this machine: check that nobody promoted meanwhile → rename the version into
the store → pointer → history → ``latest`` → prune. The pointer's rename is the moment at which the new version
counts. Whatever is killed before it leaves the old version promoted and rubbish on the workbench; whatever is
killed after it leaves the new version promoted and steps to complete. The next command does either by itself: see
`_recover`. MLflow's alias follows after the lock is released.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from pipeline.core.errors import PipelineError, PromotionRefused, StoreError
from pipeline.core.files import NotRegularFile, read_regular_file
from pipeline.core.machine import now, whoami
from pipeline.core.promoted import Promotion, pointer_path, promotions, read_pointer, version_home
from pipeline.promotion import store_folders
from pipeline.promotion.failpoint import failpoint
from pipeline.promotion.lock import promotion_lock
from pipeline.promotion.pointer import is_settled, reconcile, write_pointer
from pipeline.promotion.settings import PromoteSettings

if TYPE_CHECKING:
    from pipeline.promotion.staging import Stored
    from pipeline.registry.client import ModelVersion


@contextlib.contextmanager
def changing(settings: PromoteSettings) -> Iterator[None]:
    """Hold the lock, and complete what an earlier command left undone.

    Nothing in the block may wait for MLflow, or for anything else outside this machine: a rollback must not wait.

    Raises
    ------
    PromotionRefused
        Another command held the lock for too long.
    StoreError
        The disk is full, or a permission is missing.
    """
    with store_folders.writing(), promotion_lock(settings.lock_seconds):
        _recover()
        failpoint("after-lock")
        yield


def pointer_state() -> bytes | None:
    """Content of the promoted pointer's file, by which `require_unmoved` sees any change; None: no such file."""
    try:
        return read_regular_file(pointer_path())
    except FileNotFoundError:
        return None
    except NotRegularFile:  # the next promotion replaces it
        return b""


def require_unmoved(seen: bytes | None) -> None:
    """Discard the verdict if another command has promoted since; call it while holding the lock.

    Raises
    ------
    PromotionRefused
        The pointer is not the one that was seen.
    """
    if pointer_state() != seen:
        present = last_known()
        raise PromotionRefused(
            f"{present.tag if present else 'another version'} was promoted while this command was judging, so its "
            "verdict no longer holds. Nothing was changed; run it again"
        )


def last_known() -> Promotion | None:
    """What is promoted; the last known if the pointer is damaged; None if nothing is."""
    try:
        return read_pointer()
    except StoreError:
        return next(iter(promotions()), None)


def enter(
    version: ModelVersion, stored: Stored, why: str, *, replaces: ModelVersion | None, forced: bool = False
) -> Promotion:
    """Put a staged version into the store and move the pointer to it.

    `replaces` is the champion that MLflow names.
    """
    failpoint("after-verify")
    if stored.folder != version_home(stored.tag):
        store_folders.install(stored.folder, stored.tag)
    facts = {"tag": stored.tag, "version": version.number, "run_id": version.run_id}
    target = Promotion.model_validate({**_origin(why), **facts, "digests": dict(stored.digests)})
    return move_to(target, why, forced=forced, replaces=[replaces.number] if replaces else [])


def move_to(target: Promotion, why: str, *, forced: bool = False, replaces: list[int] | None = None) -> Promotion:
    """Move the pointer to a version that is in the store.

    `replaces` is what MLflow's alias names; None: MLflow was not asked, so what it may name is taken from here.
    """
    promotion = _succeed(target, why, forced=forced, replaces=replaces)
    store_folders.share(version_home(promotion.tag))
    write_pointer(promotion)
    failpoint("after-history")
    return promotion


def complete(promotion: Promotion, settings: PromoteSettings) -> list[str]:
    """Do on this machine what follows the pointer; return notes on what is left to the next command.

    The promotion counts already: nothing here may undo it.
    """
    notes: list[str] = []
    with noting(notes, "the next command completes it"):
        reconcile()
    failpoint("after-latest")
    with noting(notes, "the next promotion tries again"):
        order = [one.tag for one in promotions()]
        removed = store_folders.prune(settings.keep, order, [promotion.tag, promotion.previous])
        notes += [f"removed {tag} (keep: {settings.keep})" for tag in removed]
    failpoint("after-prune")
    return notes


@contextlib.contextmanager
def noting(notes: list[str], cure: str) -> Iterator[None]:
    """Turn a failure into a note."""
    try:
        yield
    except (PipelineError, OSError) as error:
        notes.append(f"{error}; {cure}")


def _recover() -> None:
    """Finish or clean up what a killed command left on this machine. Idempotent."""
    with contextlib.suppress(StoreError):  # a damaged pointer is replaced by the next promotion, not repaired
        promoted = read_pointer()
        if promoted:
            store_folders.restore(promoted.tag, promoted.digests)
        reconcile()
    store_folders.clear()


def _succeed(target: Promotion, why: str, *, forced: bool, replaces: list[int] | None) -> Promotion:
    """Make the promotion that follows the present one."""
    current = last_known()
    changes: dict[str, Any] = {**_origin(why), "forced": forced, "previous": None, "replaces": replaces or []}
    if current:
        changes["previous"] = current.previous if current.tag == target.tag else current.tag
    if current and replaces is None:
        # This machine's last word; if that never reached MLflow, also what came before it.
        changes["replaces"] = [current.version, *([] if is_settled(current) else current.replaces)]
    return target.model_copy(update=changes)


def _origin(why: str) -> dict[str, Any]:
    return {"since": now(), "by": whoami(), "why": why}
