"""Show the progress of a search: a bar on a terminal, a line now and then in a log."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from optuna.trial import FrozenTrial
from tqdm import tqdm

_SECONDS_BETWEEN_LINES = 10
"""In a log file."""


@contextmanager
def progress_bar(total: int, finished: list[FrozenTrial]) -> Iterator[Callable[[FrozenTrial], None]]:
    """Show a bar on stderr; yields a function to call with each trial that finishes."""
    interval = 0.1 if sys.stderr.isatty() else _SECONDS_BETWEEN_LINES
    values = [trial.value for trial in finished if trial.value is not None]
    with tqdm(total=total, initial=len(finished), desc="trials", unit="trial", mininterval=interval) as bar:

        def show(trial: FrozenTrial) -> None:
            if trial.value is not None:
                values.append(trial.value)
            if values:
                bar.set_postfix_str(f"best log loss {min(values):.4f}", refresh=False)
            bar.update()

        yield show
