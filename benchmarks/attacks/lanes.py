"""Several machines attacked at once, each from a process of its own: one promotion does not fill two cores."""

from __future__ import annotations

import itertools
import multiprocessing
import os
import random
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from benchmarks.attacks.lab import Lab
    from tests.testkit.registry import Machine

ResultT = TypeVar("ResultT")

_LANES = 2


@dataclass(frozen=True)
class Lane:
    """The part of an attack's tries that one process makes: iterate over their numbers."""

    first: int
    last: int
    seed: int

    def __iter__(self) -> Iterator[int]:
        return iter(range(self.first, self.last))

    def random(self) -> random.Random:
        """Random numbers of this lane's own."""
        return random.Random(self.seed + self.first)


def in_lanes(work: Callable[[Machine, Lane], ResultT], lab: Lab, count: int) -> list[ResultT]:
    """Share `count` tries among processes, each with a machine of its own; gives what each returned."""
    bounds = [count * number // _LANES for number in range(_LANES + 1)]
    lanes = [Lane(first, last, lab.counts.seed) for first, last in itertools.pairwise(bounds)]
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(_LANES, mp_context=spawn, initializer=_end_with_parent) as pool:
        futures = [pool.submit(work, lab.machine(), lane) for lane in lanes if lane.last > lane.first]
        try:
            return [future.result() for future in futures]
        except BaseException:
            for process in multiprocessing.active_children():  # the block would wait for the end of the lanes
                process.kill()
            raise


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None

    def end() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=end, daemon=True).start()
