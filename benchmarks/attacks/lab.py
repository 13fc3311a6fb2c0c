"""What attacks work on: registries, machines, stores and servers, made when the first attack asks for them."""

from __future__ import annotations

import io
import itertools
import os
import random
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.core.contract.schema import Schema
from tests.testkit import DATA, PROJECT
from tests.testkit.projects import changed_conf

if TYPE_CHECKING:
    import pandas as pd

    from pipeline.core.promoted import Promotion
    from tests.testkit.registry import Command, Machine
    from tests.testkit.servers import Server
    from tests.testkit.store import Store


@dataclass(frozen=True)
class Counts:
    """How often the attacks try whose number can be chosen."""

    kills: int = 100
    races: int = 50
    corruptions: int = 200
    body_seconds: float = 30
    seed: int = 0


class Lab:
    """The place of all attacks of one run.

    Parameters
    ----------
    folder
        Everything is kept below it; its caller removes it.
    counts
        How often to try.
    """

    def __init__(self, folder: Path, counts: Counts) -> None:
        self._folder = folder
        self._numbers = itertools.count()
        self.counts = counts

    def folder(self) -> Path:
        """Make a new folder."""
        path = self._folder / f"{next(self._numbers)}"
        path.mkdir()
        return path

    def random(self) -> random.Random:
        """Give each attack the same random numbers, whichever others run."""
        return random.Random(self.counts.seed)

    @cached_property
    def schema(self) -> Schema:
        """The shipped contract."""
        return Schema.load(PROJECT / "conf/schema.yaml")

    @cached_property
    def applications(self) -> pd.DataFrame:
        """The shipped data, validated."""
        from pipeline.tables.labelled import ingest

        return ingest(DATA, self.schema).frame

    @cached_property
    def rows(self) -> list[dict[str, Any]]:
        """The shipped data as request bodies."""
        from tests.testkit.store import rows_of

        return rows_of(self.applications, self.schema)

    # Promotion: a registry, and machines that promote from it.

    @cached_property
    def registry(self) -> Path:
        """SQLite file of a tracking store that holds the versions of `tests.testkit.registry`."""
        from tests.testkit.registry import make_registry

        with redirect_stderr(io.StringIO()):  # MLflow tells of each version
            return make_registry(self.folder(), self.schema, self.applications)

    @cached_property
    def _first_promoted(self) -> Machine:
        from tests.testkit.registry import GOOD, new_machine

        machine = new_machine(self.folder(), self.registry)
        done(machine, "promote", "--version", str(GOOD))
        return machine

    def machine(self) -> Machine:
        """A machine on which the first good version is promoted."""
        return self._first_promoted.copy(self.folder())

    # Serving: a store filled in milliseconds, and servers over it.

    @cached_property
    def _filled(self) -> tuple[Path, dict[int, Promotion]]:
        from tests.testkit.store import fill_store

        home = self.folder()
        return home, fill_store(home, self.applications, self.schema, self.rows[:20])

    @contextmanager
    def store(self) -> Iterator[Store]:
        """A store with two versions, of which the first is promoted; ``$BENTOML_HOME`` names it."""
        from tests.testkit.store import Store

        source, promotions = self._filled
        home = self.folder() / "bentoml"
        shutil.copytree(source, home)
        with environment(BENTOML_HOME=str(home)):
            store = Store(promotions)
            store.promote(1)
            yield store

    @contextmanager
    def serving(self, *arguments: str, ready: str = "/readyz", keys: str = "", **changes: Any) -> Iterator[Server]:
        """Run the service over the store of ``$BENTOML_HOME``; `changes` are keys of ``conf/serve.yaml``."""
        from tests.testkit.store import serving

        conf = changed_conf(self.folder(), **changes)
        variables = {"CREDIT_RISK_CONF": str(conf), "CREDIT_RISK_API_KEYS": keys}
        with serving(*arguments, ready=ready, environment=variables) as server:
            yield server


@contextmanager
def environment(**variables: str) -> Iterator[None]:
    """Set variables until the block ends."""
    before = dict(os.environ)
    os.environ.update(variables)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


_BURNT = 0.3
"""Seconds of processor time that show how busy the cores are; the scheduler favours what runs for less."""


def slowdown() -> float:
    """How many times its processor time something takes here now: 1 if a core is free.

    Limits in seconds are multiplied by it: on a busy machine all takes longer, and no promise is broken by that.
    """
    began, cpu = time.perf_counter(), time.process_time()
    while time.process_time() < cpu + _BURNT:
        pass
    return max(1.0, (time.perf_counter() - began) / _BURNT)


def done(machine: Machine, *arguments: str) -> Command:
    """Run a command that an attack needs; it must succeed."""
    command = machine.run(*arguments)
    if command.code != 0:
        raise RuntimeError(f"{' '.join(arguments)}: exit {command.code}: {command.err}")
    return command


def one_line(command: Command) -> bool:
    """Whether a command was refused as it should be: exit 1, one line of error and no traceback."""
    return command.code == 1 and len(command.err.splitlines()) == 1 and command.err.startswith("error: ")
