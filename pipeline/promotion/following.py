"""The sync command: make this machine follow MLflow's champion, once or forever."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from pipeline.core.errors import PipelineError, TrackingError, first_line
from pipeline.core.machine import now
from pipeline.core.promoted import read_pointer
from pipeline.promotion.alias import settle_earlier
from pipeline.promotion.candidates import is_same
from pipeline.promotion.commands import bring_in
from pipeline.promotion.lock import is_held_here
from pipeline.promotion.outcome import moved, promotion_data, unchanged
from pipeline.promotion.request import SyncRequest
from pipeline.promotion.settings import PromoteSettings
from pipeline.promotion.store_folders import is_intact
from pipeline.promotion.transaction import changing, last_known, pointer_state
from pipeline.registry import client
from pipeline.report import Report


def sync(request: SyncRequest) -> Report:
    """Bring MLflow's ``champion`` into this machine's store and promote it, once or until a signal ends it.

    Raises
    ------
    PipelineError
        MLflow cannot be asked, or its champion cannot be stored; what was promoted still is.
    """
    settings = PromoteSettings.load(request.settings_file)
    if request.watch is None:
        return _follow(settings)
    return _watch(settings, request.watch)


def _follow(settings: PromoteSettings) -> Report:
    """One round."""
    with changing(settings):
        seen, current = pointer_state(), last_known()
    settle_earlier()
    named = client.by_alias(client.CHAMPION)
    if named is None:
        raise TrackingError("MLflow names no champion yet; promote a version first")
    if current and is_same(current, named) and is_intact(current.tag, current.digests):
        return unchanged(current, f"{current.tag} is MLflow's champion and promoted here")
    promotion, notes = bring_in(named, "sync", seen, settings)
    return moved("followed MLflow's champion:", promotion, notes)


def _watch(settings: PromoteSettings, seconds: float) -> Report:
    """Follow until SIGINT or SIGTERM. A failure is reported once, and the round is tried again."""
    stop = threading.Event()
    shown = ""
    while not stop.is_set():
        with _ending_at_a_signal(stop):
            shown = _show(_round(settings), shown)
            stop.wait(seconds)
    current = read_pointer()
    return Report("stopped following", promotion_data(current, changed=False) if current else {"promoted": None})


def _round(settings: PromoteSettings) -> str:
    try:
        return first_line_of(_follow(settings))
    except PipelineError as error:
        return f"error: {error}"
    except Exception as error:  # whatever a server sends: the next round asks again
        return f"error: {type(error).__name__}: {first_line(error)}"


def first_line_of(report: Report) -> str:
    """The first line of what a command says."""
    return report.text.partition("\n")[0]


class _Stopped(BaseException):
    """A signal ended a round that was waiting."""


@contextmanager
def _ending_at_a_signal(stop: threading.Event) -> Iterator[None]:
    """Let SIGINT and SIGTERM interrupt any waiting, but never a change of the store."""

    def end(*_: object) -> None:
        stop.set()
        if not is_held_here():
            raise _Stopped

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, end)
    try:
        yield
    except _Stopped:
        pass
    finally:
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda *_: stop.set())


def _show(line: str, shown: str) -> str:
    if line != shown:
        sys.stderr.write(f"{now()} {line}\n")
        sys.stderr.flush()
    return line
