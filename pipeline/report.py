"""The outcome of a command, for people and for programs."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Report:
    """Outcome of one command.

    Attributes
    ----------
    text
        For people, on stdout.
    data
        The same for programs: the one JSON object of ``--json``.
    failure
        Why the command did not do what was asked (exit code 1); None if it did.
    """

    text: str
    data: dict[str, Any] = field(default_factory=dict)
    failure: str | None = None
