"""What an attack is, and what came of it."""

from __future__ import annotations

import signal
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from benchmarks.attacks.lab import Lab

_SHOWN = 3
"""Broken tries that are described; the rest is only counted."""


class Skipped(Exception):
    """The attack cannot be made here; the message says what is missing."""


@dataclass
class Tally:
    """What an attack has counted so far.

    Attributes
    ----------
    held, broken
        Tries that left the promise whole, and descriptions of those that did not.
    notes
        Figures worth showing.
    """

    held: int = 0
    broken: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def tried(self) -> int:
        """All tries."""
        return self.held + len(self.broken)

    def count(self, held: object, what: str) -> None:
        """Count one try; `what` describes it in case it broke the promise."""
        if held:
            self.held += 1
        else:
            self.broken.append(what)

    def add(self, other: Tally) -> None:
        """Add what another process has counted."""
        self.held += other.held
        self.broken += other.broken

    def note(self, text: str) -> None:
        """Add a figure to the attack's line."""
        self.notes.append(text)


@dataclass(frozen=True)
class Attack:
    """One way to break a promise.

    Attributes
    ----------
    name
        For ``--only``.
    promise
        What must hold, in one sentence.
    run
        Makes the tries and counts them.
    seconds
        After which it is ended and counts as broken, by this process's alarm. None: it may take any time.
    """

    name: str
    promise: str
    run: Callable[[Lab, Tally], None]
    seconds: float | None = 600

    def outcome(self, lab: Lab) -> Outcome:
        """Run it. Whatever it raises counts as broken: an attack that fails has shown nothing."""
        tally, skipped = Tally(), ""
        began = time.monotonic()
        try:
            with _at_most(self.seconds):
                self.run(lab, tally)
        except Skipped as error:
            skipped = str(error)
        except Exception as error:
            place = traceback.extract_tb(error.__traceback__)[-1]
            tally.broken.append(f"ended by {type(error).__name__} in {place.name}, line {place.lineno}: {error}")
        return Outcome(self.name, tally, time.monotonic() - began, skipped)


@dataclass(frozen=True)
class Outcome:
    """What came of an attack; `skipped` says why it was not made."""

    name: str
    tally: Tally
    seconds: float
    skipped: str

    @property
    def is_broken(self) -> bool:
        """Whether a promise did not hold, or nothing was tried."""
        return not self.skipped and (bool(self.tally.broken) or not self.tally.tried)

    def __str__(self) -> str:
        if self.skipped:
            return f"{self.name:<16} skipped: {self.skipped}"
        counts = f"{self.tally.tried:>6} tried {self.tally.held:>6} held {len(self.tally.broken):>4} broken"
        lines = [f"{self.name:<16}{counts}  {self.seconds:5.0f} s  {'; '.join(self.tally.notes)}".rstrip()]
        lines += [f"    broken: {' '.join(what.split())[:500]}" for what in self.tally.broken[:_SHOWN]]
        return "\n".join(lines)


@contextmanager
def _at_most(seconds: float | None) -> Iterator[None]:
    if seconds is None:
        yield
        return

    def end(*_: object) -> None:
        raise TimeoutError(f"not done after {seconds:g} s")

    before = signal.signal(signal.SIGALRM, end)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
