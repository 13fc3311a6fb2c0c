from __future__ import annotations

import asyncio
from collections.abc import Sequence

import pytest

from service.answering.batcher import MicroBatcher

pytestmark = pytest.mark.anyio


class Doubler:
    """Answers each number with its double, and remembers which came together."""

    def __init__(self) -> None:
        self.batches: list[list[int]] = []

    def __call__(self, numbers: Sequence[int]) -> list[int]:
        self.batches.append(list(numbers))
        return [2 * number for number in numbers]


async def test_what_arrives_in_one_turn_is_answered_in_one_call_and_in_order() -> None:
    doubler = Doubler()
    batcher = MicroBatcher(doubler, limit=64)
    assert await asyncio.gather(*(batcher.submit(number) for number in range(10))) == [*range(0, 20, 2)]
    assert doubler.batches == [[*range(10)]]


async def test_who_comes_while_others_still_come_joins_them() -> None:
    doubler = Doubler()
    batcher = MicroBatcher(doubler, limit=64)

    async def come_in_the_next_turn() -> int:
        return await batcher.submit(3)

    late = asyncio.create_task(come_in_the_next_turn())
    assert list(await asyncio.gather(batcher.submit(1), batcher.submit(2))) == [2, 4]
    assert await late == 6
    assert doubler.batches == [[1, 2, 3]]


async def test_a_lone_request_is_not_kept_waiting() -> None:
    batcher = MicroBatcher(Doubler(), limit=64)
    assert await asyncio.wait_for(batcher.submit(4), timeout=1) == 8


async def test_a_batch_never_exceeds_its_limit() -> None:
    doubler = Doubler()
    batcher = MicroBatcher(doubler, limit=4)
    answers = await asyncio.gather(*(batcher.submit(number) for number in range(10)))
    assert answers == [*range(0, 20, 2)]
    assert [len(batch) for batch in doubler.batches] == [4, 4, 2]


async def test_a_failure_reaches_every_request_of_its_batch_and_no_other() -> None:
    def fail_on_three(numbers: Sequence[int]) -> Sequence[int]:
        if 3 in numbers:
            raise ValueError("three")
        return numbers

    batcher = MicroBatcher(fail_on_three, limit=64)
    results = await asyncio.gather(batcher.submit(3), batcher.submit(4), return_exceptions=True)
    assert all(isinstance(result, ValueError) for result in results)
    assert await batcher.submit(5) == 5


async def test_a_client_that_left_does_not_harm_its_neighbours() -> None:
    batcher = MicroBatcher(Doubler(), limit=64)
    left, stays = batcher.submit(1), batcher.submit(2)
    left.cancel()
    assert await stays == 4
    with pytest.raises(asyncio.CancelledError):
        await left
